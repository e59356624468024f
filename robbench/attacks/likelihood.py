"""Attacks on a flow's likelihood (Pope, Balaji and Feizi 2020, sections 3 and 4; facts in bits/dim).

In-distribution: raise the NLL of test images. Out-of-distribution: lower the NLL of uniform-noise images. Baseline:
uniform noise of the same size. All in an Linf ball on the 0..255 scale, clipped to [0,255].

An attack only searches. The base class checks every image (box, ball, NaN) and scores it itself; its dequantisation
noise is a function of (seed, sample id), the same before and after the attack. A search draws new noise at every step.
"""

# ruff: noqa: RUF001 - the letters of formulas are meant
from abc import abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from robbench.attacks.checks import check_tensor, inside_ball, inside_box, require_image_budget
from robbench.attacks.named import ATTACKS, Cost, NamedAttack, Objective
from robbench.attacks.search.geometry import SampleNoise, Start, norm_of
from robbench.attacks.search.inner import ascend
from robbench.attacks.search.spaces import ImageSpace
from robbench.attacks.trust.context import full_precision
from robbench.attacks.victim import chunks
from robbench.core.errors import UserError
from robbench.core.mathml import math, row, sub, sup, under
from robbench.core.random import KeyedNumbers, SampleRandom
from robbench.core.schema import Strict
from robbench.models.flows.base import FlowModel, FrozenFlow
from robbench.models.flows.checks import (
    PROBED,
    require_density_gradient,
    require_normalised,
    same_density,
)
from robbench.specs import ModelKind, ResolvedAttack
from robbench.statistics.likelihood import BitsEstimate, estimated_bits_per_dim

Images = Literal["test", "noise"]
RELATIVE_STEP = 2.5  # step size times steps over epsilon; the paper states none


class LikelihoodParameters(Strict):
    """images: attack "test" images (raise their NLL) or "noise", images of uniform grey levels (lower it).

    quantize: round the adversarial images to the flow's grey levels, towards the original. noise_draws: draws of
    dequantisation noise per image in its score. estimate: "mean" of the draws' bits/dim, or "importance", the bits/dim
    of their mean density, a tighter bound (Burda et al. 2016).
    """

    images: Images = "test"
    quantize: bool = False
    noise_draws: int = Field(default=1, gt=0)
    estimate: BitsEstimate = "mean"


class NllParameters(LikelihoodParameters):
    """steps: sign steps. step_size: on the 0..255 scale; None means 2.5 epsilon / steps. restarts: number of searches,
    of which the one with the strongest score is kept; with start "zero" all but the first start at random."""

    steps: int = Field(gt=0)
    step_size: float | None = Field(default=None, gt=0)
    start: Start = "zero"
    restarts: int = Field(default=1, gt=0)

    def step(self, epsilon: float) -> float:
        """Step size for a budget, both on the 0..255 scale."""
        return RELATIVE_STEP * epsilon / self.steps if self.step_size is None else self.step_size


@dataclass
class LikelihoodOutcome:
    """Verified result: tensors on the CPU, N rows in the order of the call.

    Attributes:
        sample_ids, labels: [N] int64.
        nll_before, nll_after: bits/dim of original and attacked image, [N] float64, may be infinite or NaN.
        l1, l2, linf: norms of the perturbation, in [0,1] pixels.
        forwards, backwards: calls of the flow, [N].
        originals, adversarial: images [N,C,H,W] in [0,1] before and after the attack.
    """

    sample_ids: Tensor
    labels: Tensor
    nll_before: Tensor
    nll_after: Tensor
    l1: Tensor
    l2: Tensor
    linf: Tensor
    forwards: Tensor
    backwards: Tensor
    originals: Tensor
    adversarial: Tensor


@dataclass(frozen=True)
class LikelihoodTask:
    """A batch to search. ids: [n], on the CPU. x: originals [n,C,H,W] in [0,1]; y: labels [n], on x's device."""

    ids: Tensor
    x: Tensor
    y: Tensor
    seed: int


