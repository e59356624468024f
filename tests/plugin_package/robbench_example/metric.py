"""A metric: the mean L1 distance of the successful adversarial examples."""

from robbench.metrics import Metric, Number
from robbench.metrics.verdicts import broken
from robbench.store.records import CellResult


def mean_l1(result: CellResult) -> Number | None:
    """Mean over the samples that the attack broke; None without any."""
    lost = broken(result.rows)
    return Number(float(lost["l1"].mean()), scope=f"over {len(lost)} samples") if len(lost) else None


L1 = Metric("l1", "mean L1 distance", "pixel range", "higher", column="L1", part="Distances", compute=mean_l1)
