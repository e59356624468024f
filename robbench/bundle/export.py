"""`robbench export`: a run folder as a bundle, compact and without loss.

The run is copied to a temporary run folder (the last plan only, one shard per cell, the chosen examples), read back and
packed; the manifest describes what was read back.
"""

import tempfile
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import is_zipfile

import pyarrow as pa
import pyarrow.compute as pc

from robbench.bundle.archive import check_parent, pack
from robbench.bundle.contents import run_identity
from robbench.bundle.examples import ExampleChoice
from robbench.bundle.manifest import BundleCell, ExampleShare, Manifest
from robbench.core.device import versions
from robbench.core.errors import UserError
from robbench.core.resources import write_text_atomically
from robbench.core.schema import canonical_hash, dump_yaml
from robbench.results.tables import leaderboard
from robbench.run.shard_work import sum_diagnostics
from robbench.specs import threat_models
from robbench.store.columns import Images, select_names
from robbench.store.folder import lock_is_held
from robbench.store.frechet_records import FRECHET_FOLDER, read_record, write_record
from robbench.store.ledger import ORIGINALS_FILE, Ledger, load_run, refuse_shard
from robbench.store.records import CellResult, Run, RunFile

# Columns and metrics in the digest of a table, the same in every version, so that later ones do not change old digests.
DIGESTED_COLUMNS = (
    "dataset", "model", "defense", "threat_model", "attack", "epsilon", "eta", "metric", "value", "lower", "upper",
    "unit", "n", "seed", "status", "model_sha256", "flow", "measure",
)  # fmt: skip
_BITS = ("bits_per_dim", "importance_weighted_bits_per_dim")
_SIZES = ("l2", "linf", "l2_all", "linf_all")
DIGESTED_METRICS = {
    *("accuracy", "robust_accuracy", "worst_case_accuracy", "average_accuracy", "corruption_accuracy"),
    *(f"{name}{suffix}" for name in _BITS for suffix in ("", "_median", "_before")),
    *("bits_per_dim_before_median", "bits_per_dim_after", "bits_per_dim_after_median"),
    *(f"{name}{suffix}" for name in _SIZES for suffix in ("", "_std")),
    *("fid", "frechet"),
}


@dataclass(frozen=True)
class ExportRequest:
    """Options of `robbench export`.

    Attributes:
        folder: the run folder.
        out: the bundle to write.
        examples: choice of the stored adversarial examples.
        partial: also export a run that is unfinished, being written, or has failed cells.
        overwrite: replace `out`.
        threat_models: folder of further threat models, where attacks came from one.
    """

    folder: Path
    out: Path
    examples: ExampleChoice
    partial: bool = False
    overwrite: bool = False
    threat_models: Path | None = None


def export_run(request: ExportRequest) -> Manifest:
    """Write the bundle; returns its manifest. `UserError` when it cannot be written there, or when the run is empty,
    unfinished, failed in part or being written (see `ExportRequest.partial`)."""
    _check_target(request)
    plan, run = Ledger(request.folder).read_run(), load_run(request.folder)
    partial = _check_complete(request, run)
    with tempfile.TemporaryDirectory(prefix="robbench-export-") as name:
        staged = Path(name)
        _check_unchanged(request, plan, run)
        stored = _stage(request, run, Ledger(staged))
        _check_unchanged(request, plan, run)
        manifest = _manifest(request, load_run(staged), stored, partial)
        return pack(staged, manifest, request.out)


def _check_target(request: ExportRequest) -> None:
    out = request.out
    if out.is_dir():
        raise UserError(
            f"-o {str(out)!r} is a folder; give the name of a file, as in -o {out / 'bundle.zip'}"
        )
    if out.exists() and not request.overwrite:
        raise UserError(f"-o {str(out)!r} exists; give another name, or --overwrite to replace it")
    if out.exists() and not (out.is_file() and (out.suffix == ".zip" or is_zipfile(out))):
        raise UserError(
            f"-o {str(out)!r} is no bundle, and --overwrite replaces only those; give another name"
        )
    check_parent(out)


