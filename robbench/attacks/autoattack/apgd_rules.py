"""The timetable of an APGD search, and start, steps and step sizes by norm (Croce & Hein 2020; 2021)."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from robbench.attacks.search.geometry import direction, normalise, per_sample, project
from robbench.attacks.search.geometry_l1 import (
    project_l1_box,
    rounding_allowance,
    sparse_direction,
    support_size,
)
from robbench.attacks.search.spaces import State
from robbench.core.errors import UserError
from robbench.specs import Norm

MOMENTUM = 0.75  # share of the gradient step in an update; the rest continues the last update
SPARSITY_SHRINK, LEAST_STEP = 1.5, 0.1  # L1: divisor of support and step size; smallest step size / radius


@dataclass(frozen=True)
class Timetable:
    """What happens at the t-th iterate, t = 0..iterations: columns [iterations + 1], or [n] for the t of n samples.

    Attributes:
        first: whether t begins a phase.
        counts: whether the phase has the attack's own radius, so that a misclassified iterate breaks the sample.
        window: length of the window that a checkpoint at t closes, else 0.
        ends: whether t is scored for its loss only, and the next phase begins at the best point so far.
        radius: of the phase.
        following: radius of the next iterate.
    """

    first: Tensor
    counts: Tensor
    window: Tensor
    ends: Tensor
    radius: Tensor
    following: Tensor

    def at(self, iteration: Tensor) -> "Timetable":
        """The entries of samples at `iteration` [n]."""
        return Timetable(*(column[iteration] for column in vars(self).values()))

    def to(self, device: torch.device) -> "Timetable":
        """The timetable on `device`."""
        return Timetable(*(column.to(device) for column in vars(self).values()))


class Rule(ABC):
    """The part of APGD that depends on the norm: start, steps, and adaptation at checkpoints."""

    norm: Norm

    def __init__(self, epsilon: float, rho: float, lowest: float = 0.0) -> None:
        """lowest: lower bound of the loss, with which the loss after the first step is compared. The reference takes 0,
        the bound of the cross-entropy; -inf for a loss without one."""
        self.epsilon, self.rho, self.lowest = epsilon, rho, lowest

    @abstractmethod
    def windows(self, iterations: int) -> dict[int, int]:
        """Checkpoints of a phase and the length of the windows they close."""

    @abstractmethod
    def noise(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """Start relative to x, not yet admissible, from numbers [n, ...] uniform on [-1,1) and standard normal."""

    @abstractmethod
    def admit(self, state: State, point: Tensor, radius: Tensor) -> Tensor:
        """The admissible point nearest to `point` (for l2: ball first, then box). radius: [n]."""

    @abstractmethod
    def begin(self, x: Tensor, radius: Tensor) -> State:
        """State entries of this rule for samples x [n,C,H,W] whose first phase has `radius` [n]."""

    @abstractmethod
    def adapt(self, state: State, loss: Tensor, now: Timetable) -> Tensor:
        """Adapt the step sizes in `state`; True [n] for samples that continue from their best point."""

    @abstractmethod
    def move(self, state: State, point: Tensor, gradient: Tensor, now: Timetable) -> Tensor:
        """The next iterate from `point` with its gradient; state["old"] is the previous one (linf, l2)."""


class HalvingRule(Rule):
    """Linf and L2: momentum; the step size is halved after a window with too few improvements (2020, section 3)."""

    def windows(self, iterations: int) -> dict[int, int]:
        window, least = max(int(0.22 * iterations), 1), max(int(0.06 * iterations), 1)
        shorter = max(int(0.03 * iterations), 1)
        found: dict[int, int] = {}
        at = window
        while at <= iterations:
            found[at] = window
            window = max(window - shorter, least)
            at += window
        return found

    def begin(self, x: Tensor, radius: Tensor) -> State:
        zeros = torch.zeros_like(radius)
        return {
            "step_size": 2.0 * radius,
            "increases": zeros,
            "previous_loss": zeros,
            "checked_loss": zeros,
            "reduced": torch.ones_like(zeros, dtype=torch.bool),
        }

    def adapt(self, state: State, loss: Tensor, now: Timetable) -> Tensor:
        increases = state["increases"] + ((loss > state["previous_loss"]) & ~now.first)
        # The reference compares the loss after the first step with 0, not with the start's.
        state["previous_loss"] = loss.masked_fill(now.first, self.lowest)
        best, due = state["best_loss"], now.window > 0
        stuck = ~state["reduced"] & (state["checked_loss"] >= best)
        reduce = due & ((increases <= self.rho * now.window) | stuck)
        state["increases"] = increases.masked_fill(due, 0.0)
        state["reduced"] = torch.where(due, reduce, state["reduced"])
        state["checked_loss"] = torch.where(due | now.first, best, state["checked_loss"])
        state["step_size"] = torch.where(reduce, 0.5 * state["step_size"], state["step_size"])
        return reduce

    def move(self, state: State, point: Tensor, gradient: Tensor, now: Timetable) -> Tensor:
        step = direction(gradient, self.norm).mul_(per_sample(state["step_size"], gradient)).add_(point)
        share = per_sample(torch.where(now.first, 1.0, MOMENTUM), point)
        inertia = (point - state["old"]).mul_(1.0 - share)
        step = self.admit(state, step, now.radius).sub_(point).mul_(share).add_(point).add_(inertia)
        return self.admit(state, step, now.radius)


class LinfRule(HalvingRule):
    """APGD in Linf balls."""

    norm = "linf"

    def begin(self, x: Tensor, radius: Tensor) -> State:
        bounds = {"low": (x - self.epsilon).clamp_(min=0.0), "high": (x + self.epsilon).clamp_(max=1.0)}
        return {**super().begin(x, radius), **bounds}

    def noise(self, uniform: Tensor, normal: Tensor) -> Tensor:
        return self.epsilon * normalise(uniform, "linf")

    def admit(self, state: State, point: Tensor, radius: Tensor) -> Tensor:
        return point.clamp_(state["low"], state["high"])


class L2Rule(HalvingRule):
    """APGD in L2 balls."""

    norm = "l2"

    def noise(self, uniform: Tensor, normal: Tensor) -> Tensor:
        return self.epsilon * normalise(normal, "l2")

    def admit(self, state: State, point: Tensor, radius: Tensor) -> Tensor:
        x = state["x"]
        inside = self.epsilon - rounding_allowance(self.epsilon, x.shape[1:].numel())
        return project(point - x, "l2", inside).add_(x).clamp_(0.0, 1.0)


class L1Rule(Rule):
    """Sparse steps; their support follows that of the best point, and the step size with it (2021, section 4)."""

    norm = "l1"

    def __init__(self, epsilon: float, rho: float, large_radii: bool, lowest: float = 0.0) -> None:
        super().__init__(epsilon, rho, lowest)
        self.large_radii = large_radii

    def windows(self, iterations: int) -> dict[int, int]:
        window = max(int(0.04 * iterations), 1)
        return dict.fromkeys(range(window, iterations + 1, window), window)

    def begin(self, x: Tensor, radius: Tensor) -> State:
        support = torch.full_like(radius, x.shape[1:].numel())
        return {"step_size": radius.clone(), "density": torch.full_like(radius, 0.2), "support": support}

    def noise(self, uniform: Tensor, normal: Tensor) -> Tensor:
        return normal

    def admit(self, state: State, point: Tensor, radius: Tensor) -> Tensor:
        x = state["x"]
        inside = radius - rounding_allowance(self.epsilon, x.shape[1:].numel())
        return project_l1_box(point - x, x, inside).add_(x).clamp_(0.0, 1.0)

    def adapt(self, state: State, loss: Tensor, now: Timetable) -> Tensor:
        support, due = support_size(state["best"] - state["x"]), now.window > 0
        # The support of a dense random start is meaningless; that of a start projected on a smaller ball is measured.
        renew = due | (now.first & self.large_radii)
        sparser = due & (support / state["support"] < 0.95)
        density = support / state["x"].shape[1:].numel() / SPARSITY_SHRINK
        state["density"] = torch.where(renew, density, state["density"])
        state["support"] = torch.where(renew, support, state["support"])
        step = torch.where(due, state["step_size"] / SPARSITY_SHRINK, state["step_size"])
        step = torch.where(sparser | now.first, now.radius, step)
        state["step_size"] = step.clamp(min=LEAST_STEP * now.radius, max=now.radius)
        return sparser

    def move(self, state: State, point: Tensor, gradient: Tensor, now: Timetable) -> Tensor:
        dimensions = point.shape[1:].numel()
        left_out = ((1.0 - state["density"]) * dimensions).clamp_(0, dimensions - 1).long()
        step = sparse_direction(gradient, dimensions - left_out)
        step.mul_(per_sample(state["step_size"], step)).add_(point)
        step = torch.where(per_sample(now.ends, step), state["best"], step)
        return self.admit(state, step, now.following)


def rule_of(
    name: str, norm: Norm, epsilon: float, rho: float, large_radii: bool, lowest: float = 0.0
) -> Rule:
    """The rule of a norm; `UserError` for an unknown norm, and for large_radii with another norm than l1. name: of the
    component; lowest: see `Rule`."""
    if large_radii and norm != "l1":
        raise UserError(f"{name}: large_radii with norm {norm!r}; the schedule of radii is for l1 alone")
    if norm == "l1":
        return L1Rule(epsilon, rho, large_radii, lowest)
    if norm == "l2":
        return L2Rule(epsilon, rho, lowest)
    if norm == "linf":
        return LinfRule(epsilon, rho, lowest)
    raise UserError(f"{name}: norm {norm!r}; APGD searches in linf, l2 and l1 balls")
