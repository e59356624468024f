"""robbench's own AutoAttack (Croce & Hein 2020; 2021 for L1): APGD-CE, targeted APGD-DLR, targeted FAB, Square.

Components, schedules and budgets are those of the reference's standard version; each component runs on the samples
that are still robust after the ones before, by a clean fp32 forward. docs/autoattack.md lists the differences and why
none of them can overstate robustness; reports/autoattack/ measures parity with the reference.
"""

# ruff: noqa: RUF001 - the letters of formulas are meant
from collections.abc import Iterator
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from robbench.attacks.autoattack.apgd import APGD, LEAST_CLASSES, Loss
from robbench.attacks.autoattack.fab import TargetedFab
from robbench.attacks.autoattack.square import Square
from robbench.attacks.base import Attack, Candidates, Task
from robbench.attacks.named import ATTACKS, Cost, Objective
from robbench.attacks.search.active import Search, run_search, still_robust
from robbench.attacks.search.goals import Target
from robbench.attacks.trust.diagnosis import PROBED, cross_entropy
from robbench.attacks.trust.suspicions import Diagnostics
from robbench.attacks.victim import RANDOMISED_VERDICTS, Victim
from robbench.core.errors import UserError
from robbench.core.mathml import math, sub, under
from robbench.core.schema import Strict
from robbench.specs import ResolvedAttack

