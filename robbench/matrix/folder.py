"""Taking possession of an output folder: whose run is in it, may we write, is nobody else writing."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from robbench.errors import UserError
from robbench.matrix.ledger import LOCK_FILE, RUN_FILE, Ledger
from robbench.matrix.records import RunFile


def check_folder(folder: Path, run: RunFile, fresh: bool) -> None:
    """`UserError` when `folder` cannot take this run. Reads only.

    Accepted: an absent or empty folder, the same run, and with `fresh` another run of robbench (put aside
    later). Never accepted: a folder with other content, which `fresh` must not move.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--out {str(folder)!r} is a file; give a folder")
        content = [path.name for path in folder.iterdir()] if folder.exists() else []
    except OSError as error:
        raise _unusable(folder, error) from error
    if RUN_FILE not in content:
        foreign = sorted(name for name in content if name != LOCK_FILE and not _is_leftover(name))
        if foreign:
            raise UserError(
                f"--out {str(folder)!r} holds something else ({', '.join(foreign[:3])}) and no {RUN_FILE}; "
                f"give another --out"
            )
        return
    try:
        existing = Ledger(folder).read_run()
    except UserError as error:
        if fresh:
            return
        raise UserError(f"{error}; give another --out, or --fresh to put all of it aside") from error
    differences = existing.differences(run) if existing else []
    if differences and not fresh:
        raise UserError(
            f"--out {str(folder)!r} holds another run ({'; '.join(differences)}); "
            f"give another --out, or --fresh to put it aside"
        )


def _is_leftover(name: str) -> bool:
    """A temporary file of a run killed before its run.yaml was in place."""
    return name.endswith(".tmp") or name in ("cards", "cells")


@contextmanager
def opened(folder: Path, run: RunFile, fresh: bool) -> Iterator[Ledger]:
    """The ledger of `folder`, locked against a second writer, with superseded results put aside."""
    check_folder(folder, run, fresh)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / LOCK_FILE).open("w")
    except OSError as error:
        raise _unusable(folder, error) from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another robbench run is writing to {str(folder)!r}; wait for it, or give another --out"
            ) from error
        check_folder(folder, run, fresh)
        ledger = Ledger(folder)
        if fresh:
            _put_aside(ledger, run)
        yield ledger


def _put_aside(ledger: Ledger, run: RunFile) -> None:
    try:
        existing = ledger.read_run()
        another = existing is not None and bool(existing.differences(run))
    except UserError:  # a damaged run.yaml: nobody knows whose run this was
        existing, another = None, True
    if another:
        keep = (LOCK_FILE,)
        entries = [path for path in sorted(ledger.folder.iterdir()) if path.name not in keep]
        ledger.supersede([path for path in entries if not path.name.startswith("superseded-")])
    elif existing is not None:
        ledger.supersede([ledger.cell_folder(entry.hash) for entry in run.cells])


def _unusable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"--out {str(folder)!r} cannot be written ({error.strerror}); give a folder that you may write to"
    )
