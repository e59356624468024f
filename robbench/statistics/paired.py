"""Two models, or two runs, on the same samples: exact tests, intervals of differences, rank ranges.

Which one is better depends only on the samples on which they disagree: b robust in the first only, c in the second
only. McNemar's exact test (Q. McNemar, Psychometrika 12 (1947) 153-157) tests this split against even odds. The mid-p
variant is not used, because it sometimes exceeds its level.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robbench.statistics.accuracy import Estimate, Verdicts, wilson

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]
Matrix = NDArray[np.float32]

ALPHA = 0.05
BLOCK = 256  # rows of models at once: bounds the memory of all-pairs comparisons


@overload
def sign_test(b: int, c: int) -> float: ...
@overload
def sign_test(b: Counts, c: Counts) -> Floats: ...
def sign_test(b: ArrayLike, c: ArrayLike) -> float | Floats:
    """Exact two-sided p-value of b against c (counts of any one shape, or two numbers) under even odds: min(1, 2 P(X <=
    min(b, c))), X binomial (b + c, 1/2); 1 where both are 0. On discordant pairs it is McNemar's exact test."""
    from scipy.stats import binom

    first, second = np.asarray(b, dtype=np.int64), np.asarray(c, dtype=np.int64)
    if (np.minimum(first, second) < 0).any():
        raise ValueError("counts of a sign test are negative; give counts of at least 0")
    values = np.minimum(1.0, 2.0 * binom.cdf(np.minimum(first, second), first + second, 0.5))
    return float(values) if values.ndim == 0 else values


def holm(p: ArrayLike) -> Floats:
    """p-values [n] with Holm's adjustment: calling those of at most alpha significant bounds the family-wise error rate
    by alpha under any dependence.

    Source: S. Holm, Scand. J. Statist. 6 (1979) 65-70. ValueError for a p outside [0, 1].
    """
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p-values must be one-dimensional numbers in [0, 1]")
    order = np.argsort(values, kind="stable")
    scaled = np.minimum(1.0, values[order] * np.arange(len(values), 0, -1))
    adjusted: Floats = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(scaled)
    return adjusted


@dataclass(frozen=True)
class PairedCounts:
    """Two verdicts a and b on the same samples.

    Attributes:
        both, only_a, only_b, neither: number of samples with these verdicts true.
        p: of `sign_test` on the discordant samples.
    """

    both: int
    only_a: int
    only_b: int
    neither: int
    p: float

    @property
    def n(self) -> int:
        """Number of samples."""
        return self.both + self.only_a + self.only_b + self.neither

    def difference(self, confidence: float = 1 - ALPHA) -> Estimate:
        """Accuracy of b minus that of a in percentage points, with its interval (`paired_interval`)."""
        lower, upper = paired_interval(self, confidence)
        return Estimate(100 * (self.only_b - self.only_a) / self.n, lower, upper, self.n)


def paired(robust_a: Verdicts, robust_b: Verdicts) -> PairedCounts:
    """Counts and exact test of two verdicts [n] on the same samples in the same order; ValueError unless both are
    bool, equally long and not empty."""
    a, b = np.asarray(robust_a), np.asarray(robust_b)
    if a.dtype != np.bool_ or b.dtype != np.bool_ or a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"verdicts of {a.dtype} {a.shape} and {b.dtype} {b.shape}; need two non-empty bool arrays of one length"
        )
    both, only_a, only_b = (int(mask.sum()) for mask in (a & b, a & ~b, ~a & b))
    return PairedCounts(both, only_a, only_b, len(a) - both - only_a - only_b, sign_test(only_a, only_b))


