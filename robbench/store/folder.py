"""Opening an output folder: which run it contains, whether it can be written, and its lock."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from robbench.core.errors import UserError, spell_argument
from robbench.core.locks import TABLE, LockHeldError, file_lock, holding_processes
from robbench.data.card import CARD_FILE
from robbench.store.ledger import LOCK_FILE, RUN_FILE, Ledger
from robbench.store.records import RunFile


def check_folder(folder: Path, run: RunFile, fresh: bool) -> None:
    """`UserError` when `folder` cannot take this run. Reads only.

    Accepted: an absent or empty folder, the same run, and with `fresh` another run of robbench (moved aside later).
    Never accepted: a folder with other content, which `fresh` must not move.
    """
    check_not_foreign(folder)
    if not (folder / RUN_FILE).exists():
        return
    try:
        existing = Ledger(folder).read_run(edited=True)  # run.yaml is written again
    except UserError as error:
        if fresh:
            return
        raise UserError(
            f"{error}; give another {spell_argument('out')}, or {spell_argument('fresh', True)} to put all of it aside"
        ) from error
    differences = existing.differences(run) if existing else []
    if differences and not fresh:
        raise UserError(
            f"{_spell(folder)} holds another run ({'; '.join(differences)}); give another {spell_argument('out')}, or "
            f"{spell_argument('fresh', True)} to put it aside"
        )


def check_not_foreign(folder: Path) -> None:
    """`UserError` when `folder` is a file or contains something else than a run. Reads only."""
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{_spell(folder)} is a file; give a folder")
        foreign = foreign_content(folder)
    except OSError as error:
        raise _unusable(folder, error) from error
    if foreign:
        raise UserError(
            f"{_spell(folder)} holds something else ({', '.join(foreign[:3])}) and no {RUN_FILE}; "
            f"give another {spell_argument('out')}"
        )


def foreign_content(folder: Path) -> list[str]:
    """Names in a folder without run.yaml that no run left there; empty for a run folder and an absent one."""
    content = [path.name for path in folder.iterdir()] if folder.exists() else []
    if RUN_FILE in content:
        return []
    return sorted(name for name in content if name != LOCK_FILE and not _is_leftover(name))


def _is_leftover(name: str) -> bool:
    """A file of a run killed before its run.yaml was in place."""
    return name.endswith(".tmp") or name in ("cards", "cells", CARD_FILE)


@contextmanager
def open_ledger(folder: Path, run: RunFile, fresh: bool) -> Iterator[Ledger]:
    """The ledger of `folder`, locked against other writers; with `fresh` earlier results are moved aside."""
    check_folder(folder, run, fresh)
    with lock_folder(folder, f"or give another {spell_argument('out')}"):
        check_folder(folder, run, fresh)
        ledger = Ledger(folder)
        if fresh:
            _put_aside(ledger, run)
        yield ledger


@contextmanager
def lock_folder(folder: Path, otherwise: str, argument: str = "") -> Iterator[None]:
    """Inside, hold the lock of `folder`, which is created if absent. `UserError` when another process has it.

    otherwise: what the user can do besides waiting. argument: the one that names the folder; "" for the output's.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(file_lock(folder / LOCK_FILE))
        except LockHeldError as error:
            raise UserError(
                f"another robbench run is writing to {str(folder)!r}{error.process}; wait for it, {otherwise}"
            ) from error
        except OSError as error:
            raise _unusable(folder, error, argument) from error
        yield


def lock_is_held(folder: Path, locks: Path = TABLE) -> bool | None:
    """Whether a process of this machine holds the lock of `folder`; None where the system does not report it."""
    holders = holding_processes(folder / LOCK_FILE, locks)
    return None if holders is None else bool(holders)


def _put_aside(ledger: Ledger, run: RunFile) -> None:
    try:
        existing = ledger.read_run(edited=True)
        another = existing is not None and bool(existing.differences(run))
    except UserError:  # a damaged run.yaml may be of any run
        existing, another = None, True
    if another:
        keep = (LOCK_FILE,)
        entries = [path for path in sorted(ledger.folder.iterdir()) if path.name not in keep]
        ledger.supersede([path for path in entries if not path.name.startswith("superseded-")])
    elif existing is not None:
        ledger.supersede([ledger.cell_folder(entry.hash) for entry in run.cells])


def _spell(folder: Path) -> str:
    return spell_argument("out", repr(str(folder)))


def _unusable(folder: Path, error: OSError, argument: str = "") -> UserError:
    named = f"{argument} {str(folder)!r}" if argument else _spell(folder)
    return UserError(f"{named} cannot be written ({error.strerror}); give a folder that you may write to")
