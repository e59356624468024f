"""Bits per dimension: summary over samples that may overflow, and two estimates from draws of dequantisation noise."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from torch import Tensor

    from robbench.models.flows.base import FlowModel

Z_95 = 1.959963984540054
# Estimate of an image's bits/dim from several draws: mean of their bits/dim, or bits/dim of their mean density.
BitsEstimate = Literal["mean", "importance"]


@dataclass(frozen=True)
class BitsPerDim:
    """Bits/dim of `n` samples.

    Attributes:
        mean: over the finite values; None without any.
        median: over all values but NaN, infinite ones included; None when all are NaN.
        n: number of samples.
        n_finite, n_infinite, n_nan: of them finite, infinite, NaN.
        lower, upper: 95 % normal interval of the mean over samples; None for fewer than two finite values.
    """

    mean: float | None
    median: float | None
    n: int
    n_finite: int
    n_infinite: int
    n_nan: int
    lower: float | None = None
    upper: float | None = None

    @property
    def median_note(self) -> str:
        """A remark on the values that the median leaves out; "" for none."""
        return f"{self.n_nan} NaN left out" if self.n_nan else ""

    @property
    def note(self) -> str:
        """A remark on the values that the mean leaves out; "" for none."""
        if self.n_finite == self.n:
            return ""
        left_out = f"{self.n_infinite} infinite, {self.n_nan} NaN left out"
        return f"mean over {self.n_finite} finite of {self.n}: {left_out}"


def bits_per_dim(values: ArrayLike) -> BitsPerDim:
    """Summary of per-sample bits/dim, shape [n], n >= 1; ValueError without samples."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"bits/dim of shape {array.shape}; need one number a sample, at least one")
    finite = array[np.isfinite(array)]
    ordered = array[~np.isnan(array)]
    scale = float(np.abs(finite).max()) or 1.0 if len(finite) else 1.0  # sums near 1e308 would overflow
    lower, upper = _normal_interval(finite / scale)
    return BitsPerDim(
        mean=scale * float((finite / scale).mean()) if len(finite) else None,
        median=_median(ordered) if len(ordered) else None,
        n=len(array),
        n_finite=len(finite),
        n_infinite=int(np.isinf(array).sum()),
        n_nan=int(np.isnan(array).sum()),
        lower=None if lower is None else scale * lower,
        upper=None if upper is None else scale * upper,
    )


def estimated_bits_per_dim(
    flow: "FlowModel",
    x: "Tensor",
    y: "Tensor | None",
    estimate: BitsEstimate,
    draws: int,
    *,
    seed: int,
    sample_ids: "Sequence[int] | Tensor",
) -> "Tensor":
    """Bits/dim [N] of images x [N,C,H,W] in [0,1] from `draws` draws of the noise; with one draw both estimates are
    equal."""
    if estimate == "importance":
        return importance_weighted_bits_per_dim(flow, x, draws, seed=seed, sample_ids=sample_ids, y=y)
    return flow.bits_per_dim(x, y, n_samples=draws, seed=seed, sample_ids=sample_ids)


def importance_weighted_bits_per_dim(
    flow: "FlowModel",
    x: "Tensor",
    draws: int,
    *,
    seed: int,
    sample_ids: "Sequence[int] | Tensor",
    y: "Tensor | None" = None,
) -> "Tensor":
    """-log2(mean of exp(log_prob) over `draws` draws of the dequantisation noise) / D of images x [N,C,H,W], [N].

    It bounds -log2 P(image) / D from above in expectation, more tightly the more draws (Burda et al. 2016); with one
    draw it is the flow's `bits_per_dim`, whose noise it shares.
    """
    log_probs = flow.log_prob_draws(x, y, n_samples=draws, seed=seed, sample_ids=sample_ids)
    nats = log_probs.logsumexp(0) - math.log(draws)
    return -nats / (flow.dimensions * math.log(2.0))


def _normal_interval(
    finite: "np.ndarray[tuple[int], np.dtype[np.float64]]",
) -> tuple[float | None, float | None]:
    if len(finite) < 2:
        return None, None
    mean, spread = float(finite.mean()), Z_95 * float(finite.std(ddof=1)) / len(finite) ** 0.5
    return mean - spread, mean + spread


def _median(values: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float | None:
    ordered = np.sort(values)
    low, high = float(ordered[(len(ordered) - 1) // 2]), float(ordered[len(ordered) // 2])
    if low == high:
        return low  # also when both are the same infinity
    middle = low / 2 + high / 2  # halves first: the sum of two huge values overflows
    return None if np.isnan(middle) else middle  # -inf and +inf in the middle have no midpoint
