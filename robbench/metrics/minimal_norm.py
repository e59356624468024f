"""Distances of minimal-norm attacks: the median over all samples of a cell, and accuracies at any budget from one run.

The distance of a sample is that of the nearest misclassified image that the attack found, in the attack's norm: 0 where
the clean image is misclassified, infinite where the attack found none, never left out.
"""

import numpy as np

from robbench.metrics.registry import Metric, Number, register
from robbench.metrics.verdicts import Floats, clean_correct, floats, right_under_attack
from robbench.statistics.accuracy import Estimate, accuracy
from robbench.statistics.distances import median
from robbench.store.records import CellRecord, CellResult

MINIMAL = "minimal"  # the space of these attacks
UNIT = "distance"  # in the attack's norm, of pixels in [0,1]; for L0 a number of values


def is_minimal(cell: CellRecord) -> bool:
    """Whether a cell is of a minimal-norm attack."""
    return cell.attack.space == MINIMAL


def distances(result: CellResult) -> Floats:
    """Distance to the nearest misclassified image found of every sample, [n]."""
    rows = result.rows
    found = np.where(right_under_attack(rows), np.inf, floats(rows[result.cell.attack.norm]))
    return np.where(clean_correct(rows), found, 0.0)


def accuracy_at(found: Floats, budget: float) -> Estimate:
    """Share of the distances [n] beyond `budget` in percent, with its interval: the robust accuracy at that budget,
    read from a search without one. At 0 it is the clean accuracy."""
    return accuracy(found > budget)


def median_number(found: Floats) -> Number:
    """The median of distances [n] with its interval; it tells how many are infinite."""
    estimate, failed = median(found), int(np.isinf(found).sum())
    scope = f"over all {len(found)} samples" + (
        f", {failed} of them without an adversarial image" if failed else ""
    )
    return Number(estimate.value, estimate.lower, estimate.upper, scope=scope)


def _median_distance(result: CellResult) -> Number:
    return median_number(distances(result))


MEDIAN_DISTANCE = Metric(
    "median_distance", "median distance to the nearest adversarial image", UNIT, "higher", column="median distance",
    part="Minimal-norm attacks", place=21, applies=is_minimal, compute=_median_distance,
)  # fmt: skip
SMALLEST_DISTANCE = Metric(
    "smallest_distance", "median of the smallest distance over the attacks of one norm", UNIT, "higher", place=22,
)  # fmt: skip
register(MEDIAN_DISTANCE, SMALLEST_DISTANCE)
