"""Metrics: a registry (`registry`) and one module per family, which are all imported here. NumPy only."""

from importlib import import_module
from pkgutil import iter_modules

from robbench.metrics.registry import METRICS, Metric, Number, all_metrics, metric_of

__all__ = ["METRICS", "Metric", "Number", "all_metrics", "metric_of"]

for _module in iter_modules(__path__):  # they register themselves
    import_module(f"{__name__}.{_module.name}")
