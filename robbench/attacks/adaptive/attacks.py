"""`adaptive-pgd` and `adaptive-apgd`: attacks that know the detector.

An image breaks a sample when the classifier is wrong about it and the detector accepts it. The detector's score moves
as the predicted class does, and the two gradients often point against each other; so several directions are tried, one
search each (Bryniarski, Hein, Pal & Wagner 2021):

* oblivious: the classifier's alone, first of all; the detector only judges. What it finds starts later searches.
* selective: the classifier's while the image is right, the detector's while it is misclassified and flagged.
* orthogonal: as selective, without the part along the other gradient.
* combined: a weighted sum of both, of length 1 each; the detector weighs more after each step where it alone is in the
  way, and less where the classifier alone is.

Every search runs on the samples that are still robust, towards any wrong class and then towards each of the most
likely ones: detectors with a density for each class ask for an image that is ordinary for one of them.
"""

# ruff: noqa: RUF001 - the letters of formulas are meant
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from robbench.attacks.adaptive.objective import GuardedTask, GuardedVictim, Strategy, rank
from robbench.attacks.adaptive.searches import GuardedAPGD, GuardedPGD, ShrinkingSteps, likely_wrong_classes
from robbench.attacks.base import Attack, Candidates, Task
from robbench.attacks.guard import Guard
from robbench.attacks.named import ATTACKS, Cost, Objective
from robbench.attacks.search.active import Search, run_search
from robbench.attacks.search.geometry import per_sample
from robbench.attacks.search.spaces import Codec
from robbench.attacks.victim import Victim, chunks
from robbench.core.errors import UserError
from robbench.core.mathml import math, sub, under
from robbench.core.schema import Strict
from robbench.specs import ModelKind, ResolvedAttack

Start = Literal["oblivious", "random", "clean"]


class AdaptiveParameters(Strict):
    """Parameters of adaptive attacks.

    Attributes:
        steps: of every search.
        strategies: directions that are tried, see the module; after the oblivious search.
        weights: of the detector in combined directions at the start, above 0 and below 1; a search each.
        starts: where searches start: the image that the oblivious search ended with, a random one, the clean one.
        targets: number of most likely wrong classes that searches move to, beside any.
    """

    steps: int = Field(gt=0)
    strategies: tuple[Literal["combined", "selective", "orthogonal"], ...] = (
        "selective",
        "combined",
        "orthogonal",
    )
    weights: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(default=(0.5,), min_length=1)
    starts: tuple[Start, ...] = Field(default=("oblivious", "random"), min_length=1)
    targets: int = Field(default=3, ge=0)


class AdaptivePGDParameters(AdaptiveParameters):
    """relative_step_size: of the first step, a share of epsilon; step sizes fall linearly to 0."""

    relative_step_size: float = Field(default=0.2, gt=0)


@dataclass(frozen=True)
class Restart:
    """One search: its number, direction, weight of the detector, start, and the place of its class among the most
    likely wrong ones; None for any class."""

    number: int
    strategy: Strategy
    weight: float
    start: Start
    place: int | None


