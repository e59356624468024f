"""Files in a run folder that its last plan does not need, and their removal.

Only files that robbench writes, under its own names, are removed; links are not followed, and other files are reported
and stay.
"""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from robbench.cards import ModelCard
from robbench.core.errors import UserError
from robbench.core.schema import load_yaml
from robbench.store.frechet_records import FRECHET_FOLDER, read_record
from robbench.store.ledger import CELL_FILE, ORIGINALS_FILE, Ledger, refuse_shard
from robbench.store.record_files import read_json_record
from robbench.store.records import CellRecord, RunFile
from robbench.store.shards import BadShardError, read_shard

Kind = Literal["cell", "distance", "card", "original", "quarantine", "superseded", "temporary", "cache"]
YOUNG_SECONDS = 3600.0  # a younger temporary file may be in use by `report` or `fid`, which take no lock

_SHARD, _CELL, _NAME = r"shard-\d{4,}-[0-9a-f]{8}\.parquet", r"[0-9a-f]{16}", r"[A-Za-z0-9][A-Za-z0-9._-]*"
_RUN_CONTENT = "|".join(
    (
        r"run\.yaml",
        r"card\.yaml",
        r"originals(-\d+)?\.npz",
        rf"cards/{_NAME}\.yaml",
        rf"cells/{_CELL}/(cell\.json|{_SHARD})",
        rf"frechet/({_CELL}|clean)-[0-9a-f]{{8}}\.json",
        rf"figures/{_NAME}\.(json|csv|svg)",
        r"leaderboard(-wide)?\.(csv|html|md)",
        r"likelihood\.csv",
        rf"published/{_NAME}\.(html|csv|md)",
    )
)
_QUARANTINED = rf"{_CELL}-shard-\d{{4,}}-[0-9a-f]{{8}}(-\d+)?\.parquet|originals(-\d+)?\.npz"
_SUPERSEDED = re.compile(rf"{_RUN_CONTENT}|quarantine/({_QUARANTINED})")
TEMPORARY = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.tmp")


@dataclass(frozen=True)
class Garbage:
    """Something that can be removed.

    Attributes:
        kind: of garbage.
        path: the file, or the folder around `files`.
        bytes: freed by the removal.
        what: description for people.
        files: removed.
        ids: for an "original", the sample ids whose images stay in the file, which is written again.
    """

    kind: Kind
    path: Path
    bytes: int
    what: str
    files: tuple[Path, ...] = ()
    ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class LeftAlone:
    """A file or folder that stays, and the reason."""

    path: Path
    reason: str


@dataclass
class Collection:
    """The garbage of one place, a run folder or the cache."""

    place: Path
    garbage: list[Garbage] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of all garbage."""
        return sum(item.bytes for item in self.garbage)

    def add(self, kind: Kind, path: Path, files: Sequence[Path], what: str) -> None:
        """Add `files` as garbage."""
        self.garbage.append(Garbage(kind, path, sum(map(_size, files)), what, tuple(files)))

    def leave(self, path: Path, reason: str) -> None:
        """Report `path` as staying."""
        self.left_alone.append(LeftAlone(path, reason))


def remove(collection: Collection) -> None:
    """Remove the garbage of a collection, and folders that are empty then. The caller holds the lock."""
    for item in collection.garbage:
        if item.kind == "original":
            Ledger(item.path.parent).keep_originals(item.ids)
        for file in reversed(item.files):  # cell.json last, so that a half removed cell is still recognised
            file.unlink(missing_ok=True)
        if item.path.is_dir():
            _remove_empty(item.path)


def _remove_empty(folder: Path) -> None:
    """Remove a folder and its subfolders as far as they contain no file."""
    for inner in [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]:
        _remove_empty(inner)
    if not any(folder.iterdir()):
        folder.rmdir()


def _size(path: Path) -> int:
    return path.lstat().st_size


def files_below(folder: Path) -> list[Path]:
    """All files and links below a folder, sorted; links are not followed."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []:
        found += files_below(path) if path.is_dir() and not path.is_symlink() else [path]
    return found


def find_garbage(folder: Path) -> Collection:
    """The garbage of a run folder: what its last plan does not need. `UserError` for a folder that is not a run."""
    run = Ledger(folder).require_run()
    found = Collection(folder)
    _add_cells(found, run)
    _add_distances(found, run)
    _add_cards(found, run)
    _add_originals(found, run)
    _add_put_aside(found)
    own = [folder / name for name in ("cards", FRECHET_FOLDER, "published", "cells")]
    inner = sorted((folder / "cells").glob("*")) if not (folder / "cells").is_symlink() else []
    add_temporaries(found, [folder, *(path for path in (*own, *inner) if not path.is_symlink())])
    return found


def _entries(found: Collection, name: str, pattern: str) -> list[Path]:
    """Entries of a folder of the run, sorted; none of a link, which may lead to another run."""
    folder = found.place / name
    if folder.is_symlink():
        found.leave(folder, "is a link; what it leads to may belong to another run")
        return []
    return sorted(folder.glob(pattern))


def _add_cells(found: Collection, run: RunFile) -> None:
    """Add cells that are not in the plan, with their shards."""
    planned = {entry.hash[:16] for entry in run.cells}
    for cell in (cell for cell in _entries(found, "cells", "*") if cell.name not in planned):
        with _leave_on_error(found, cell):
            record, files = _orphan(cell)
            shards, name = len(files) - 1, f"{record.model} x {record.attack.label}"
            noun = "shard" if shards == 1 else "shards"
            what = f"{name}, {shards} {noun}, {record.seconds:.1f} s of computing; the last plan does not name it"
            found.add("cell", cell, files, what)


