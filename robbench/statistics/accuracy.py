"""Accuracies in percent with intervals: per attack, worst case over attacks, and the papers' average.

A verdict is one bool per sample, True where it is classified correctly (under the attack in question).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Verdicts = NDArray[np.bool_]
SampleIds = NDArray[np.int64]

CONFIDENCE = 0.95
RESAMPLES = 2_000


@dataclass(frozen=True)
class Estimate:
    """A percentage in [0, 100] with the bounds of its confidence interval, over `n` samples."""

    value: float
    lower: float
    upper: float
    n: int


def wilson(successes: float, n: int, confidence: float = CONFIDENCE) -> Estimate:
    """Proportion `successes / n` in percent with the Wilson score interval (no continuity correction).

    A success may be a part of one, as the mean of verdicts on one sample.
    Raises ValueError unless 0 <= successes <= n and n >= 1.
    Source: E. B. Wilson, J. Amer. Statist. Assoc. 22 (1927) 209-212.
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(
            f"{successes} successes of {n} is not a proportion; need 0 <= successes <= n and n >= 1"
        )
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    rate = successes / n
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    centre = rate + z * z / (2 * n)
    # At the ends the closed form is exactly 0 or 1, which rounding must not change.
    lower = 0.0 if successes == 0 else (centre - spread) / scale
    upper = 1.0 if successes == n else (centre + spread) / scale
    return Estimate(100 * rate, 100 * lower, 100 * upper, n)


def accuracy(correct: Verdicts) -> Estimate:
    """Share of `True` in percent with its 95 % Wilson interval. Raises ValueError without samples."""
    verdicts = _verdicts(correct)
    return wilson(int(verdicts.sum()), len(verdicts))


def worst_case(ids: Sequence[SampleIds], verdicts: Sequence[Verdicts]) -> Verdicts:
    """Verdicts against an attacker who chooses the best attack per sample: AND over attacks.

    ids[k], verdicts[k]: sample ids and verdicts of attack k, same length and order. ValueError unless all attacks have
    the same samples in the same order.
    """
    if not verdicts or len(ids) != len(verdicts):
        raise ValueError(
            f"worst case over {len(verdicts)} attacks and {len(ids)} id lists; need one id list each"
        )
    for position, other in enumerate(ids):
        if not np.array_equal(np.asarray(other), np.asarray(ids[0])):
            raise ValueError(f"attack {position} has other sample ids than attack 0; use the same samples")
    columns = [_verdicts(v, expected=len(ids[0])) for v in verdicts]
    robust: Verdicts = np.logical_and.reduce(columns)
    return robust


def average(columns: Sequence[Verdicts], seed: int, resamples: int = RESAMPLES) -> Estimate:
    """The papers' "Avg": unweighted mean over columns (clean and every attack), with a bootstrap interval.

    columns[k]: verdicts of the same samples in the same order. The bootstrap resamples samples jointly over all
    columns, which preserves the correlation between attacks on one sample; bounds are the 2.5 and 97.5 percentiles of
    `resamples` means, and a function of the seed. ValueError when columns differ in length or are empty.
    """
    if len(columns) == 0:
        raise ValueError("average over no columns; give at least one")
    n = len(columns[0])
    table = np.stack([_verdicts(v, expected=n) for v in columns])
    scores = table.sum(axis=0)
    means = bootstrap_means(scores, seed, resamples) * (100 / len(table))
    tail = 100 * (1 - CONFIDENCE) / 2
    lower, upper = np.percentile(means, [tail, 100 - tail])
    return Estimate(100 * float(table.mean()), float(lower), float(upper), n)


def bootstrap_means(scores: NDArray[np.integer], seed: int, resamples: int) -> NDArray[np.float64]:
    """Means of `resamples` bootstrap resamples (with replacement, n of n) of the per-sample integer `scores`.

    Draws multinomial counts of the distinct scores, which has the same distribution as drawing n indices, without the
    resamples x n matrix. Shape [n] -> [resamples].
    """
    values, counts = np.unique(scores, return_counts=True)
    n = int(counts.sum())
    draws = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples)
    means: NDArray[np.float64] = draws @ values / n
    return means


def _verdicts(values: Verdicts, expected: int | None = None) -> Verdicts:
    array = np.asarray(values)
    if array.dtype != np.bool_ or array.ndim != 1 or len(array) == 0:
        raise ValueError(
            f"verdicts must be a non-empty 1-dimensional bool array, not {array.dtype} {array.shape}"
        )
    if expected is not None and len(array) != expected:
        raise ValueError(f"verdicts of {len(array)} samples instead of {expected}; use the same samples")
    return array
