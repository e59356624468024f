"""Decoupled direction and norm (Rony et al. 2019): normalised ascent on the loss, rescaled after every step to a sphere
whose radius shrinks where the image is misclassified and grows where it is not.

The direction is that of the cross-entropy, taken from the log-odds of an error, which keep a gradient where the
cross-entropy has rounded to 0. Images are not rounded to grey levels.
"""

from typing import ClassVar

import torch
from pydantic import Field

from robbench.attacks.minimal.base import Annealed, MinimalAttack, MinimalSearch
from robbench.attacks.named import ATTACKS, Cost, Objective
from robbench.attacks.search.geometry import TINY, norm_of, normalise, per_sample, stands_still
from robbench.attacks.search.inner import ascent_weights
from robbench.attacks.search.spaces import State
from robbench.attacks.search.task import Task
from robbench.attacks.victim import Victim
from robbench.core.schema import Strict
from robbench.specs import Norm, ResolvedAttack

LAST_STEP = 0.01


class DDNParameters(Strict):
    """Parameters of DDN.

    Attributes:
        steps: iterations, one forward and one backward each.
        radius: of the first sphere, in [0,1] pixels.
        pace: share by which the sphere grows or shrinks.
    """

    steps: int = Field(default=100, gt=0)
    radius: float = Field(default=1.0, gt=0)
    pace: float = Field(default=0.05, gt=0, lt=1)


class DDN(MinimalSearch):
    """The search; see the module."""

    norm: Norm = "l2"

    def __init__(self, name: str, parameters: DDNParameters) -> None:
        self.name, self.parameters, self.iterations = name, parameters, parameters.steps
        self.length = Annealed(1.0, LAST_STEP, self.iterations)

    def begin(self, victim: Victim, task: Task) -> State:
        state = super().begin(victim, task)
        farthest = norm_of(torch.maximum(task.x, 1.0 - task.x), "l2")
        radius = torch.full_like(farthest, self.parameters.radius)
        return {**state, "delta": torch.zeros_like(task.x), "radius": radius, "farthest": farthest}

    def step(self, victim: Victim, state: State) -> State:
        state, live = {**state}, self.live(state)
        point = (state["x"] + state["delta"]).requires_grad_(True)
        with torch.enable_grad():
            logits = victim.differentiable(point)
            (gradient,) = torch.autograd.grad(logits, point, ascent_weights(logits, state["y"]))
        wrong, _ = self.offer(victim, state, point.detach(), logits.detach())
        length = self.length.at(state["iteration"])
        moved = state["delta"] + normalise(gradient, "l2") * per_sample(length, gradient)
        pace = torch.where(wrong, 1.0 - self.parameters.pace, 1.0 + self.parameters.pace)
        state["radius"] = torch.minimum(state["radius"] * pace, state["farthest"])
        scale = state["radius"] / norm_of(moved, "l2").clamp(min=TINY)
        state["delta"] = (state["x"] + moved * per_sample(scale, moved)).clamp(0.0, 1.0) - state["x"]
        state["zero_gradients"] = state["zero_gradients"] + live * stands_still(gradient)
        return state | {name: state[name] + live for name in ("iteration", "forwards", "backwards")}


@ATTACKS.register("ddn")
class DecoupledDirectionNorm(MinimalAttack):
    """DDN (Rony et al. 2019); see the module."""

    Parameters = DDNParameters
    norms: ClassVar[tuple[Norm, ...]] = ("l2",)

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        p = spec.parameters
        words = (
            f"{p.get('steps', 100)} normalised gradient steps, each rescaled to a sphere of radius "
            f"{p.get('radius', 1):g} at first that shrinks by {100 * p.get('pace', 0.05):g} % where the image is "
            f"misclassified, else grows."
        )
        return (cls.goal(spec),), words

    @property
    def cost(self) -> Cost:
        return Cost(forwards=self.parameters.steps + 2, backwards=self.parameters.steps)

    def plan(self) -> DDN:
        return DDN(self.spec.name, self.parameters)
