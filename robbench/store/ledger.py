"""The ledger: one row per sample, one atomic Parquet file per shard (`store.shards`), cells addressed by hash.

run.yaml                                identity and last plan (`records.RunFile`)
cards/<model>.yaml                      the cards of the models of the plan
originals.npz                           clean images of the samples whose adversarial images are kept
cells/<hash16>/cell.json                `records.CellRecord`
cells/<hash16>/shard-<k>-<ids8>.parquet rows of block k; ids8 hashes the sample ids inside
frechet/<cell16|clean>-<extractor8>.json  Fréchet distances (`frechet_records.FrechetRecord`)
quarantine/                             damaged shards
superseded-<k>/                         results moved aside by `--fresh`
"""

import re
from collections.abc import Callable, Iterable, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from robbench.cards import ModelCard
from robbench.core.errors import UserError
from robbench.core.npz import read_npz
from robbench.core.resources import write_atomically, write_text_atomically
from robbench.core.schema import dump_yaml, load_yaml, read_yaml, validate, yaml_text
from robbench.specs import ResolvedAttack
from robbench.store.columns import Images
from robbench.store.record_files import (
    RECORD_VERSION,
    read_json_record,
    with_checksum,
    without_checksum,
    write_json_record,
)
from robbench.store.records import CellRecord, CellResult, Run, RunFile
from robbench.store.shards import (
    SCHEMAS,
    BadShardError,
    Shard,
    newer_ledger,
    read_shard,
    shard_name,
    write_shard,
)

if TYPE_CHECKING:
    import pandas as pd


_STATED_VERSION = re.compile(r'^ {0,2}"?schema_version"?: ([0-9]{1,9}),?$', re.MULTILINE)
_STATED_WRITER = re.compile(r"^ {2}robbench: '?([0-9A-Za-z.+-]{1,40})'?$", re.MULTILINE)
RUN_FILE, CELL_FILE, LOCK_FILE, ORIGINALS_FILE = "run.yaml", "cell.json", ".lock", "originals.npz"
_RESTORE = "run the same `robbench run` again to restore it"