class LikelihoodAttack(NamedAttack):
    """Base class of attacks on a flow's likelihood. Subclasses set `Parameters` and implement `search` and `cost`."""

    Parameters: ClassVar[type[Strict]] = LikelihoodParameters
    target: ClassVar[ModelKind] = "flow"
    judging = ("evaluate", "_one_batch", "_originals", "_score")

    @abstractmethod
    def search(self, flow: FrozenFlow, task: LikelihoodTask) -> Tensor:
        """Adversarial images [n,C,H,W] in ball and box, which the base class checks up to rounding."""

    @property
    def sign(self) -> float:
        """+1 where the attacker wants a high NLL, -1 where a low one."""
        return 1.0 if self.parameters.images == "test" else -1.0

    def evaluate(
        self,
        flow: FrozenFlow,
        judge: FrozenFlow,
        sample_ids: Tensor,
        x: Tensor,
        y: Tensor,
        seed: int,
        batch_size: int,
    ) -> LikelihoodOutcome:
        """Attack the samples, verify and score. x: test images [N,C,H,W] in [0,1]; y: labels [N].

        flow: what the search differentiates. judge: what scores (the same function, maybe in float64). Raises
        `AttackViolation` when an image leaves its set, `UserError` for a flow whose densities depend on batch or call.
        """
        require_image_budget(self.spec, x)
        device = next(flow.buffers()).device
        parts = []
        with full_precision(), ExitStack() as tried:
            for one in dict.fromkeys((flow, judge)):  # often the same one
                tried.enter_context(same_density(one, x, y))
            if self.cost.backwards and self.spec.radius > 0:
                require_density_gradient(
                    flow, self._originals(flow, sample_ids[:PROBED], x[:PROBED], seed), y
                )
            for rows in chunks(torch.arange(len(x)), batch_size):
                images = self._originals(flow, sample_ids[rows], x[rows], seed)
                task = LikelihoodTask(sample_ids[rows], images.to(device), y[rows].to(device), seed)
                parts.append(self._one_batch(flow, judge, task))
        outcome = _join_outcomes(parts)
        require_normalised(judge, outcome.nll_before, "original")
        require_normalised(judge, outcome.nll_after, "attacked")
        return outcome

    def _one_batch(self, flow: FrozenFlow, judge: FrozenFlow, task: LikelihoodTask) -> LikelihoodOutcome:
        before = self._score(judge, task, task.x)
        found = self.search(flow, task) if self.spec.radius > 0 else task.x.clone()
        check_tensor(self.spec, found, task.x, task.ids)
        found = inside_ball(self.spec, task.ids, task.x, inside_box(self.spec, task.ids, found))
        if self.parameters.quantize:
            found = _quantize(found, task.x, flow.grey_levels)
        delta, cost = found - task.x, self.cost
        n, searched = len(task.ids), self.spec.radius > 0
        return LikelihoodOutcome(
            sample_ids=task.ids.clone(),
            labels=task.y.cpu(),
            nll_before=before,
            nll_after=self._score(judge, task, found),
            l1=norm_of(delta, "l1").cpu(),
            l2=norm_of(delta, "l2").cpu(),
            linf=norm_of(delta, "linf").cpu(),
            forwards=torch.full((n,), cost.forwards if searched else 2),
            backwards=torch.full((n,), cost.backwards if searched else 0),
            originals=task.x.cpu(),
            adversarial=found.cpu(),
        )

    def _originals(self, flow: FrozenFlow, ids: Tensor, x: Tensor, seed: int) -> Tensor:
        if self.parameters.images == "test":
            return x
        return noise_images(seed, ids, flow.input_shape, flow.grey_levels)

    def _score(self, judge: FlowModel, task: LikelihoodTask, images: Tensor) -> Tensor:
        with torch.no_grad():
            bits = estimated_bits_per_dim(
                judge,
                images.clone(),  # a flow may write into its input
                task.y,
                self.parameters.estimate,
                self.parameters.noise_draws,
                seed=task.seed,
                sample_ids=task.ids,
            )
        return bits.double().cpu()


