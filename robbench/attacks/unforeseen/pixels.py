"""Pixel balls at the calibrated budgets of Kang et al. 2019, as the simplest renderer: x' = x + v."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robbench.attacks.named import ATTACKS
from robbench.attacks.search.constraints import Ball, Constraint
from robbench.attacks.search.geometry import Noise, random_start
from robbench.attacks.search.geometry_l1 import furthest_point
from robbench.attacks.search.rendered import Renderer, Shape
from robbench.attacks.unforeseen.base import RenderedAttack
from robbench.core.budget_limits import require_inside_box
from robbench.specs import Norm


@dataclass(frozen=True)
class PixelShift(Renderer):
    """x' = clip(x + v) with ||v|| <= epsilon, in [0,1] pixels; x + v is brought into the box after every step.

    Attributes:
        norm: of the ball.
        epsilon: its radius, the norm over all pixels of an image. (The public code's L1 budget is per pixel, and its
            published grid the total on pixels 0..255: budget times 3 H W.)
    """

    norm: Norm
    epsilon: float
    unit = "[0,1] pixels"

    @property
    def usual(self) -> tuple[float, float]:
        return 1e-4, 1.0 if self.norm == "linf" else 1e6

    def shape(self, image: Shape) -> tuple[int, ...]:
        require_inside_box(self.epsilon, self.norm, image, 1, f"uar-{self.norm}")
        return image

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        return (Ball("the pixels' shift", self.norm, self.epsilon),)

    def start(self, image: Shape, noise: Noise) -> Tensor:
        return random_start("uniform", self.norm, self.epsilon, image, noise)

    def confine(self, x: Tensor, variables: Tensor) -> Tensor:
        return (x + variables).clamp(0.0, 1.0) - x

    def render(self, x: Tensor, scene: Mapping[str, Tensor], variables: Tensor) -> Tensor:
        return x + variables

    def vertex(self, x: Tensor, variables: Tensor, gradient: Tensor) -> Tensor:
        """See `Renderer`; for norm l1, of ball and box together."""
        return furthest_point(gradient, torch.where(gradient > 0, 1.0 - x, x), self.epsilon)


@ATTACKS.register("pixels")
class Pixels(RenderedAttack):
    """A ball of pixels under the steps of the unforeseen attacks; Frank-Wolfe for l1."""

    renders = PixelShift

    def renderer(self, epsilon: float) -> PixelShift:
        return PixelShift(self.spec.norm, epsilon)