def _check_complete(request: ExportRequest, run: Run) -> bool:
    """Whether the export is partial; `UserError` without any rows, and for an incomplete run without --partial."""
    if not any(len(result.rows) for result in run.cells):
        raise UserError(
            f"{str(request.folder)!r} has no finished rows to export; run its attacks first (robbench run)"
        )
    problems = list(_list_unfinished(run))
    if lock_is_held(request.folder):
        problems.insert(0, "another robbench run is writing to it")
    if problems and not request.partial:
        raise UserError(
            f"{str(request.folder)!r} is not complete ({'; '.join(problems)}); finish it with the same `robbench run`, "
            f"or give --partial to export what there is"
        )
    return bool(problems)


def _check_unchanged(request: ExportRequest, plan: RunFile | None, run: Run) -> None:
    """`UserError` when another run has changed the plan meanwhile."""
    now = Ledger(request.folder).read_run()
    same = now is not None and [entry.hash for entry in now.cells] == [r.cell.hash for r in run.cells]
    if now != plan or not same:
        raise UserError(
            f"{str(request.folder)!r} was changed while it was exported; wait for the run that writes it, and export "
            f"again"
        )


def _list_unfinished(run: Run) -> Iterable[str]:
    kinds: tuple[tuple[Literal["running", "failed"], str], ...] = (
        ("running", "unfinished"),
        ("failed", "failed"),
    )
    for status, word in kinds:
        cells = [result.cell for result in run.cells if result.cell.status == status]
        if cells:
            plural = "s" if len(cells) > 1 else ""
            yield f"{len(cells)} {word} cell{plural}, first {cells[0].model} x {cells[0].attack.label}"


def _stage(request: ExportRequest, run: Run, staged: Ledger) -> int:
    """Fill `staged` with the content of the bundle; returns the number of examples that the run stores."""
    source = Ledger(request.folder)
    plan = source.require_run()
    # Paths on this machine are nobody else's business, and would make equal runs unequal bundles.
    staged.write_run(plan.model_copy(update={"options": {}, "given": {}}), run.cards)
    stored, exported = 0, set[int]()
    for cell in dict.fromkeys(entry.hash for entry in plan.cells):  # one cell may have two names in a plan
        of_cell, chosen = _stage_cell(source, staged, cell, run, request.examples)
        stored, exported = stored + of_cell, exported | chosen
    _stage_originals(source, staged, exported)
    _stage_frechet(request.folder, staged.folder, {entry.hash for entry in plan.cells})
    _stage_threat_models(request, run, staged.folder)
    return stored


def _stage_cell(
    source: Ledger, staged: Ledger, cell: str, run: Run, choice: ExampleChoice
) -> tuple[int, frozenset[int]]:
    """Copy the record of a cell, and its rows as one shard; returns the number of its stored examples, and the ids of
    the chosen ones."""
    result = next(result for result in run.cells if result.cell.hash == cell)
    record = source.read_cell(cell)
    assert record is not None
    seconds = round(result.cell.seconds, 3)
    # Without `clean`, which no stored row supports.
    changes = {"status": result.cell.status, "seconds": seconds, "clean": None}
    staged.write_cell(record.model_copy(update=changes))
    shards = source.shards(cell, refuse_shard)
    table = _select_rows([shard.table for shard in shards], run.sample_ids)
    if table is None:
        return 0, frozenset()
    kept = table.filter(pc.is_valid(table["example"]))["sample_id"].to_pylist()
    chosen = choice.choose(kept)
    noticed = sum_diagnostics(shards).model_dump_json(exclude_defaults=True)
    staged.write_shard(cell, 0, _with_pixels_of(table, chosen), seconds, noticed, smallest=True)
    return len(kept), chosen


def _select_rows(tables: list[pa.Table], requested: Iterable[int]) -> pa.Table | None:
    """Rows of the requested samples, sorted by id; None without any."""
    if not tables:
        return None
    table = pa.concat_tables([table.replace_schema_metadata() for table in tables])
    table = table.filter(pc.is_in(table["sample_id"], value_set=pa.array(list(requested), pa.int64())))
    return table.sort_by("sample_id").combine_chunks() if len(table) else None


def _with_pixels_of(table: pa.Table, chosen: frozenset[int]) -> pa.Table:
    """`table` with images and witnesses of the chosen samples only."""
    mask = pc.is_in(table["sample_id"], value_set=pa.array(sorted(chosen), pa.int64()))
    for name in select_names("image"):
        if name in table.column_names:
            place, field = table.schema.get_field_index(name), table.schema.field(name)
            table = table.set_column(
                place, field, pc.if_else(mask, table[name], pa.scalar(None, pa.binary()))
            )
    return table


