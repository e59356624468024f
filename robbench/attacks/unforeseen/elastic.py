"""Elastic: a smooth flow field that displaces pixels (Xiao et al. 2018; Kang et al. 2019, section 3 and appendix)."""

import math
from dataclasses import dataclass
from functools import cache

import torch
from pydantic import Field
from torch import Tensor, nn

from robbench.attacks.named import ATTACKS
from robbench.attacks.search.constraints import Ball, Constraint
from robbench.attacks.search.geometry import Noise
from robbench.attacks.search.rendered import Renderer, Shape
from robbench.attacks.unforeseen.base import RenderedAttack, RenderedParameters
from robbench.core.errors import UserError

REFERENCE_SIDE, REFERENCE_SIGMA, REACH = 224, 3.0, 4


@cache
def _convolution(line: tuple[float, ...], side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix [side,side] that convolves rows of `side` numbers, reflected at both ends, with `line`; on a CPU a
    product of matrices is faster than a convolution of two channels."""
    half = (len(line) // 2,) * 2
    padded = nn.functional.pad(torch.eye(side, dtype=torch.float64)[:, None], half, mode="reflect")
    kernel = torch.tensor(line, dtype=torch.float64)[None, None]
    return nn.functional.conv1d(padded, kernel)[:, 0].to(device, dtype)


@dataclass(frozen=True)
class ElasticFlow(Renderer):
    """x'(p) = x(p + (G * v)(p)): bilinear sampling along a flow field v [2,H,W] in pixels, smoothed by a Gaussian.

    |v| <= epsilon in every coordinate; the smoothed flow is smaller. The grid is that of align_corners=True, which is
    the identity for a zero flow; with PyTorch's default, align_corners=False, a zero flow distorts already.

    Attributes:
        epsilon: largest displacement, in pixels.
        sigma: standard deviation of the Gaussian, in pixels; None for 3 at 224 pixels, in proportion for other sides.
            The kernel reaches to 4 sigma: 25 pixels at 224, 5 at 32, 3 at 8.
    """

    epsilon: float
    sigma: float | None = None
    unit = "pixels of displacement (before smoothing)"
    usual = (0.05, 64.0)
    tolerance = 1e-4

    def shape(self, image: Shape) -> tuple[int, ...]:
        _, height, width = image
        reach = len(self.weights(min(height, width))) // 2
        if min(height, width) <= reach:
            raise UserError(
                f"images of {height} x {width} pixels are too small for the elastic attack's kernel of "
                f"{2 * reach + 1}; give sides of at least {reach + 1}, or a smaller `sigma` in the threat model's YAML"
            )
        return (2, height, width)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        return (Ball("flow field", "linf", self.epsilon),)

    def start(self, image: Shape, noise: Noise) -> Tensor:
        return noise.uniform(self.shape(image)) * self.epsilon

    def weights(self, side: int) -> Tensor:
        """The Gaussian in one dimension for images of that side, of sum 1."""
        sigma = REFERENCE_SIGMA * side / REFERENCE_SIDE if self.sigma is None else self.sigma
        reach = math.ceil(REACH * sigma)
        density = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma) ** 2)
        return density / density.sum()

    def smooth(self, field: Tensor) -> Tensor:
        """A field [n,2,H,W] convolved with the Gaussian, reflected at the border."""
        height, width = field.shape[2:]
        line = tuple(self.weights(min(height, width)).tolist())
        down, across = (_convolution(line, side, field.dtype, field.device) for side in (height, width))
        return down.T @ field @ across

    def render(self, x: Tensor, scene: object, variables: Tensor) -> Tensor:
        height, width = x.shape[2:]
        flow = self.smooth(variables)
        # In units of the grid the first pixel is -1 and the last 1; epsilon counts 2 / side a pixel, as in Kang et al.
        columns = torch.linspace(-1.0, 1.0, width, device=x.device) + flow[:, 0] * (2.0 / width)
        rows = torch.linspace(-1.0, 1.0, height, device=x.device)[:, None] + flow[:, 1] * (2.0 / height)
        grid = torch.stack([columns, rows], -1)
        return nn.functional.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)


class ElasticParameters(RenderedParameters):
    """sigma: see `ElasticFlow`."""

    sigma: float | None = Field(default=None, gt=0)


@ATTACKS.register("elastic")
class Elastic(RenderedAttack):
    """Elastic deformation by a smoothed flow field, sign steps."""

    Parameters = ElasticParameters
    renders = ElasticFlow

    def renderer(self, epsilon: float) -> ElasticFlow:
        return ElasticFlow(epsilon, self.parameters.sigma)