def paired_interval(counts: PairedCounts, confidence: float = 1 - ALPHA) -> tuple[float, float]:
    """Interval of the difference b minus a of two accuracies of the same samples, in percentage points.

    Combines Wilson's intervals of both with the correlation of the two verdicts, where n/2 is subtracted from a
    positive excess, so that the interval is slightly too wide rather than too narrow.
    Source: R. G. Newcombe, Statistics in Medicine 17 (1998) 2635-2650, method 10.
    """
    n = counts.n
    a = wilson(counts.both + counts.only_a, n, confidence)
    b = wilson(counts.both + counts.only_b, n, confidence)
    phi = _correlation(counts)
    value = 100 * (counts.only_b - counts.only_a) / n
    down = _combine_widths(b.value - b.lower, a.upper - a.value, phi)
    up = _combine_widths(b.upper - b.value, a.value - a.lower, phi)
    return max(value - down, -100.0), min(value + up, 100.0)


def _combine_widths(one: float, other: float, phi: float) -> float:
    return math.sqrt(max(one * one - 2 * phi * one * other + other * other, 0.0))


def _correlation(counts: PairedCounts) -> float:
    """Newcombe's phi; 0 where a margin of the table is empty."""
    in_a, in_b, n = counts.both + counts.only_a, counts.both + counts.only_b, counts.n
    margins = in_a * (n - in_a) * in_b * (n - in_b)
    excess: float = counts.both * counts.neither - counts.only_a * counts.only_b
    if excess > 0:
        excess = max(excess - n / 2, 0.0)
    return excess / math.sqrt(margins) if margins else 0.0


@dataclass(frozen=True)
class MeanDifference:
    """Mean of after - before.

    Attributes:
        value: over the pairs with a finite difference; None without any.
        lower, upper: normal interval over samples; None for fewer than two.
        n, n_finite: number of pairs, and of those with a finite difference.
    """

    value: float | None
    lower: float | None
    upper: float | None
    n: int
    n_finite: int


def mean_difference(before: ArrayLike, after: ArrayLike, confidence: float = 1 - ALPHA) -> MeanDifference:
    """Mean difference of two numbers per sample, [n] each."""
    with np.errstate(invalid="ignore", over="ignore"):
        change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    finite = change[np.isfinite(change)]
    if not len(finite):
        return MeanDifference(None, None, None, len(change), 0)
    scale = float(np.abs(finite).max()) or 1.0  # sums near 1e308 would overflow
    value = scale * float((finite / scale).mean())
    if len(finite) < 2:
        return MeanDifference(value, None, None, len(change), 1)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    half = z * scale * float((finite / scale).std(ddof=1)) / math.sqrt(len(finite))
    return MeanDifference(value, value - half, value + half, len(change), len(finite))


def rank_ranges(verdicts: NDArray[np.bool_], alpha: float = ALPHA) -> list[tuple[int, int]]:
    """Range (best, worst) of the rank of each model, 1 the best, from verdicts [models, samples] on the same samples.

    All pairs of models are tested (`sign_test`) with Holm's adjustment, so that the probability of any false difference
    is at most alpha. best: 1 + number of significantly better models; worst: number of models minus the significantly
    worse ones. Two models whose ranges overlap may still differ significantly as a pair.

    Time grows with models squared times samples; memory with models times (samples + `BLOCK`). ValueError unless bool,
    two-dimensional, with at least one sample.
    """
    table = np.asarray(verdicts)
    if table.dtype != np.bool_ or table.ndim != 2 or not table.shape[1]:
        raise ValueError(f"verdicts of {table.dtype} {table.shape}; need bool [models, samples >= 1]")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha {alpha} is no error rate; need a number between 0 and 1")
    models = len(table)
    if models < 2:
        return [(1, 1)] * models
    limits = _significance_limits(table, alpha)
    better, worse = np.zeros(models, np.int64), np.zeros(models, np.int64)
    for rows, first, second in _count_discordant(table):
        called = np.minimum(first, second) <= limits[first + second]
        wins, losses = called & (first > second), called & (first < second)
        columns = slice(rows.start, None)
        worse[rows] += wins.sum(1)
        better[rows] += losses.sum(1)
        better[columns] += wins.sum(0)
        worse[columns] += losses.sum(0)
    return [(1 + int(up), models - int(down)) for up, down in zip(better, worse, strict=True)]


