"""One comparison, whatever a run is held to: a line of a table, a reference run, another run.

Three questions make one. What in the run corresponds to the reference (`keys`)? How far may it
lie off: a tolerance (`policy`), what rounding does to samples (`paired`), an interval of paired samples (`numbers`)?
And what is said of it: a `Comparison`, which `documents` and `report` render without asking where it came from.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from robbench.compare.pairs import IDENTITY, Shift
from robbench.compare.reference import Reference
from robbench.results.rows import WORST_CASE, RowStatus, TableRow
from robbench.specs import Measure
from robbench.statistics.paired import ALPHA, holm

if TYPE_CHECKING:
    from robbench.statistics.accuracy import Estimate
    from robbench.statistics.paired import MeanDifference

Correction = Literal["holm", "none"]
Value = str | int | float | bool | None
# The most urgent first. Tables and reference runs: pass, fail, not run; two runs: the others.
Verdict = Literal[
    "fail", "failed", "worse", "maybe worse", "not run", "not compared", "maybe better", "better", "within interval",
    "pass", "unchanged", "not judged",
]  # fmt: skip
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
FAILS: tuple[Verdict, ...] = ("fail", "failed", "worse")
WITHOUT_NUMBER: tuple[Verdict, ...] = ("not run", "not compared")


@dataclass(frozen=True)
class Side:
    """A number of a run. value: over the samples compared, None where there is none. note: why."""

    status: RowStatus = "not run"
    value: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """One number of a run, or one component of an attack, held to a reference.

    Attributes:
        model, attack, threat_model, metric, unit: as in tables; they name the number.
        a, b: the reference's number and the run's; of a table its line, and the run's row where it has one.
        verdict: what is said of it.
        reason: why, where a and b do not say it.
        gate: whether a fail fails the whole.
        path, line: where the reference stands.
        tolerance, basis: of a table, the absolute one applied (None: none was), and what it is made of.
        component, shift: of a reference run, the part of an attack and what its samples did.
        n: samples compared.
        difference, lower, upper: b - a, with its paired interval of two runs, in `unit`.
        p: exact and two-sided, of the samples in `fell` against those in `rose` (`statistics.paired.sign_test`); None
            where there is no pairing.
        p_adjusted: for all numbers compared.
        fell, rose: ids of the samples that are worse (better) in B: broken now, less likely now.
        near_ties: of fell and rose, those whose margins are both below 1e-4.
        lower_is_better: of bits/dim, unless an attack lowers them.
        measure: what an accuracy counts, as in tables.
        combined: the attacks that a worst case or average is made of.
        notes: what a reader must know besides.
    """

    model: str
    attack: str
    metric: str
    a: "Side | Reference" = field(default_factory=Side)
    b: "Side | TableRow" = field(default_factory=Side)
    verdict: Verdict = "not compared"
    reason: str = ""
    gate: bool = True
    path: Path = field(default_factory=Path)
    line: int = 1
    threat_model: str = ""
    unit: str = ""
    tolerance: float | None = None
    basis: str = ""
    component: str = ""
    shift: Shift = field(default_factory=Shift)
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
    combined: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def regression(self) -> bool:
        """Whether this alone fails the whole."""
        return self.gate and self.verdict in FAILS

    @property
    def loss(self) -> float:
        """How far it fell, positive for worse; 0 without a difference."""
        return (self.difference or 0.0) * (1 if self.lower_is_better else -1)

    @property
    def name(self) -> str:
        """ "pgd20 accuracy", "worst-case worst_case_accuracy (linf@0.2)", "aa apgd-t"."""
        threat = f" ({self.threat_model})" if self.threat_model and self.attack == WORST_CASE else ""
        return f"{self.attack} {self.component or self.metric}{threat}"

    @property
    def values(self) -> dict[str, Value]:
        """The numbers behind the verdict."""
        if self.component:
            return {"n": self.shift.n} if self.component == IDENTITY else asdict(self.shift)
        numbers: dict[str, Value] = {
            "reference": self.a.value,
            "measured": self.b.value,
            "difference": self.difference,
        }
        if isinstance(self.a, Reference):
            about: dict[str, Value] = {
                "tolerance": self.tolerance,
                "basis": self.basis,
                "reference_n": self.a.n,
            }
            return {"dataset": self.a.dataset, **numbers, **about, "n": self.n or None}
        return {**numbers, "lower": self.lower, "upper": self.upper, "p": self.p_adjusted, "n": self.n}

    def with_verdict(
        self, verdict: Verdict, reason: str, tolerance: float | None = None, basis: str = ""
    ) -> "Comparison":
        """The comparison with its verdict."""
        return replace(self, verdict=verdict, reason=reason, tolerance=tolerance, basis=basis)

    def with_interval(self, found: "Estimate | MeanDifference") -> "Comparison":
        """The comparison with its difference and interval."""
        return replace(self, difference=found.value, lower=found.lower, upper=found.upper)


def judge(
    changes: Sequence[Comparison], alpha: float = ALPHA, correction: Correction = "holm"
) -> list[Comparison]:
    """Numbers of two runs with their verdicts, in their order.

    worse (better): the interval of the difference lies on one side of 0 and, with "holm", the exact p-value adjusted
    for all p-values here is at most alpha; maybe: the interval does, but among so many numbers that is no surprise.
    failed: B failed where A has a number. The intervals must be of confidence 1 - alpha.
    """
    tested = [change.p for change in changes if change.p is not None]
    adjusted = iter(holm(tested).tolist() if correction == "holm" else tested)
    found = [replace(change, p_adjusted=None if change.p is None else next(adjusted)) for change in changes]
    return [replace(change, verdict=_verdict(change, alpha, correction)) for change in found]


def _verdict(change: Comparison, alpha: float, correction: Correction) -> Verdict:
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


def _side(change: Comparison) -> int:
    """-1 where the interval says worse, 1 where it says better, 0 where it holds 0; without an interval (no two finite
    differences) what most samples say."""
    if change.lower is None or change.upper is None:
        return (len(change.rose) > len(change.fell)) - (len(change.rose) < len(change.fell))
    side = (change.lower > 0) - (change.upper < 0)
    return -side if change.lower_is_better else side
