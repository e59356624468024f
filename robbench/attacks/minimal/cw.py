"""Carlini & Wagner's attack in L2 (2017): Adam on ||x' - x||^2 + c max(0, margin + confidence) in tanh space, with a
binary search over c per sample.

x' = (tanh(w) + 1) / 2 lies in the box whatever w is; w starts at the clean image, drawn in by `EDGE` so that pixels at
exactly 0 and 1 keep a gradient. A search over w ends early where a tenth of its steps did not lower the loss.
"""

# ruff: noqa: RUF001 - the letters of formulas are meant
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from robbench.attacks.minimal.base import MinimalAttack, MinimalSearch, lead_gradient
from robbench.attacks.named import ATTACKS, Cost, Objective
from robbench.attacks.search.geometry import known_empty, per_sample, stands_still
from robbench.attacks.search.goals import Target
from robbench.attacks.search.spaces import State
from robbench.attacks.search.task import Task
from robbench.attacks.victim import Victim
from robbench.core.mathml import length, math, row, sup, under
from robbench.core.schema import Strict
from robbench.specs import Norm, ResolvedAttack

# Of the range (-1, 1) of tanh, where w starts at most. Public code has 0.999999: pixels at 0 and 1 then need hundreds
# of steps to come back, and no image of such pixels alone is ever broken.
EDGE = 0.999
BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam
LARGEST_CONSTANT = 1e10
LARGEST_SLOPE = 1e18  # whose square is in the range of float32
LEAST_WINDOW = 10  # steps between checks of progress: Adam may overshoot for a few
PROGRESS = 0.9999  # factor by which a tenth of the steps must lower the loss


class CWParameters(Strict):
    """Parameters of the attack.

    Attributes:
        steps: Adam steps for each constant, one forward and one backward each.
        binary_search_steps: constants tried.
        step_size: of Adam, in tanh space.
        confidence: kappa, by how much in logits another class must lead the label for an image to be a success.
        initial_constant: c of the first search; times 10 until one succeeds, then bisected.
        abort_early: end the steps of a constant that makes no progress.
        target: class to reach, or how it is chosen per sample (`goals.choose_targets`); None for untargeted. With one,
            kappa is the lead of that class over the best other one.
    """

    steps: int = Field(default=1000, gt=0)
    binary_search_steps: int = Field(default=9, gt=0)
    step_size: float = Field(default=0.01, gt=0)
    confidence: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    initial_constant: float = Field(default=1e-3, gt=0)
    abort_early: bool = True
    target: Target | None = None


