"""AutoAttack (Croce & Hein 2020) through the reference package `pyautoattack`, one component at a time.

The components and their budgets are the package's own (APGD-CE, targeted APGD-DLR, targeted FAB, Square); robbench runs
them one after another on the samples that are still robust, checks and re-scores what they return, and records which
component broke which sample. The package draws random numbers per batch, so that a verdict can depend on which samples
share a batch; its seed is derived from (seed, component, sample ids of the batch), so that a shard can be reproduced.
"""

import contextlib
import io
from importlib.metadata import version
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robbench.attacks.autoattack.ensemble import StandardBudgets, margin_objective
from robbench.attacks.base import Attack, Candidates, Task
from robbench.attacks.named import ATTACKS, Cost, Objective
from robbench.attacks.victim import Victim, chunks
from robbench.core.errors import UserError
from robbench.core.random import derive_seed
from robbench.specs import ResolvedAttack

Component = Literal["apgd-ce", "apgd-t", "fab-t", "square"]
STANDARD: tuple[Component, ...] = ("apgd-ce", "apgd-t", "fab-t", "square")


class ReferenceParameters(StandardBudgets):
    """Components and budgets of the standard version; at most classes - 1 target classes are used."""

    components: tuple[Component, ...] = STANDARD


class _CountingModel(nn.Module):
    """The model as the package calls it; counts images, and those with a graph."""

    def __init__(self, victim: Victim) -> None:
        super().__init__()
        self.victim, self.images, self.graphs = victim, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.images += len(x)
        self.graphs += len(x) if torch.is_grad_enabled() and x.requires_grad else 0
        out = self.victim.differentiable(x)
        # The package takes argmax of NaN as a prediction, and might call such an image robust.
        if not bool(out.isfinite().all()):
            raise UserError(
                "the model returned NaN or infinite logits for an attacked image, which the reference package cannot "
                "judge; attack it with aa, where such an image counts as broken"
            )
        return out


@ATTACKS.register("autoattack-reference")
class AutoAttackReference(Attack):
    """AutoAttack standard by `pyautoattack`. Counts per sample are means over its batch (counts_exact is false)."""

    Parameters = ReferenceParameters
    batch_dependent = True

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        return margin_objective(spec)

    @property
    def engine(self) -> str:
        return f"{super().engine}, pyautoattack {version('pyautoattack')}"

    @property
    def cost(self) -> Cost:
        """Calls of the reference implementation per robust sample (one restart per component)."""
        p: ReferenceParameters = self.parameters
        k, t, f = p.iterations, p.target_classes, p.fab_target_classes
        forwards = {
            "apgd-ce": (k + 3) * p.apgd_restarts,
            "apgd-t": (k + 2) * t + 2,
            "fab-t": (2 * k + 3) * f + 2,
            "square": p.square_queries + 4,
        }
        backwards = {"apgd-ce": (k + 1) * p.apgd_restarts, "apgd-t": (k + 1) * t, "fab-t": k * f, "square": 0}
        chosen = p.components
        return Cost(2 + sum(forwards[c] for c in chosen), sum(backwards[c] for c in chosen))

    def search(self, victim: Victim, task: Task) -> Candidates:
        classes = victim.logits(task.x[:1]).shape[1]
        if classes < 4 and "apgd-t" in self.parameters.components:
            raise UserError(
                f"attack {self.spec.name!r} needs at least 4 classes (its DLR loss ranks four logits), the model has "
                f"{classes}; use components [apgd-ce, fab-t, square] in a threat-model YAML of your own"
            )
        found = Candidates.unsearched(task.x, self.spec.name)
        found.counts_exact = False
        model = _CountingModel(victim)
        package = self._package(model, victim.device, classes)
        rows = torch.arange(len(task.x))
        for component in self.parameters.components:
            if not len(rows):
                break
            parts = chunks(rows, task.batch_size)
            broken = [
                self._run_component(component, package, model, victim, task, found, part) for part in parts
            ]
            rows = rows[~torch.cat(broken)]
        return found

    def _package(self, model: nn.Module, device: torch.device, classes: int) -> Any:
        from pyautoattack import AutoAttack

        p: ReferenceParameters = self.parameters
        norms = {"linf": "Linf", "l2": "L2", "l1": "L1"}
        package = AutoAttack(
            model, norm=norms[self.spec.norm], eps=float(self.spec.epsilon or 0.0), device=device, seed=0
        )
        package.apgd.n_iter = package.apgd_targeted.n_iter = package.fab.n_iter = p.iterations
        # with large radii the package counts from n_iter_orig instead
        package.apgd.n_iter_orig = package.apgd_targeted.n_iter_orig = p.iterations
        package.apgd.n_restarts = p.apgd_restarts
        package.apgd_targeted.n_restarts = package.fab.n_restarts = 1
        package.apgd.use_largereps = package.apgd_targeted.use_largereps = p.large_radii
        package.apgd_targeted.n_target_classes = min(p.target_classes, classes - 1)
        package.fab.n_target_classes = min(p.fab_target_classes, classes - 1)
        package.square.n_queries = p.square_queries
        package.apgd.loss, package.fab.targeted = "ce", True
        return package

    def _run_component(
        self,
        component: Component,
        package: Any,
        model: _CountingModel,
        victim: Victim,
        task: Task,
        found: Candidates,
        rows: Tensor,
    ) -> Tensor:
        """Run one component on `rows`; True where a clean forward misclassifies its example."""
        part = {
            "apgd-ce": package.apgd,
            "apgd-t": package.apgd_targeted,
            "fab-t": package.fab,
            "square": package.square,
        }
        attack = part[component]
        attack.seed = derive_seed(task.seed, self.spec.name, component, task.ids[rows].tolist()) % 2**31
        x, y = task.x[rows], task.y[rows]
        model.images = model.graphs = 0
        devices = [task.x.device] if task.x.device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad(), contextlib.redirect_stdout(io.StringIO()):
            candidate = attack.perturb(x.clone(), y.clone()).detach()
        broken = (victim.margins(candidate, y) <= 0).cpu()
        found.forwards[rows] += round(model.images / len(rows)) + 1
        found.backwards[rows] += round(model.graphs / len(rows))
        found.adversarial[rows[broken]] = candidate[broken.to(candidate.device)]
        for row in rows[broken].tolist():
            found.component[row] = component
        return broken
