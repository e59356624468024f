"""A run as tidy table rows: one number a row, with its interval, its sample count and its status."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robbench.matrix.records import CellResult, Run
from robbench.metrics import accuracy
from robbench.metrics.likelihood import bits_per_dim
from robbench.metrics.perturbation import perturbation_size

RowStatus = Literal["ok", "failed", "not run"]

CLEAN, WORST_CASE, AVERAGE = "clean", "worst-case", "average"
ALL_THREATS = "all"
NEAR_TIE = 1e-4


@dataclass(frozen=True)
class TableRow:
    """One number; the fields are the columns of leaderboard.csv, in this order.

    attack: label of an attack, or "clean", "worst-case", "average". epsilon, eta: budgets, None where there
    is none. value, lower, upper: in `unit`, None unless status is "ok" (a failed cell is never a 0). n:
    samples asked for. note: what a reader must know besides (samples left out, attacks missing, near ties).
    """

    dataset: str
    model: str
    defense: str
    threat_model: str
    attack: str
    epsilon: float | None
    eta: float | None
    metric: str
    value: float | None
    lower: float | None
    upper: float | None
    unit: str
    n: int
    seed: int
    status: RowStatus
    model_sha256: str
    flow: str
    note: str


Threat = tuple[str, float | None, float | None]  # threat model, epsilon, eta
COLUMNS = tuple(field.name for field in fields(TableRow))


@dataclass(frozen=True)
class Wide:
    """The accuracies as a matrix: models down, then clean, attacks, worst cases and the average across.

    cells: by (model, column); a pair that nothing was planned for is absent.
    """

    models: tuple[tuple[str, str], ...]  # (name, defense)
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], TableRow]


def wide(rows: Sequence[TableRow], per_threat_model: bool = True) -> Wide:
    """`rows` of `leaderboard` as a matrix.

    The worst case under one threat model and budget has a column only where it says something: it combines
    several attacks but not all of them, and `per_threat_model` is asked for.
    """
    accuracies = [row for row in rows if row.metric.endswith("accuracy")]
    threats: dict[Threat, set[str]] = {}
    for row in accuracies:
        if row.metric == "accuracy" and row.attack != CLEAN:
            threats.setdefault(_threat(row), set()).add(row.attack)
    names = [name for name, _, _ in threats]
    cells: dict[tuple[str, str], TableRow] = {}
    for row in accuracies:
        partial = _is_partial_worst_case(row)
        if partial and not (per_threat_model and len(threats) > 1 and len(threats[_threat(row)]) > 1):
            continue
        cells[row.model, _column(row, names.count(row.threat_model) > 1)] = row
    columns = dict.fromkeys(column for _, column in cells)
    return Wide(
        models=tuple(dict.fromkeys((row.model, row.defense) for row in accuracies)),
        columns=tuple(sorted(columns, key=_column_group)),
        cells=cells,
    )


def _threat(row: TableRow) -> Threat:
    return row.threat_model, row.epsilon, row.eta


def _is_partial_worst_case(row: TableRow) -> bool:
    return row.attack == WORST_CASE and row.threat_model != ALL_THREATS


def _column(row: TableRow, with_budget: bool) -> str:
    if not _is_partial_worst_case(row):
        return "worst case" if row.attack == WORST_CASE else row.attack
    budgets = [f"{value:g}" for value in (row.epsilon, row.eta) if value is not None] if with_budget else []
    return "@".join([f"worst {row.threat_model}", *budgets])


def _column_group(column: str) -> int:
    """Clean, attacks, worst cases, average; the order inside a group stays."""
    if column.startswith("worst "):
        return 3 if column == "worst case" else 2
    return {CLEAN: 0, AVERAGE: 4}.get(column, 1)


@dataclass(frozen=True)
class ModelResults:
    """The cells of one model, in plan order."""

    name: str
    cells: tuple[CellResult, ...]

    @property
    def first(self) -> CellResult:
        return self.cells[0]


def models(run: Run) -> list[ModelResults]:
    """The run's cells grouped by model; models and their cells in plan order."""
    names = dict.fromkeys(cell_model(result) for result in run.cells)
    return [ModelResults(name, tuple(r for r in run.cells if cell_model(r) == name)) for name in names]


def cell_model(result: CellResult) -> str:
    """Name of the model of a cell."""
    return result.cell.model_name


def cell_status(run: Run, result: CellResult) -> tuple[RowStatus, str]:
    """Status of a cell's numbers and why. A cell that covers only a part of the samples counts as not run."""
    if result.cell.status == "failed":
        return "failed", result.cell.error or "failed"
    if len(result.rows) < run.n:
        return "not run", f"{len(result.rows)} of {run.n} samples done" if len(result.rows) else ""
    return "ok", ""


