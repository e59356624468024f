"""Base of minimal-norm attacks: searches that return the nearest misclassified image of the box.

The search is unbounded. `epsilon` of such a spec is the budget at which the accuracy is read off the distances: a
sample counts as robust where the nearest image found is further away (`Attack._outcome`).
"""

# ruff: noqa: RUF001 - the letters of formulas are meant
import math as numbers
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from markupsafe import Markup
from torch import Tensor

from robbench.attacks.base import Attack, Candidates, Task
from robbench.attacks.search.active import Search, fresh_state, run_search
from robbench.attacks.search.decision import margins
from robbench.attacks.search.geometry import finite_part, known_empty, norm_of, put
from robbench.attacks.search.goals import goal_margins, missing_lead
from robbench.attacks.search.spaces import State
from robbench.attacks.victim import Victim
from robbench.core.errors import UserError
from robbench.core.mathml import length, math, under
from robbench.specs import Norm, ResolvedAttack

INDEX = {"linf": "∞", "l2": "2", "l1": "1", "l0": "0"}
SLACK = (
    2.0**-18
)  # share of the largest logit, 32 float32 roundings of it: by less, rounding decides who leads


class MinimalSearch(Search):
    """A search that keeps the nearest misclassified image it meets, until its iterations are used up.

    A sample that never met one leaves with its clean image. An image whose margin may be rounding is kept only as long
    as there is no other. Entries of the state besides `RESERVED`: x, y; found: [n] bool, an image is kept; distance:
    [n], of the kept image, infinite for none and for one within rounding; aim: [n], of a targeted search, the class to
    reach, without which no image counts as misclassified.

    Attributes:
        norm: of the distances.
        confidence: by how much, in logits, another class must lead the label.
    """

    norm: Norm
    confidence: float = 0.0

    def begin(self, victim: Victim, task: Task) -> State:
        fresh = fresh_state(task.x)
        far = torch.full((len(task.x),), float("inf"), device=task.x.device)
        aims = {} if task.targets is None else {"aim": task.targets}
        return {**fresh, **aims, "x": task.x, "y": task.y, "found": fresh["broken"].clone(), "distance": far}

    def leave(self, state: State) -> State:
        return {**state, "broken": state["found"]}

    def live(self, state: State) -> Tensor:
        """Which samples search on, [n] bool; the others must not change."""
        return state["iteration"] < self.iterations

    def offer(
        self, victim: Victim, state: State, images: Tensor, logits: Tensor, margin: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keep in place the `images` [n,C,H,W] that are misclassified and nearer than what is kept; logits: [n,K] of a
        forward of them, margin: [n] of these logits, where it is known. Returns which of them are misclassified,
        [n] bool, and their distances [n]."""
        if margin is None:
            margin = goal_margins(logits, state["aim"]) if "aim" in state else margins(logits, state["y"])
        margin = margin + self.confidence if self.confidence else margin
        distance = norm_of(images - state["x"], self.norm)
        wrong = margin <= 0
        taken = self.live(state) & wrong & (distance < state["distance"])
        if known_empty(taken):
            return wrong, distance
        slack = SLACK * largest(logits)
        taken = taken & ((margin <= -slack) | ~state["found"])
        if victim.must_confirm:
            margin = self._confirmed(victim, state, images, taken, margin)
            taken = taken & (margin <= 0)
        beyond_rounding = taken & (margin <= -slack)
        put(state["adversarial"], images, taken)
        state["distance"] = torch.where(beyond_rounding, distance, state["distance"])
        state["broken_at"] = torch.where(taken, state["iteration"], state["broken_at"])
        state["found"] = state["found"] | taken
        return wrong, distance

    def _confirmed(
        self, victim: Victim, state: State, images: Tensor, taken: Tensor, margin: Tensor
    ) -> Tensor:
        """`margin` with those of the model itself for the images `taken`; the calls are counted."""
        rows = taken.nonzero().squeeze(1)
        aims = state["aim"][rows] if "aim" in state else None
        own = victim.margins(images[rows], state["y"][rows], aims) + self.confidence
        state["forwards"] = state["forwards"] + taken * victim.draws
        return margin.index_copy(0, rows, own)


def largest(logits: Tensor) -> Tensor:
    """Size of the largest finite logit of each row, [n]."""
    return finite_part(logits).abs().amax(1)


@dataclass(frozen=True)
class Lead:
    """How far a sample is from success, and the way there.

    Attributes:
        logits: of the images, [n,K].
        margin: [n], at most 0 for a success, -inf for logits that are not finite (`margins`, `goal_margins`).
        lead: [n], of the best other class over the label, or of the class to reach over the best other one; 0 for
            logits that are not finite.
        gradient: of the lead, [n,C,H,W]; entries that are not finite are 0.
    """

    logits: Tensor
    margin: Tensor
    lead: Tensor
    gradient: Tensor


def lead_gradient(victim: Victim, images: Tensor, labels: Tensor, aims: Tensor | None = None) -> Lead:
    """The lead at images [n,C,H,W] with labels [n]; aims: classes to reach, [n]."""
    point = images.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = victim.differentiable(point)
        one = labels if aims is None else aims
        others = logits.scatter(1, one[:, None], float("-inf")).amax(1)
        over_one = others - logits.gather(1, one[:, None]).squeeze(1)
        lead = over_one if aims is None else -over_one
        (gradient,) = torch.autograd.grad(lead.sum(), point)
    logits, lead, finite = logits.detach(), lead.detach(), logits.detach().isfinite().all(1)
    margin = torch.where(finite, -lead, float("-inf")) if aims is None else missing_lead(-lead, finite)
    return Lead(logits, margin, torch.where(finite, lead, 0.0), finite_part(gradient))


class Annealed:
    """From `first` at iteration 0 to `last` at `iterations` along half a cosine; computed once for all iterations."""

    def __init__(self, first: float, last: float, iterations: int) -> None:
        share = (torch.arange(iterations + 1) * (numbers.pi / iterations)).cos().add_(1.0).mul_(0.5)
        self._values = last + (first - last) * share

    def at(self, iteration: Tensor) -> Tensor:
        """The values [n] at iterations [n]."""
        self._values = self._values.to(iteration.device)
        return self._values.index_select(0, iteration)


class MinimalAttack(Attack):
    """Base of minimal-norm attacks. A subclass makes its search for the norm of the spec, one of `norms`."""

    norms: ClassVar[tuple[Norm, ...]]

    def __init__(self, spec: ResolvedAttack, flow: None = None) -> None:
        super().__init__(spec, flow)
        if spec.space != "minimal" or spec.norm not in self.norms:
            raise UserError(
                f"attack {spec.name!r}: algorithm {spec.algorithm!r} searches space minimal in norm "
                f"{' or '.join(self.norms)}, not {spec.space} in {spec.norm}; correct the threat model's YAML"
            )

    @abstractmethod
    def plan(self) -> Search:
        """The search of one batch."""

    @classmethod
    def goal(cls, spec: ResolvedAttack) -> Markup:
        """The problem of every minimal-norm attack as a formula."""
        end = "≠ y" if spec.parameters.get("target") is None else "= t"
        return math(
            under("min", "x′ ∈ [0, 1]"), length("x′ - x", INDEX[spec.norm]), f"with arg max f(x′) {end}"
        )

    def search(self, victim: Victim, task: Task) -> Candidates:
        found = Candidates.unsearched(task.x, self.spec.name)
        run_search(victim, self.plan(), task, found, torch.arange(len(task.x)))
        return found
