"""NES (Ilyas et al. 2018): PGD in the Linf ball along gradients estimated from scores, by antithetic Gaussian probes.

The estimate at x' is the mean over pairs of (L(x' + sigma u) - L(x' - sigma u)) u / (2 sigma), u standard normal, keyed
by sample id. Probes are clipped to the box, where a model is defined. Only iterates, which lie in ball and box, count
as adversarial examples.
"""

# ruff: noqa: RUF001 - the letters of formulas are meant
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from robbench.attacks.base import Attack, Candidates, Task
from robbench.attacks.named import ATTACKS, Cost, Objective
from robbench.attacks.search.active import Search, fresh_state, note, run_search
from robbench.attacks.search.decision import margins
from robbench.attacks.search.geometry import drawn_noise, finite_part, per_sample, project, put
from robbench.attacks.search.inner import error_log_odds
from robbench.attacks.search.spaces import Codec, State
from robbench.attacks.victim import Victim
from robbench.core.errors import UserError
from robbench.core.mathml import math, row, sub, under
from robbench.core.random import KeyedNumbers
from robbench.core.schema import Strict
from robbench.specs import ResolvedAttack

Loss = Literal["cross-entropy", "margin"]


class NESParameters(Strict):
    """Parameters of NES.

    Attributes:
        queries: at most, per sample: whole steps of 2 * pairs + 1, the last for the iterate itself.
        pairs: antithetic pairs of probes of an estimate.
        sigma: standard deviation of the probes, in [0,1] pixels.
        relative_step_size: of the sign steps, relative to the budget.
        momentum: decay of the sum of estimates.
        loss: what ascends: the log-odds of an error, which rise with the cross-entropy and do not saturate, or the
            largest other logit minus the label's.
    """

    queries: int = Field(default=5000, gt=0)
    pairs: int = Field(default=25, gt=0)
    sigma: float = Field(default=1e-3, gt=0, le=1)
    relative_step_size: float = Field(default=0.1, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    loss: Loss = "cross-entropy"

    @model_validator(mode="after")
    def _has_a_step(self) -> "NESParameters":
        if not self.steps:
            raise ValueError(f"queries of {self.queries} are no step, which takes {self.queries_per_step}")
        return self

    @property
    def queries_per_step(self) -> int:
        """Of an estimate and the iterate that follows."""
        return 2 * self.pairs + 1

    @property
    def steps(self) -> int:
        """Steps that the queries suffice for."""
        return self.queries // self.queries_per_step


class NESSearch(Search):
    """The search; an iteration is a query, of which a step takes `queries_per_step`. State: x, y, keys; momentum."""

    def __init__(self, name: str, epsilon: float, parameters: NESParameters) -> None:
        self.name, self.epsilon, self.parameters = name, epsilon, parameters
        self.iterations = parameters.steps * parameters.queries_per_step

    def begin(self, victim: Victim, task: Task) -> State:
        keys = KeyedNumbers(task.seed, self.name, task.ids, 0, task.x.device).keys
        momentum = torch.zeros_like(task.x)
        return {**fresh_state(task.x), "x": task.x, "y": task.y, "keys": keys, "momentum": momentum}

    def step(self, victim: Victim, state: State) -> State:
        p, state = self.parameters, {**state}
        live = ~state["broken"] & (state["iteration"] < self.iterations)
        estimate = self.estimate(victim, state)
        state["momentum"] = p.momentum * state["momentum"] + (1.0 - p.momentum) * estimate
        moved = state["adversarial"] + p.relative_step_size * self.epsilon * state["momentum"].sign()
        images = (state["x"] + project(moved - state["x"], "linf", self.epsilon)).clamp(0.0, 1.0)
        margin = margins(victim.logits(images), state["y"])
        put(state["adversarial"], images, live)
        asked = live * p.queries_per_step
        state |= {name: state[name] + asked for name in ("iteration", "forwards")}
        note(state, images, margin, self.iterations)
        return state

    def estimate(self, victim: Victim, state: State) -> Tensor:
        """The estimate of the gradient at the images of the state, [n,C,H,W]."""
        p, total = self.parameters, torch.zeros_like(state["x"])
        for pair in range(p.pairs):
            _, ray = drawn_noise(state["keys"], state["iteration"] + pair, state["x"])
            above, below = (
                self.loss(victim, (state["adversarial"] + sign * p.sigma * ray).clamp(0.0, 1.0), state["y"])
                for sign in (1.0, -1.0)
            )
            total += per_sample(finite_part(above - below), ray) * ray
        return total / (2.0 * p.sigma * p.pairs)

    def loss(self, victim: Victim, images: Tensor, labels: Tensor) -> Tensor:
        """What ascends, [n]."""
        logits = victim.logits(images)
        return (
            error_log_odds(logits, labels)
            if self.parameters.loss == "cross-entropy"
            else -margins(logits, labels)
        )


@ATTACKS.register("nes")
class NaturalEvolutionStrategies(Attack):
    """NES (Ilyas et al. 2018); see the module."""

    Parameters: ClassVar[type[NESParameters]] = NESParameters

    def __init__(self, spec: ResolvedAttack, flow: Codec | None = None) -> None:
        super().__init__(spec, flow)
        if spec.space != "image" or spec.norm != "linf":
            raise UserError(
                f"attack {spec.name!r}: algorithm 'nes' searches Linf balls of pixels, not {spec.space} in {spec.norm}"
                f"; correct the threat model's YAML"
            )

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        p = cls.Parameters.model_validate(spec.parameters)
        difference = row("(ℓ(", sub("x", "t"), "+ σu) - ℓ(", sub("x", "t"), "- σu)) u / 2σ")
        lines = (math(under("max", "x′ ∈ 𝒜(x)"), "ℓ(f(x′), y)"), math("g =", row("mean", difference)))
        words = (
            f"{p.steps} sign steps of {p.relative_step_size:g} ε along g with momentum {p.momentum:g}, g from "
            f"{p.pairs} antithetic pairs of Gaussian probes, σ = {p.sigma:g}: at most {p.queries} queries, no "
            f"gradients. ℓ: {p.loss}."
        )
        return lines, words

    @property
    def cost(self) -> Cost:
        return Cost(forwards=self.parameters.steps * self.parameters.queries_per_step + 2, backwards=0)

    def search(self, victim: Victim, task: Task) -> Candidates:
        found = Candidates.unsearched(task.x, self.spec.name)
        search = NESSearch(self.spec.name, self.spec.radius, self.parameters)
        run_search(victim, search, task, found, torch.arange(len(task.x)))
        return found
