"""Unforeseen attack robustness (Kang et al. 2019): accuracy at six budgets relative to training for them."""

from robbench.metrics.registry import Metric, register

# Combined from the cells of one attack at its calibrated budgets, by `results.unforeseen`.
UAR = Metric(
    "uar", "unforeseen attack robustness (UAR)", "%", "higher", absolute=1.0, relative=0.0, column="UAR",
    part="Unforeseen attacks", decimals=1, place=5,
)  # fmt: skip
register(UAR)