@ATTACKS.register("nll")
class NllAttack(LikelihoodAttack):
    """Projected gradient on the NLL (Pope et al. 2020, section 4): sign steps up for test images, down for noise.

    Defaults where the paper states nothing: step 2.5 epsilon / steps, zero start, no rounding, one restart; the last
    iterate is returned. New dequantisation noise at every step, keyed by (seed, attack, restart, sample id, step). A
    coordinate whose gradient is not finite does not move in that step.
    """

    Parameters = NllParameters

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        lowers = spec.parameters.get("images") == "noise"
        extreme, sign = ("min", "-") if lowers else ("max", "+")
        bits = row("-", sub("log", "2"), "p(")
        goal = math(under(extreme, "x′ ∈ 𝒜(x)"), bits, "x′) / d")
        update = row("(", sub("x", "t"), f"{sign} α sign ∇(", bits, sub("x", "t"), ")))")
        what = "uniform-noise images, whose NLL is lowered" if lowers else "test images, whose NLL is raised"
        words = f"x: {what}. {spec.parameters.get('steps')} steps; p: the flow's density, d: pixels."
        return (goal, math(sub("x", "t + 1"), "=", sub("Π", "𝒜(x)"), update)), words

    @property
    def cost(self) -> Cost:
        """Steps times restarts, the final two scorings, and one per restart where there are several."""
        p: NllParameters = self.parameters
        extra = p.restarts if p.restarts > 1 else 0
        return Cost(
            forwards=p.steps * p.restarts + (extra + 2) * p.noise_draws, backwards=p.steps * p.restarts
        )

    def search(self, flow: FrozenFlow, task: LikelihoodTask) -> Tensor:
        p: NllParameters = self.parameters
        best = self._restart(flow, task, 0)
        if p.restarts == 1:
            return best
        best_score = self._attacker_score(flow, task, best)
        for restart in range(1, p.restarts):
            images = self._restart(flow, task, restart)
            score = self._attacker_score(flow, task, images)
            better = (score > best_score).to(images.device)
            best[better] = images[better]
            best_score = torch.maximum(score, best_score)
        return best

    def _restart(self, flow: FrozenFlow, task: LikelihoodTask, restart: int) -> Tensor:
        p: NllParameters = self.parameters
        kind: Start = "uniform" if restart and p.start == "zero" else p.start
        step = p.step(float(self.spec.epsilon or 0.0)) / self.spec.pixel_range
        space = ImageSpace(self.spec.norm, self.spec.radius, step, kind)
        noise = SampleNoise(task.seed, self.spec.name, task.ids, restart, task.x.device)
        stream = f"{self.spec.name}/dequantization"
        keys = KeyedNumbers(task.seed, stream, task.ids, restart, task.x.device).keys
        taken = iter(range(p.steps))

        def loss(image: Tensor) -> Tensor:
            u = KeyedNumbers.uniform(keys, torch.full_like(keys, next(taken)), flow.dimensions)
            return -self.sign * flow.log_prob(image, task.y, u.reshape(image.shape))

        return space.finish(ascend(space, loss, space.start(task.x, task.y, noise), p.steps))[0]

    def _attacker_score(self, flow: FrozenFlow, task: LikelihoodTask, images: Tensor) -> Tensor:
        """The score that the attacker maximises, [n]; -inf for NaN."""
        return torch.nan_to_num(self.sign * self._score(flow, task, images), nan=float("-inf"))


@ATTACKS.register("uniform-noise")
class UniformNoise(LikelihoodAttack):
    """x + U[-epsilon, epsilon] per pixel, clipped to [0,255]: the baseline that an attack of that size must beat."""

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        return (math("x′ = clip(x + u), u ∼ 𝒰", sup("[-ε, ε]", "d")),), "Drawn, not searched."

    @property
    def cost(self) -> Cost:
        return Cost(forwards=2 * self.parameters.noise_draws, backwards=0)

    def search(self, flow: FrozenFlow, task: LikelihoodTask) -> Tensor:
        noise = SampleNoise(task.seed, self.spec.name, task.ids, 0, task.x.device)
        return (task.x + self.spec.radius * noise.uniform(tuple(task.x.shape[1:]))).clamp(0.0, 1.0)


def build_likelihood_attack(spec: ResolvedAttack) -> LikelihoodAttack:
    """The attack on a flow's likelihood that a spec describes; `UserError` for attacks on classifiers."""
    found = ATTACKS.get(spec.algorithm)
    if not issubclass(found, LikelihoodAttack):
        raise UserError(
            f"attack {spec.name!r} changes the decision of a classifier, not the likelihood of a flow; "
            f"name an attack on flows: nll-in, nll-out or noise"
        )
    return found(spec)


def noise_images(seed: int, ids: Tensor, shape: tuple[int, ...], grey_levels: int) -> Tensor:
    """Images [n,*shape] of independent uniform grey levels k / (L-1), a function of (seed, sample id) alone."""

    def levels(generator: np.random.Generator, size: tuple[int, ...]) -> np.ndarray:
        return generator.integers(0, grey_levels, size) / (grey_levels - 1)

    return SampleRandom(seed, "noise images").draw(ids, shape, levels)


def _quantize(adversarial: Tensor, x: Tensor, grey_levels: int) -> Tensor:
    """`adversarial` rounded to grey levels towards x, so that no pixel leaves the ball. x is on the grid."""
    top = grey_levels - 1
    moved = (adversarial.double() - x.double()) * top
    # float32 rounding must not cost a whole level.
    return (
        ((x.double() * top).round() + (moved + 1e-4 * moved.sign()).trunc())
        .div(top)
        .to(x.dtype)
        .clamp(0.0, 1.0)
    )


def _join_outcomes(parts: list[LikelihoodOutcome]) -> LikelihoodOutcome:
    names = LikelihoodOutcome.__dataclass_fields__
    return LikelihoodOutcome(**{name: torch.cat([getattr(part, name) for part in parts]) for name in names})
