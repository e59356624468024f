"""Fast minimum-norm attack (Pintor, Roli, Brendel & Biggio 2021), in L2, Linf, L1 and L0.

Normalised steps on the lead of the best other class, and a ball per sample that shrinks where the point is
misclassified and grows where it is not; as long as no misclassified point was met, it reaches to the linearised
boundary. Where the box takes back what the linearisation asks for, the paper's ball stays as it is for good (half of
the digits in L2), and so it does where the model is linear and rounding leaves the point short of the boundary; here it
grows on.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from robbench.attacks.minimal.base import Annealed, MinimalAttack, MinimalSearch, lead_gradient
from robbench.attacks.named import ATTACKS, Cost, Objective
from robbench.attacks.search.geometry import norm_of, normalise, per_sample, project, rescale, stands_still
from robbench.attacks.search.spaces import State
from robbench.attacks.search.task import Task
from robbench.attacks.victim import Victim
from robbench.core.schema import Strict
from robbench.specs import Norm, ResolvedAttack

DUAL: dict[Norm, Norm] = {"l2": "l2", "linf": "l1", "l1": "linf"}
LAST_PACE = 0.001  # of the ball, at the last iteration
LAST_STEP = 0.01  # of the first step, at the last iteration
TAKEN_BACK = 0.999  # share of its ball's radius that a point keeps at most where the box holds it back
# Factors by which a ball must grow as long as no misclassified point is known, held back by the box or not.
STALLED, ARRIVED = 1.01, 1.001


class FMNParameters(Strict):
    """Parameters of FMN.

    Attributes:
        steps: iterations, one forward and one backward each.
        step_size: Euclidean length of the first step, in [0,1] pixels; the last has a hundredth of it.
        pace: share by which the ball first grows or shrinks; the last is 0.001.
    """

    steps: int = Field(default=100, gt=0)
    step_size: float = Field(default=1.0, gt=0)
    pace: float = Field(default=0.05, gt=0, lt=1)


class FMN(MinimalSearch):
    """The search; see the module. radius: state entry [n], of the ball."""

    def __init__(self, name: str, norm: Norm, parameters: FMNParameters) -> None:
        self.name, self.norm, self.parameters = name, norm, parameters
        self.iterations = parameters.steps
        first = parameters.step_size
        self.length = Annealed(first, LAST_STEP * first, self.iterations)
        self.pace = Annealed(parameters.pace, LAST_PACE, self.iterations)

    def begin(self, victim: Victim, task: Task) -> State:
        state = super().begin(victim, task)
        corner = torch.maximum(task.x, 1.0 - task.x)
        farthest = norm_of(corner, self.norm)
        radius = torch.ones_like(farthest) if self.norm == "l0" else farthest
        return {**state, "delta": torch.zeros_like(task.x), "radius": radius, "farthest": farthest}

    def step(self, victim: Victim, state: State) -> State:
        state, live = {**state}, self.live(state)
        point, found_before = state["x"] + state["delta"], state["found"]
        found = lead_gradient(victim, point, state["y"])
        wrong, size = self.offer(victim, state, point, found.logits, found.margin)
        boundary, gradient = size + reach(found.lead, found.gradient, self.norm), found.gradient
        taken_back = size < TAKEN_BACK * state["radius"]
        state["radius"] = self._next_radius(state, wrong, found_before, boundary, taken_back)
        length = self.length.at(state["iteration"])
        moved = state["delta"] + normalise(gradient, "l2") * per_sample(length, gradient)
        # The box contains x, so that clipping to it does not leave the ball.
        inside = state["x"] + project(moved, self.norm, state["radius"])
        state["delta"] = inside.clamp_(0.0, 1.0) - state["x"]
        state["zero_gradients"] = state["zero_gradients"] + live * stands_still(gradient)
        return state | {name: state[name] + live for name in ("iteration", "forwards", "backwards")}

    def _next_radius(
        self, state: State, wrong: Tensor, found_before: Tensor, boundary: Tensor, taken_back: Tensor
    ) -> Tensor:
        """Radii [n] of the next balls. wrong: the point is misclassified; found_before: an earlier one was; boundary:
        how far the linearised boundary is from the clean image; taken_back: the box kept the point inside its ball."""
        radius, nearest = state["radius"], state["distance"]
        pace = self.pace.at(state["iteration"])
        if self.norm == "l0":
            return torch.minimum(_whole_radius(radius, wrong, nearest, pace), state["farthest"])
        grown = radius * (1.0 + pace)
        least = torch.where(taken_back, STALLED, ARRIVED)
        stalled = (boundary <= least * radius) & (state["iteration"] > 0)
        outward = torch.where(found_before | stalled, grown, boundary)
        inward = torch.minimum(radius * (1.0 - pace), nearest)
        return torch.minimum(torch.where(wrong, inward, outward), state["farthest"])


def reach(lead: Tensor, gradient: Tensor, norm: Norm) -> Tensor:
    """Distance [n] to the linearised boundary, in a norm that has a dual; 0 in l0."""
    if norm == "l0":
        return torch.zeros_like(lead)
    # In units of the gradient's largest entry: squares of the gradients themselves may underflow or overflow.
    unit, size = norm_of(gradient, "linf"), norm_of(rescale(gradient), DUAL[norm])
    distance = lead.abs() / unit / size
    return torch.where(distance.isfinite(), distance, float("inf"))


def _whole_radius(radius: Tensor, wrong: Tensor, nearest: Tensor, pace: Tensor) -> Tensor:
    """The next number of values that may differ, [n], at least 1."""
    fewer = torch.minimum(torch.minimum(radius - 1.0, (radius * (1.0 - pace)).floor()), nearest)
    more = torch.maximum(radius + 1.0, (radius * (1.0 + pace)).floor())
    return torch.where(wrong, fewer, more).clamp(min=1.0)


@ATTACKS.register("fmn")
class FastMinimumNorm(MinimalAttack):
    """FMN (Pintor et al. 2021); see the module."""

    Parameters = FMNParameters
    norms: ClassVar[tuple[Norm, ...]] = ("l2", "linf", "l1", "l0")

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        p = spec.parameters
        words = (
            f"{p.get('steps', 100)} steps of Euclidean length {p.get('step_size', 1):g}, falling to a hundredth of it, "
            f"in a ball that shrinks by {100 * p.get('pace', 0.05):g} % where the image is misclassified, else grows."
        )
        return (cls.goal(spec),), words

    @property
    def cost(self) -> Cost:
        return Cost(forwards=self.parameters.steps + 2, backwards=self.parameters.steps)

    def plan(self) -> FMN:
        return FMN(self.spec.name, self.spec.norm, self.parameters)
