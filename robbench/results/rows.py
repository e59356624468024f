"""Table rows, one number each, and the cells of a run as the tables group them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from robbench.core.foreign import foreign_code
from robbench.metrics.accuracy import NEAR_TIE
from robbench.metrics.registry import Metric, Number, metric_of
from robbench.specs import Measure, ModelKind
from robbench.statistics.accuracy import Estimate
from robbench.store.records import CellResult, Run

CellStatus = Literal["ok", "failed", "not run"]
RowStatus = Literal["ok", "partial", "failed", "not run"]

OBLIVIOUS = "no adaptive attack was run: says nothing about an attacker who knows the detector"
CLEAN, WORST_CASE, AVERAGE = "clean", "worst-case", "average"


@dataclass(frozen=True)
class TableRow:
    """One number. `COLUMNS` are the columns of leaderboard.csv, in this order.

    Attributes:
        dataset, model, defense, threat_model: names.
        attack: label of an attack, or "clean", "worst-case", "average".
        epsilon, eta: budgets; None where there is none.
        metric: name of a metric (`metrics.registry`).
        value, lower, upper: in `unit`; None unless status is "ok" or "partial" (a failed cell is never a 0).
        unit: of the metric.
        n: number of requested samples.
        seed: of the run.
        status: "partial" is a worst case or average that leaves out attacks under which other models of the same table
            were run, and so is no number to compare them by.
        model_sha256, flow: sha256 of the weights; name of the flow that was searched through or scored the images.
        measure: what an accuracy counts (`specs.Measure`); "" for other numbers and averages over both kinds.
        combined: columns that a worst case or average combines.
        scope: samples that a mean covers; "" for all.
        near_ties: samples whose verdict may depend on batch size or machine: |margin| below NEAR_TIE.
        reason: why there is no value.
        missing: attacks that a worst case or average leaves out.
        left_out: samples of the scope that are not finite and left out.
        differing: samples whose clean verdict differs between the cells of a model.
        remarks: further remarks, each a phrase.
        suspicions: why the number may overstate robustness, each a sentence.
        detector: name of the detector that guards the classifier; "" for none. An accuracy is then one with rejection.
        oblivious: whether the number is of a guarded classifier that no adaptive attack was finished on.
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
    measure: Measure | Literal[""] = ""
    combined: tuple[str, ...] = ()
    scope: str = ""
    near_ties: int = 0
    reason: str = ""
    missing: tuple[str, ...] = ()
    left_out: int = 0
    differing: int = 0
    remarks: tuple[str, ...] = ()
    suspicions: tuple[str, ...] = ()
    detector: str = ""
    oblivious: bool = False

    @property
    def measured(self) -> bool:
        """Whether the row has a number, complete or partial."""
        return self.status in ("ok", "partial")

    @property
    def kind(self) -> Metric:
        """The metric whose name the row has."""
        return metric_of(self.metric)

    @property
    def facts(self) -> tuple[str, ...]:
        """Everything to know about the number but its suspicions, each a phrase."""
        found = (
            self.reason,
            f"over {', '.join(self.combined)}" if self.combined else "",
            f"not run: {', '.join(self.missing)}" if self.missing else "",
            self.scope,
            f"clean verdicts differ between cells on {self.differing} samples" if self.differing else "",
            *self.remarks,
            OBLIVIOUS if self.oblivious else "",
            f"{self.near_ties} of {self.n} samples with |margin| < {NEAR_TIE:g}" if self.near_ties else "",
        )
        return tuple(fact for fact in found if fact)

    @property
    def note(self) -> str:
        """Facts and suspicions as one text for people; no program reads it."""
        return "; ".join([*self.facts, *(f"suspicious: {text}" for text in self.suspicions)])

    def cell(self, column: str) -> str | float | int | None:
        """The value of one of `COLUMNS` in a file."""
        return ", ".join(self.combined) if column == "combined" else getattr(self, column)


_FIELDS = tuple(field.name for field in fields(TableRow))
COLUMNS = (
    *_FIELDS[: _FIELDS.index("measure")], "note", "measure", "combined", "scope", "near_ties",
)  # fmt: skip


@dataclass(frozen=True)
class ModelResults:
    """The cells of one model, in plan order."""

    name: str
    cells: tuple[CellResult, ...]

    @property
    def first(self) -> CellResult:
        """The first cell."""
        return self.cells[0]

    @property
    def kind(self) -> ModelKind:
        """Whether tables show it among classifiers, as also guarded ones, or among flows."""
        return "classifier" if self.first.cell.decides else "flow"

    @property
    def detector(self) -> str:
        """Name of the detector that guards it; "" for none."""
        guard = self.first.cell.detector
        return guard.name if guard else ""


def models(run: Run) -> list[ModelResults]:
    """The run's cells grouped by model; models and their cells in plan order."""
    found: dict[str, list[CellResult]] = {}
    for result in run.cells:
        found.setdefault(cell_model(result), []).append(result)
    return [ModelResults(name, tuple(results)) for name, results in found.items()]


