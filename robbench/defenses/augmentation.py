"""Mixup and Cutout: augmentations that do not depend on the model."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from robbench.core.schema import Strict
from robbench.defenses.base import DEFENSES, Defense, mix
from robbench.defenses.losses import mixed_cross_entropy


class MixupParameters(Strict):
    """tau: both parameters of the Beta distribution of the mixing weight."""

    tau: float = Field(default=1.0, gt=0)


@DEFENSES.register("mixup")
class Mixup(Defense):
    """Mixup (Zhang et al. 2018, eq. 1): convex combinations of two images, one weight ~ Beta(tau, tau) per batch.

    The loss mixes the two cross-entropies, which equals the cross-entropy of the mixed one-hot label.
    """

    Parameters = MixupParameters

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        mixed = mix(x, y, self.parameters.tau, generator)
        return mixed_cross_entropy(model(mixed.x), mixed.labels, mixed.partners, mixed.weight).mean()


class CutoutParameters(Strict):
    """length: side of the square in pixels, None for half of the image's height (16 of 32, as for CIFAR-10).

    fill: "mean" is the batch's mean per channel, "zero" is black. probability: share of images that get a hole.
    """

    length: int | None = Field(default=None, gt=0)
    fill: Literal["mean", "zero"] = "mean"
    probability: float = Field(default=1.0, ge=0, le=1)


def cutout_mask(n: int, height: int, width: int, length: int, generator: torch.Generator) -> Tensor:
    """Boolean [n,1,H,W], True inside a square of side `length` whose centre is uniform over the pixels.

    The square is cut off at the border, as in the authors' code. A centre c covers c - length//2 up to, not including,
    c - length//2 + length.
    """
    inside = []
    for size in (height, width):
        first = torch.randint(0, size, (n, 1), generator=generator) - length // 2
        axis = torch.arange(size)
        inside.append((axis >= first) & (axis < first + length))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


@DEFENSES.register("cutout")
class Cutout(Defense):
    """Cutout (DeVries & Taylor 2017, section 3): one square hole per image.

    Deviation: the authors zero the hole after normalisation, which is the mean colour of the data set; images
    here are not normalised outside the model, so the hole takes the batch's mean colour (fill "zero": black).
    """

    Parameters = CutoutParameters

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        p: CutoutParameters = self.parameters
        n, _, height, width = x.shape
        hole = cutout_mask(n, height, width, p.length or height // 2, generator)
        hole &= torch.rand((n, 1, 1, 1), generator=generator) < p.probability
        fill = x.mean((0, 2, 3), keepdim=True) if p.fill == "mean" else torch.zeros_like(x[:1, :, :1, :1])
        return functional.cross_entropy(model(torch.where(hole.to(x.device), fill, x)), y)
