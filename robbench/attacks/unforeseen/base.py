"""Base of attacks on the variables of a renderer."""

# ruff: noqa: RUF001 - the letters of formulas are meant
import math as numbers
from abc import abstractmethod
from typing import Any, ClassVar

from pydantic import Field

from robbench.attacks.named import Objective
from robbench.attacks.pgd import GradientAttack, GradientParameters, search_words
from robbench.attacks.search.rendered import VARIABLES, Optimizer, RenderedSpace, Renderer, Shape
from robbench.core.budget_limits import exact_text
from robbench.core.errors import UserError, spell_argument
from robbench.core.mathml import math, sub, under
from robbench.specs import Norm, ResolvedAttack, Semantics

STEPS = 200  # of the calibrated attacks of Kang et al.
FIXED_STEP = 0.002236  # theirs for fog, snow and gabor, whose variables have ranges of their own


class RenderedParameters(GradientParameters):
    """Parameters of an attack on a renderer's variables.

    Attributes:
        steps: gradient steps per restart.
        relative_step_size: None means 1 / sqrt(steps), as in Kang et al.
        step_size: in units of the variables, where it does not follow from the budget (fog, snow, gabor: 0.002236).
        optimizer: "steps", or "frank-wolfe", which has no step size.
    """

    steps: int = Field(default=STEPS, gt=0)
    relative_step_size: float | None = Field(default=None, gt=0)  # type: ignore[assignment]
    optimizer: Optimizer = "steps"

    def step(self, budget: float) -> float:
        if self.step_size is not None:
            return self.step_size
        return (self.relative_step_size or 1.0 / numbers.sqrt(self.steps)) * budget


class FixedStepParameters(RenderedParameters):
    """Parameters of attacks whose budget does not bound the variables; steps do not depend on it.

    Attributes:
        step_size: in the units of the variables.
        relative_step_size: none.
    """

    step_size: float = Field(default=FIXED_STEP, gt=0)
    relative_step_size: None = None


class RenderedAttack(GradientAttack):
    """Gradient ascent on the variables of a renderer (Kang et al. 2019, section 3).

    Untargeted. Unlike the published code, which returns the last iterate, a sample stops at its first misclassified
    iterate. A subclass names its `Renderer` class and builds it with the budget.
    """

    Parameters: ClassVar[type[RenderedParameters]] = RenderedParameters
    renders: ClassVar[type[Renderer]]
    witnesses = (VARIABLES,)

    @abstractmethod
    def renderer(self, epsilon: float) -> Renderer:
        """The renderer with budget `epsilon`, in its unit."""

    @property
    def step_norm(self) -> Norm:
        """Norm in which a step is steepest: the spec's, sign steps for "none"."""
        return "linf" if self.spec.norm == "none" else self.spec.norm

    @classmethod
    def declared_semantics(cls, parameters: Any) -> Semantics:
        """A perturbation where no variables render the clean image: the attacker cannot leave it alone."""
        return super().declared_semantics(parameters) if cls.renders.contains_clean else "perturbation"

    @property
    def steps(self) -> int:
        """None at budget 0, where all variables render one image (fog, snow: not the clean one)."""
        return super().steps if self.spec.epsilon else 0

    @property
    def raises_cross_entropy(self) -> bool:
        """Not without steps, and not above the loss of a clean image that the set does not hold: fog may lower it."""
        return bool(self.steps) and self.contains_clean

    @property
    def contains_clean(self) -> bool:
        return self.renders.contains_clean

    def __init__(self, spec: ResolvedAttack, flow: Any = None) -> None:
        super().__init__(spec, flow)
        _require_scale(self.spec, self.renderer(float(self.spec.epsilon or 0.0)))
        if self.parameters.optimizer == "frank-wolfe":
            _require_vertex(self.spec, self.renders)

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        formula = math(under("max", sub("v ∈ 𝒱", "ε")), "ℓ(f(clip(R(x, v))), y)")
        p = spec.parameters
        if p.get("optimizer") == "frank-wolfe":
            how = (
                "Step t = 0, 1, … moves v by 1 / (t + 1) towards the point of 𝒱 furthest along the gradient."
            )
            words = f"{p['steps']} steps of Frank-Wolfe. ℓ: cross-entropy. {how}"
        else:
            words = search_words(spec, "ε")
            if p.get("step_size") is None and p.get("relative_step_size") is None:
                words = f"α = ε / √{p['steps']}. {words}"
        return (formula,), f"{words} ε in {cls.renders.unit}."

    def space(self) -> RenderedSpace:
        epsilon, p = float(self.spec.epsilon or 0.0), self.parameters
        return RenderedSpace(self.renderer(epsilon), p.step(epsilon), self.step_norm, p.optimizer)

    def require_images(self, shape: Shape) -> None:
        self.renderer(float(self.spec.epsilon or 0.0)).shape(shape)


def _require_scale(spec: ResolvedAttack, renderer: Renderer) -> None:
    """`UserError` for a budget on another scale than the renderer's."""
    low, high = renderer.usual
    if spec.epsilon and not low <= spec.epsilon <= high:
        raise UserError(
            f"{spell_argument('epsilon', exact_text(spec.epsilon))}: attack {spec.name!r} counts epsilon in "
            f"{renderer.unit}; give {low:g} to {high:g}"
        )


def _require_vertex(spec: ResolvedAttack, renderer: type[Renderer]) -> None:
    """`UserError` for Frank-Wolfe where there is no vertex to move to."""
    if spec.norm != "l1" or renderer.vertex is Renderer.vertex:
        raise UserError(
            f"attack {spec.name!r}: optimizer 'frank-wolfe' needs norm l1 and an algorithm with vertices (pixels, "
            f"jpeg); give optimizer: steps"
        )
