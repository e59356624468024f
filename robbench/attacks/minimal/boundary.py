"""Boundary attack (Brendel, Rauber & Bethge 2018), in L2: a random walk along the boundary, each move first on the
sphere around the clean image and then towards it, taken where the image is still misclassified.

Both lengths follow how often moves succeed. Moves on the sphere alone, every `CHECK_EVERY`th query, tell whether the
boundary looks flat at that length.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from robbench.attacks.minimal.decisions import WALK, DecisionAttack, DecisionParameters, DecisionSearch
from robbench.attacks.named import ATTACKS, Objective
from robbench.attacks.search.geometry import TINY, drawn_noise, norm_of, per_sample, put
from robbench.attacks.search.spaces import State
from robbench.attacks.search.task import Task
from robbench.attacks.victim import Victim
from robbench.specs import Norm, ResolvedAttack

CHECK_EVERY = 5  # queries
WINDOW = 20  # answers after which a length is revised
ON_SPHERE, INWARD = (
    (0.2, 0.5),
    (0.1, 0.25),
)  # shares of success below which lengths shrink, above which they grow
LEAST, MOST = 1e-6, 0.5  # lengths, relative to the distance


class BoundaryParameters(DecisionParameters):
    """Parameters of the boundary attack.

    Attributes:
        sphere_step: first length of moves on the sphere, relative to the distance.
        source_step: first length of moves towards the clean image, relative to the distance.
        pace: factor by which they grow and shrink.
    """

    sphere_step: float = Field(default=0.01, gt=0, le=MOST)
    source_step: float = Field(default=0.01, gt=0, le=MOST)
    pace: float = Field(default=1.5, gt=1)


class Boundary(DecisionSearch):
    """The search; see the module. State: sphere_step, source_step [n]; of both lengths the answers since they were
    revised, and successes among them: checks, checks_passed, moves, moves_passed [n]."""

    norm: Norm = "l2"
    resolution = 2.0**-10

    def __init__(self, name: str, parameters: BoundaryParameters, budget: float) -> None:
        super().__init__(name, "l2", parameters.queries, budget)
        self.parameters = parameters

    def begin(self, victim: Victim, task: Task) -> State:
        state = super().begin(victim, task)
        zeros = torch.zeros_like(state["distance"])
        counts = {name: zeros.clone() for name in ("checks", "checks_passed", "moves", "moves_passed")}
        steps = {name: zeros + getattr(self.parameters, name) for name in ("sphere_step", "source_step")}
        return {**state, **counts, **steps}

    def propose(self, state: State) -> Tensor:
        x, away = state["x"], state["point"] - state["x"]
        reach = norm_of(away, "l2").clamp(min=TINY)
        _, ray = drawn_noise(state["keys"], state["iteration"], x)
        inner = (ray * away).flatten(1).sum(1) / reach.square()
        tangent = ray - per_sample(inner, ray) * away
        length = state["sphere_step"] * reach / norm_of(tangent, "l2").clamp(min=TINY)
        moved = away + per_sample(length, ray) * tangent
        moved = moved / per_sample((1.0 + state["sphere_step"].square()).sqrt(), ray)
        around = (x + moved).clamp(0.0, 1.0)
        wanted = reach * (1.0 - state["source_step"]) / norm_of(around - x, "l2").clamp(min=TINY)
        wanted = torch.where(self._checks(state), 1.0, wanted.clamp(max=1.0))
        return torch.lerp(x, around, per_sample(wanted, x))

    def _checks(self, state: State) -> Tensor:
        return state["iteration"] % CHECK_EVERY == 0

    def learn(self, state: State, images: Tensor, wrong: Tensor) -> None:
        walking, checking = state["phase"] == WALK, self._checks(state)
        closer = norm_of(images - state["x"], "l2") < norm_of(state["point"] - state["x"], "l2")
        put(state["point"], images, walking & ~checking & wrong & closer)
        for name, asked in (("checks", walking & checking), ("moves", walking & ~checking)):
            state[name] = state[name] + asked
            state[f"{name}_passed"] = state[f"{name}_passed"] + (asked & wrong)
        self._revise(state, "checks", ON_SPHERE, ("sphere_step", "source_step"))
        self._revise(state, "moves", INWARD, ("source_step",))

    def _revise(
        self, state: State, answers: str, shares: tuple[float, float], steps: tuple[str, ...]
    ) -> None:
        due = state[answers] >= WINDOW
        share = state[f"{answers}_passed"] / WINDOW
        factor = torch.where(due & (share > shares[1]), self.parameters.pace, 1.0)
        factor = torch.where(due & (share < shares[0]), 1.0 / self.parameters.pace, factor)
        state |= {name: (state[name] * factor).clamp(LEAST, MOST) for name in steps}
        state |= {name: state[name].masked_fill(due, 0.0) for name in (answers, f"{answers}_passed")}

    def arrive(self, state: State, where: Tensor) -> None:
        state["phase"] = state["phase"].masked_fill(where, WALK)


@ATTACKS.register("boundary")
class BoundaryAttack(DecisionAttack):
    """The boundary attack (Brendel et al. 2018); see the module."""

    Parameters = BoundaryParameters
    norms: ClassVar[tuple[Norm, ...]] = ("l2",)

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        words = (
            f"{spec.parameters.get('queries', 5000)} decisions in all, no logits: a random walk of misclassified "
            "images, on the sphere around x and towards x, with steps that follow the share of successful moves."
        )
        return (cls.goal(spec),), words

    def plan(self) -> Boundary:
        return Boundary(self.spec.name, self.parameters, self.budget)
