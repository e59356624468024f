"""Constraints of perturbations: what a search projects on, and what the base class checks on every witness."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from robbench.attacks.search.geometry import norm_of, project
from robbench.specs import Norm

BALL_TOLERANCE = (
    1e-5  # rounding allowance of float32 arithmetic before a point counts as outside its ball, relative
)


class Constraint(Protocol):
    """One condition on a perturbation [n,...] of every sample: `sizes` of at most `limit`.

    Attributes:
        what: the condition in words, as part of a message ("budget of lambda").
        limit: largest size allowed.
        allowance: how far rounding may exceed it.
    """

    @property
    def what(self) -> str: ...

    @property
    def limit(self) -> float: ...

    @property
    def allowance(self) -> float: ...

    def sizes(self, values: Tensor) -> Tensor:
        """What is compared with the limit, [n,m]."""

    def project(self, values: Tensor) -> Tensor:
        """The nearest perturbation that meets the condition."""


@dataclass(frozen=True)
class Ball:
    """||values|| <= radius in a norm; without a condition for norm "none"."""

    name: str
    norm: Norm
    radius: float

    @property
    def what(self) -> str:
        return f"budget of {self.name}"

    @property
    def limit(self) -> float:
        return self.radius if self.norm != "none" else float("inf")

    @property
    def allowance(self) -> float:
        return BALL_TOLERANCE * max(1.0, self.radius)

    def sizes(self, values: Tensor) -> Tensor:
        return norm_of(values, self.norm)[:, None]

    def project(self, values: Tensor) -> Tensor:
        return project(values, self.norm, self.radius)


@dataclass(frozen=True)
class Range:
    """Every entry in [low, high]."""

    name: str
    low: float
    high: float
    limit: float = 0.0
    allowance: float = 1e-6

    @property
    def what(self) -> str:
        return f"range [{self.low:g}, {self.high:g}] of {self.name}"

    def sizes(self, values: Tensor) -> Tensor:
        return torch.maximum(self.low - values, values - self.high).flatten(1)

    def project(self, values: Tensor) -> Tensor:
        return values.clamp(self.low, self.high)


@dataclass(frozen=True)
class Support:
    """No movement where `mask` [D] is 0."""

    what: str
    mask: Tensor
    limit: float = 0.0
    allowance: float = 0.0

    def sizes(self, values: Tensor) -> Tensor:
        return values.flatten(1).abs() * (1.0 - self.mask.to(values))

    def project(self, values: Tensor) -> Tensor:
        return values * self.mask.to(values).reshape(values.shape[1:])
