"""Median number of queries of a black-box attack until it breaks a sample (Andriushchenko et al. 2020, table 2)."""

import numpy as np

from robbench.metrics.registry import Metric, Number, register
from robbench.metrics.verdicts import broken
from robbench.specs import TRANSFER
from robbench.store.records import CellRecord, CellResult


def median_queries(result: CellResult) -> Number | None:
    """Median over the broken samples of the iteration that broke them, one query of the model each; of decision-based
    attacks the query that first met a misclassified image within the budget.

    None for an attack that used gradients, broke nothing, or whose queries were not counted per sample.
    """
    lost = broken(result.rows)
    if not len(lost) or result.rows["backwards"].any() or not result.rows["counts_exact"].all():
        return None
    return Number(
        float(np.median(lost["broken_at"])), scope=f"over the {len(lost)} samples that the attack broke"
    )


def _asks_the_model(cell: CellRecord) -> bool:
    """Whether the search is on the attacked model itself, not on a surrogate."""
    return cell.attack.algorithm != TRANSFER


QUERIES = Metric(
    "median_queries", "median queries to break a sample", "queries", "higher", column="queries",
    part="Cost of black-box attacks", decimals=0, place=40, applies=_asks_the_model, compute=median_queries,
)  # fmt: skip
register(QUERIES)
