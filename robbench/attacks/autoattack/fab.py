"""Targeted FAB, the fast adaptive boundary attack (Croce & Hein 2020, "Minimally distorted adversarial examples").

Algorithm, schedule and budget are those of the reference's standard version: the decision boundary to one target class
is linearised at the current point, that point and the clean image are projected on it inside the box, and the next
point is a mean of both projections, overshot; a misclassified point is pulled back towards the clean image. The search
minimises the distance; here a sample leaves at the first misclassified point within epsilon, which decides the same
verdict.

An iteration scores two images: the point its gradient is taken at, and the new point, whose prediction decides whether
it is pulled back. Where it is (60 % to 80 % of iterations for linf and l2, 40 % to 50 % for l1, measured on robust
models), both are needed; which these are is known only after the second forward.
"""

import torch
from torch import Tensor

from robbench.attacks.search.active import Search, fresh_state, note
from robbench.attacks.search.decision import margins
from robbench.attacks.search.geometry import (
    finite_part,
    keyed_noise,
    known_empty,
    norm_of,
    per_sample,
    rescale,
    stands_still,
)
from robbench.attacks.search.geometry_box import steps_to_hyperplane
from robbench.attacks.search.spaces import State
from robbench.attacks.search.task import Task
from robbench.attacks.victim import Victim
from robbench.core.errors import UserError
from robbench.specs import Norm

LEAST_STEP = 1e-8  # norm below which a step counts as that long in the mean of two


