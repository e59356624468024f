"""How far a measured number may lie from its reference, and why: tolerance policies.

`default`: what differs for a reason gets an interval, what should be the same gets what its metric allows
(`metrics.registry.Metric.absolute` and `relative`).

* clean accuracy of the same samples: exact, up to the near ties that the run (or the reference) counted;
* other accuracies of the same samples: the metric's points, or one sample and the near ties where that is more;
* accuracies of other samples: the 95 % interval of the difference of two proportions, in which the n of both enter
  (Newcombe 1998, method 10, from Wilson bounds); a reference without n is taken as exact;
* bits/dim: the metric's absolute; after an attack the relative where that is more, since single samples in the tail
  rule the mean; of other samples the intervals of both on top;
* anything else: what the metric says, the same samples only.

`exact`: nothing but the digits the reference was written with. `interval`: as `default`, but the same samples are
treated as others, too. A row's own tolerance beats a policy; `--tolerance` replaces it for numbers in percent.
"""

import math
from dataclasses import dataclass
from typing import Literal

from robbench.compare.reference import Reference
from robbench.metrics.accuracy import PERCENT
from robbench.metrics.likelihood import BITS
from robbench.results.rows import CLEAN, TableRow
from robbench.statistics.accuracy import wilson

PolicyName = Literal["default", "exact", "interval"]


@dataclass(frozen=True)
class Allowed:
    """Largest |measured - reference|, and what it is made of; comparable: False where no tolerance helps, because
    other samples give another number."""

    tolerance: float
    basis: str
    comparable: bool = True


@dataclass(frozen=True)
class Policy:
    """name: see the module. points: percentage points that replace the policy for numbers in percent."""

    name: PolicyName = "default"
    points: float | None = None

    def allow(self, reference: Reference, row: TableRow) -> Allowed:
        """For two finite values."""
        if reference.tolerance is not None:
            return Allowed(reference.tolerance, "the row's own tolerance")
        same = same_samples(reference, row)
        if self.points is not None and row.unit == PERCENT:
            return Allowed(self.points, "--tolerance", comparable=same is not False)
        if self.name == "exact":
            return Allowed(reference.rounding, "digits of the reference", comparable=same is not False)
        if row.unit == PERCENT:
            return self._percent(reference, row, same)
        if row.unit == BITS:
            return self._bits(reference, row, same)
        fixed = max(row.kind.tolerance(reference.value or 0.0), reference.rounding)
        return Allowed(fixed, "same samples", comparable=same is not False)

    def _percent(self, reference: Reference, row: TableRow, same: bool | None) -> Allowed:
        if not same or self.name == "interval":
            return Allowed(
                max(_binomial(reference, row), reference.rounding),
                f"95 % interval, n {row.n} and {reference.n or 'not stated'}",
            )
        ties = max(reference.near_ties, row.near_ties)
        if row.attack == CLEAN:
            return Allowed(
                max(100 * ties / row.n, reference.rounding),
                f"same samples, {ties} near ties" if ties else "exact",
            )
        fixed = max(row.kind.tolerance(reference.value or 0.0), 100 * (1 + ties) / row.n, reference.rounding)
        return Allowed(fixed, "same samples")

    def _bits(self, reference: Reference, row: TableRow, same: bool | None) -> Allowed:
        attacked, metric = bool(row.epsilon) and row.kind.attacked, row.kind
        fixed = max(
            metric.tolerance(reference.value or 0.0) if attacked else metric.absolute, reference.rounding
        )
        if same and self.name == "default":
            return Allowed(fixed, "same samples")
        halves = [_half(reference.lower, reference.upper), _half(row.lower, row.upper)]
        if same is None and reference.lower is None:  # nothing is known of the reference's samples
            return Allowed(fixed, "absolute")
        return Allowed(fixed + math.hypot(*halves), "95 % interval of the difference")


def same_samples(reference: Reference, row: TableRow) -> bool | None:
    """Whether both are of the same samples; None where the reference does not say."""
    pairs = ((reference.n, row.n), (reference.seed, row.seed))
    if any(theirs not in (None, ours) for theirs, ours in pairs):
        return False
    return None if any(theirs is None for theirs, _ in pairs) else True


def _binomial(reference: Reference, row: TableRow) -> float:
    """How far the measured percentage may lie from the reference in the direction in which it does, so that 0 is in
    the interval of the difference (R. G. Newcombe, Statistics in Medicine 17 (1998) 873-890, method 10).

    Averages over attacks vary less than a single accuracy of as many samples: for them this is wide.
    """
    measured, value = float(row.value or 0.0), float(reference.value or 0.0)
    ours = _bounds(measured, row.n)
    theirs = _bounds(value, reference.n) if reference.n else (value, value)
    if measured >= value:
        return math.hypot(measured - ours[0], theirs[1] - value)
    return math.hypot(ours[1] - measured, value - theirs[0])


def _bounds(percent: float, n: int) -> tuple[float, float]:
    estimate = wilson(min(max(round(percent / 100 * n), 0), n), n)
    shift = (
        percent - estimate.value
    )  # a percentage that is no multiple of 1/n: rounded in print, or an average
    return max(estimate.lower + shift, 0.0), min(estimate.upper + shift, 100.0)


def _half(lower: float | None, upper: float | None) -> float:
    finite = lower is not None and upper is not None and math.isfinite(upper - lower)
    return (upper - lower) / 2 if finite and upper is not None and lower is not None else 0.0
