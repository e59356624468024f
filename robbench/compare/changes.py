"""One number in two runs, and what is said of its change."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from robbench.results.rows import CellStatus
from robbench.specs import Measure
from robbench.statistics.accuracy import Estimate
from robbench.statistics.paired import ALPHA, MeanDifference, holm

Correction = Literal["holm", "none"]
CORRECTIONS: tuple[Correction, ...] = get_args(Correction)
Verdict = Literal[
    "failed",
    "worse",
    "maybe worse",
    "not compared",
    "maybe better",
    "better",
    "within interval",
    "unchanged",
    "not judged",
]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)


@dataclass(frozen=True)
class Side:
    """A number in one run. value: over the samples compared, None where there is none. note: why."""

    status: CellStatus
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Change:
    """One number in runs A and B, over the `n` samples that both have.

    Attributes:
        model, attack, threat_model, metric, unit: as in tables; they name the number.
        a, b: the number in each run.
        n: samples that both runs have.
        difference, lower, upper: B - A with its paired interval, in `unit`.
        p: exact and two-sided, of the samples in `fell` against those in `rose` (`statistics.paired.sign_test`); None
            where there is no pairing.
        p_adjusted: for all numbers compared.
        fell, rose: ids of the samples that are worse (better) in B: broken now, less likely now.
        near_ties: of fell and rose, those whose margins are both below 1e-4.
        lower_is_better: of bits/dim, unless an attack lowers them.
        measure: what an accuracy counts, as in tables.
        verdict: what `judged` says of it.
        combined: the attacks that a worst case or average is made of.
        notes: what a reader must know besides.
    """

    model: str
    attack: str
    threat_model: str
    metric: str
    unit: str
    a: Side
    b: Side
    n: int = 0
    difference: float | None = None
    lower: float | None = None
    upper: float | None = None
    p: float | None = None
    p_adjusted: float | None = None
    fell: tuple[int, ...] = ()
    rose: tuple[int, ...] = ()
    near_ties: int = 0
    lower_is_better: bool = False
    measure: Measure | Literal[""] = ""
    verdict: Verdict = "not compared"
    combined: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def regression(self) -> bool:
        """Whether this alone is a fall."""
        return self.verdict in ("failed", "worse")

    @property
    def loss(self) -> float:
        """How far it fell, positive for worse; 0 without a difference."""
        return (self.difference or 0.0) * (1 if self.lower_is_better else -1)

    def with_interval(self, found: Estimate | MeanDifference) -> "Change":
        """The change with its difference and interval."""
        return replace(self, difference=found.value, lower=found.lower, upper=found.upper)


def judged(changes: Sequence[Change], alpha: float = ALPHA, correction: Correction = "holm") -> list[Change]:
    """`changes` with their verdicts, in their order.

    worse (better): the interval of the difference lies on one side of 0 and, with "holm", the exact p-value adjusted
    for all p-values here is at most alpha; maybe: the interval does, but among so many numbers that is no surprise.
    failed: B failed where A has a number. The intervals must be of confidence 1 - alpha.
    """
    tested = [change.p for change in changes if change.p is not None]
    adjusted = iter(holm(tested).tolist() if correction == "holm" else tested)
    found = [replace(change, p_adjusted=None if change.p is None else next(adjusted)) for change in changes]
    return [replace(change, verdict=_verdict(change, alpha, correction)) for change in found]


def _verdict(change: Change, alpha: float, correction: Correction) -> Verdict:
    if (change.a.status, change.b.status) != ("ok", "ok"):
        return "failed" if change.a.status == "ok" and change.b.status == "failed" else "not compared"
    if change.p_adjusted is None:
        return "not judged" if change.difference else "unchanged"
    if not change.fell and not change.rose:
        return "unchanged"
    side = _side(change)
    certain = change.p_adjusted <= alpha
    if side == 0 or (change.lower is None and not certain):
        return "within interval"
    if certain or correction == "none":
        return "worse" if side < 0 else "better"
    return "maybe worse" if side < 0 else "maybe better"


def _side(change: Change) -> int:
    """-1 where the interval says worse, 1 where it says better, 0 where it holds 0; without an interval (no two finite
    differences) what most samples say."""
    if change.lower is None or change.upper is None:
        return (len(change.rose) > len(change.fell)) - (len(change.rose) < len(change.fell))
    side = (change.lower > 0) - (change.upper < 0)
    return -side if change.lower_is_better else side