class CarliniWagner(MinimalSearch):
    """The search; see the module. Iteration k is step k % steps of constant k // steps.

    State: w, mean, square: [n,C,H,W], variables and Adam's moments; constant, low, high: [n], c and its bracket;
    reached: [n] bool, this constant succeeded; lowest: [n], loss with this constant; before: that at the last check of
    progress.
    """

    norm: Norm = "l2"

    def __init__(self, name: str, parameters: CWParameters) -> None:
        self.name, self.parameters, self.confidence = name, parameters, parameters.confidence
        self.iterations = parameters.steps * parameters.binary_search_steps
        taken = torch.arange(1, parameters.steps + 1, dtype=torch.float64)
        first, second = BETAS
        correction = (1.0 - second**taken).sqrt()
        # Adam's step with both moments corrected for their start at 0: rate * mean / (square ** 0.5 + eps)
        rate = parameters.step_size * correction / (1.0 - first**taken)
        self.rates = torch.stack([rate, EPS * correction], 1).float()

    def begin(self, victim: Victim, task: Task) -> State:
        state = super().begin(victim, task)
        zeros = torch.zeros_like(state["distance"])
        brackets = {
            "constant": zeros + self.parameters.initial_constant,
            "low": zeros,
            "high": zeros + float("inf"),
        }
        return self._restarted({**state, **brackets}, torch.ones_like(state["found"]))

    def step(self, victim: Victim, state: State) -> State:
        state, live = {**state}, self.live(state)
        squashed = state["w"].tanh()
        images = squashed.add(1.0).mul_(0.5)
        found = lead_gradient(victim, images, state["y"], state.get("aim"))
        wrong, _ = self.offer(victim, state, images, found.logits, found.margin)
        state["reached"] = state["reached"] | wrong
        missing = (self.confidence - found.lead).clamp_(min=0.0)
        difference = images.sub_(state["x"])
        loss = difference.flatten(1).square().sum(1) + state["constant"] * missing
        pull = per_sample(state["constant"] * (missing > 0) * 0.5, difference)
        slope = difference.sub_(pull * found.gradient).mul_(squashed.square_().neg_().add_(1.0))
        self._adam(state, slope.clamp_(-LARGEST_SLOPE, LARGEST_SLOPE))
        state["zero_gradients"] = state["zero_gradients"] + live * stands_still(found.gradient)
        state |= {name: state[name] + live for name in ("forwards", "backwards")}
        return self._advance(state, live, loss)

    def _adam(self, state: State, slope: Tensor) -> None:
        first, second = BETAS
        self.rates = self.rates.to(slope.device)
        rate, eps = self.rates.index_select(0, state["iteration"] % self.parameters.steps).unbind(1)
        state["mean"] = torch.lerp(slope, state["mean"], first)
        state["square"] = torch.lerp(slope.square(), state["square"], second)
        size = state["square"].sqrt().add_(per_sample(eps, slope))
        state["w"] = state["w"] - (state["mean"] * per_sample(rate, slope)).div_(size)

    def _advance(self, state: State, live: Tensor, loss: Tensor) -> State:
        """Count the iteration; begin the next constant where this one is done with."""
        steps = self.parameters.steps
        within = state["iteration"] % steps
        over = within + 1 == steps
        if self.parameters.abort_early:
            state["lowest"] = torch.minimum(state["lowest"], loss)
            due = within % max(LEAST_WINDOW, -(-steps // 10)) == 0
            over = over | (due & ~(state["lowest"] <= PROGRESS * state["before"]))
            state["before"] = torch.where(due, state["lowest"], state["before"])
        begun = state["iteration"] - within + steps
        state["iteration"] = torch.where(over & live, begun, state["iteration"] + live)
        return state if known_empty(over) else self._restarted(self._next_constant(state, over), over)

    def _next_constant(self, state: State, over: Tensor) -> State:
        """c and its bracket, moved where `over` [n]: c was enough, or too little."""
        c, reached = state["constant"], state["reached"]
        high = torch.where(over & reached, c, state["high"])
        low = torch.where(over & ~reached, c, state["low"])
        following = torch.where(high.isfinite(), (low + high) / 2.0, (10.0 * c).clamp(max=LARGEST_CONSTANT))
        return {**state, "high": high, "low": low, "constant": torch.where(over, following, c)}

    def _restarted(self, state: State, over: Tensor) -> State:
        """Variables at the clean image and moments at 0 where `over` [n]."""
        start = ((2.0 * state["x"] - 1.0) * EDGE).atanh()
        fresh = {"w": start, "mean": torch.zeros_like(start), "square": torch.zeros_like(start)}
        fresh |= {name: torch.full_like(state["distance"], float("inf")) for name in ("lowest", "before")}
        fresh |= {"reached": torch.zeros_like(state["found"])}
        if "w" not in state:
            return {**state, **fresh}
        return {
            **state,
            **{
                name: torch.where(per_sample(over, value), value, state[name])
                for name, value in fresh.items()
            },
        }


@ATTACKS.register("carlini-wagner")
class CarliniWagnerL2(MinimalAttack):
    """Carlini & Wagner's attack in L2; see the module."""

    Parameters = CWParameters
    norms: ClassVar[tuple[Norm, ...]] = ("l2",)

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        p = spec.parameters
        formula = math(
            under("min", "w"),
            sup(length("x′ - x", "2"), "2"),
            "+ c max(0,",
            row("m(x′) + κ"),
            "), x′ = (tanh w + 1) / 2",
        )
        target = p.get("target")
        lead = "logit of the label minus the largest other one"
        if target is not None:
            lead = f"largest other logit minus that of the class t to reach ({target})"
        words = (
            f"{p.get('binary_search_steps', 9)} values of c with {p.get('steps', 1000)} steps of Adam each; m: "
            f"{lead}; κ = {p.get('confidence', 0):g}: an image whose m is above -κ is no success, even if it is "
            f"misclassified."
        )
        return (cls.goal(spec), formula), words

    @property
    def cost(self) -> Cost:
        """Without early ends."""
        p: CWParameters = self.parameters
        steps = p.steps * p.binary_search_steps
        return Cost(forwards=steps + 2, backwards=steps)

    def plan(self) -> CarliniWagner:
        return CarliniWagner(self.spec.name, self.parameters)
