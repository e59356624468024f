"""Verdicts from the rows of a cell on a classifier: right before the attack, broken by it, right under it."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from robbench.statistics.accuracy import Verdicts
from robbench.store.records import CellResult

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


def attacked(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Rows of the samples that are right before the attack; most attacks do not search the others."""
    return rows[clean_correct(rows)]


def broken(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Rows of the samples that are right before the attack and wrong after it."""
    return rows[is_broken(rows)]


def is_broken(rows: "pd.DataFrame") -> Verdicts:
    """Whether each sample is right before the attack and wrong after it."""
    return clean_correct(rows) & ~robust(rows)


def robust(rows: "pd.DataFrame") -> Verdicts:
    """Whether each sample is right before the attack and under it."""
    return rows["robust"].to_numpy(dtype=np.bool_)


def right_under_attack(rows: "pd.DataFrame") -> Verdicts:
    """Whether each attacked image is classified correctly, whatever the answer on the clean one."""
    right: Verdicts = rows["margin"].to_numpy() > 0  # a tie is wrong
    return right


def shown_verdicts(result: CellResult) -> Verdicts:
    """The verdicts that tables show for an attack, by its `measure`: robust, or right under attack."""
    perturbed = result.cell.attack.semantics == "perturbation"
    return right_under_attack(result.rows) if perturbed else robust(result.rows)


def clean_correct(rows: "pd.DataFrame") -> Verdicts:
    """Whether each sample is right before the attack, by its margin, so that a tie is wrong."""
    return np.asarray(rows["clean_margin"].to_numpy(dtype=np.float64) > 0)


def floats(column: "pd.Series[float]") -> Floats:
    """A column in float64."""
    return np.asarray(column, dtype=np.float64)


def is_beyond_budget(result: CellResult) -> Verdicts:
    """Whether each nearest adversarial image is beyond the budget of a minimal-norm attack, and so counts as none."""
    attack, rows = result.cell.attack, result.rows
    if attack.space != "minimal" or attack.epsilon is None:
        return np.zeros(len(rows), dtype=np.bool_)
    return np.asarray(floats(rows[attack.norm]) > attack.radius)