Component = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab-t", "square"]
STANDARD: tuple[Component, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")


class StandardBudgets(Strict):
    """Budgets of the standard version for Linf and L2. A model with fewer classes has fewer targets.

    Attributes:
        iterations: of APGD (per restart) and FAB (per target).
        apgd_restarts: of APGD-CE and APGD-DLR.
        target_classes, fab_target_classes: how many of the most likely wrong classes APGD-T and FAB-T try.
        square_queries: of Square.
        large_radii: L1's schedule of APGD, which starts with 3 and 2 epsilon.
    """

    iterations: int = Field(default=100, gt=0)
    apgd_restarts: int = Field(default=1, gt=0)
    target_classes: int = Field(default=9, gt=0)
    fab_target_classes: int = Field(default=9, gt=0)
    square_queries: int = Field(default=5000, gt=0)
    large_radii: bool = False


class AutoAttackParameters(StandardBudgets):
    """components: run in this order. eot_iterations: forwards averaged per APGD iterate and per verdict, for randomised
    models (20 in the reference's "rand" version). target: class to reach, or how it is chosen (`goals.choose_targets`),
    for apgd-ce and apgd-t; None for untargeted, where APGD-T and FAB-T try several classes."""

    components: tuple[Component, ...] = STANDARD
    eot_iterations: int = Field(default=1, gt=0)
    target: Target | None = None

    @model_validator(mode="after")
    def _components_can_aim(self) -> Self:
        rest = [name for name in self.components if name not in ("apgd-ce", "apgd-t")]
        if self.target is not None and rest:
            raise ValueError(
                f"component {rest[0]} has no targeted version; name apgd-ce or apgd-t alone with a target"
            )
        return self


def margin_objective(spec: ResolvedAttack) -> Objective:
    """The objective of an ensemble: any misclassified image of the set."""
    rival = under("max", "k ≠ y")
    goal = math("x′ ∈ 𝒜(x) :", sub("f", "y"), "(x′) ≤", rival, sub("f", "k"), "(x′)")
    parts = ", ".join(spec.parameters.get("components") or STANDARD)
    return (goal,), f"Searched by {parts}, each on the samples that are robust to those before it."


@ATTACKS.register("autoattack")
class AutoAttack(Attack):
    """AutoAttack with an active set: a broken sample leaves at once, a robust one gets every budget in full.

    Random numbers are keyed by (seed, attack, component, target, restart, sample id): the result of a sample depends on
    no other sample. With fewer than four classes targeted APGD uses the targeted cross-entropy, since DLR ranks four
    logits.
    """

    Parameters = AutoAttackParameters

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        return margin_objective(spec)

    @property
    def raises_cross_entropy(self) -> bool:
        """Only APGD-CE climbs the cross-entropy, and of several components the last one returns its image."""
        if self.parameters.target is not None:
            return False
        return list(self.parameters.components) == ["apgd-ce"]

    @property
    def verdict_forwards(self) -> int:
        p: AutoAttackParameters = self.parameters
        return p.eot_iterations

    @property
    def engine(self) -> str:
        p: AutoAttackParameters = self.parameters
        strict = f", right in {RANDOMISED_VERDICTS} averages" if p.eot_iterations > 1 else ""
        return super().engine + strict

    @property
    def cost(self) -> Cost:
        """Per robust sample, with as many classes as the targets need; every Square query is counted, although the Linf
        search skips those whose answer is known."""
        p: AutoAttackParameters = self.parameters
        k, e = p.iterations, p.eot_iterations
        restarts, targets = p.apgd_restarts, p.target_classes
        phases = 2 if p.large_radii else 0  # each phase scores its own start
        apgd = k + phases
        if p.target is not None:  # one class, which is known without a forward
            targets = p.apgd_restarts
        forwards = {
            "apgd-ce": (apgd + 1) * restarts,
            "apgd-dlr": (apgd + 1) * restarts,
            "apgd-t": (apgd + 2) * targets,
            "fab-t": (2 * k + 1) * p.fab_target_classes,
            "square": p.square_queries + 2,
        }
        backwards = {
            "apgd-ce": apgd * restarts,
            "apgd-dlr": apgd * restarts,
            "apgd-t": apgd * targets,
            "fab-t": k * p.fab_target_classes,
            "square": 0,
        }
        chosen = p.components
        scored = 1 + (RANDOMISED_VERDICTS if e > 1 else 1)  # the clean image once
        return Cost(e * (scored + sum(forwards[c] for c in chosen)), e * sum(backwards[c] for c in chosen))

    def search(self, victim: Victim, task: Task) -> Candidates:
        found = Candidates.unsearched(task.x, self.spec.name)
        rows, climbed = torch.arange(len(task.x)), Diagnostics()
        for component, search in self.searches(self._classes(victim, task)):
            if not len(rows):
                break
            run_search(victim, search, task, found, rows)
            rows = self._keep_robust(victim, task, found, rows, component)
            if component == "apgd-ce":
                climbed = self._measure_ascent(victim, task, found, rows)
        # With APGD-CE alone the base class measures the ascent itself, on the returned last iterates.
        if len(self.parameters.components) > 1:
            found.diagnostics += climbed
        return found

    def _measure_ascent(self, victim: Victim, task: Task, found: Candidates, rows: Tensor) -> Diagnostics:
        """Loss before and after APGD-CE, which has just left `rows` at its last iterates, for the first of them; these
        calls are not counted."""
        few = rows[: min(PROBED, task.batch_size)].to(task.x.device)
        if not len(few):
            return Diagnostics()
        with torch.no_grad():
            before, after = (
                cross_entropy(victim.logits(images[few]), task.y[few]).sum()
                for images in (task.x, found.adversarial)
            )
        return Diagnostics(held=len(few), loss_before=float(before), loss_after=float(after))

    def searches(self, classes: int) -> Iterator[tuple[Component, Search]]:
        """The searches of all components in order, one per restart or target."""
        for component in self.parameters.components:
            for search in self._component_searches(component, classes):
                yield component, search

    def _component_searches(self, component: Component, classes: int) -> Iterator[Search]:
        p: AutoAttackParameters = self.parameters
        if p.target is not None:
            yield from self._targeted_searches(component, classes)
        elif component == "square":
            yield Square(self.spec.norm, self.spec.radius, self._stream(component), p.square_queries)
        elif component == "fab-t":
            for target in range(1, min(p.fab_target_classes, classes - 1) + 1):
                yield TargetedFab(
                    self.spec.norm,
                    self.spec.radius,
                    name=component,
                    stream=self._stream(component),
                    target=target,
                    budget=p.iterations,
                )
        elif component == "apgd-t":
            loss: Loss = "dlr-targeted" if classes >= LEAST_CLASSES["dlr-targeted"] else "ce-targeted"
            for target in range(1, min(p.target_classes, classes - 1) + 1):
                yield self._apgd(component, loss, target, 0)
        else:
            for restart in range(p.apgd_restarts):
                yield self._apgd(component, "ce" if component == "apgd-ce" else "dlr", None, restart)

    def _targeted_searches(self, component: Component, classes: int) -> Iterator[Search]:
        """Searches that aim at the task's targets, one per restart."""
        ranked = component == "apgd-t" and classes >= LEAST_CLASSES["dlr-targeted"]
        for restart in range(self.parameters.apgd_restarts):
            yield self._apgd(component, "dlr-targeted" if ranked else "ce-targeted", 1, restart)

    def _apgd(self, component: Component, loss: Loss, target: int | None, restart: int) -> APGD:
        p: AutoAttackParameters = self.parameters
        return APGD(
            self.spec.norm,
            self.spec.radius,
            name=component,
            stream=self._stream(component),
            loss=loss,
            target=target,
            restart=restart,
            budget=p.iterations,
            large_radii=p.large_radii,
            eot_iterations=p.eot_iterations,
        )

    def _stream(self, component: Component) -> str:
        return f"{self.spec.name}/{component}"

    def _classes(self, victim: Victim, task: Task) -> int:
        classes = victim.logits(task.x[:1]).shape[1]
        if classes < LEAST_CLASSES["dlr"] and "apgd-dlr" in self.parameters.components:
            raise UserError(
                f"attack {self.spec.name!r}: component apgd-dlr ranks three logits, the model has {classes} classes; "
                f"use components [apgd-ce] in a threat-model YAML of your own"
            )
        return classes

    def _keep_robust(
        self, victim: Victim, task: Task, found: Candidates, rows: Tensor, component: Component
    ) -> Tensor:
        """The rows that are still robust; `found.component` of the others becomes `component`."""
        kept = still_robust(victim, task, found, rows)
        for row in rows[~torch.isin(rows, kept)].tolist():
            found.component[row] = component
        return kept
