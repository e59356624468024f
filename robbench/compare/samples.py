"""Reference runs, sample by sample: what a run folder holds, as one compact Parquet file that can be committed.

A row is one sample under one cell: id, label, margin (of a flow: bits/dim) before and after, verdict, the component
that broke it, the step at which it did, model calls, size of the perturbation. The Parquet metadata holds everything
a cell depends on (the attack with all parameters, hashes of models and flows) and the history: who wrote what and why
is in the file itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from robbench.compare.keys import Key
from robbench.core.errors import UserError
from robbench.core.resources import write_atomically
from robbench.core.schema import Strict, parse_json, validate
from robbench.specs import SHA256, ResolvedAttack
from robbench.store.columns import LEDGER_COLUMNS, list_columns
from robbench.store.ledger import unify_robust
from robbench.store.records import CellResult, Run

if TYPE_CHECKING:
    import pandas as pd

KEY = b"robbench.reference"
SUFFIX = ".parquet"
_NARROW = {pa.int64(): pa.int32(), pa.float64(): pa.float32()}
_OF_FLOWS = {"robust": True, "broken_by": "", "step": -1}  # what attacks on flows have no column for


def _reference_schema() -> pa.Schema:
    """The columns of the ledger that reference runs keep, between the cell's number and the size of the perturbation
    in the attack's norm. No null may be in those that reference runs always had."""
    fields = {
        column.reference: pa.field(
            column.reference,
            column.type if column.kind == "key" else _NARROW.get(column.type, column.type),
            nullable=column.since > 1,
        )
        for column in list_columns()
        if column.reference
    }
    first, last = pa.field("cell", pa.int32(), nullable=False), pa.field("size", pa.float32(), nullable=False)
    return pa.schema([first, *fields.values(), last])


SAMPLES = _reference_schema()
COLUMNS = tuple(SAMPLES.names[1:])


class CellIdentity(Strict):
    """What the rows of a cell depend on.

    Attributes:
        model: its name.
        attack: with every number filled in.
        model_hash: `ModelCard.function_hash`.
        flow_sha256: of the flow that the attack searches through; "" without one.
        engine: recorded and shown, not compared: what it did is.
        precision: in which verdicts are computed.
        search_precision: in which the attack searches.
    """

    model: str
    attack: ResolvedAttack
    model_hash: SHA256
    flow_sha256: str
    engine: str
    precision: str
    search_precision: str

    @property
    def key(self) -> Key:
        """What the cell corresponds to in another run."""
        return Key(self.model, self.attack.label)

    @property
    def components(self) -> tuple[str, ...]:
        """Parts of an ensemble in the order they are tried; of any other attack its own name."""
        return tuple(self.attack.parameters.get("components") or (self.attack.name,))


class Entry(Strict):
    """One writing of a reference file. changes: which cells are new, changed or gone, in a line."""

    date: str
    reason: str
    changes: str


class Identity(Strict):
    """What all rows of a reference depend on.

    Attributes:
        schema_version: of the file's metadata.
        dataset, dataset_revision, seed, n: which samples.
        versions: of the libraries that wrote the rows; not compared.
        cells: in the order of the column `cell`.
        history: every writing of the file, the first one first.
    """

    schema_version: Literal[1] = 1
    dataset: str
    dataset_revision: SHA256
    seed: int
    n: int
    versions: dict[str, str]
    cells: tuple[CellIdentity, ...]
    history: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class CellSamples:
    """A cell and its rows (`COLUMNS`), sorted by sample id. problem: why there are no complete rows, else ""."""

    identity: CellIdentity
    rows: "pd.DataFrame"
    problem: str = ""
    failed: bool = False


@dataclass(frozen=True)
class Samples:
    """A run, or a reference run, sample by sample. cells: by model and label of the attack."""

    path: Path
    identity: Identity
    cells: dict[Key, CellSamples]


def of_run(run: Run) -> Samples:
    """A run folder's cells. Rows before pandas' defaults: flows have robust True and broken_by ""."""
    cells = [_of_cell(run, result) for result in run.cells]
    identity = Identity(
        dataset=run.dataset,
        dataset_revision=run.dataset_revision,
        seed=run.seed,
        n=run.n,
        versions=run.versions,
        cells=tuple(cell.identity for cell in cells),
    )
    return Samples(run.folder, identity, {cell.identity.key: cell for cell in cells})


def _of_cell(run: Run, result: CellResult) -> CellSamples:
    cell, rows = result.cell, result.rows
    identity = CellIdentity(
        model=cell.model,
        attack=cell.attack,
        model_hash=run.cards[cell.model].function_hash,
        flow_sha256=cell.attack_flow.sha256 if cell.attack_flow else "",
        engine=cell.engine,
        precision=cell.precision,
        search_precision=cell.search_precision,
    )
    problem = ""
    if cell.status == "failed":
        problem = f"failed: {cell.error or 'no reason recorded'}"
    elif len(rows) < run.n:
        problem = f"{len(rows)} of {run.n} samples done"
    return CellSamples(identity, _rows(identity, rows), problem, cell.status == "failed")


