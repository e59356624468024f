"""Means over trainings that differ in their seed alone."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev

from robbench.statistics.accuracy import CONFIDENCE


def mean_over_trainings(numbers: Sequence[float]) -> tuple[float, float, float]:
    """Mean of at least two numbers, one a training, and its 95 % interval (Student's, over trainings)."""
    from scipy.stats import t

    quantile = float(t.ppf(0.5 + CONFIDENCE / 2, len(numbers) - 1))
    half = quantile * stdev(numbers) / math.sqrt(len(numbers))
    mean = fmean(numbers)
    return mean, mean - half, mean + half
