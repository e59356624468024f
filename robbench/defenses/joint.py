"""Defenses that train on joint space attacks (JSA): AT+JSA, IJSAT, TRADES+JSA, MART+JSA."""

from collections.abc import Callable
from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from robbench.attacks.search.geometry import Start
from robbench.defenses.base import DEFENSES, Defense, Mixture, mix, perturb, search_mode
from robbench.defenses.budgets import JointSearch, joint_space, resolve_joint
from robbench.defenses.losses import kl_divergence, mart_loss, mixed_cross_entropy, trades_loss


class JointDefense(Defense):
    """Base: parameters extend `JointSearch`; the flow is frozen, the classifier in eval mode in the attack."""

    Parameters = JointSearch
    needs_flow = True
    criterion = "pgd10_accuracy"

    def resolve(self, parameters: Any) -> Any:
        return resolve_joint(parameters, self.setting)

    def search(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor,
        generator: torch.Generator,
        loss: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """x' = clip(G(F(x) + lambda) + delta) [B,C,H,W] that maximises `loss` (image -> [B]; by default CE(., y))."""
        p = self.current

        def cross_entropy(image: Tensor) -> Tensor:
            return functional.cross_entropy(model(image), y, reduction="none")

        space = joint_space(p, self.setting)
        return perturb(model, space, loss or cross_entropy, p.steps, x, y, generator, p.attack_bn)


@DEFENSES.register("jsa-at")
class JointSpaceTraining(JointDefense):
    """AT [JSA] (IJSAT, section 5): cross-entropy on joint space adversarial examples, no mixup."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return functional.cross_entropy(model(self.search(model, x, y, generator)), y)


class IjsatParameters(JointSearch):
    """tau: both parameters of the Beta distribution of the mixing weight; the printed Beta(-tau, tau) does not
    exist."""

    tau: float = Field(default=0.1, gt=0)


@DEFENSES.register("ijsat")
class IJSAT(JointDefense):
    """Interpolated joint space adversarial training (IJSAT, Algorithm 1, corrected): mix two images, encode
    the mixed IMAGE, attack the mixed loss in the joint space, train on the adversarial term alone.

    Corrections to the print: line 5 mixes x_i with itself; eq. 6 has y_i twice; eqs. 8 and 10 neither
    accumulate nor project. Not stated in the paper: one mixing weight per batch.
    """

    Parameters = IjsatParameters

    def robust_mixup(self, model: nn.Module, mixture: Mixture, generator: torch.Generator) -> Tensor:
        """Joint space adversarial examples of the mixed images, against the mixed loss."""

        def loss(image: Tensor) -> Tensor:
            return mixed_cross_entropy(model(image), mixture.labels, mixture.partners, mixture.weight)

        return self.search(model, mixture.x, mixture.labels, generator, loss)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        mixture = mix(x, y, self.parameters.tau, generator)
        worst = self.robust_mixup(model, mixture, generator)
        return mixed_cross_entropy(model(worst), mixture.labels, mixture.partners, mixture.weight).mean()


class TradesJsaParameters(JointSearch):
    """beta: weight of the KL term. A start at zero is refused, since the KL has no gradient at x itself."""

    beta: float = Field(default=6.0, ge=0)

    @field_validator("start")
    @classmethod
    def _random(cls, value: Start | None) -> Start | None:
        if value == "zero":
            raise ValueError("the KL divergence has no gradient at the image itself; choose uniform")
        return value


@DEFENSES.register("trades-jsa")
class TradesJSA(JointDefense):
    """TRADES+JSA (IJSAT, Table 5; formulas unpublished, our reading): the inner search maximises
    KL(p(x) || p(x_JSA)) over (lambda, delta); the loss is CE(f(x), y) + beta KL(p(x) || p(x_JSA))."""

    Parameters = TradesJsaParameters

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        with search_mode(model, self.parameters.attack_bn), torch.no_grad():
            reference = model(x)
        worst = self.search(model, x, y, generator, lambda image: kl_divergence(reference, model(image)))
        return trades_loss(model(x), model(worst), y, self.parameters.beta)


class MartJsaParameters(JointSearch):
    """beta: weight of the misclassification-aware KL term."""

    beta: float = Field(default=6.0, ge=0)


@DEFENSES.register("mart-jsa")
class MartJSA(JointDefense):
    """MART+JSA (IJSAT, Table 5; formulas unpublished, our reading): inner cross-entropy, MART's loss with
    x' = x_JSA."""

    Parameters = MartJsaParameters

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return mart_loss(model(x), model(self.search(model, x, y, generator)), y, self.parameters.beta)
