"""Accuracies: under an attack, and combined (worst case, average, mean over corruptions)."""

import numpy as np

from robbench.metrics.registry import Metric, Number, register
from robbench.metrics.verdicts import floats, robust, shown_verdicts
from robbench.statistics.accuracy import Verdicts, accuracy
from robbench.store.records import CellRecord, CellResult

NEAR_TIE = 1e-4  # |margin| below which batch size or machine may decide a verdict
PERCENT, POINTS = "%", 0.5


def count_near_ties(result: CellResult, column: str = "margin") -> int:
    """Number of samples whose margin (of the attacked image, or "clean_margin") is so small that rounding may
    decide."""
    return int((np.abs(floats(result.rows[column])) < NEAR_TIE).sum())


def _number(verdicts: Verdicts, near_ties: int = 0) -> Number:
    found = accuracy(verdicts)
    return Number(found.value, found.lower, found.upper, near_ties=near_ties)


def _under_attack(result: CellResult) -> Number:
    return _number(shown_verdicts(result), count_near_ties(result))


def _robust(result: CellResult) -> Number:
    return _number(robust(result.rows))


def _shows_another(cell: CellRecord) -> bool:
    """Whether a cell shows the accuracy under attack, so that its robust accuracy gets a column too. Corruptions do
    not: they have their own tables, and there would be 75 columns."""
    return cell.attack.semantics == "perturbation" and cell.attack.space != "corruption"


ACCURACY = Metric(
    "accuracy", "accuracy", PERCENT, "higher", accuracy=True, headline=True, absolute=POINTS, relative=0.0, decimals=1,
    place=0, measure=None, compute=_under_attack,
)  # fmt: skip
ROBUST_ACCURACY = Metric(
    "robust_accuracy", "robust accuracy", PERCENT, "higher", accuracy=True, absolute=POINTS, relative=0.0, decimals=1,
    place=0, measure="robust accuracy", applies=_shows_another, compute=_robust,
)  # fmt: skip
WORST_CASE_ACCURACY, AVERAGE_ACCURACY, CORRUPTION_ACCURACY = (
    Metric(name, title, PERCENT, "higher", accuracy=True, absolute=POINTS, relative=0.0, decimals=1, place=0)
    for name, title in (
        ("worst_case_accuracy", "worst-case accuracy"),
        ("average_accuracy", "average accuracy"),
        ("corruption_accuracy", "mean accuracy over corruptions"),
    )
)
register(ACCURACY, ROBUST_ACCURACY, WORST_CASE_ACCURACY, AVERAGE_ACCURACY, CORRUPTION_ACCURACY)