def complete(run: Run, results: Iterable[CellResult]) -> list[CellResult]:
    """The cells whose every sample is there."""
    return [result for result in results if cell_status(run, result)[0] == "ok"]


def leaderboard(run: Run) -> list[TableRow]:
    """All numbers of a run. Order: models as planned; in a model clean, attacks, worst cases, average, then
    likelihoods and distances attack by attack."""
    rows: list[TableRow] = []
    for model in models(run):
        rows.append(_clean_row(run, model))
        rows += [_accuracy_row(run, result) for result in model.cells]
        rows += _worst_case_rows(run, model)
        rows.append(_average_row(run, model))
        for result in model.cells:
            rows += _likelihood_rows(run, result) + _perturbation_rows(run, result)
    return rows


# --------------------------------------------------------------------------------------------------- accuracy
def _clean_row(run: Run, model: ModelResults) -> TableRow:
    done = complete(run, model.cells)
    blank = _row(
        run, model.first, attack=CLEAN, threat_model=CLEAN, metric="accuracy", unit="%", of_attack=False
    )
    if not done:
        return _without_value(blank, run, model.cells)
    clean = [_clean_correct(result.rows) for result in done]
    differing = int(np.any([column != clean[0] for column in clean], axis=0).sum())
    notes = [f"clean verdicts differ between cells on {differing} samples"] if differing else []
    notes.append(_near_ties(done[0].rows["clean_margin"]))
    return _with_estimate(blank, accuracy.accuracy(clean[0]), notes)


def _accuracy_row(run: Run, result: CellResult) -> TableRow:
    blank = _row(run, result, metric="accuracy", unit="%")
    if blank.status != "ok":
        return blank
    notes = [_near_ties(result.rows["margin"])]
    return _with_estimate(blank, accuracy.accuracy(_robust(result.rows)), notes)


def _worst_case_rows(run: Run, model: ModelResults) -> list[TableRow]:
    """One row a threat model and budget, then one over all attacks."""
    groups: dict[Threat, list[CellResult]] = {}
    for result in model.cells:
        attack = result.cell.attack
        groups.setdefault((attack.threat_model, attack.epsilon, attack.eta), []).append(result)
    rows = [
        _worst_case_row(run, group, threat_model, epsilon, eta)
        for (threat_model, epsilon, eta), group in groups.items()
    ]
    return [*rows, _worst_case_row(run, model.cells, ALL_THREATS, None, None)]


def _worst_case_row(
    run: Run, results: Sequence[CellResult], threat_model: str, epsilon: float | None, eta: float | None
) -> TableRow:
    blank = _row(
        run,
        results[0],
        attack=WORST_CASE,
        threat_model=threat_model,
        epsilon=epsilon,
        eta=eta,
        metric="worst_case_accuracy",
        unit="%",
        of_attack=False,
    )
    if len(complete(run, results)) < len(results):
        return _without_value(blank, run, results)
    held = accuracy.worst_case([_ids(r.rows) for r in results], [_robust(r.rows) for r in results])
    return _with_estimate(blank, accuracy.accuracy(held), [_over(_labels(results))])


def _average_row(run: Run, model: ModelResults) -> TableRow:
    blank = _row(
        run,
        model.first,
        attack=AVERAGE,
        threat_model=ALL_THREATS,
        metric="average_accuracy",
        unit="%",
        of_attack=False,
    )
    if len(complete(run, model.cells)) < len(model.cells):
        return _without_value(blank, run, model.cells)
    _same_samples(model.cells)
    columns = [_clean_correct(model.first.rows), *(_robust(result.rows) for result in model.cells)]
    return _with_estimate(blank, accuracy.average(columns, run.seed), [_over([CLEAN, *_labels(model.cells)])])


def _same_samples(results: Sequence[CellResult]) -> None:
    accuracy.worst_case([_ids(r.rows) for r in results], [_robust(r.rows) for r in results])


# --------------------------------------------------------------------------------- likelihoods and distances
def _likelihood_rows(run: Run, result: CellResult) -> list[TableRow]:
    """Mean and median bits/dim before (all samples) and after (samples the attack broke); no row where no flow
    scored the images or nothing broke.

    Unbroken samples are left out because a search may stop anywhere, or hand back the clean image, once it has
    failed. An infinite or missing summary keeps status "ok" with what was measured in the note.
    """
    rows: list[TableRow] = []
    if cell_status(run, result)[0] != "ok":
        return rows
    flow = result.cell.nll_flow.name if result.cell.nll_flow else ""
    for name in ("before", "after") if result.cell.nll_flow else ():
        rows_of = result.rows if name == "before" else _broken(result.rows)
        if rows_of.empty:
            continue
        summary = bits_per_dim(_floats(rows_of[f"nll_{name}"]))
        metrics = {
            f"bits_per_dim_{name}": (summary.mean, summary.note),
            f"bits_per_dim_{name}_median": (summary.median, summary.median_note),
        }
        for metric, (value, note) in metrics.items():
            blank = replace(_row(run, result, metric=metric, unit="bits/dim"), flow=flow)
            scope = f"over the {len(rows_of)} samples that the attack broke" if name == "after" else ""
            rows.append(_with_value(blank, value, [scope, note]))
    return rows


