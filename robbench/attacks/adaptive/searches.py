"""PGD and APGD with the objective of adaptive attacks in the place of a loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robbench.attacks.adaptive.objective import (
    GuardedTask,
    GuardedVictim,
    Strategy,
    as_nearest,
    keep_nearest,
    look,
    nothing_kept,
)
from robbench.attacks.autoattack.apgd import APGD
from robbench.attacks.search.engine import GradientSearch, SearchPlan
from robbench.attacks.search.geometry import per_sample
from robbench.attacks.search.spaces import ImageSpace, State
from robbench.attacks.search.task import Task
from robbench.attacks.victim import Victim
from robbench.specs import Norm


@dataclass(frozen=True)
class ShrinkingSteps(ImageSpace):
    """An image space whose step size falls linearly to 0 over so many `steps`: what is misclassified and accepted may
    be a wedge that longer steps jump over."""

    steps: int = 1

    def pace(self, state: State) -> Tensor:
        left = 1.0 - state["iteration"].float() / (self.steps + 1)
        return self.step_size * per_sample(left, state["x"])


class GuardedPGD(GradientSearch):
    """PGD on classifier and detector from one start. A budget of n steps is n + 1 iterates, all scored."""

    def __init__(
        self, space: ShrinkingSteps, name: str, restart: int, strategy: Strategy, weight: float
    ) -> None:
        super().__init__(SearchPlan(space, space.steps + 1), name, restart, ())
        self.strategy, self.weight = strategy, weight

    def begin(self, victim: Victim, task: Task) -> State:
        state = {**super().begin(victim, task), **nothing_kept(task.x), **_aim(task, self.weight)}
        if isinstance(task, GuardedTask) and task.start is not None:
            state["delta"] = task.start - task.x
        return state

    def look(self, victim: Victim, state: State) -> tuple[Tensor, Tensor, State, State]:
        assert isinstance(victim, GuardedVictim)
        images = (state["x"] + state["delta"]).clamp(0.0, 1.0)
        seen = look(victim, images, state, self.strategy)
        keep_nearest(state, images, seen)
        return images, seen.verdict, {"delta": seen.direction}, state

    def leave(self, state: State) -> State:
        return as_nearest(state)


class GuardedAPGD(APGD):
    """APGD on classifier and detector from one start: its step sizes follow the order of `objective.rank`."""

    def __init__(
        self,
        norm: Norm,
        epsilon: float,
        steps: int,
        name: str,
        restart: int,
        strategy: Strategy,
        weight: float,
    ) -> None:
        super().__init__(norm, epsilon, name=name, stream=name, restart=restart, budget=steps + 1)
        self.strategy, self.weight = strategy, weight

    def begin(self, victim: Victim, task: Task) -> State:
        return {**super().begin(victim, task), **nothing_kept(task.x), **_aim(task, self.weight)}

    def _noise(self, task: Task) -> Tensor:
        if isinstance(task, GuardedTask) and task.start is not None:
            return task.start - task.x
        return super()._noise(task)

    def look(self, victim: Victim, state: State) -> tuple[Tensor, Tensor, Tensor]:
        assert isinstance(victim, GuardedVictim)
        seen = look(victim, state["point"], state, self.strategy)
        keep_nearest(state, state["point"], seen)
        return seen.verdict, seen.rank, seen.direction

    def leave(self, state: State) -> State:
        return as_nearest(state)


def _aim(task: Task, weight: float) -> State:
    """State entries of `objective.look`."""
    towards: Tensor | None = getattr(task, "towards", None)
    aim = {} if towards is None else {"towards": towards}
    return {**aim, "weight": torch.full((len(task.x),), weight, device=task.x.device).logit()}


def likely_wrong_classes(victim: Victim, task: Task) -> Tensor:
    """Wrong classes [n,K-1] of the clean images, the most likely first; one forward."""
    logits = victim.logits(task.x).scatter(1, task.y[:, None], float("-inf"))
    return torch.argsort(logits, dim=1, descending=True, stable=True)[:, :-1]
