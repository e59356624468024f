"""Metrics: a registry (`registry`) and one module per family. NumPy only, but for `features` and `flow_samples`."""

from robbench.metrics import accuracy, distance, frechet, likelihood  # noqa: F401  (they register themselves)
from robbench.metrics.registry import METRICS, Metric, Number, all_metrics, metric_of

__all__ = ["METRICS", "Metric", "Number", "all_metrics", "metric_of"]
