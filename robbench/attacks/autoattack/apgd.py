"""APGD, step-size-free projected gradient ascent (Croce & Hein 2020), and its L1 form (Croce & Hein 2021).

Algorithm, schedules and budgets are those of the reference's standard version. Step t of a search scores the iterate
x_t once: its logits give the loss, the margin and the gradient. The last iterate needs no gradient: it is returned
unscored and scored by `still_robust`. So a robust sample costs `iterations` backwards and, that score included, one
forward more.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from robbench.attacks.autoattack.apgd_rules import HalvingRule, Rule, Timetable, rule_of
from robbench.attacks.search.active import RESERVED, Search, fresh_state, note
from robbench.attacks.search.decision import margins
from robbench.attacks.search.geometry import (
    TINY,
    finite_part,
    keyed_noise,
    known_empty,
    per_sample,
    put,
    stands_still,
)
from robbench.attacks.search.goals import goal_margins
from robbench.attacks.search.inner import error_log_odds, temper_logits
from robbench.attacks.search.spaces import State
from robbench.attacks.search.task import Task
from robbench.attacks.victim import Victim
from robbench.core.errors import UserError
from robbench.specs import Norm

Loss = Literal["ce", "dlr", "ce-targeted", "dlr-targeted"]
LEAST_CLASSES: dict[Loss, int] = {"ce": 2, "dlr": 3, "ce-targeted": 2, "dlr-targeted": 4}


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio [n], invariant to shift and scale; positive when misclassified (2020, eq. 6)."""
    logits = _of_order_one(logits)
    top = logits.topk(3, dim=1)
    rival = torch.where(top.indices[:, 0] == labels, top.values[:, 1], top.values[:, 0])
    return -(_logit(logits, labels) - rival) / (top.values[:, 0] - top.values[:, 2] + TINY)


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """DLR towards the classes `targets` [n]; positive when these win over the labels (2020, eq. 7)."""
    logits = _of_order_one(logits)
    top = logits.topk(4, dim=1).values
    spread = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + TINY
    return -(_logit(logits, labels) - _logit(logits, targets)) / spread


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits, labels, reduction="none")


def _of_order_one(logits: Tensor) -> Tensor:
    """Logits [n,K] divided by the power of 2 next to their spread, so that `TINY` is as small for logits of any scale.
    Exact in floating point; equal logits are unchanged."""
    spread = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach()
    scale = torch.frexp(spread).mantissa / spread
    return logits * scale.nan_to_num(1.0, posinf=torch.finfo(scale.dtype).max)