def _stage_originals(source: Ledger, staged: Ledger, exported: set[int]) -> None:
    """Copy the clean images of the exported examples."""
    stored: dict[int, Images] = {i: image for i, image in source.originals().items() if i in exported}
    missing = sorted(exported - stored.keys())
    if missing:
        raise UserError(
            f"{source.folder / ORIGINALS_FILE} lacks sample {missing[0]}, whose adversarial example is stored; run the "
            f"same `robbench run` again to restore it, or give --examples none"
        )
    if stored:
        staged.add_originals(stored, refuse_shard)


def _stage_frechet(folder: Path, staged: Path, cells: set[str]) -> None:
    records = (read_record(path) for path in sorted((folder / FRECHET_FOLDER).glob("*.json")))
    for record in records:
        if record.cell is None or record.cell in cells:
            write_record(staged, record)


def _stage_threat_models(request: ExportRequest, run: Run, staged: Path) -> None:
    """Copy the installed definitions of the attacks; the settings that were run are in every cell.json."""
    known = threat_models(request.threat_models)
    for result in run.cells:
        attack = result.cell.attack
        model = known.get(attack.threat_model)
        if model is None or attack.name not in model.attacks:
            raise UserError(
                f"attack {attack.name!r} of threat model {attack.threat_model!r} is in {str(request.folder)!r} and not "
                f"installed; name the folder of its YAML with --threat-models"
            )
    for name in sorted({result.cell.attack.threat_model for result in run.cells}):
        write_text_atomically(staged / "threat_models" / f"{name}.yaml", dump_yaml(known[name]))


def _manifest(request: ExportRequest, run: Run, stored: int, partial: bool) -> Manifest:
    unique = {result.cell.hash: result for result in run.cells}.values()
    counts = sum((_counts(result) for result in unique), Counter[str]())
    choice = request.examples
    return Manifest(
        versions=versions(),
        run=run_identity(Ledger(run.folder).require_run()),
        partial=partial,
        examples=ExampleShare(
            asked=choice.requested,
            seed=choice.seed,
            stored=stored,
            exported=counts["example"],
            witnesses=counts["witness"],
        ),
        models={name: card.weights.sha256 for name, card in sorted(run.cards.items())},
        detectors={
            card.detector.name: card.detector.weights.sha256
            for _, card in sorted(run.cards.items())
            if card.detector is not None
        },
        flows=_flows(run),
        cells=tuple(_bundle_cell(result) for result in run.cells),
        tables=table_digests(run),
        files={},
    )


def _counts(result: CellResult) -> Counter[str]:
    columns = [name for name in ("example", "witness") if name in result.rows.columns]
    return Counter({name: int(result.rows[name].notna().sum()) for name in columns})


def _bundle_cell(result: CellResult) -> BundleCell:
    cell = result.cell
    return BundleCell(
        hash=cell.hash,
        model=cell.model,
        attack=cell.attack.label,
        status=cell.status,
        rows=len(result.rows),
        examples=_counts(result)["example"],
    )


def _flows(run: Run) -> dict[str, str]:
    """sha256 of the weights of every flow that attacks or likelihoods of the run used, by name."""
    found: dict[str, str] = {}
    for result in run.cells:
        for flow in (result.cell.attack_flow, result.cell.nll_flow):
            if flow is not None and found.setdefault(flow.name, flow.sha256) != flow.sha256:
                raise UserError(
                    f"{str(run.folder)!r} mixes two weights of flow {flow.name!r} ({found[flow.name][:12]}, "
                    f"{flow.sha256[:12]}); run it again with one of them"
                )
    return dict(sorted(found.items()))


def table_digests(run: Run, left_out: Collection[str] = ()) -> dict[str, str]:
    """sha256 of every derived table, by name. A function of the ledger's rows alone: over `DIGESTED_COLUMNS` and
    `DIGESTED_METRICS`, floats with 9 digits, since CPUs round the last ones differently. left_out: columns that tables
    of an older robbench lacked."""
    columns = [name for name in DIGESTED_COLUMNS if name not in left_out]
    rows = [
        [_round(getattr(row, name)) for name in columns]
        for row in leaderboard(run)
        if row.kind.name in DIGESTED_METRICS
    ]
    return {"leaderboard": canonical_hash([columns, *rows])}


def _round(value: object) -> object:
    return f"{value:.9g}" if isinstance(value, float) else value