@contextmanager
def _leave_on_error(found: Collection, path: Path) -> Iterator[None]:
    """Inside, a `UserError` becomes the reason why `path` stays."""
    try:
        yield
    except UserError as error:
        found.leave(path, str(error))


def _orphan(cell: Path) -> tuple[CellRecord, list[Path]]:
    """Record and files of a cell folder; `UserError` with the reason where it contains anything else."""
    if cell.is_symlink() or not cell.is_dir() or not re.fullmatch(_CELL, cell.name):
        raise UserError("is no cell folder")
    files = [path for path in files_below(cell) if not TEMPORARY.fullmatch(path.name)]
    strange = [path for path in files if path.is_symlink() or not _is_of_cell(path.relative_to(cell))]
    if strange:
        raise UserError(f"holds {strange[0].relative_to(cell)}, which robbench did not write")
    if not (cell / CELL_FILE).is_file():
        raise UserError(f"has no {CELL_FILE}")
    record = read_json_record(cell / CELL_FILE, CellRecord, "look at it first")
    if record.hash[:16] != cell.name:
        raise UserError(f"has the {CELL_FILE} of another cell")
    for path in files:
        _refuse_newer(path, record.hash)
    return record, files


def _is_of_cell(path: Path) -> bool:
    return re.fullmatch(rf"cell\.json|{_SHARD}", path.as_posix()) is not None


def _refuse_newer(path: Path, cell: str) -> None:
    """`NewerLedgerError` for a shard that a newer robbench wrote; damaged ones are accepted."""
    if path.name != CELL_FILE:
        try:
            read_shard(path, cell)
        except BadShardError:
            return


def _add_distances(found: Collection, run: RunFile) -> None:
    """Add Fréchet distances of cells that are not in the plan."""
    planned = {None, *(entry.hash for entry in run.cells)}
    for path in _entries(found, FRECHET_FOLDER, "*.json"):
        with _leave_on_error(found, path):
            record = read_record(path)
            if record.cell not in planned and not path.is_symlink():
                name = f"{record.extractor} of {record.model} x {record.attack}"
                found.add("distance", path, [path], f"{name}, which the last plan does not name")


def _add_cards(found: Collection, run: RunFile) -> None:
    """Add cards of models that are not in the plan."""
    for path in _entries(found, "cards", "*.yaml"):
        if path.stem not in run.models and not path.is_symlink():
            with _leave_on_error(found, path):
                name = load_yaml(path, ModelCard).name
                found.add("card", path, [path], f"card of {name}, which the last plan does not name")


def _add_originals(found: Collection, run: RunFile) -> None:
    """Add clean images of samples of which no cell of the plan keeps an adversarial image."""
    ledger, path = Ledger(found.place), found.place / ORIGINALS_FILE
    if path.is_symlink():
        return
    with _leave_on_error(found, path):
        stored = frozenset(ledger.originals())
        needed = _find_referenced(ledger, run) if stored else stored
        if idle := stored - needed:
            share = _size(path) * len(idle) // len(stored)
            what = f"{len(idle)} of {len(stored)} clean images whose adversarial ones are gone or of no planned cell"
            found.garbage.append(Garbage("original", path, share, what, ids=stored & needed))


def _find_referenced(ledger: Ledger, run: RunFile) -> frozenset[int]:
    """Samples whose adversarial image a planned cell keeps; all requested ones while a cell is incomplete."""
    requested, ids = frozenset(run.sample_ids), set[int]()
    for entry in run.cells:
        done: set[int] = set()
        for shard in ledger.shards(entry.hash, refuse_shard):
            done.update(shard.ids)
            kept = shard.table["example"].is_valid().to_pylist()
            ids.update(i for i, is_kept in zip(shard.ids, kept, strict=True) if is_kept)
        if not requested <= done:
            ids |= requested
    return frozenset(ids)


def _add_put_aside(found: Collection) -> None:
    """Add quarantine/ and every superseded-<k>/."""
    _add_known_files(
        found,
        found.place / "quarantine",
        "quarantine",
        re.compile(_QUARANTINED),
        "damaged files, computed again since",
    )
    for folder in sorted(found.place.glob("superseded-*")):
        if re.fullmatch(r"superseded-\d+", folder.name):
            what = "results put aside by --fresh, or because a block was computed again"
            _add_known_files(found, folder, "superseded", _SUPERSEDED, what)


def _add_known_files(found: Collection, folder: Path, kind: Kind, known: re.Pattern[str], what: str) -> None:
    """Add the files of a folder that have names of robbench; others stay."""
    files = files_below(folder)
    good = [path for path in files if not path.is_symlink() and _is_known(path.relative_to(folder), known)]
    for path in files:
        if path not in good:
            found.leave(path, "robbench did not write it")
    if good:
        found.add(kind, folder, good, f"{len(good)} files: {what}")


def _is_known(path: Path, known: re.Pattern[str]) -> bool:
    temporary = TEMPORARY.fullmatch(path.name)
    name = path.with_name(temporary["name"]) if temporary else path
    return known.fullmatch(name.as_posix()) is not None


def add_temporaries(found: Collection, folders: Iterable[Path]) -> None:
    """Add temporary files of killed writes."""
    for path in (path for folder in folders for path in sorted(folder.glob(".*.tmp"))):
        if path.is_symlink() or not path.is_file() or not TEMPORARY.fullmatch(path.name):
            found.leave(path, "robbench did not write it")
        elif time.time() - path.stat().st_mtime < YOUNG_SECONDS:
            found.leave(path, "is less than an hour old: something may be writing it")
        else:
            found.add("temporary", path, [path], "half a file that a killed process left")