class AdaptiveAttack(Attack):
    """Base of the adaptive attacks. guard: the detector, set by whoever has it at hand."""

    target: ClassVar[ModelKind] = "detector"
    Parameters: ClassVar[type[BaseModel]] = AdaptiveParameters

    def __init__(self, spec: ResolvedAttack, flow: Codec | None = None) -> None:
        super().__init__(spec, flow)
        self.guard: Guard | None = None

    @abstractmethod
    def plan(self, restart: Restart) -> Search:
        """The search of one restart."""

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        rival = under("max", "k ≠ y")
        lines = (
            math("x′ ∈ 𝒜(x) :", sub("f", "y"), "(x′) ≤", rival, sub("f", "k"), "(x′)"),
            math("s(x′) ≤ τ"),
        )
        p = spec.parameters
        tried = ", ".join(p.get("strategies") or AdaptiveParameters.model_fields["strategies"].default)
        words = (
            f"s: score of the detector that guards f, τ: its threshold. {p.get('steps')} steps a search: along "
            f"the gradient of f alone, then {tried}, towards any class and the {p.get('targets', 3)} most likely wrong "
            f"ones."
        )
        return lines, words

    @property
    def cost(self) -> Cost:
        """Calls of classifier and detector together, with as many classes as there are targets."""
        searches = sum(1 for _ in self.restarts(self.parameters.targets))
        steps = (self.parameters.steps + 1) * searches
        return Cost(forwards=steps + searches + 1 + 2, backwards=steps)

    def restarts(self, targets: int) -> Iterator[Restart]:
        """All searches in order; targets: number of wrong classes to move to."""
        p: AdaptiveParameters = self.parameters
        number = 0
        yield Restart(number, "oblivious", 0.5, "random", None)
        for start in p.starts:
            for place in (None, *range(targets)):
                for strategy in p.strategies:
                    for weight in p.weights if strategy == "combined" else (0.5,):
                        number += 1
                        yield Restart(number, strategy, weight, start, place)

    def search(self, victim: Victim, task: Task) -> Candidates:
        guarded, found = (
            GuardedVictim(victim, self._require_guard()),
            Candidates.unsearched(task.x, self.spec.name),
        )
        rows = torch.arange(len(task.x))
        parts = [likely_wrong_classes(victim, task.part(part)) for part in chunks(rows, task.batch_size)]
        found.forwards += 1
        classes, begin = torch.cat(parts), task.x
        best = torch.full((len(rows),), float("-inf"), dtype=torch.float64, device=task.x.device)
        for restart in self.restarts(min(self.parameters.targets, classes.shape[1])):
            if not len(rows):
                break
            start = {"oblivious": begin, "random": None, "clean": task.x}[restart.start]
            towards = None if restart.place is None else classes[:, restart.place]
            aimed, kept = GuardedTask(**vars(task), start=start, towards=towards), found.adversarial.clone()
            run_search(guarded, self.plan(restart), aimed, found, rows)
            rows = self._keep(guarded, task, found, rows, kept, best)
            if restart.strategy == "oblivious":
                begin = found.adversarial.clone()
        found.step.clamp_(max=self.parameters.steps)
        return found

    def _require_guard(self) -> Guard:
        if self.guard is None:
            raise UserError(
                f"attack {self.spec.label!r} is on a classifier and its detector, and none is at hand; name a detector "
                f"as the model (robbench train --detector kde --model NAME)"
            )
        return self.guard

    @staticmethod
    def _keep(
        guarded: GuardedVictim, task: Task, found: Candidates, rows: Tensor, kept: Tensor, best: Tensor
    ) -> Tensor:
        """The `rows` that are still robust, by a clean forward that is counted; of these `found` goes back to the
        images `kept` [N,C,H,W] of earlier searches where these are nearer; their rank is `best` [N]."""
        robust = []
        for part in chunks(rows, task.batch_size):
            where = part.to(task.x.device)
            margin, excess = guarded.verdict(found.adversarial[where], task.y[where])
            found.forwards[part] += 1
            order, holds = rank(margin, excess), torch.maximum(margin, excess) > 0
            back = holds & (order <= best[where])
            found.adversarial[where] = torch.where(
                per_sample(back, kept), kept[where], found.adversarial[where]
            )
            best[where] = torch.maximum(order, best[where])
            robust.append(part[holds.cpu()])
        return torch.cat(robust)


@ATTACKS.register("adaptive-pgd")
class AdaptivePGD(AdaptiveAttack):
    """PGD on a classifier and its detector; see the module."""

    Parameters = AdaptivePGDParameters

    def plan(self, restart: Restart) -> Search:
        epsilon, p = self.spec.radius, self.parameters
        space = ShrinkingSteps(self.spec.norm, epsilon, p.relative_step_size * epsilon, steps=p.steps)
        return GuardedPGD(space, self.spec.name, restart.number, restart.strategy, restart.weight)


@ATTACKS.register("adaptive-apgd")
class AdaptiveAPGD(AdaptiveAttack):
    """APGD on a classifier and its detector; see the module."""

    def plan(self, restart: Restart) -> Search:
        return GuardedAPGD(
            self.spec.norm,
            self.spec.radius,
            self.parameters.steps,
            self.spec.name,
            restart.number,
            restart.strategy,
            restart.weight,
        )
