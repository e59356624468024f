"""HopSkipJump (Chen, Jordan & Wainwright 2020), in L2 and Linf: at the boundary, the mean of random directions weighted
by decisions estimates its normal; a step along it, halved until misclassified; a bisection back to the boundary.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from robbench.attacks.minimal.decisions import WALK, DecisionAttack, DecisionParameters, DecisionSearch
from robbench.attacks.named import ATTACKS, Objective
from robbench.attacks.search.geometry import drawn_noise, known_empty, norm_of, normalise, per_sample, put
from robbench.attacks.search.spaces import State
from robbench.attacks.search.task import Task
from robbench.attacks.victim import Victim
from robbench.core.mathml import math, row, sub
from robbench.specs import Norm, ResolvedAttack

PROBE, MOVE = WALK, WALK + 1  # phases: ask around the point; step along the estimate
FIRST_RADIUS = 0.1  # of the probes of the first round, in [0,1] pixels
FINEST = 2.0**-20  # of bisections and steps, relative: float32 resolves no more


class HopSkipJumpParameters(DecisionParameters):
    """Parameters of HopSkipJump.

    Attributes:
        probes: queries of the first estimate; that of round t has sqrt(t) times as many.
        most_probes: of an estimate.
    """

    probes: int = Field(default=100, gt=0)
    most_probes: int = Field(default=10000, gt=0)


class HopSkipJump(DecisionSearch):
    """The search; see the module.

    State: round [n], from 0, -1 before the first; reach [n], distance of the point; radius, probes, ups [n], of an
    estimate: length of a probe, queries so far, sum of the decisions (1 misclassified, -1 not); total, weighted
    [n,C,H,W], sums of directions, and of decisions times directions; direction [n,C,H,W], size [n], of a step.
    """

    def __init__(self, name: str, norm: Norm, parameters: HopSkipJumpParameters, budget: float) -> None:
        super().__init__(name, norm, parameters.queries, budget)
        self.parameters = parameters

    def begin(self, victim: Victim, task: Task) -> State:
        self.dimensions = task.x.shape[1:].numel()
        self.resolution = max(self.dimensions ** (-2.0 if self.norm == "linf" else -1.5), FINEST)
        state = super().begin(victim, task)
        scalars = ("reach", "radius", "probes", "ups", "size")
        state |= {name: torch.zeros_like(state["distance"]) for name in scalars}
        state |= {name: torch.zeros_like(task.x) for name in ("total", "weighted", "direction")}
        return {**state, "round": torch.full_like(state["phase"], -1)}

    def propose(self, state: State) -> Tensor:
        uniform, normal = drawn_noise(state["keys"], state["iteration"], state["x"])
        ray = normalise(uniform if self.norm == "linf" else normal, "l2")
        probe = per_sample(state["radius"], ray) * ray
        step = per_sample(state["size"], ray) * state["direction"]
        return state["point"] + torch.where(per_sample(state["phase"] == PROBE, ray), probe, step)

    def learn(self, state: State, images: Tensor, wrong: Tensor) -> None:
        probing, moving = state["phase"] == PROBE, state["phase"] == MOVE
        self._count(state, images, torch.where(wrong, 1.0, -1.0) * probing)
        wanted = (self.parameters.probes * (state["round"] + 1).clamp(min=1).sqrt()).floor()
        full = probing & (state["probes"] >= wanted.clamp(max=self.parameters.most_probes))
        state["size"] = torch.where(moving & ~wrong, 0.5 * state["size"], state["size"])
        stuck = moving & ~wrong & (state["size"] < FINEST * state["reach"])
        self._begin_step(state, full)
        self.arrive(state, stuck)
        self.bisect_from(state, images, moving & wrong)

    def _count(self, state: State, images: Tensor, decision: Tensor) -> None:
        """Add the answers `decision` [n]: 1, -1, or 0 for samples that do not probe."""
        radius = state["radius"].masked_fill(state["radius"] == 0, 1.0)
        ray = (images - state["point"]) / per_sample(radius, images)  # clipped to the box
        state["weighted"] = state["weighted"] + per_sample(decision, ray) * ray
        state["total"] = state["total"] + per_sample(decision.abs(), ray) * ray
        state["probes"] = state["probes"] + decision.abs()
        state["ups"] = state["ups"] + decision

    def _begin_step(self, state: State, where: Tensor) -> None:
        """Steps along the estimate, whose decisions are centred unless all are the same."""
        if known_empty(where):
            return
        mean = state["ups"] / state["probes"].clamp(min=1.0)
        mean = mean.masked_fill(mean.abs() == 1.0, 0.0)
        estimate = state["weighted"] - per_sample(mean, state["total"]) * state["total"]
        put(state["direction"], estimate.sign() if self.norm == "linf" else normalise(estimate, "l2"), where)
        size = state["reach"] / (state["round"] + 1).clamp(min=1).sqrt()
        state["size"] = torch.where(where, size, state["size"])
        state["phase"] = state["phase"].masked_fill(where, MOVE)

    def arrive(self, state: State, where: Tensor) -> None:
        if known_empty(where):
            return
        reach = norm_of(state["point"] - state["x"], self.norm)
        radius = torch.where(state["round"] < 0, FIRST_RADIUS, reach / self.dimensions)
        state["reach"] = torch.where(where, reach, state["reach"])
        state["radius"] = torch.where(where, radius, state["radius"])
        state["round"] = state["round"] + where
        state |= {name: state[name].masked_fill(where, 0.0) for name in ("probes", "ups")}
        state |= {
            name: state[name].masked_fill(per_sample(where, state[name]), 0.0)
            for name in ("total", "weighted")
        }
        state["phase"] = state["phase"].masked_fill(where, PROBE)


@ATTACKS.register("hopskipjump")
class HopSkipJumpAttack(DecisionAttack):
    """HopSkipJump (Chen et al. 2020); see the module."""

    Parameters = HopSkipJumpParameters
    norms: ClassVar[tuple[Norm, ...]] = ("l2", "linf")

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        p = spec.parameters
        decision = row(sub("φ", "i"), "- φ̄")
        estimate = math("v =", sub("Σ", "i"), "(", decision, ")", sub("u", "i"))
        words = (
            f"{p.get('queries', 5000)} decisions in all, no logits. φ: 1 where x + δu is misclassified, else -1; u: "
            f"{p.get('probes', 100)} random directions at first, √t times as many in round t. A step along "
            f"{'sign(v)' if spec.norm == 'linf' else 'v'}, halved until misclassified, then bisection."
        )
        return (cls.goal(spec), estimate), words

    def plan(self) -> HopSkipJump:
        return HopSkipJump(self.spec.name, self.spec.norm, self.parameters, self.budget)
