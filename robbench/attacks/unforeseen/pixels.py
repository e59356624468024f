"""Pixel balls at the calibrated budgets of Kang et al. 2019, as the simplest renderer: x' = x + v."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from robbench.attacks.named import ATTACKS
from robbench.attacks.search.constraints import Ball, Constraint
from robbench.attacks.search.geometry import Noise, random_start
from robbench.attacks.search.rendered import Renderer, Shape
from robbench.attacks.unforeseen.base import RenderedAttack
from robbench.specs import Norm


@dataclass(frozen=True)
class PixelShift(Renderer):
    """x' = clip(x + v) with ||v|| <= epsilon, in [0,1] pixels. The box is met by clipping alone."""

    norm: Norm
    epsilon: float
    unit = "[0,1] pixels"
    usual = (1e-4, 1e6)

    def shape(self, image: Shape) -> tuple[int, ...]:
        return image

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        return (Ball("the pixels' shift", self.norm, self.epsilon),)

    def start(self, image: Shape, noise: Noise) -> Tensor:
        return random_start("uniform", self.norm, self.epsilon, image, noise)

    def render(self, x: Tensor, scene: Mapping[str, Tensor], variables: Tensor) -> Tensor:
        return x + variables


@ATTACKS.register("pixels")
class Pixels(RenderedAttack):
    """A ball of pixels under the steps of the unforeseen attacks."""

    renders = PixelShift

    def renderer(self, epsilon: float) -> PixelShift:
        return PixelShift(self.spec.norm, epsilon)
