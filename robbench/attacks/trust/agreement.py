"""Differences between two forwards of the same images, independent of scale and common shift of the logits."""

import torch
from torch import Tensor, nn

ROUNDING = 1e-3  # relative gaps that arithmetic in another order explains, with a wide margin
DIFFERENT = 0.02  # relative gaps that no arithmetic of bfloat16 or better explains
# The same where layers quantise activations by the range of the whole batch: digits-at with int8 layers has 0.013.
DIFFERENT_QUANTIZED = 0.1
_SMALLEST_SCALE = (
    0.1  # of a row, as a share of the median row: near-constant logits are rounding of larger numbers
)
_ULPS = 32  # of the logits themselves, where a common shift is much larger than their differences
_FEW = 8  # rows, below which the classes that come first or second in some row are too few to tell a scale


def largest_explained_gap(module: nn.Module) -> float:
    """The largest relative gap that arithmetic can explain, given the layers of `module`."""
    quantized = any(".quantized." in f"{type(part).__module__}." for part in module.modules())
    return DIFFERENT_QUANTIZED if quantized else DIFFERENT


def relative_gaps(first: Tensor, second: Tensor, usual: Tensor | None = None) -> Tensor:
    """Largest difference of the centred logits of each image, relative to their `sizes`, [N] float64.

    first, second: logits [N,K] of the same images. usual: logits [M,K] of clean images, whose sizes are a floor where
    those of attacked images, which lie at the boundary, are small. 0 where neither row is finite, infinity where only
    one is. A constant added to all logits of an image, or a factor common to all images, changes nothing beyond
    rounding.
    """
    if not len(first):
        return torch.zeros(0, dtype=torch.float64)
    first, second = first.detach().double().cpu(), second.detach().double().cpu()
    finite = torch.stack([first.isfinite().all(1), second.isfinite().all(1)])
    a, b = (torch.where(finite.all(0)[:, None], rows, 0.0) for rows in (first, second))
    rounding = _ULPS * torch.finfo(torch.float32).eps * torch.maximum(a.abs(), b.abs())
    contending = _contending(torch.cat([a, b]), len(a))
    rounding = rounding + rounding[:, contending].mean(1, keepdim=True)
    difference = (a - a[:, contending].mean(1, keepdim=True)) - (b - b[:, contending].mean(1, keepdim=True))
    scale = sizes(torch.cat([a, b])).view(2, -1).amax(0)
    typical = scale if usual is None or not len(usual) else sizes(usual)
    scale = torch.maximum(scale, _SMALLEST_SCALE * typical.median())
    gap = (difference.abs() - rounding).clamp(min=0.0).amax(1)
    gap = torch.where(gap > 0, gap / scale.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return torch.where(finite[0] == finite[1], gap, torch.inf)


def sizes(logits: Tensor) -> Tensor:
    """What the size of a difference of logits [N,K] is measured by, [N] float64: the largest logit minus the median.

    Of classes that come first or second in some row, because a class that never does (masked with -1e9, say) may have
    any logit without a meaning for any prediction.
    """
    rows = logits.detach().double().cpu()
    rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0.0)
    rows = rows[:, _contending(rows, len(rows))]
    return rows.amax(1) - rows.median(1).values


def _contending(rows: Tensor, images: int) -> Tensor:
    """Classes that are among the largest logits of some of rows [N,K] of so many images."""
    among = 2 if images >= _FEW else 5
    return torch.bincount(rows.topk(min(among, rows.shape[1]), 1).indices.flatten()).nonzero().squeeze(1)


def spread_gaps(first: Tensor, second: Tensor) -> Tensor:
    """Difference of the mean logits of each image in standard errors, the largest over its logits, [N] float64.

    first, second: logits [draws,N,K] of two sets of forwards of a randomised model. Gaps that are rounding
    (`relative_gaps`) count as 0, also for a model that is in fact deterministic.
    """
    means = first.double().mean(0), second.double().mean(0)
    errors = sum(part.double().var(0, unbiased=True) / len(part) for part in (first, second))
    difference = (means[0] - means[1]).abs()
    within = relative_gaps(*means) <= ROUNDING
    scores = (difference / torch.as_tensor(errors).sqrt().clamp(min=1e-30)).nan_to_num(nan=torch.inf).amax(1)
    return torch.where(within, 0.0, scores)
