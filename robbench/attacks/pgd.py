"""Gradient attacks on the image: FGSM, PGD and MIM in Linf, L2 and L1 balls."""

# ruff: noqa: RUF001 - the letters of formulas are meant
from abc import abstractmethod
from typing import Any, ClassVar, Literal

from markupsafe import Markup
from pydantic import BaseModel, Field, model_validator

from robbench.attacks.base import Attack, Candidates, Task
from robbench.attacks.named import ATTACKS, Cost, Objective
from robbench.attacks.search import engine
from robbench.attacks.search.geometry import Start
from robbench.attacks.search.spaces import Codec, ImageSpace, SearchSpace
from robbench.attacks.victim import Victim
from robbench.core.errors import UserError
from robbench.core.mathml import length, math, row, sub, under
from robbench.core.schema import Strict
from robbench.specs import Norm, ResolvedAttack, Semantics

LabelSource = Literal["true", "predicted"]


class GradientParameters(Strict):
    """Parameters of every iterative gradient attack.

    Attributes:
        steps: gradient steps per restart.
        step_size: in the units of the budget; None means relative_step_size * budget.
        start: where in the ball the search starts, see `geometry.random_start`.
        restarts: the first successful one is kept.
        momentum: decay of MIM's accumulated gradient; None for none.
        early_stop: stop at the first misclassified iterate.
        label_source: label in the loss, the true one or the clean prediction (verdicts always use the true one). With
            the prediction the last iterate is returned: early_stop is off and restarts is 1.
    """

    steps: int = Field(gt=0)
    relative_step_size: float = Field(default=0.25, gt=0)
    step_size: float | None = Field(default=None, gt=0)
    start: Start = "uniform"
    restarts: int = Field(default=1, gt=0)
    momentum: float | None = None
    early_stop: bool = True
    label_source: LabelSource = "true"

    @model_validator(mode="before")
    @classmethod
    def _last_iterate_against_the_prediction(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("label_source") == "predicted":
            return {"early_stop": False, **values}
        return values

    def step(self, budget: float) -> float:
        """Step size for `budget`, in its units."""
        return self.relative_step_size * budget if self.step_size is None else self.step_size


def steepest(gradient: str, norm: Norm) -> Markup | None:
    """The formula of the steepest-ascent direction; None for l1, which the text describes."""
    if norm == "linf":
        return row("sign(", gradient, ")")
    return row(gradient, "/", length(gradient, "2")) if norm == "l2" else None


def label_letter(spec: ResolvedAttack) -> str:
    """The letter of the label in the loss: k for the model's own prediction, y for the true label."""
    return "k" if spec.parameters.get("label_source") == "predicted" else "y"


def search_words(spec: ResolvedAttack, budget: str, *more: str) -> str:
    """Steps, step size, start and label of a gradient search as text. budget: letter of the budget that a relative step
    size refers to."""
    p = spec.parameters
    given, relative, restarts = p.get("step_size"), p.get("relative_step_size"), p.get("restarts", 1)
    parts = [
        f"{p['steps']} step{'s' if p['steps'] != 1 else ''}" if "steps" in p else "",
        f"α = {given:g}" if given is not None else f"α = {relative:g} of {budget}" if relative else "",
        f"start: {p['start']}" if "start" in p else "",
        f"{restarts} starts" if restarts > 1 else "",
    ]
    settings = ", ".join(filter(None, parts)) + ". ℓ: cross-entropy; Π: projection onto the set."
    predicted = label_letter(spec) == "k"
    label = "k: the model's own clean prediction in the place of the true label." if predicted else ""
    return " ".join(filter(None, [settings, *more, label]))


class GradientAttack(Attack):
    """Base of all gradient attacks: a subclass defines its search space, the engine searches in it.

    witnesses: names of the perturbations to return, where the ball cannot be checked from the image alone.
    """

    Parameters: ClassVar[type[BaseModel]] = GradientParameters
    witnesses: ClassVar[tuple[str, ...]] = ()

    def __init__(self, spec: ResolvedAttack, flow: Codec | None = None) -> None:
        super().__init__(spec, flow)
        p: GradientParameters = self.parameters
        if p.label_source == "predicted" and (p.early_stop or p.restarts > 1):
            given = f"restarts {p.restarts}" if p.restarts > 1 else "early_stop true"
            raise UserError(
                f"attack {spec.name!r}: label_source predicted with {given} would choose among images by the "
                f"true label; give early_stop: false and restarts: 1"
            )

    @property
    def raises_cross_entropy(self) -> bool:
        return True

    @abstractmethod
    def space(self) -> SearchSpace:
        """The search space with the budgets and step sizes of this attack's spec."""

    @property
    def steps(self) -> int:
        """Gradient steps per restart."""
        steps: int = self.parameters.steps
        return steps

    @property
    def cost(self) -> Cost:
        """Steps times restarts, the check between restarts and the two scoring forwards."""
        steps = self.steps * self.parameters.restarts
        return Cost(forwards=steps + self.parameters.restarts - 1 + 2, backwards=steps)

    @classmethod
    def declared_semantics(cls, parameters: Any) -> Semantics:
        """A perturbation where the loss uses the model's prediction: the image may move towards its true class."""
        return "perturbation" if parameters.label_source == "predicted" else "worst-case"

    @property
    def attacks_misclassified(self) -> bool:
        return super().attacks_misclassified or not self.parameters.early_stop

    def search(self, victim: Victim, task: Task) -> Candidates:
        p: GradientParameters = self.parameters
        plan = engine.SearchPlan(
            self.space(), self.steps, p.restarts, p.momentum, p.early_stop, p.label_source
        )
        return engine.search(victim, plan, task, self.spec.name, self.witnesses)


@ATTACKS.register("pgd")
class ProjectedGradientDescent(GradientAttack):
    """PGD (Madry et al. 2018): cross-entropy, random start in the ball, projection on ball and box at every step.

    With `momentum` it is MIM (Dong et al. 2018), with one step of the full budget from the centre FGSM (Goodfellow
    et al. 2015). Unlike foolbox and torchattacks, which return the last iterate, a sample stops at its first
    misclassified iterate unless early_stop is off.
    """

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        label, momentum = label_letter(spec), spec.parameters.get("momentum")
        lines = [math(under("max", "x′ ∈ 𝒜(x)"), f"ℓ(f(x′), {label})")]
        gradient = row("∇ ℓ(f(", sub("x", "t"), f"), {label})")
        words = search_words(spec, "ε")
        if momentum is not None:
            inertia = row("μ", sub("g", "t - 1"))
            lines.append(math(sub("g", "t"), "=", inertia, "+", gradient, "/", length(gradient, "1")))
            words += f" μ = {momentum:g}: momentum."
            gradient = sub("g", "t")
        step = steepest(gradient, spec.norm)
        if step is None:
            moved = "the 5 % of pixels with the largest gradient, by its sign, and is then projected."
            return tuple(lines), f"{words} A step moves {moved}"
        update = row("(", sub("x", "t"), "+ α", step, ")")
        return (*lines, math(sub("x", "t + 1"), "=", sub("Π", "𝒜(x)"), update)), words

    def space(self) -> ImageSpace:
        p: GradientParameters = self.parameters
        epsilon = float(self.spec.epsilon or 0.0)
        return ImageSpace(self.spec.norm, epsilon, p.step(epsilon), p.start)
