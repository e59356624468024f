"""The rows of a cell on a classifier as verdicts: right before the attack, broken by it, right under it."""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from robbench.statistics.accuracy import Verdicts
from robbench.store.records import CellResult

if TYPE_CHECKING:
    import pandas as pd

Floats = NDArray[np.float64]


def attacked(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Samples right before the attack: for the others most attacks search nothing."""
    return rows[clean_correct(rows)]


def broken(rows: "pd.DataFrame") -> "pd.DataFrame":
    """Samples right before the attack and not after it: where the adversarial image is a successful one."""
    return rows[is_broken(rows)]


def is_broken(rows: "pd.DataFrame") -> Verdicts:
    """Whether each sample is right before the attack and not after it."""
    return clean_correct(rows) & ~robust(rows)


def robust(rows: "pd.DataFrame") -> Verdicts:
    """Whether each sample is right before the attack and under it."""
    return rows["robust"].to_numpy(dtype=np.bool_)


def right_under_attack(rows: "pd.DataFrame") -> Verdicts:
    """Whether each sample is right on its attacked image, whatever the model says of the clean one."""
    held: Verdicts = rows["margin"].to_numpy() > 0  # a tie is not a right answer
    return held


def shown(result: CellResult) -> Verdicts:
    """The verdicts that tables show of an attack: `measure` of its cell says which."""
    perturbed = result.cell.attack.semantics == "perturbation"
    return right_under_attack(result.rows) if perturbed else robust(result.rows)


def clean_correct(rows: "pd.DataFrame") -> Verdicts:
    """Whether each sample is right before the attack: by its margin, as after it, so that a tie is wrong in both."""
    return np.asarray(rows["clean_margin"].to_numpy(dtype=np.float64) > 0)


def floats(column: "pd.Series[float]") -> Floats:
    """A column in float64, before any sum."""
    return np.asarray(column, dtype=np.float64)
