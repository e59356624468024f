"""Table rows, one number each, and the cells of a run as the tables group them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robbench.specs import Measure, ModelKind
from robbench.statistics.accuracy import Estimate, Verdicts
from robbench.store.records import CellResult, Run

CellStatus = Literal["ok", "failed", "not run"]
RowStatus = Literal["ok", "partial", "failed", "not run"]
Floats = NDArray[np.float64]

CLEAN, WORST_CASE, AVERAGE = "clean", "worst-case", "average"
PIXEL_RANGE = "pixel range"  # unit of distances: pixels in [0, 1]


@dataclass(frozen=True)
class TableRow:
    """One number; the fields are the columns of leaderboard.csv, in this order.

    attack: label of an attack, or "clean", "worst-case", "average". epsilon, eta: budgets, None where there
    is none. measure: what an accuracy counts (`specs.Measure`), "" for other numbers and averages over both
    kinds. value, lower, upper: in `unit`, None unless status is "ok" or "partial" (a failed cell is never a 0). n:
    samples asked for. status "partial": a worst case or average that leaves out attacks under which other models of
    the same table were run, and so is no number to compare them by. note: what a reader must know besides (samples
    left out, attacks missing, near ties).

    Two fields are no columns: combined, the columns that a worst case or average is made of, and missing, the attacks
    that it leaves out.
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
    measure: Measure | Literal[""] = ""
    combined: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def measured(self) -> bool:
        """Whether the row holds a number, of all that it speaks of or of a part."""
        return self.status in ("ok", "partial")


NO_COLUMNS = ("combined", "missing")
COLUMNS = tuple(field.name for field in fields(TableRow) if field.name not in NO_COLUMNS)


# ------------------------------------------------------------------------------------------------------ cells
@dataclass(frozen=True)
class ModelResults:
    """The cells of one model, in plan order."""

    name: str
    cells: tuple[CellResult, ...]

    @property
    def first(self) -> CellResult:
        return self.cells[0]

    @property
    def kind(self) -> ModelKind:
        """What the model is, and so which columns its rows have: an attack fits one kind of model only."""
        return self.first.cell.attack.target


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
    """The rows that speak of classifiers, or of flows."""
    names = {model.name for model in of_kind(run, kind)}
    return [row for row in rows if row.model in names]


def cell_model(result: CellResult) -> str:
    """Name of the model of a cell."""
    return result.cell.model_name


def cell_status(run: Run, result: CellResult) -> tuple[CellStatus, str]:
    """Status of a cell's numbers and why. A cell that covers only a part of the samples counts as not run."""
    if result.cell.status == "failed":
        return "failed", result.cell.error or "failed"
    if len(result.rows) < run.n:
        return "not run", f"{len(result.rows)} of {run.n} samples done" if len(result.rows) else ""
    return "ok", ""


def complete(run: Run, results: Iterable[CellResult]) -> list[CellResult]:
    """The cells whose every sample is there."""
    return [result for result in results if cell_status(run, result)[0] == "ok"]


# ------------------------------------------------------------------------------------- columns of classifiers
def attacked(rows: pd.DataFrame) -> pd.DataFrame:
    """Samples right before the attack: for the others most attacks search nothing."""
    return rows[clean_correct(rows)]


def broken(rows: pd.DataFrame) -> pd.DataFrame:
    """Samples right before the attack and not after it: where the adversarial image is a successful one."""
    return rows[is_broken(rows)]


def is_broken(rows: pd.DataFrame) -> Verdicts:
    """Whether each sample is right before the attack and not after it."""
    return clean_correct(rows) & ~robust(rows)


def robust(rows: pd.DataFrame) -> Verdicts:
    """Whether each sample is right before the attack and under it."""
    return rows["robust"].to_numpy(dtype=np.bool_)


def right_under_attack(rows: pd.DataFrame) -> Verdicts:
    """Whether each sample is right on its attacked image, whatever the model says of the clean one."""
    held: Verdicts = rows["margin"].to_numpy() > 0  # a tie is not a right answer
    return held


def shown(result: CellResult) -> Verdicts:
    """The verdicts that tables show of an attack: `measure` of its cell says which."""
    perturbed = result.cell.attack.semantics == "perturbation"
    return right_under_attack(result.rows) if perturbed else robust(result.rows)


def adversaries(results: Iterable[CellResult]) -> list[CellResult]:
    """What a worst case combines: the attacks with worst-case semantics. Whoever may leave an image as it is would not
    apply a perturbation that helps the model."""
    return [result for result in results if result.cell.attack.semantics == "worst-case"]


def clean_correct(rows: pd.DataFrame) -> Verdicts:
    """Whether each sample is right before the attack: by its margin, as after it, so that a tie is wrong in both."""
    return np.asarray(rows["clean_margin"].to_numpy(dtype=np.float64) > 0)


def floats(column: "pd.Series[float]") -> Floats:
    """A column in float64, before any sum."""
    return np.asarray(column, dtype=np.float64)


# ------------------------------------------------------------------------------------------------------- rows
def blank_row(
    run: Run,
    result: CellResult,
    *,
    metric: str,
    unit: str,
    measure: Measure | Literal[""] = "",
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
        measure=measure,
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


def with_estimate(blank: TableRow, estimate: Estimate, notes: Sequence[str]) -> TableRow:
    """The row with a value and its interval."""
    noted = with_value(blank, estimate.value, notes)
    return replace(noted, lower=estimate.lower, upper=estimate.upper)


def with_value(blank: TableRow, value: float | None, notes: Sequence[str]) -> TableRow:
    """The row with a value; the notes that are not empty are joined."""
    return replace(blank, value=value, note="; ".join(note for note in notes if note))


def without_value(blank: TableRow, run: Run, results: Sequence[CellResult]) -> TableRow:
    """A combined number some of whose cells are missing: no value, and the note says which cells."""
    missing = {r.cell.attack.label: cell_status(run, r)[0] for r in results if cell_status(run, r)[0] != "ok"}
    status: RowStatus = "failed" if "failed" in missing.values() else "not run"
    note = "; ".join(f"{label} {reason}" for label, reason in missing.items())
    return replace(blank, status=status, note=note)
