"""DeepFool (Moosavi-Dezfooli, Fawzi & Frossard 2016), in L2 and Linf: repeated steps to the nearest of the linearised
boundaries to the other classes, until the image is misclassified.

One forward serves the gradients of all classes. The steps are summed up, overshot and clipped to the box, as in the
public implementations; the attack does not search on for a nearer image.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from robbench.attacks.minimal.base import MinimalAttack, MinimalSearch
from robbench.attacks.named import ATTACKS, Cost, Objective
from robbench.attacks.search.geometry import finite_part, known_empty, norm_of, per_sample, rescale
from robbench.attacks.search.spaces import State
from robbench.attacks.search.task import Task
from robbench.attacks.victim import Victim
from robbench.core.schema import Strict
from robbench.specs import Norm, ResolvedAttack

PUSH = 1e-4  # added to the length of a step, so that it does not end on the boundary
UNSET = -1


class DeepFoolParameters(Strict):
    """Parameters of DeepFool.

    Attributes:
        steps: iterations at most.
        candidates: most likely classes of the clean image that are considered, the label among them.
        overshoot: share by which the sum of the steps is lengthened.
    """

    steps: int = Field(default=50, gt=0)
    candidates: int = Field(default=10, gt=1)
    overshoot: float = Field(default=0.02, ge=0)


class DeepFool(MinimalSearch):
    """The search; see the module. Its last image is scored, but not linearised."""

    def __init__(self, name: str, norm: Norm, parameters: DeepFoolParameters) -> None:
        self.name, self.norm, self.parameters = name, norm, parameters
        self.iterations = parameters.steps + 1

    def begin(self, victim: Victim, task: Task) -> State:
        rivals = torch.full((len(task.x), self.parameters.candidates - 1), UNSET, device=task.x.device)
        zeros = torch.zeros_like(task.x)
        return {**super().begin(victim, task), "point": task.x, "total": zeros, "rivals": rivals}

    def step(self, victim: Victim, state: State) -> State:
        state = {**state}
        live = self.live(state)
        point = state["point"].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = victim.differentiable(point)
        self.offer(victim, state, point.detach(), logits.detach())
        done = state["distance"].isfinite()  # at the first image that is misclassified by more than rounding
        going = live & ~done & (state["iteration"] < self.parameters.steps)
        state["iteration"] = torch.where(done, self.iterations, state["iteration"] + live)
        state["forwards"] = state["forwards"] + live
        if known_empty(going):
            return state
        self._choose_rivals(state, logits.detach())
        step, backwards = self._nearest_boundary(state, logits, point)
        state["total"] = state["total"] + step * per_sample(going, step)
        moved = (state["x"] + (1.0 + self.parameters.overshoot) * state["total"]).clamp(0.0, 1.0)
        state["zero_gradients"] = (
            state["zero_gradients"] + (going & (step == 0).flatten(1).all(1)) * backwards
        )
        state["point"] = torch.where(per_sample(going, moved), moved, state["point"])
        return state | {"backwards": state["backwards"] + going * backwards}

    def _choose_rivals(self, state: State, logits: Tensor) -> None:
        """At its first iteration, a sample's most likely classes other than the label."""
        others = logits.scatter(1, state["y"][:, None], float("-inf"))
        count = min(state["rivals"].shape[1], logits.shape[1] - 1)
        first = torch.full_like(state["rivals"], UNSET)
        first[:, :count] = others.topk(count, dim=1).indices
        fresh = (state["rivals"] == UNSET).all(1, keepdim=True)
        state["rivals"] = torch.where(fresh, first, state["rivals"])

    def _nearest_boundary(self, state: State, logits: Tensor, point: Tensor) -> tuple[Tensor, int]:
        """The shortest step [n,C,H,W] to a linearised boundary of a rival, 0 where none has a gradient; and the
        backward passes that it took."""
        count = min(state["rivals"].shape[1], logits.shape[1] - 1)
        own = logits.gather(1, state["y"][:, None]).squeeze(1)
        nearest = torch.full_like(own.detach(), float("inf"))
        step = torch.zeros_like(state["point"])
        for k in range(count):
            lead = logits.gather(1, state["rivals"][:, k : k + 1]).squeeze(1) - own
            (gradient,) = torch.autograd.grad(lead.sum(), point, retain_graph=k + 1 < count)
            distance, towards = _to_boundary(lead.detach(), gradient, self.norm)
            closer = distance < nearest
            nearest = torch.where(closer, distance, nearest)
            step = torch.where(per_sample(closer, step), towards, step)
        return step, count


def _to_boundary(lead: Tensor, gradient: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """Distance [n] to the hyperplane where the linearised lead is 0, infinite for a gradient of 0, and the step there,
    lengthened by `PUSH`."""
    # In units of the gradient's largest entry: squares of the gradients themselves may overflow.
    unit = norm_of(finite_part(gradient), "linf")
    gradient = rescale(gradient)
    size = norm_of(gradient, "l2" if norm == "l2" else "l1")
    distance = lead.abs() / unit / size
    distance = torch.where(distance.isfinite(), distance, float("inf"))
    ray = gradient / per_sample(size.clamp(min=1.0), gradient) if norm == "l2" else gradient.sign()
    length = torch.where(distance.isfinite(), distance + PUSH, 0.0)
    return distance, ray * per_sample(length, ray)


@ATTACKS.register("deepfool")
class DeepFoolAttack(MinimalAttack):
    """DeepFool (Moosavi-Dezfooli et al. 2016); see the module."""

    Parameters = DeepFoolParameters
    norms: ClassVar[tuple[Norm, ...]] = ("l2", "linf")

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        p = spec.parameters
        words = (
            f"At most {p.get('steps', 50)} steps to the nearest linearised boundary among the "
            f"{p.get('candidates', 10)} most likely classes, their sum lengthened by "
            f"{100 * p.get('overshoot', 0.02):g} %; ends at the first misclassified image."
        )
        return (cls.goal(spec),), words

    @property
    def cost(self) -> Cost:
        """With as many classes as there are candidates; samples leave at their first misclassified image."""
        p: DeepFoolParameters = self.parameters
        return Cost(forwards=p.steps + 3, backwards=p.steps * (p.candidates - 1))

    def plan(self) -> DeepFool:
        return DeepFool(self.spec.name, self.spec.norm, self.parameters)
