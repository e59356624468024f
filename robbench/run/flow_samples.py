"""Samples of one flow scored under another, at several temperatures (Pope, Balaji and Feizi 2020, section 8.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from robbench.attacks.victim import chunks
from robbench.core.errors import UserError
from robbench.core.random import derive_seed
from robbench.models.flows.base import FlowModel
from robbench.statistics.likelihood import BitsPerDim, bits_per_dim

BATCH = 256


@dataclass(frozen=True)
class ScoredSamples:
    """Bits/dim of samples at a temperature, or of images (temperature None)."""

    temperature: float | None
    summary: BitsPerDim


def score_samples(
    flow: FlowModel, judge: FlowModel, temperatures: Sequence[float], n: int, seed: int
) -> list[ScoredSamples]:
    """Bits/dim under `judge` of n samples of `flow` per temperature, rounded to grey levels as images are.

    Both flows must model the same images; conditional flows are refused with `UserError`.
    """
    if (flow.input_shape, flow.grey_levels) != (judge.input_shape, judge.grey_levels):
        raise UserError(
            f"the flows model images {flow.input_shape} of {flow.grey_levels} and {judge.input_shape} of "
            f"{judge.grey_levels} grey levels; name two flows of one data set"
        )
    if flow.label_classes is not None or judge.label_classes is not None:
        raise UserError("samples of a class-conditional flow need labels; name unconditional flows")
    return [_score(judge, _samples(flow, t, n, seed), t, seed) for t in temperatures]


def score_images(judge: FlowModel, images: Tensor, seed: int) -> ScoredSamples:
    """Bits/dim of images [n,C,H,W] in [0,1], to compare samples with."""
    return _score(judge, images, None, seed)


def _samples(flow: FlowModel, temperature: float, n: int, seed: int) -> Tensor:
    """Grey-level images [n,C,H,W]: a function of (seed, temperature); the same latents at every temperature."""
    generator = torch.Generator().manual_seed(derive_seed(seed, "samples of a flow"))
    images = flow.sample(n, temperature, generator)
    top = flow.grey_levels - 1
    return torch.round(images * top) / top


def _score(judge: FlowModel, images: Tensor, temperature: float | None, seed: int) -> ScoredSamples:
    scores = []
    with torch.no_grad():
        for rows in chunks(torch.arange(len(images)), BATCH):
            bits = judge.bits_per_dim(images[rows], seed=seed, sample_ids=rows)
            scores.append(bits.double().cpu().numpy())
    values = np.concatenate(scores)
    return ScoredSamples(temperature, bits_per_dim(values))