def of_kind(run: Run, kind: ModelKind) -> list[ModelResults]:
    """The classifiers, or the flows, of a run."""
    return [model for model in models(run) if model.kind == kind]


def rows_of(run: Run, rows: Iterable[TableRow], kind: ModelKind) -> list[TableRow]:
    """The rows of classifiers, or of flows."""
    names = {model.name for model in of_kind(run, kind)}
    return [row for row in rows if row.model in names]


def cell_model(result: CellResult) -> str:
    """Name of the model of a cell."""
    return result.cell.model_name


def cell_status(run: Run, result: CellResult) -> tuple[CellStatus, str]:
    """Status of a cell's numbers, and the reason. A cell with a part of the samples counts as not run."""
    if result.cell.status == "failed":
        return "failed", result.cell.error or "failed"
    if len(result.rows) < run.n:
        return "not run", f"{len(result.rows)} of {run.n} samples done" if len(result.rows) else ""
    return "ok", ""


def complete(run: Run, results: Iterable[CellResult]) -> list[CellResult]:
    """The cells that have all samples."""
    return [result for result in results if cell_status(run, result)[0] == "ok"]


def adversaries(results: Iterable[CellResult]) -> list[CellResult]:
    """The cells that a worst case combines (`ResolvedAttack.is_adversary`). Random and label-free perturbations are no
    adversaries, since one that may leave the image unchanged would not apply a perturbation that helps the model."""
    return [result for result in results if result.cell.attack.is_adversary]


def blank_row(
    run: Run, result: CellResult, *, metric: str, unit: str, measure: Measure | Literal[""] = ""
) -> TableRow:
    """A row of a cell, without a value."""
    cell = result.cell
    status, reason = cell_status(run, result)
    return TableRow(
        dataset=run.dataset,
        model=cell.model_name,
        defense=cell.defense,
        threat_model=cell.attack.threat_model,
        attack=cell.attack.label,
        epsilon=cell.attack.epsilon,
        eta=cell.attack.eta,
        metric=metric,
        measure=measure,
        value=None,
        lower=None,
        upper=None,
        unit=unit,
        n=run.n,
        seed=run.seed,
        status=status,
        model_sha256=cell.model_sha256,
        flow=cell.flow or "",
        reason=reason,
        detector=cell.detector.name if cell.detector else "",
    )


def blank_model_row(
    run: Run,
    result: CellResult,
    metric: Metric,
    attack: str,
    threat_model: str,
    measure: Measure | Literal[""] = "",
    epsilon: float | None = None,
    eta: float | None = None,
) -> TableRow:
    """A row without a value of the model of a cell: of its clean images, or combined over several attacks."""
    row = blank_row(run, result, metric=metric.name, unit=metric.unit, measure=measure)
    row = replace(row, attack=attack, threat_model=threat_model, epsilon=epsilon, eta=eta)
    return replace(row, status="ok", reason="", flow="")


def with_estimate(blank: TableRow, estimate: Estimate) -> TableRow:
    """The row with a percentage and its interval."""
    return replace(blank, value=estimate.value, lower=estimate.lower, upper=estimate.upper)


def with_number(blank: TableRow, number: Number) -> TableRow:
    """The row with the number of a metric."""
    return replace(
        blank,
        value=number.value,
        lower=number.lower,
        upper=number.upper,
        scope=number.scope,
        left_out=number.left_out,
        near_ties=number.near_ties,
        remarks=tuple(remark for remark in number.remarks if remark),
        flow=blank.flow if number.flow is None else number.flow,
    )


def cell_rows(run: Run, result: CellResult, metrics: Iterable[Metric]) -> list[TableRow]:
    """A row for each of `metrics` that applies to a cell, in their order. A failed or incomplete cell has rows without
    a value, for its accuracies and headline numbers only."""
    status, _ = cell_status(run, result)
    rows = []
    for metric in metrics:
        if metric.compute is None or not metric.fits(result.cell):
            continue
        measure = metric.measure_of(result.cell)
        blank = blank_row(run, result, metric=metric.name, unit=metric.unit, measure=measure)
        if status == "ok":
            with foreign_code(
                f"computing the metric {metric.name!r}", "repair or uninstall the package it is from"
            ):
                number = metric.compute(result)
            rows += [] if number is None else [with_number(blank, number)]
        elif metric.accuracy or metric.headline:
            rows.append(blank)
    return rows


def without_value(blank: TableRow, run: Run, results: Sequence[CellResult]) -> TableRow:
    """The row of a combined number without a value; the reason names the missing cells."""
    missing = {r.cell.attack.label: cell_status(run, r)[0] for r in results if cell_status(run, r)[0] != "ok"}
    status: RowStatus = "failed" if "failed" in missing.values() else "not run"
    reason = "; ".join(f"{label} {state}" for label, state in missing.items())
    return replace(blank, status=status, reason=reason)