def _rows(identity: CellIdentity, rows: "pd.DataFrame") -> "pd.DataFrame":
    import pandas as pd

    norm = identity.attack.norm if identity.attack.norm != "none" else "l2"
    kept = {c.reference: rows[c.name] for c in LEDGER_COLUMNS[identity.attack.target] if c.reference}
    values = {**_OF_FLOWS, **kept, "size": rows[norm]}
    frame = pd.DataFrame({name: values.get(name) for name in COLUMNS}, index=rows.index)
    for field in (SAMPLES.field(name) for name in COLUMNS):
        if pa.types.is_string(field.type):
            frame[field.name] = frame[field.name].fillna("").astype(str)
        elif not field.nullable:
            frame[field.name] = frame[field.name].astype(field.type.to_pandas_dtype())
    return frame.reset_index(drop=True)


def write_reference(samples: Samples, path: Path, reason: str) -> Entry:
    """Write `samples` to `path` atomically, keeping the history of a file that is there; returns the new entry.

    `UserError` for a run with failed or incomplete cells, and for a file that is no reference.
    """
    bad = [f"{key.model} x {key.attack} ({c.problem})" for key, c in samples.cells.items() if c.problem]
    if bad:
        raise UserError(
            f"{samples.path} is no reference: {len(bad)} cells are incomplete, first {bad[0]}; complete the run"
        )
    if path.suffix != SUFFIX:
        raise UserError(
            f"--write-reference {str(path)!r}: a reference run is a Parquet file; name it *{SUFFIX}"
        )
    before = read_samples(path) if path.exists() else None
    entry = Entry(date=date.today().isoformat(), reason=reason, changes=_changes(before, samples))
    history = (*(before.identity.history if before else ()), entry)
    identity = samples.identity.model_copy(update={"history": history})
    _write(path, identity, [samples.cells[cell.key] for cell in identity.cells])
    return entry


def _write(path: Path, identity: Identity, cells: Sequence[CellSamples]) -> None:
    import pandas as pd

    frame = pd.concat([cell.rows.assign(cell=number) for number, cell in enumerate(cells)])
    table = pa.Table.from_pandas(frame[["cell", *COLUMNS]], SAMPLES, preserve_index=False)
    table = table.replace_schema_metadata({KEY: identity.model_dump_json().encode()})

    def save(temporary: Path) -> None:
        with temporary.open("wb") as stream:
            pq.write_table(table, stream, compression="zstd", compression_level=19, write_page_checksum=True)

    write_atomically(path, save)


def _changes(before: Samples | None, now: Samples) -> str:
    """ "3 new, 2 changed, 1 gone" of the cells; "the same rows"."""
    if before is None:
        return f"{len(now.cells)} cells, n = {now.identity.n}"
    new = now.cells.keys() - before.cells.keys()
    gone = before.cells.keys() - now.cells.keys()
    changed = [
        key for key in now.cells.keys() & before.cells.keys() if _differs(before.cells[key], now.cells[key])
    ]
    counts = (("new", len(new)), ("changed", len(changed)), ("gone", len(gone)))
    return ", ".join(f"{count} cells {what}" for what, count in counts if count) or "the same rows"


def _differs(one: CellSamples, other: CellSamples) -> bool:
    ignored = {"engine"}
    same = one.identity.model_dump(exclude=ignored) == other.identity.model_dump(exclude=ignored)
    return not (same and one.rows.equals(other.rows))


def read_samples(path: Path) -> Samples:
    """A reference file; `UserError` for anything else."""
    again = "write it again: robbench check RUN --write-reference FILE"
    try:
        with pa.OSFile(str(path)) as stream:
            table = pq.read_table(stream, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        why = " ".join(str(error).split())[:120]
        raise UserError(f"--against {str(path)!r} cannot be read as Parquet ({why}); {again}") from error
    stored, table = (table.schema.metadata or {}).get(KEY), _complete(table)
    if stored is None or not table.schema.equals(SAMPLES, check_metadata=False):
        raise UserError(f"--against {str(path)!r} is Parquet, but no reference run; {again}")
    try:
        content = parse_json(stored)
    except ValueError as error:
        raise UserError(f"--against {str(path)!r} has damaged metadata ({error}); {again}") from error
    identity = validate(content, Identity, str(path))
    frame = table.replace_schema_metadata(None).to_pandas()
    parts = {int(number): part for number, part in frame.groupby("cell")}
    if sorted(parts) != list(range(len(identity.cells))):
        raise UserError(f"--against {str(path)!r} has other cells than its metadata says; {again}")
    if frame.duplicated(["cell", "sample_id"]).any():
        raise UserError(f"--against {str(path)!r} has samples twice; {again}")
    cells = [
        CellSamples(
            cell,
            unify_robust(
                cell.attack, parts[number][list(COLUMNS)].reset_index(drop=True), margin="before", step="step"
            ),
        )
        for number, cell in enumerate(identity.cells)
    ]
    return Samples(path, identity, {cell.identity.key: cell for cell in cells})


def _complete(table: pa.Table) -> pa.Table:
    """The table with nulls in the columns that are newer than its file."""
    for place, field in enumerate(SAMPLES):
        if field.nullable and field.name not in table.column_names:
            table = table.add_column(place, field, pa.nulls(len(table), field.type))
    return table