def _perturbation_rows(run: Run, result: CellResult) -> list[TableRow]:
    """Mean and standard deviation of the distances over the samples that the attack broke."""
    if cell_status(run, result)[0] != "ok":
        return []
    broken = _broken(result.rows)
    size = perturbation_size(_floats(broken["l2"]), _floats(broken["linf"]))
    if size is None:
        return []
    note = f"over the {size.n} samples that the attack broke"
    values = {"l2": size.l2_mean, "l2_std": size.l2_std, "linf": size.linf_mean, "linf_std": size.linf_std}
    return [
        _with_value(_row(run, result, metric=m, unit="pixel range"), v, [note]) for m, v in values.items()
    ]


# ---------------------------------------------------------------------------------------------------- columns
def _broken(rows: pd.DataFrame) -> pd.DataFrame:
    """Samples right before the attack and not after it: where the adversarial image is a successful one."""
    return rows[_clean_correct(rows) & ~_robust(rows)]


def _robust(rows: pd.DataFrame) -> accuracy.Verdicts:
    return rows["robust"].to_numpy(dtype=np.bool_)


def _clean_correct(rows: pd.DataFrame) -> accuracy.Verdicts:
    equal: accuracy.Verdicts = (rows["clean_prediction"] == rows["label"]).to_numpy(dtype=np.bool_)
    return equal


def _ids(rows: pd.DataFrame) -> accuracy.SampleIds:
    return rows["sample_id"].to_numpy(dtype=np.int64)


def _floats(column: "pd.Series[float]") -> NDArray[np.float64]:
    return np.asarray(column, dtype=np.float64)


def _near_ties(margin: "pd.Series[float]") -> str:
    """Samples whose verdict may depend on batch size or machine: |margin| below NEAR_TIE."""
    count = int((margin.abs() < NEAR_TIE).sum())
    return f"{count} of {len(margin)} samples with |margin| < {NEAR_TIE:g}" if count else ""


def _labels(results: Sequence[CellResult]) -> list[str]:
    return [result.cell.attack.label for result in results]


def _over(parts: Sequence[str]) -> str:
    return f"over {', '.join(parts)}"


def combined_attacks(note: str) -> frozenset[str]:
    """What a worst case or average combines, from its note; empty for the note of any other row."""
    return frozenset(note.removeprefix("over ").split(", ")) if note.startswith("over ") else frozenset()


# ------------------------------------------------------------------------------------------------------- rows
def _row(
    run: Run,
    result: CellResult,
    *,
    metric: str,
    unit: str,
    of_attack: bool = True,
    attack: str = "",
    threat_model: str = "",
    epsilon: float | None = None,
    eta: float | None = None,
) -> TableRow:
    """A row without a value, of one attack's cell or (`of_attack=False`) of its model."""
    cell = result.cell
    status, reason = cell_status(run, result) if of_attack else ("ok", "")
    return TableRow(
        dataset=run.dataset,
        model=cell.model_name,
        defense=cell.defense,
        threat_model=cell.attack.threat_model if of_attack else threat_model,
        attack=cell.attack.label if of_attack else attack,
        epsilon=cell.attack.epsilon if of_attack else epsilon,
        eta=cell.attack.eta if of_attack else eta,
        metric=metric,
        value=None,
        lower=None,
        upper=None,
        unit=unit,
        n=run.n,
        seed=run.seed,
        status=status,
        model_sha256=cell.model_sha256,
        flow=(cell.flow or "") if of_attack else "",
        note=reason,
    )


def _with_estimate(blank: TableRow, estimate: accuracy.Estimate, notes: Sequence[str]) -> TableRow:
    noted = _with_value(blank, estimate.value, notes)
    return replace(noted, lower=estimate.lower, upper=estimate.upper)


def _with_value(blank: TableRow, value: float | None, notes: Sequence[str]) -> TableRow:
    return replace(blank, value=value, note="; ".join(note for note in notes if note))


def _without_value(blank: TableRow, run: Run, results: Sequence[CellResult]) -> TableRow:
    """A combined number some of whose cells are missing: no value, and the note says which cells."""
    missing = {r.cell.attack.label: cell_status(run, r)[0] for r in results if cell_status(run, r)[0] != "ok"}
    status: RowStatus = "failed" if "failed" in missing.values() else "not run"
    note = "; ".join(f"{label} {reason}" for label, reason in missing.items())
    return replace(blank, status=status, note=note)
