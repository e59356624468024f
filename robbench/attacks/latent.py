"""Attacks in the latent space of a normalizing flow: R-LA, A-LA, OM-PGD; and the joint space attack (JSA).

Latents are raw z, all levels flattened into one vector: norm, sign and clamp act on all coordinates together. The flow
is frozen and exact (decode inverts encode), so that a zero perturbation returns the image itself.
"""

# ruff: noqa: RUF001 - the letters of formulas are meant
from typing import Any, Literal

import torch
from markupsafe import Markup
from pydantic import Field
from torch import Tensor

from robbench.attacks.base import Attack, Candidates, Task
from robbench.attacks.named import ATTACKS, Cost, Objective
from robbench.attacks.pgd import GradientAttack, GradientParameters, label_letter, search_words, steepest
from robbench.attacks.search.active import still_robust
from robbench.attacks.search.geometry import Noise, SampleNoise, project
from robbench.attacks.search.spaces import Codec, InLoop, JointSpace, LatentSpace
from robbench.attacks.victim import Victim, chunks
from robbench.core.errors import UserError, spell_argument
from robbench.core.mathml import length, math, row, sub, under
from robbench.core.schema import Strict
from robbench.specs import Norm, ResolvedAttack, Semantics


def random_latent(
    flow: Codec, x: Tensor, y: Tensor, norm: Norm, eta: float, noise: Noise
) -> tuple[Tensor, Tensor]:
    """R-LA (Yuksel et al., eq. 3): x' = clip(G(F(x) + d)), d = Pi(eta * N(0, I)); returns (x', d [n,D]).

    The standard deviation and the truncation radius are the same eta; norm "none" leaves the Gaussian as drawn.
    """
    with torch.no_grad():
        z = flow.encode_flat(x, y)
        shift = project(eta * noise.normal(tuple(z.shape[1:])), norm, eta)
        return flow.decode_flat(z + shift, y).clamp(0.0, 1.0), shift


class RandomLatentParameters(Strict):
    """draws: independent perturbations per image; the first that is misclassified is returned, else the last."""

    draws: int = Field(default=1, gt=0)


@ATTACKS.register("random-latent")
class RandomLatentAttack(Attack):
    """R-LA: random perturbation of the latents, no gradient (Yuksel et al. 2022, section 3)."""

    Parameters = RandomLatentParameters

    @classmethod
    def declared_semantics(cls, parameters: Any) -> Semantics:
        return "perturbation"

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        noise = row("η ξ") if spec.norm == "none" else row(sub("Π", "η"), "(η ξ)")
        draws = spec.parameters.get("draws", 1)
        formula = math("x′ = clip(G(F(x) +", noise, ")), ξ ∼ 𝒩(0, I)")
        return (formula,), f"Drawn, not searched; {draws} draw{'s' if draws != 1 else ''} per image."

    @property
    def cost(self) -> Cost:
        return Cost(forwards=self.parameters.draws - 1 + 2, backwards=0)

    def space(self) -> LatentSpace:
        assert self.flow is not None
        return LatentSpace(self.flow, self.spec.norm, float(self.spec.eta or 0.0), 0.0)

    def search(self, victim: Victim, task: Task) -> Candidates:
        assert self.flow is not None
        rows = torch.arange(len(task.x))
        shift = torch.zeros_like(self.flow.encode_flat(task.x[:1], task.y[:1])).expand(len(rows), -1).clone()
        found = Candidates.unsearched(task.x, self.spec.name)
        found.step.fill_(1)
        found.witness = {"lambda": shift}
        for draw in range(self.parameters.draws):
            for part in chunks(rows, task.batch_size):
                noise = SampleNoise(task.seed, self.spec.name, task.ids[part], draw, victim.device)
                image, delta = random_latent(
                    self.flow, task.x[part], task.y[part], self.spec.norm, float(self.spec.eta or 0.0), noise
                )
                found.adversarial[part], shift[part] = image, delta
            if draw + 1 < self.parameters.draws:
                rows = still_robust(victim, task, found, rows)
        return found


