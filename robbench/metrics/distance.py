"""Distances of adversarial images from their originals: mean and standard deviation of L2 and Linf over samples.

For a classifier over two sets of samples: "broken", the successful adversarial examples, and "attacked" (`_all`), all
samples that are right before the attack, or all samples of a perturbation. For a flow over all samples.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from robbench.metrics.registry import Metric, Number, register
from robbench.metrics.verdicts import clean_correct, floats, is_broken
from robbench.statistics.accuracy import Verdicts
from robbench.statistics.perturbation import PerturbationSize, perturbation_size
from robbench.store.records import CellResult

PIXEL_RANGE = "pixel range"  # unit of distances: pixels in [0, 1]


@dataclass(frozen=True)
class Measured:
    """Distances over one set of samples ("all", "broken" or "attacked"); scope: the set as text."""

    samples: str
    scope: str
    size: PerturbationSize


def broken_size(result: CellResult) -> Measured | None:
    """Distances of the successful adversarial examples of a classifier's cell (None without any), or of all images of a
    flow's cell."""
    if result.cell.attack.target == "flow":
        every = np.ones(len(result.rows), np.bool_)
        return _measure(result, every, "all", "mean over all {n} samples")
    return _measure(result, is_broken(result.rows), "broken", "over the {n} samples that the attack broke")


def attacked_size(result: CellResult) -> Measured | None:
    """Distances of all attacked images of a classifier's cell; None without any."""
    if result.cell.attack.target == "flow":
        return None
    if result.cell.attack.semantics == "perturbation":
        every = np.ones(len(result.rows), np.bool_)
        return _measure(result, every, "attacked", "mean over all {n} samples")
    scope = "mean over the {n} samples that were right before the attack"
    return _measure(result, clean_correct(result.rows), "attacked", scope)


def _measure(result: CellResult, part: Verdicts, samples: str, scope: str) -> Measured | None:
    size = perturbation_size(floats(result.rows["l2"])[part], floats(result.rows["linf"])[part])
    return Measured(samples, scope.format(n=size.n), size) if size else None


def _compute(
    measure: Callable[[CellResult], Measured | None], norm: str, statistic: str
) -> Callable[[CellResult], Number | None]:
    def compute(result: CellResult) -> Number | None:
        found = measure(result)
        return Number(getattr(found.size, f"{norm}_{statistic}"), scope=found.scope) if found else None

    return compute


def _metrics(measure: Callable[[CellResult], Measured | None], suffix: str, samples: str) -> list[Metric]:
    return [
        Metric(
            f"{norm}{suffix}{'_std' if statistic == 'std' else ''}",
            f"{'standard deviation of ' if statistic == 'std' else ''}{norm.title()} of {samples} samples",
            PIXEL_RANGE, "", place=20, targets=("classifier", "flow") if samples == "broken" else ("classifier",),
            compute=_compute(measure, norm, statistic),
        )
        for norm in ("l2", "linf")
        for statistic in ("mean", "std")
    ]  # fmt: skip


register(*_metrics(broken_size, "", "broken"), *_metrics(attacked_size, "_all", "attacked"))