def _check_record_version(path: Path) -> None:
    """`NewerLedgerError` for a run.yaml or cell.json of a newer schema, which may have unknown keys."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # reported when it is read
        return
    stated = _STATED_VERSION.search(text)
    if stated and int(stated[1]) > RECORD_VERSION:
        writer = _STATED_WRITER.search(text)
        raise newer_ledger(path, int(stated[1]), writer[1] if writer else "", RECORD_VERSION)


class Ledger:
    """Reads and writes one run folder. Creating the object writes nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def cell_folder(self, cell: str) -> Path:
        """The folder of the cell with hash `cell`."""
        return self.folder / "cells" / cell[:16]

    def read_run(self, edited: bool = False) -> RunFile | None:
        """run.yaml, or None without one. `UserError` when it is malformed, newer than this robbench, or (unless
        `edited`) changed after robbench wrote it."""
        path = self.folder / RUN_FILE
        if not path.exists():
            return None
        _check_record_version(path)
        content = without_checksum(path, read_yaml(path), _RESTORE, check=not edited)
        return validate(content, RunFile, str(path))

    def require_run(self) -> RunFile:
        """run.yaml; `UserError` for a folder that is not a run, and as `read_run`."""
        run = self.read_run() if self.folder.is_dir() else None
        if run is None:
            raise UserError(
                f"{str(self.folder)!r} is not a run folder (no {RUN_FILE}); give the --out of a `robbench run`"
            )
        return run

    def write_run(
        self, run: RunFile, cards: dict[str, ModelCard], records: Sequence[CellRecord] = ()
    ) -> None:
        """Write a plan: cards, cell.json of cells that have none, and last run.yaml, which makes it a run folder."""
        for record in records:
            if not (self.cell_folder(record.hash) / CELL_FILE).exists():
                self.write_cell(record)
        for name, card in cards.items():
            write_text_atomically(self.folder / "cards" / f"{name}.yaml", dump_yaml(card))
        write_text_atomically(self.folder / RUN_FILE, yaml_text(with_checksum(run)))

    def read_cell(self, cell: str, edited: bool = False) -> CellRecord | None:
        """cell.json of the cell with this hash, or None; `UserError` when it is malformed, of another cell, or (unless
        `edited`) changed after robbench wrote it."""
        path = self.cell_folder(cell) / CELL_FILE
        if not path.exists():
            return None
        _check_record_version(path)
        record = read_json_record(path, CellRecord, _RESTORE, check=not edited)
        if record.hash != cell:
            raise UserError(f"{path}: is the record of another cell; {_RESTORE}")
        return record

    def write_cell(self, record: CellRecord) -> None:
        """Write cell.json of a cell, atomically."""
        write_json_record(self.cell_folder(record.hash) / CELL_FILE, record)

    def originals(self) -> dict[int, Images]:
        """Stored clean images [C,H,W] in [0,1] by sample id; `UserError` when the file is damaged."""
        path = self.folder / ORIGINALS_FILE
        if not path.exists():
            return {}
        try:
            ids, images = read_npz(path, ("ids", "images")).values()
            if images.dtype != np.float32 or images.ndim != 4 or ids.dtype != np.int64 or ids.ndim != 1:
                raise ValueError(f"holds {images.dtype} {images.shape}, not float32 images")
            return {int(i): image for i, image in zip(ids, images, strict=True)}
        except (ValueError, OSError) as error:
            raise UserError(f"{path} cannot be read ({error}); {_RESTORE}") from error

    def add_originals(self, images: dict[int, Images], on_bad: Callable[[Path, str], None]) -> None:
        """Add clean images to the stored ones. `on_bad(path, reason)` must move a damaged file away, which is then
        written again."""
        path, shapes = self.folder / ORIGINALS_FILE, {image.shape for image in images.values()}
        try:
            stored = self.originals()
            if not shapes.issuperset(image.shape for image in stored.values()):
                raise UserError(f"{path} holds images of another shape")
        except UserError as error:
            on_bad(path, str(error).removeprefix(f"{path} ").removesuffix(f"; {_RESTORE}"))
            stored = {}
        if images.keys() <= stored.keys():
            return
        self._write_originals({**stored, **images})

    def keep_originals(self, ids: Set[int]) -> None:
        """Delete the stored clean images of all samples but `ids`."""
        kept = {i: image for i, image in self.originals().items() if i in ids}
        if kept:
            self._write_originals(kept)
        else:
            (self.folder / ORIGINALS_FILE).unlink(missing_ok=True)

    def _write_originals(self, images: dict[int, Images]) -> None:
        ids = np.array(sorted(images), dtype=np.int64)
        stack = np.stack([images[int(i)] for i in ids])

        def save(temporary: Path) -> None:
            with temporary.open("wb") as stream:
                np.savez_compressed(stream, ids=ids, images=stack)

        write_atomically(self.folder / ORIGINALS_FILE, save)

    def shards(
        self, cell: str, on_bad: Callable[[Path, str], None], known: frozenset[int] | None = None
    ) -> list[Shard]:
        """The intact shards of a cell in name order; calls `on_bad(path, reason)` for every damaged one.
        `NewerLedgerError` for a shard of a newer robbench, which must not be computed again.

        known: ids of the data set, where the caller knows them.
        """
        good: list[Shard] = []
        seen: set[int] = set()
        for path in sorted(self.cell_folder(cell).glob("shard-*.parquet")):
            try:
                shard = read_shard(path, cell, known)
                if not seen.isdisjoint(shard.ids):
                    raise BadShardError("repeats sample ids of another shard")
            except BadShardError as error:
                on_bad(path, str(error))
                continue
            seen.update(shard.ids)
            good.append(shard)
        return good

    def write_shard(
        self,
        cell: str,
        block: int,
        table: pa.Table,
        seconds: float,
        diagnostics: str = "{}",
        smallest: bool = False,
    ) -> None:
        """Write the rows of a block of a cell as a shard, see `shards.write_shard`."""
        path = self.cell_folder(cell) / shard_name(block, table["sample_id"].to_pylist())
        write_shard(path, table, cell, seconds, diagnostics, smallest)

    def quarantine(self, path: Path) -> Path:
        """Move a damaged file to quarantine/ under a free name; returns its new path."""
        folder = self.folder / "quarantine"
        folder.mkdir(exist_ok=True)
        place = f"{path.parent.name}-" if path.parent != self.folder else ""
        names = (f"{place}{path.stem}{suffix}{path.suffix}" for suffix in _suffixes())
        target = next(folder / name for name in names if not (folder / name).exists())
        return path.rename(target)

    def supersede(self, paths: Sequence[Path]) -> Path | None:
        """Move the existing ones of `paths` (in this folder) to a new superseded-<k>/; None when none exists."""
        present = [path for path in paths if path.exists()]
        if not present:
            return None
        names = (f"superseded-{k}" for k in range(1, 1_000_000))
        aside = next(self.folder / name for name in names if not (self.folder / name).exists())
        for path in present:
            target = aside / path.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        return aside