class LatentParameters(GradientParameters):
    """levels: 1-based levels of the flow that may move, None for all."""

    levels: tuple[int, ...] | None = None


@ATTACKS.register("latent-pgd")
class LatentAttack(GradientAttack):
    """Gradient ascent on the cross-entropy over the latents of an image.

    A-LA (Yuksel et al., eq. 4): start "cube", no clipping inside the loop. OM-PGD (Lin et al. 2020; IJSAT's
    comparison) is the same search with a uniform start. Both printed updates accumulate and then project.
    """

    Parameters = LatentParameters
    witnesses = ("lambda",)

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        ball = row(length("λ", {"linf": "∞", "l2": "2", "l1": "1"}.get(spec.norm, "")), "≤ η")
        lines = [math(under("max", ball), f"ℓ(f(clip(G(F(x) + λ))), {label_letter(spec)})")]
        step = steepest(row(sub("∇", "λ"), "ℓ"), spec.norm)
        if step is not None:
            update = row("(", sub("λ", "t"), "+ α", step, ")")
            lines.append(math(sub("λ", "t + 1"), "=", sub("Π", "η"), update))
        return tuple(lines), search_words(spec, "η", _level_words(spec))

    def space(self) -> LatentSpace:
        assert self.flow is not None
        p: LatentParameters = self.parameters
        eta = float(self.spec.eta or 0.0)
        _check_levels(self.flow, p.levels, self.spec.name)
        return LatentSpace(self.flow, self.spec.norm, eta, p.step(eta), p.start, p.levels)


class JointParameters(LatentParameters):
    """in_loop: "project" (box constraint at every step) or "paper_literal" (only at the end; weaker)."""

    in_loop: InLoop = "project"
    step_size: Literal[None] = None  # two budgets, two step sizes: both are relative_step_size * budget


@ATTACKS.register("jsa")
class JointSpaceAttack(GradientAttack):
    """JSA (IJSAT, eq. 8, corrected: accumulate, then project): latent and image perturbation from one gradient."""

    Parameters = JointParameters
    witnesses = ("lambda", "delta")

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        goal = math(under("max", "λ, δ"), f"ℓ(f(clip(G(F(x) + λ) + δ)), {label_letter(spec)})")
        literal = spec.parameters.get("in_loop") == "paper_literal"
        box = "The box is met in the final image only." if literal else "The box is met at every step."
        words = search_words(spec, "each budget", box, _level_words(spec))
        return (goal, _joint_step("λ", "η"), _joint_step("δ", "ε")), words

    def space(self) -> JointSpace:
        assert self.flow is not None
        p: JointParameters = self.parameters
        epsilon, eta = float(self.spec.epsilon or 0.0), float(self.spec.eta or 0.0)
        _check_levels(self.flow, p.levels, self.spec.name)
        return JointSpace(self.flow, epsilon, p.step(epsilon), eta, p.step(eta), p.start, p.in_loop, p.levels)


def _joint_step(letter: str, budget: str) -> Markup:
    update = row("(", sub(letter, "t"), "+", sub("α", budget), "sign", sub("∇", letter), "ℓ)")
    return math(sub(letter, "t + 1"), "=", sub("Π", budget), update)


def _level_words(spec: ResolvedAttack) -> str:
    levels = spec.parameters.get("levels")
    return f"Only level {', '.join(map(str, levels))} of the flow moves." if levels else ""


def _check_levels(flow: Codec, levels: tuple[int, ...] | None, attack: str) -> None:
    if levels is None:
        return
    if not levels or not all(float(flow.level_mask((level,)).sum()) > 0 for level in levels):
        raise UserError(
            f"attack {attack!r} names levels {list(levels)} that the flow does not have; "
            f"levels count from 1 (finest); choose another level or another {spell_argument('flow')}"
        )