def _logit(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


class APGD(Search):
    """APGD from one random start.

    norm: linf, l2 or l1; epsilon in [0,1] pixels. name: of the component. stream: key of the random numbers,
    "ATTACK/COMPONENT"; together with `restart` and `target` it determines the start. target: for targeted losses, 1 for
    the most likely wrong class of the clean image, 2 for the next one, unless the task has targets, which only they can
    break a sample then. budget: iterations per random start, shared by
    the phases where there are several. large_radii (l1 only): 3/10 of them at 3 epsilon, 3/10 at 2 epsilon, the rest at
    epsilon, each phase from the best point of the one before; only the last phase can break a sample. eot_iterations:
    forwards averaged per iterate (loss, gradient and logits), for randomised models. For models that are not
    randomised, `error_log_odds`, an increasing function of the cross-entropy that does not saturate, replaces it, and
    its gradient is that of tempered logits (`temper_logits`).
    """

    def __init__(
        self,
        norm: Norm,
        epsilon: float,
        *,
        name: str,
        stream: str,
        loss: Loss = "ce",
        target: int | None = None,
        restart: int = 0,
        budget: int = 100,
        rho: float = 0.75,
        large_radii: bool = False,
        eot_iterations: int = 1,
    ) -> None:
        matching = (target is not None and target >= 1) if "targeted" in loss else target is None
        if loss not in LEAST_CLASSES or not matching:
            raise UserError(
                f"{name}: loss {loss!r} with target {target}; give one of {', '.join(LEAST_CLASSES)}, "
                f"and a target (1 for the most likely wrong class) with the targeted ones only"
            )
        if eot_iterations < 1:
            raise UserError(
                f"{name}: eot_iterations {eot_iterations}; give 1, or more for a randomised model"
            )
        self.name, self.loss, self.target, self.restart = name, loss, target, restart
        self.stream = stream if target is None else f"{stream}/target {target}"
        self.eot_iterations = eot_iterations
        # The mean over several forwards is of cross-entropies: their gradients are not parallel to those of log-odds.
        self.unsaturated = loss == "ce" and eot_iterations == 1
        lowest = -math.inf if self.unsaturated else 0.0
        self.rule = rule_of(name, norm, epsilon, rho, large_radii, lowest)
        self.timetable = _timetable(_phases(name, epsilon, budget, large_radii), self.rule)
        self.iterations = len(self.timetable.first) - 1

    def begin(self, victim: Victim, task: Task) -> State:
        self.timetable = self.timetable.to(task.x.device)
        radius = self.timetable.radius[:1].expand(len(task.x))
        state = {**fresh_state(task.x), "x": task.x, "y": task.y}
        if task.targets is not None:
            state["target"] = state["aim"] = task.targets
        elif self.target is not None:
            state["target"] = self._targets(victim, task)
            state["forwards"] += self.eot_iterations
        state |= self.rule.begin(task.x, radius)
        point = self.rule.admit(state, task.x + self._noise(task), radius)
        state |= {"point": point, "best": point.clone(), "best_gradient": torch.zeros_like(point)}
        if isinstance(self.rule, HalvingRule):
            state["old"] = point
        return state | {"best_loss": torch.zeros(len(point), device=point.device)}

    def step(self, victim: Victim, state: State) -> State:
        now, before = self.timetable.at(state["iteration"]), dict(state)
        margin, loss, gradient = self.look(victim, state)
        still = stands_still(gradient)
        point, live = state["point"], ~state["broken"] & (state["iteration"] < self.iterations)
        margin = margin.masked_fill(~now.counts, float("inf"))
        note(state, point, margin, self.iterations)
        loss = self._keep_best(state, loss, gradient, now, live)
        back = self.rule.adapt(state, loss, now) & live
        put(point, state["best"], back)
        put(gradient, state["best_gradient"], back)
        state["point"] = self.rule.move(state, point, gradient, now)
        put(state["point"], point, ~live)
        if "old" in state:
            state["old"] = point
        if victim.must_confirm:
            _wait(state, before, live)
        calls = live * self.eot_iterations
        state["zero_gradients"] = state["zero_gradients"] + calls * still
        state["iteration"] = state["iteration"] + live
        return state | {name: state[name] + calls for name in ("forwards", "backwards")}

    def leave(self, state: State) -> State:
        """Samples that were not broken return their last iterate."""
        broken = per_sample(state["broken"], state["point"])
        return state | {"adversarial": torch.where(broken, state["adversarial"], state["point"])}

    def _keep_best(
        self, state: State, loss: Tensor, gradient: Tensor, now: Timetable, live: Tensor
    ) -> Tensor:
        """Update the best point of the phase in place; returns the loss with +inf for NaN: a point where the model is
        not finite is broken, and in an early phase, where that does not count, the next phase starts from it."""
        loss = loss.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
        better = (now.first | (loss > state["best_loss"])) & live
        state["best_loss"] = torch.where(better, loss, state["best_loss"])
        put(state["best"], state["point"], better)
        put(state["best_gradient"], gradient, better)
        return loss

    def look(self, victim: Victim, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Margins [n] of the iterates state["point"] (at most 0: broken), loss [n] and its gradient [n,C,H,W]."""
        logits, loss, gradient = self._score(victim, state)
        margin = goal_margins(logits, state["aim"]) if "aim" in state else margins(logits, state["y"])
        return margin, loss, gradient

    def _score(self, victim: Victim, state: State) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [n,K], loss [n] and its gradient [n,C,H,W] at state["point"], means over the EOT forwards."""
        point = state["point"].detach().requires_grad_(True)
        logits, loss, gradient = self._score_once(victim, point, state)
        for n in range(2, self.eot_iterations + 1):  # running means
            again = self._score_once(victim, point, state)
            logits, loss = logits.lerp(again[0], 1 / n), loss.lerp(again[1], 1 / n)
            gradient = gradient.lerp(again[2], 1 / n)
        return logits, loss, gradient

    def _score_once(self, victim: Victim, point: Tensor, state: State) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            logits = victim.differentiable(point)
            loss = climbed = self._losses(logits, state)
            if self.unsaturated:
                climbed = error_log_odds(temper_logits(logits, state["y"]), state["y"])
            (gradient,) = torch.autograd.grad(climbed.sum(), point)
        # One forward whose gradient is not finite must not spoil the mean of several.
        return logits.detach(), loss.detach(), gradient if self.eot_iterations == 1 else finite_part(gradient)

    def _losses(self, logits: Tensor, state: State) -> Tensor:
        self._require_classes(logits)
        if self.unsaturated:
            # 0 for equal logits, so that float32 resolves the differences of small ones.
            odds = error_log_odds(logits.detach().double(), state["y"])
            return (odds - math.log(logits.shape[1] - 1)).float()
        if self.loss == "ce":
            return _cross_entropy(logits, state["y"])
        if self.loss == "ce-targeted":
            return -_cross_entropy(logits, state["target"])
        if self.loss == "dlr":
            return dlr(logits, state["y"])
        return dlr_targeted(logits, state["y"], state["target"])

    def _require_classes(self, logits: Tensor) -> None:
        least = max(LEAST_CLASSES[self.loss], (self.target or 0) + 1)
        if logits.shape[1] < least:
            raise UserError(
                f"{self.name}: loss {self.loss!r}{f' with target {self.target}' if self.target else ''} needs at least "
                f"{least} classes, the model has {logits.shape[1]}; use fewer targets, or the loss 'ce'"
            )

    def _targets(self, victim: Victim, task: Task) -> Tensor:
        """The target-th most likely wrong class of the clean images, [n]."""
        logits = victim.logits(task.x)
        for _ in range(self.eot_iterations - 1):
            logits = logits + victim.logits(task.x)
        self._require_classes(logits)
        wrong = logits.scatter(1, task.y[:, None], float("-inf"))
        return wrong.argsort(dim=1, descending=True, stable=True)[:, (self.target or 1) - 1]

    def _noise(self, task: Task) -> Tensor:
        """The start relative to the clean images, not yet admissible, [n,C,H,W]."""
        return self.rule.noise(*keyed_noise(task.seed, self.stream, task.ids, self.restart, task.x))


def _wait(state: State, before: State, live: Tensor) -> None:
    """Undo a step for samples that are not `live`: one whose break is not confirmed searches on from where it was."""
    if known_empty(~live):
        return
    for name, value in before.items():
        if name not in (*RESERVED, "point") and state[name] is not value:
            state[name] = torch.where(per_sample(live, value), state[name], value)


def _phases(name: str, epsilon: float, budget: int, large_radii: bool) -> list[tuple[float, int]]:
    """(radius, iterations) of every phase."""
    least = 3 if large_radii else 1
    if budget < least or not epsilon > 0:
        raise UserError(
            f"{name}: {budget} iterations in a ball of radius {epsilon:g}; at least {least} and above 0"
        )
    if not large_radii:
        return [(epsilon, budget)]
    part = math.ceil(0.3 * budget)
    return [(3.0 * epsilon, part), (2.0 * epsilon, part), (epsilon, budget - 2 * part)]


def _timetable(phases: Sequence[tuple[float, int]], rule: Rule) -> Timetable:
    """The timetable of phases (radius, iterations). A phase of n iterations scores n + 1 iterates, except that the last
    iterate of the last phase is scored by `still_robust`."""
    rows: list[tuple[bool, bool, int, bool, float]] = []
    for number, (radius, iterations) in enumerate(phases):
        final, windows = number + 1 == len(phases), rule.windows(iterations)
        rows += [
            (t == 0, final, windows.get(t, 0), t == iterations and not final, radius)
            for t in range(iterations + 1)
        ]
    first, counts, window, ends, radii = (torch.tensor(column) for column in zip(*rows, strict=True))
    return Timetable(first, counts, window, ends, radii, torch.cat([radii[1:], radii[-1:]]))