def _suffixes() -> Iterable[str]:
    yield ""
    for k in range(2, 1_000_000):
        yield f"-{k}"


def load_run(folder: Path) -> Run:
    """The last plan of a run folder with all its present rows. Reads only; needs no data set and no model.

    A cell with fewer rows than requested, or without a recorded end, has status "running". Raises `UserError` for a
    folder that is not a run and for a damaged shard.
    """
    ledger = Ledger(folder)
    run = ledger.require_run()
    requested = pa.array(sorted(run.sample_ids), pa.int64())
    cells = [
        _load_cell(ledger, entry.hash, entry.model, entry.defense, entry.attack, requested)
        for entry in run.cells
    ]
    cards = {name: _load_card(folder / "cards" / f"{name}.yaml") for name in run.models}
    return Run(
        folder=folder,
        dataset=run.dataset,
        dataset_revision=run.dataset_revision,
        seed=run.seed,
        n=run.n,
        shape=run.shape,
        class_names=run.class_names,
        sample_ids=tuple(run.sample_ids),
        cells=cells,
        cards=cards,
        versions=run.versions,
        data=run.data,
        note=run.note,
        options=run.options,
        given=run.given,
    )


def _load_card(path: Path) -> ModelCard:
    try:
        return load_yaml(path, ModelCard)
    except UserError as error:
        raise UserError(f"{error}; {_RESTORE}") from error


def _load_cell(
    ledger: Ledger, cell: str, model: str, defense: str, label: str, requested: pa.Array
) -> CellResult:
    record = ledger.read_cell(cell)
    if record is None:
        raise UserError(f"{ledger.cell_folder(cell) / CELL_FILE} of {model} x {label} is missing; {_RESTORE}")
    shards = ledger.shards(cell, refuse_shard)
    empty = SCHEMAS[record.kind].empty_table()
    table = pa.concat_tables([empty, *(s.table.replace_schema_metadata() for s in shards)])
    table = table.filter(pc.is_in(table["sample_id"], value_set=requested)).sort_by("sample_id")
    # A process that was killed before it wrote the end state has not checked its results.
    status = "running" if len(table) < len(requested) and record.status == "ok" else record.status
    changes = {
        "model": model,
        "defense": defense,
        "attack": record.attack.model_copy(update={"label": label}),
        "status": status,
        "seconds": sum(shard.seconds for shard in shards),
    }
    return CellResult(record.model_copy(update=changes), unify_robust(record.attack, table.to_pandas()))


def unify_robust(
    attack: ResolvedAttack, rows: "pd.DataFrame", margin: str = "clean_margin", step: str = "broken_at"
) -> "pd.DataFrame":
    """The rows with `robust` meaning right before and under attack, also of early cells on corrupted images, where it
    meant right on the corrupted image. margin, step: names of the columns of the clean margin and of the step."""
    if attack.space != "corruption":
        return rows
    wrong_before = rows["robust"] & ~(rows[margin] > 0)
    changes = {
        "robust": rows["robust"] & ~wrong_before,
        "broken_by": rows["broken_by"].mask(wrong_before, "clean"),
        step: rows[step].mask(wrong_before, 0),
    }
    return rows.assign(**changes)


def refuse_shard(path: Path, reason: str) -> None:
    """Raise `UserError` for a damaged shard, as `on_bad` when a run is read."""
    raise UserError(f"{path} {reason}; run the same `robbench run` again to quarantine and recompute it")
