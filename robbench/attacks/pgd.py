"""Gradient attacks on the image: FGSM, PGD and MIM in Linf, L2 and L1 balls."""

from abc import abstractmethod
from typing import ClassVar, Literal

from pydantic import BaseModel, Field

from robbench.attacks import engine
from robbench.attacks.base import Attack, Candidates, Task
from robbench.attacks.geometry import Start
from robbench.attacks.named import ATTACKS, Cost
from robbench.attacks.spaces import ImageSpace, SearchSpace
from robbench.attacks.victim import Victim
from robbench.schema import Strict


class GradientParameters(Strict):
    """What every iterative attack takes.

    step_size: absolute, in the units of the budget; None means relative_step_size * budget. momentum: MIM's decay.
    label_source: whose label the loss uses, the true one or the clean prediction (verdicts always use the true one).
    """

    steps: int = Field(gt=0)
    relative_step_size: float = Field(default=0.25, gt=0)
    step_size: float | None = Field(default=None, gt=0)
    start: Start = "uniform"
    restarts: int = Field(default=1, gt=0)
    momentum: float | None = None
    early_stop: bool = True
    label_source: Literal["true", "predicted"] = "true"

    def step(self, budget: float) -> float:
        """Step size for a budget."""
        return self.relative_step_size * budget if self.step_size is None else self.step_size


class GradientAttack(Attack):
    """Base of all gradient attacks: a subclass says in which space it searches, the engine does the rest.

    witnesses: perturbations to return, where the ball cannot be checked from the image alone.
    """

    Parameters: ClassVar[type[BaseModel]] = GradientParameters
    witnesses: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def space(self) -> SearchSpace:
        """The space with the budgets and step sizes of this attack's spec."""

    @property
    def cost(self) -> Cost:
        """Steps times restarts, the check between restarts and the two scoring forwards."""
        steps = self.parameters.steps * self.parameters.restarts
        return Cost(forwards=steps + self.parameters.restarts - 1 + 2, backwards=steps)

    @property
    def attacks_misclassified(self) -> bool:
        return not self.parameters.early_stop

    def search(self, victim: Victim, task: Task) -> Candidates:
        p: GradientParameters = self.parameters
        plan = engine.SearchPlan(self.space(), p.steps, p.restarts, p.momentum, p.early_stop, p.label_source)
        return engine.search(victim, plan, task, self.spec.name, self.witnesses)


@ATTACKS.register("pgd")
class ProjectedGradientDescent(GradientAttack):
    """PGD (Madry et al. 2018): cross-entropy, random start in the ball, projection on ball and box at every step.

    With `momentum` it is MIM (Dong et al. 2018), with one step of the full budget from the centre FGSM (Goodfellow
    et al. 2015). Deviation from the libraries' habit: a sample stops at its first misclassified iterate
    (early_stop); with early_stop off the last iterate is returned, as foolbox and torchattacks do.
    """

    def space(self) -> ImageSpace:
        p: GradientParameters = self.parameters
        epsilon = float(self.spec.epsilon or 0.0)
        return ImageSpace(self.spec.norm, epsilon, p.step(epsilon), p.start)