class TargetedFab(Search):
    """One target class: the `target`-th most likely wrong class of the clean image, 1 for the most likely.

    epsilon: radius of the ball in which a misclassified point counts. budget: iterations; a sample that stays robust
    gets all of them, two forwards and one backward each. alpha_max: largest weight of the clean image's projection.
    overshoot: factor on both projections' steps, above 1 (eta in the paper). pull_back: what is kept of a
    misclassified point's distance (beta). Restart 0 starts at the clean image, others at a random point half a radius
    away; their noise is keyed by (seed, stream, target, restart, sample id).
    `UserError` for another norm, numbers out of range, and from the first step when the model has too few classes.
    """

    def __init__(
        self,
        norm: Norm,
        epsilon: float,
        *,
        name: str,
        stream: str,
        target: int,
        restart: int = 0,
        budget: int = 100,
        alpha_max: float = 0.1,
        overshoot: float = 1.05,
        pull_back: float = 0.9,
    ) -> None:
        if norm not in ("linf", "l2", "l1"):
            raise UserError(f"{name}: norm {norm!r}; FAB searches in linf, l2 and l1 balls")
        if not (epsilon > 0 and target > 0 and budget > 0):
            raise UserError(
                f"{name}: epsilon {epsilon:g}, target {target}, budget {budget}; all must be above 0 "
                f"(target 1 is the most likely wrong class)"
            )
        self.name, self.norm, self.epsilon = name, norm, epsilon
        self.stream, self.restart = f"{stream}/target {target}", restart
        self.target, self.iterations = target, budget
        self.alpha_max, self.overshoot, self.pull_back = alpha_max, overshoot, pull_back

    def begin(self, victim: Victim, task: Task) -> State:
        target = torch.zeros_like(task.y)  # chosen by the first step, which scores the clean image anyway
        state = {**fresh_state(task.x), "x": task.x, "y": task.y, "target": target, "point": task.x}
        if self.restart:
            # The starting point is not the clean image, whose logits choose the target.
            state["point"] = self._random_point(task)
            state["target"] = self._target_class(victim.logits(task.x), task.y)
            state["forwards"] += 1
        return state

    def step(self, victim: Victim, state: State) -> State:
        state = {**state}
        live = ~state["broken"] & (state["iteration"] < self.iterations)
        logits, lead, gradient = self._linearise(victim, state)
        # A point pulled back may still be misclassified, now inside the ball; its logits are at hand.
        self._note(state, live, state["point"], margins(logits, state["y"]))
        candidate = self._next_point(state, lead, gradient)
        margin = margins(victim.logits(candidate), state["y"])
        state["iteration"] = state["iteration"] + live
        state["zero_gradients"] = state["zero_gradients"] + live * stands_still(gradient)
        self._note(state, live, candidate, margin)
        # A mean of two points of the box is in it.
        share = torch.where(margin <= 0, self.pull_back, 1.0)
        state["point"] = torch.lerp(state["x"], candidate, per_sample(share, candidate))
        return state | {"forwards": state["forwards"] + 2 * live, "backwards": state["backwards"] + live}

    def _note(self, state: State, live: Tensor, images: Tensor, margin: Tensor) -> None:
        """`note` what counts: points within epsilon, of samples that still search."""
        if known_empty(margin <= 0):
            return
        counts = live & (norm_of(images - state["x"], self.norm) <= self.epsilon)
        note(state, images, margin.masked_fill(~counts, float("inf")), self.iterations)

    def _linearise(self, victim: Victim, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [n,K], lead of the target over the label [n] and its gradient [n,C,H,W] at state["point"].

        Chooses state["target"] for samples at the clean image.
        """
        point = state["point"].detach().requires_grad_(True)
        with torch.enable_grad():
            logits = victim.differentiable(point)
            if not self.restart:
                ranked = self._target_class(logits.detach(), state["y"])
                state["target"] = torch.where(state["iteration"] == 0, ranked, state["target"])
            pair = logits.gather(1, torch.stack([state["target"], state["y"]], 1))
            lead = pair[:, 0] - pair[:, 1]
            (gradient,) = torch.autograd.grad(lead.sum(), point)
        return logits.detach(), lead.detach(), gradient

    def _target_class(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The target-th most likely class other than the label, [n]."""
        if logits.shape[1] <= self.target:
            raise UserError(
                f"{self.name}: target {self.target} needs at least {self.target + 1} classes, the model has "
                f"{logits.shape[1]}; use at most {logits.shape[1] - 1} target classes"
            )
        wrong = logits.scatter(1, labels[:, None], float("-inf"))
        return wrong.topk(self.target, dim=1).indices[:, -1]

    def _next_point(self, state: State, lead: Tensor, gradient: Tensor) -> Tensor:
        """Mean of the overshot projections of point and clean image on {lead = 0}, linearised; in the box."""
        points = torch.stack([state["point"].flatten(1), state["x"].flatten(1)])
        # Lead and gradient in units of the gradient's largest entry: sums of the gradients themselves may overflow.
        largest = norm_of(finite_part(gradient), "linf")
        gradient = rescale(gradient).flatten(1)
        farthest = 2.0 * gradient.shape[1]  # more than the box can close
        lead = (lead.nan_to_num(0.0, 0.0, 0.0) / largest).clamp(-farthest, farthest)
        at_clean = lead + (gradient * (points[1] - points[0])).sum(1)
        steps = steps_to_hyperplane(points, gradient, torch.stack([lead, at_clean]), self.norm)
        size = norm_of(steps.flatten(0, 1), self.norm).reshape(2, -1).clamp_(min=LEAST_STEP)
        alpha = (size[0] / (size[0] + size[1])).clamp_(max=self.alpha_max)
        ends = points.add_(steps, alpha=self.overshoot)
        return torch.lerp(ends[0], ends[1], alpha[:, None]).clamp_(0.0, 1.0).reshape(state["point"].shape)

    def _random_point(self, task: Task) -> Tensor:
        """A point at half the radius from x in a random direction (Linf: its largest coordinate), in the box."""
        uniform, normal = keyed_noise(task.seed, self.stream, task.ids, self.restart, task.x)
        ray = uniform if self.norm == "linf" else normal
        length = per_sample(norm_of(ray, self.norm).clamp(min=LEAST_STEP), ray)
        return (task.x + ray * (0.5 * self.epsilon / length)).clamp_(0.0, 1.0)
