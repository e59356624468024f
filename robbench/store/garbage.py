"""What a run folder holds that its last plan does not need, and removing it.

Only files that robbench itself writes, under the names it gives them, are ever removed; links are not followed, and
whatever else lies there is named and left alone.
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
YOUNG_SECONDS = (
    3600.0  # a temporary file of less age may be one that `report` or `fid`, which take no lock, just write
)

_SHARD, _CELL, _NAME = r"shard-\d{4,}-[0-9a-f]{8}\.parquet", r"[0-9a-f]{16}", r"[A-Za-z0-9][A-Za-z0-9._-]*"
_RUN_CONTENT = "|".join(
    (
        r"run\.yaml",
        r"card\.yaml",
        r"originals(-\d+)?\.npz",
        rf"cards/{_NAME}\.yaml",
        rf"cells/{_CELL}/(cell\.json|{_SHARD})",
        rf"frechet/({_CELL}|clean)-[0-9a-f]{{8}}\.json",
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
    """Something nothing needs.

    Attributes:
        kind: what sort of thing it is.
        path: the file, or the folder around `files`.
        bytes: how many are freed.
        what: what it is, in words.
        files: what is removed.
        ids: of an "original" the sample ids whose images stay in the file, which is written anew.
    """

    kind: Kind
    path: Path
    bytes: int
    what: str
    files: tuple[Path, ...] = ()
    ids: frozenset[int] = frozenset()


@dataclass(frozen=True)
class LeftAlone:
    """Something that lies where garbage would, and why it stays."""

    path: Path
    reason: str


@dataclass
class Collection:
    """What was found in one place: a run folder, or the cache."""

    place: Path
    garbage: list[Garbage] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.garbage)

    def add(self, kind: Kind, path: Path, files: Sequence[Path], what: str) -> None:
        self.garbage.append(Garbage(kind, path, sum(map(_size, files)), what, tuple(files)))

    def leave(self, path: Path, reason: str) -> None:
        self.left_alone.append(LeftAlone(path, reason))


def remove(collection: Collection) -> None:
    """Remove the garbage of a collection; of folders only those that are empty then. The caller holds the lock."""
    for item in collection.garbage:
        if item.kind == "original":
            Ledger(item.path.parent).keep_originals(item.ids)
        for file in reversed(item.files):  # cell.json last: a cell half removed by a killed gc is one still
            file.unlink(missing_ok=True)
        if item.path.is_dir():
            _remove_empty(item.path)


def _remove_empty(folder: Path) -> None:
    """A folder and those in it, as far as they hold no file."""
    for inner in [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]:
        _remove_empty(inner)
    if not any(folder.iterdir()):
        folder.rmdir()


def _size(path: Path) -> int:
    return path.lstat().st_size


def files_below(folder: Path) -> list[Path]:
    """Everything in a folder and below that is no plain folder, sorted; links are not followed."""
    found: list[Path] = []
    for path in sorted(folder.iterdir()) if folder.is_dir() and not folder.is_symlink() else []:
        found += files_below(path) if path.is_dir() and not path.is_symlink() else [path]
    return found


# ------------------------------------------------------------------------------------------------- a run folder
def garbage_of_run(folder: Path) -> Collection:
    """What the last plan of a run folder does not need. `UserError` for a folder that is no run."""
    run = Ledger(folder).require_run()
    found = Collection(folder)
    _cells(found, run)
    _distances(found, run)
    _cards(found, run)
    _originals(found, run)
    _put_aside(found)
    own = [folder / name for name in ("cards", FRECHET_FOLDER, "published", "cells")]
    inner = sorted((folder / "cells").glob("*")) if not (folder / "cells").is_symlink() else []
    add_temporaries(found, [folder, *(path for path in (*own, *inner) if not path.is_symlink())])
    return found


def _entries(found: Collection, name: str, pattern: str) -> list[Path]:
    """What lies in a folder of the run, sorted; nothing of a link's, which may be another run's too."""
    folder = found.place / name
    if folder.is_symlink():
        found.leave(folder, "is a link; what it leads to may belong to another run")
        return []
    return sorted(folder.glob(pattern))


def _cells(found: Collection, run: RunFile) -> None:
    """Cells that the plan does not name, with their shards."""
    planned = {entry.hash[:16] for entry in run.cells}
    for cell in (cell for cell in _entries(found, "cells", "*") if cell.name not in planned):
        with _left_alone(found, cell):
            record, files = _orphan(cell)
            shards, name = len(files) - 1, f"{record.model} x {record.attack.label}"
            noun = "shard" if shards == 1 else "shards"
            what = f"{name}, {shards} {noun}, {record.seconds:.1f} s of computing; the last plan does not name it"
            found.add("cell", cell, files, what)


@contextmanager
def _left_alone(found: Collection, path: Path) -> Iterator[None]:
    """Inside, a `UserError` is the reason why `path` stays."""
    try:
        yield
    except UserError as error:
        found.leave(path, str(error))


def _orphan(cell: Path) -> tuple[CellRecord, list[Path]]:
    """Record and files of a cell folder in which nothing is strange; `UserError` with the reason otherwise."""
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
    """`NewerLedgerError` for a shard that this robbench does not understand; a damaged one it does."""
    if path.name != CELL_FILE:
        try:
            read_shard(path, cell)
        except BadShardError:
            return


def _distances(found: Collection, run: RunFile) -> None:
    """Fréchet distances of cells that the plan does not name."""
    planned = {None, *(entry.hash for entry in run.cells)}
    for path in _entries(found, FRECHET_FOLDER, "*.json"):
        with _left_alone(found, path):
            record = read_record(path)
            if record.cell not in planned and not path.is_symlink():
                name = f"{record.extractor} of {record.model} x {record.attack}"
                found.add("distance", path, [path], f"{name}, which the last plan does not name")


def _cards(found: Collection, run: RunFile) -> None:
    """Cards of models that the plan does not name."""
    for path in _entries(found, "cards", "*.yaml"):
        if path.stem not in run.models and not path.is_symlink():
            with _left_alone(found, path):
                name = load_yaml(path, ModelCard).name
                found.add("card", path, [path], f"card of {name}, which the last plan does not name")


def _originals(found: Collection, run: RunFile) -> None:
    """Clean images of samples no adversarial image of the plan's cells is kept of."""
    ledger, path = Ledger(found.place), found.place / ORIGINALS_FILE
    if path.is_symlink():
        return
    with _left_alone(found, path):
        stored = frozenset(ledger.originals())
        needed = _referenced(ledger, run) if stored else stored
        if idle := stored - needed:
            share = _size(path) * len(idle) // len(stored)
            what = f"{len(idle)} of {len(stored)} clean images whose adversarial ones are gone or of no planned cell"
            found.garbage.append(Garbage("original", path, share, what, ids=stored & needed))


