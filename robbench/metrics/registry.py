"""The registry of metrics: name, unit, tolerances, and computation from a cell.

A module of this package has one or several `Metric` objects, which `register` adds; other packages add theirs through
the entry point group `robbench.metrics`. Tables, leaderboards, downloads, `check`, `diff` and MLflow loop over the
registry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from robbench.core.errors import UserError
from robbench.core.registry import Registry
from robbench.specs import ATTACKED_BY, Measure, ModelKind
from robbench.store.records import CellRecord, CellResult

Better = Literal["higher", "lower", ""]


@dataclass(frozen=True)
class Number:
    """The value of a metric for a cell.

    Attributes:
        value: in the metric's unit; None or infinite where the samples give no finite number.
        lower, upper: bounds of the 95 % interval; None where the metric has none.
        scope: samples that the value covers ("over the 41 samples that the attack broke"); "" for all of the cell.
        left_out: samples of the scope that are not finite and left out.
        near_ties: samples of the scope whose verdict rounding may decide.
        remarks: further remarks, each a phrase.
        flow: the flow that scored the images; None for the flow through which the attack searched, or none.
    """

    value: float | None
    lower: float | None = None
    upper: float | None = None
    scope: str = ""
    left_out: int = 0
    near_ties: int = 0
    remarks: tuple[str, ...] = ()
    flow: str | None = None


@dataclass(frozen=True)
class Metric:
    """One kind of number.

    Attributes:
        name: in the column `metric` of leaderboard.csv. A metric with variants is registered by the part of its name
            before the first "[" or " (": "frechet" for "frechet[inception]".
        title: its name on pages.
        unit: "%", "bits/dim", "pixel range", "distance", or another.
        better: the direction that is better for the model; "" where there is none.
        accuracy: whether it is an accuracy in percent, shown in the matrix of models by attacks.
        headline: whether a cell without a reference for this metric counts as unchecked.
        attacked: whether it depends on the attack; False for numbers of clean images.
        absolute, relative: of `tolerance`, in the unit and as a share of the reference.
        column, part: prefix of its column in a leaderboard, before the attack's name, and heading in the column
            chooser; a metric without `part` has no column.
        decimals: of a number on a page.
        compared: whether `diff` lists it besides accuracies and likelihoods of flows.
        place: sort key of its rows in a cell: accuracies 0, likelihoods 10, distances 20, Fréchet distances 30.
        targets: kinds of models whose cells have it.
        applies: whether a cell on such a model has it; None for all.
        measure: what an accuracy counts; None where the attack decides.
        compute: from a complete cell to its number, or None where it does not apply; None for a metric that combines
            cells, which `results` computes.
    """

    name: str
    title: str
    unit: str
    better: Better
    accuracy: bool = False
    headline: bool = False
    attacked: bool = True
    absolute: float = 0.0
    relative: float = 0.01
    column: str = ""
    part: str = ""
    decimals: int = 3
    compared: bool = True
    place: int = 90
    targets: tuple[ModelKind, ...] = ("classifier",)
    applies: Callable[[CellRecord], bool] | None = None
    measure: Measure | Literal[""] | None = ""
    compute: Callable[[CellResult], Number | None] | None = None

    def fits(self, cell: CellRecord) -> bool:
        """Whether a cell has this metric; what a classifier has, a guarded one has too."""
        kinds = ATTACKED_BY[cell.kind] if cell.detector else (cell.kind,)
        return not {*kinds}.isdisjoint(self.targets) and (self.applies is None or self.applies(cell))

    def measure_of(self, cell: CellRecord) -> Measure | Literal[""]:
        """What the accuracy counts in a cell; "" for any other metric."""
        return cell.attack.measure if self.measure is None else self.measure

    def tolerance(self, value: float) -> float:
        """How far two measurements on the same samples may differ, in the unit: the larger of `absolute` and `relative`
        times the reference's value."""
        return max(self.absolute, self.relative * abs(value))

    def column_of(self, variant: str) -> str:
        """Name of the column of a variant: "FID (3f2a)" for "fid (3f2a)"."""
        return f"{self.column}{variant.removeprefix(self.name)}"


METRICS: Registry[Metric] = Registry(
    "metric", "robbench.metrics", lambda entry: isinstance(entry, Metric), "a robbench.metrics.Metric"
)
_ORDER: dict[str, int] = {}  # order of registration of robbench's metrics


def register(*metrics: Metric) -> None:
    """Add metrics of robbench; metrics of one `place` keep this order in tables."""
    for metric in metrics:
        METRICS.register(metric.name)(metric)
        _ORDER[metric.name] = len(_ORDER)


@cache
def all_metrics() -> tuple[Metric, ...]:
    """All metrics in the order of tables. `UserError` for a plugin that is not a metric or has another name."""
    metrics = [_check(name) for name in METRICS]
    return tuple(sorted(metrics, key=lambda m: (m.place, _ORDER.get(m.name, len(_ORDER)), m.name)))


def _check(name: str) -> Metric:
    metric = METRICS.get(name)
    if not isinstance(metric, Metric) or metric.name != name:
        raise UserError(
            f"entry point {name!r} of robbench.metrics is {metric!r}; let it name a robbench.metrics.Metric whose "
            f"`name` is {name!r}"
        )
    return metric


def metric_of(name: str) -> Metric:
    """The metric of a table's row; an unknown one, from a table of another installation, is a plain number compared
    within 1 %."""
    base = name.partition("[")[0].partition(" (")[0]
    if base in METRICS:
        return METRICS.get(base)
    return Metric(name, name, "", "")
