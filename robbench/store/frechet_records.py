"""RUN/frechet/*.json: one Fréchet distance per (cell, feature extractor), as typed records. No torch here."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from robbench.core.schema import Strict, canonical_hash
from robbench.specs import SHA256
from robbench.store.ledger import Ledger
from robbench.store.record_files import RECORD_VERSION, read_json_record, write_json_record
from robbench.store.records import RunFile

FRECHET_FOLDER, CLEAN = "frechet", "clean"
NEXT_STEP = "run robbench fid again"


class FrechetRecord(Strict):
    """Fréchet distance between the images of a cell and the training images of its data set, or why there is none.

    Attributes:
        schema_version: of the record file.
        status: "ok" with a value, "not run" without one.
        cell: hash of the cell; None for the clean images of the same samples, the floor to compare with.
        model: name of the attacked model; None for the clean images.
        attack: label of the attack; "clean" for the clean images.
        extractor: "FID", or "frechet[...]" for features that are not FID's.
        extractor_sha256: sha256 of the extractor's weights.
        extractor_hash: hash of everything that its features depend on.
        dataset: name of the data set.
        dataset_revision: its revision.
        reference_split: the split that the reference images are from.
        reference_n: number of reference images.
        n: number of images scored.
        samples_sha256: hash of the sample ids (`samples_hash`).
        key: hash of everything that the value depends on; None without a value.
        value: the distance; None without one.
        notes: remarks on the value, one line each.
        reason: why there is no value, and what to do; "" with one.
        versions: of the libraries that computed it.
    """

    schema_version: Literal[1, 2] = RECORD_VERSION
    status: Literal["ok", "not run"]
    cell: SHA256 | None
    model: str | None
    attack: str
    extractor: str
    extractor_sha256: SHA256
    extractor_hash: SHA256
    dataset: str
    dataset_revision: SHA256
    reference_split: str
    reference_n: int
    n: int
    samples_sha256: SHA256
    key: SHA256 | None = None
    value: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    notes: tuple[str, ...] = ()
    reason: str = ""
    versions: dict[str, str]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        complete = self.value is not None and self.key is not None and not self.reason
        absent = self.value is None and self.key is None and bool(self.reason)
        if not (complete if self.status == "ok" else absent):
            raise ValueError(f"status {self.status!r} fits neither its value, its key nor its reason")
        return self

    def without_value(self, reason: str) -> "FrechetRecord":
        """The same cell and extractor, not run for `reason`."""
        changes = {"status": "not run", "value": None, "key": None, "notes": (), "reason": reason}
        return self.model_copy(update=changes)


def samples_hash(ids: Iterable[int]) -> str:
    """Hash of a set of sample ids."""
    return canonical_hash(sorted(ids))


def record_path(folder: Path, cell: str | None, extractor_hash: str) -> Path:
    """Path of the record of a cell (None for the clean images) and an extractor."""
    return folder / FRECHET_FOLDER / f"{cell[:16] if cell else CLEAN}-{extractor_hash[:8]}.json"


def write_record(folder: Path, record: FrechetRecord) -> None:
    """Store `record` in a run folder, atomically."""
    write_json_record(record_path(folder, record.cell, record.extractor_hash), record)


def read_record(path: Path) -> FrechetRecord:
    """One stored record; `UserError` when the file is damaged."""
    return read_json_record(path, FrechetRecord, f"remove it and {NEXT_STEP}")


def load_frechet(run_folder: Path) -> list[FrechetRecord]:
    """Distances of the last plan of a run folder: for each extractor the clean images, then every cell in plan order.
    Empty when `robbench fid` never ran.

    A cell that was not scored, or scored for other samples than the plan's, has status "not run" with the reason.
    Raises `UserError` for a folder that is not a run and for a damaged record.
    """
    run = Ledger(run_folder).require_run()
    stored = [read_record(path) for path in sorted((run_folder / FRECHET_FOLDER).glob("*.json"))]
    extractors: dict[str, list[FrechetRecord]] = {}
    for record in sorted(stored, key=lambda r: (r.extractor, r.extractor_hash)):
        extractors.setdefault(record.extractor_hash, []).append(record)
    return [record for found in extractors.values() for record in _in_plan_order(run, found)]


def _in_plan_order(run: RunFile, found: Sequence[FrechetRecord]) -> list[FrechetRecord]:
    """The records of one extractor in plan order, completed by "not run"."""
    by_cell = {record.cell: record for record in found}
    plan: list[tuple[str | None, str | None, str]] = [(None, None, CLEAN)]
    plan += [(entry.hash, entry.model, entry.attack) for entry in run.cells]
    requested = samples_hash(run.sample_ids)
    records = []
    for cell, model, attack in plan:
        record = by_cell.get(cell) or found[0].without_value(f"not scored yet; {NEXT_STEP}")
        if record.samples_sha256 != requested:
            record = record.without_value(f"scored for other samples than the run's {run.n}; {NEXT_STEP}")
        names = {"cell": cell, "model": model, "attack": attack, "n": run.n, "samples_sha256": requested}
        records.append(record.model_copy(update=names))
    return records
