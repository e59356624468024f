"""Success of targeted attacks: the share of samples that become the class aimed at (Carlini & Wagner 2017)."""

import numpy as np

from robbench.metrics.registry import Metric, Number, register
from robbench.statistics.accuracy import accuracy
from robbench.store.records import CellRecord, CellResult


def target_success(result: CellResult) -> Number | None:
    """Percentage of the samples with another label than the target whose attacked image is classified as the target,
    with its interval. None without such samples."""
    rows = result.rows
    other = rows[(rows["target"] != rows["label"]).to_numpy(dtype=np.bool_)]
    if not len(other):
        return None
    found = accuracy(other["reached"].to_numpy(dtype=np.bool_))
    scope = f"over the {len(other)} samples whose label is not the target"
    return Number(found.value, found.lower, found.upper, scope=scope)


def _is_targeted(cell: CellRecord) -> bool:
    return cell.attack.parameters.get("target") is not None


TARGET_SUCCESS = Metric(
    "target_success", "targets reached", "%", "lower", absolute=0.5, relative=0.0, column="reached",
    part="Targeted attacks", decimals=1, place=45, applies=_is_targeted, compute=target_success,
)  # fmt: skip
register(TARGET_SUCCESS)