def _count_discordant(
    table: NDArray[np.bool_],
) -> Iterator[tuple[slice, NDArray[np.int32], NDArray[np.int32]]]:
    """(rows, b, c) per block of models: b[i, j] samples are robust in model rows.start + i only, c[i, j] in model
    rows.start + j only; 0 except for pairs i < j."""
    numbers: Matrix = table.astype(np.float32)  # exact: counts stay far below 2**24
    totals = table.sum(1).astype(np.float32)
    for start in range(0, len(table), BLOCK):
        rows = slice(start, min(start + BLOCK, len(table)))
        shared = numbers[rows] @ numbers[start:].T
        first = (totals[rows, None] - shared).astype(np.int32)
        second = (totals[None, start:] - shared).astype(np.int32)
        seen = np.tril_indices(rows.stop - start, 0, len(table) - start)
        first[seen] = second[seen] = 0
        yield rows, first, second


def _significance_limits(table: NDArray[np.bool_], alpha: float) -> NDArray[np.int32]:
    """For every number m in 0..samples of discordant samples, the largest min(b, c) that is significant after Holm's
    adjustment over all pairs of models; -1 where none is.

    Holm rejects every p <= alpha / pairs and none > alpha, so that only the few (m, min) in between are counted.
    """
    models, n = table.shape
    pairs = models * (models - 1) // 2
    sizes = np.arange(n + 1)
    surely, hardly = _largest(sizes, alpha / pairs), _largest(sizes, alpha)
    # Columns of m, one after the other: "surely", each count in between, "never".
    offsets = np.concatenate([[0], np.cumsum(hardly - surely + 2)])
    counted = np.zeros(offsets[-1], np.int64)
    shift = (offsets[:-1] - surely).astype(np.int32)
    low, high = surely.astype(np.int32), (hardly + 1).astype(np.int32)
    for _, first, second in _count_discordant(table):
        together = first + second
        place = np.clip(np.minimum(first, second), low[together], high[together]) + shift[together]
        counted += np.bincount(place.ravel(), minlength=len(counted))
    m = np.repeat(sizes, hardly - surely + 2)
    k = np.arange(len(m)) - np.repeat(offsets[:-1] - surely, hardly - surely + 2)
    between = (k > surely[m]) & (k <= hardly[m])
    m, k, found = m[between], k[between], counted[between]
    certain = int(counted[offsets[:-1]].sum())
    limit = _threshold(sign_test(k, m - k), found, certain, pairs, alpha)
    return np.maximum(surely, _largest(sizes, limit)).astype(np.int32)


def _threshold(p: Floats, found: Counts, certain: int, pairs: int, alpha: float) -> float:
    """The largest p that Holm's procedure rejects, given `found` pairs per p and `certain` pairs rejected already."""
    if not len(p):
        return alpha / pairs
    order = np.argsort(p, kind="stable")
    p, found = p[order], found[order]
    distinct = np.concatenate([p[1:] != p[:-1], [True]])  # equal p are rejected together
    values, upto = p[distinct], np.cumsum(found)[distinct]
    before = certain + np.concatenate([[0], upto[:-1]])
    present = np.diff(np.concatenate([[0], upto])) > 0
    values, before = values[present], before[present]
    failing = np.flatnonzero(values * (pairs - before) > alpha)
    kept = values[: failing[0]] if len(failing) else values
    return max(float(kept[-1]) if len(kept) else 0.0, alpha / pairs)


def _largest(sizes: Counts, p: float) -> Counts:
    """For every m the largest k <= m / 2 with sign_test(k, m - k) <= p; -1 where there is none."""
    from scipy.stats import binom

    k = np.maximum(binom.ppf(p / 2, sizes, 0.5), 0).astype(np.int64)  # the smallest k with 2 P(X <= k) >= p
    k = np.minimum(k, sizes // 2)
    values = sign_test(k, sizes - k)
    lower: Counts = np.where(values <= p, k, k - 1)
    return lower
