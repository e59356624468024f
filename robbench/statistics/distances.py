"""Medians of distances to the nearest adversarial image, infinite where none was found."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robbench.statistics.accuracy import CONFIDENCE

Distances = NDArray[np.float64]


@dataclass(frozen=True)
class MedianEstimate:
    """A median with the bounds of its confidence interval; each may be infinite."""

    value: float
    lower: float
    upper: float


def median(distances: Distances) -> MedianEstimate:
    """The median of distances [n], which may be infinite, with its 95 % interval from order statistics: no assumption
    on their distribution but that samples are independent. With fewer than 6 samples the bounds are 0 and infinity.

    For an even n the value is the mean of the middle two, infinite where the upper one is. ValueError for NaN and for
    no samples.
    """
    ordered = np.sort(np.asarray(distances, dtype=np.float64))
    n = len(ordered)
    if not n or np.isnan(ordered).any():
        raise ValueError("a median needs distances, none of them NaN")
    below = _rank_below(n)
    lower = 0.0 if below == 0 else float(ordered[below - 1])
    upper = float("inf") if below == 0 else float(ordered[n - below])
    return MedianEstimate(float((ordered[(n - 1) // 2] + ordered[n // 2]) / 2), lower, upper)


def _rank_below(n: int) -> int:
    """The largest k with P(Binomial(n, 1/2) < k) <= (1 - CONFIDENCE) / 2: the interval from the k-th smallest to the
    k-th largest value covers the median with probability `CONFIDENCE` at least; 0 for none."""
    from scipy.stats import binom  # takes half a second to import

    return int(binom.ppf((1 - CONFIDENCE) / 2, n, 0.5))