def _referenced(ledger: Ledger, run: RunFile) -> frozenset[int]:
    """Samples whose adversarial image a planned cell keeps; all of the plan's as long as a cell is incomplete."""
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


def _put_aside(found: Collection) -> None:
    """quarantine/ and every superseded-<k>/."""
    _known_content(
        found,
        found.place / "quarantine",
        "quarantine",
        re.compile(_QUARANTINED),
        "damaged files, computed again since",
    )
    for folder in sorted(found.place.glob("superseded-*")):
        if re.fullmatch(r"superseded-\d+", folder.name):
            what = "results put aside by --fresh, or because a block was computed again"
            _known_content(found, folder, "superseded", _SUPERSEDED, what)


def _known_content(found: Collection, folder: Path, kind: Kind, known: re.Pattern[str], what: str) -> None:
    """The files of a folder whose names robbench gives; the others stay, and so does the folder then."""
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
    """What a write that was killed left behind."""
    for path in (path for folder in folders for path in sorted(folder.glob(".*.tmp"))):
        if path.is_symlink() or not path.is_file() or not TEMPORARY.fullmatch(path.name):
            found.leave(path, "robbench did not write it")
        elif time.time() - path.stat().st_mtime < YOUNG_SECONDS:
            found.leave(path, "is less than an hour old: something may be writing it")
        else:
            found.add("temporary", path, [path], "half a file that a killed process left")
