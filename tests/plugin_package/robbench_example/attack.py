"""A random-search attack: corners of the Linf ball, the first that fools the model is kept."""

import torch
from pydantic import Field
from torch import Tensor

from robbench.attacks import Attack, Cost, Victim
from robbench.attacks.base import Candidates, Task
from robbench.attacks.search.geometry import SampleNoise
from robbench.core.schema import Strict


class CornerParameters(Strict):
    """tries: corners drawn a sample."""

    tries: int = Field(default=5, gt=0)


class CornerAttack(Attack):
    """x + epsilon * sign(noise), clipped to the box; no gradient."""

    Parameters = CornerParameters

    @property
    def cost(self) -> Cost:
        return Cost(forwards=self.parameters.tries + 2, backwards=0)

    def search(self, victim: Victim, task: Task) -> Candidates:
        n, found = len(task.x), task.x.clone()
        broken = torch.zeros(n, dtype=torch.bool, device=task.x.device)
        step = torch.full((n,), -1, dtype=torch.int64)
        for number in range(self.parameters.tries):
            corner = self._corner(task, number)
            wins = (victim.logits(corner).argmax(1) != task.y) & ~broken
            found[wins], step[wins.cpu()] = corner[wins], number + 1
            broken |= wins
        calls = torch.full((n,), self.parameters.tries, dtype=torch.int64)
        return Candidates(found, step, calls, torch.zeros_like(calls), [self.spec.name] * n)

    def _corner(self, task: Task, number: int) -> Tensor:
        noise = SampleNoise(task.seed, self.spec.name, task.ids, number, task.x.device)
        epsilon = float(self.spec.epsilon or 0.0)
        return (task.x + epsilon * noise.uniform(tuple(task.x.shape[1:])).sign()).clamp(0.0, 1.0)
