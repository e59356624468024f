"""Defenses that train on image-space adversarial examples: AT, TRADES, MART, IAT.

The classifier is in eval mode without parameter gradients in the inner attack, and in train mode in the loss.
"""

from typing import Any

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional

from robbench.attacks.pgd import LabelSource
from robbench.attacks.search.geometry import Start
from robbench.attacks.search.spaces import SearchSpace
from robbench.defenses.base import DEFENSES, Defense, mix, perturb, search_mode
from robbench.defenses.budgets import ImageSearch, attack_labels, image_space, resolve_image
from robbench.defenses.losses import kl_divergence, mart_loss, mixed_cross_entropy, trades_loss
from robbench.defenses.rendered import fill_rendered, rendered_attack, rendered_space


class ImageDefense(Defense):
    """Base: parameters extend `ImageSearch`, and `adversarial` is PGD on the cross-entropy."""

    Parameters = ImageSearch
    criterion = "pgd10_accuracy"

    def resolve(self, parameters: Any) -> Any:
        return resolve_image(parameters, self.setting)

    def adversarial(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """PGD examples [B,C,H,W] that maximise CE(f(x'), label), with the label of `label_source`."""
        p = self.current
        target = attack_labels(model, x, y, p)

        def loss(image: Tensor) -> Tensor:
            return functional.cross_entropy(model(image), target, reduction="none")

        return perturb(model, self.space(p), loss, p.steps, x, y, generator, p.attack_bn)

    def space(self, p: Any) -> SearchSpace:
        """What the inner attack searches, with parameters `p`."""
        return image_space(p)


@DEFENSES.register("at")
class AdversarialTraining(ImageDefense):
    """AT (Madry et al. 2018, eq. 2.1): cross-entropy on PGD examples only, 10 steps from a random start.

    The PGD baseline of Yuksel et al. is start "cube", label_source "predicted", attack_bn "train", box "end": see
    recipe flow-lp-cifar10. `attack` may also name one on the variables of a renderer (elastic, uar-linf-3), as in
    Kang et al. 2019.
    """

    def resolve(self, parameters: Any) -> Any:
        self.rendered = rendered_attack(parameters, self.setting)
        return (
            super().resolve(parameters) if self.rendered is None else fill_rendered(parameters, self.rendered)
        )

    def space(self, p: Any) -> SearchSpace:
        return super().space(p) if self.rendered is None else rendered_space(p, self.rendered)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return functional.cross_entropy(model(self.adversarial(model, x, y, generator)), y)


class TradesParameters(ImageSearch):
    """beta: weight of the KL term."""

    beta: float = Field(default=6.0, ge=0)
    start: Start | None = "gaussian"

    @field_validator("start")
    @classmethod
    def _random(cls, value: Start | None) -> Start | None:
        if value == "zero":
            raise ValueError(
                "the KL divergence has no gradient at the image itself; choose gaussian or uniform"
            )
        return value

    @field_validator("label_source")
    @classmethod
    def _no_label(cls, value: LabelSource) -> LabelSource:
        if value == "predicted":
            raise ValueError("the inner attack of TRADES uses no label; leave label_source out")
        return value


@DEFENSES.register("trades")
class TRADES(ImageDefense):
    """TRADES (Zhang et al. 2019, eq. 5): x' maximises KL(p(x) || p(x')) from x + 0.001 N(0, I); the loss is
    CE(f(x), y) + beta KL(p(x) || p(x')) with gradients through both distributions.

    Deviations from the published code: its third forward (the clean batch once more, for the KL) is shared
    with the first, so batch-norm statistics move twice per step instead of three times; budgets are the data
    set's (8/255 for CIFAR), its epsilon .031 and step .007 come with recipe trades-cifar.
    """

    Parameters = TradesParameters

    def adversarial(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        p = self.current
        with search_mode(model, p.attack_bn), torch.no_grad():
            reference = model(x)
        return perturb(
            model,
            image_space(p),
            lambda image: kl_divergence(reference, model(image)),
            p.steps,
            x,
            y,
            generator,
            p.attack_bn,
        )

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        worst = self.adversarial(model, x, y, generator)
        return trades_loss(model(x), model(worst), y, self.parameters.beta)


class MartParameters(ImageSearch):
    """beta: weight of the misclassification-aware KL; 6 in the paper, 5 in the authors' ResNet-18 script."""

    beta: float = Field(default=6.0, ge=0)
    start: Start | None = "gaussian"


@DEFENSES.register("mart")
class MART(ImageDefense):
    """MART (Wang et al. 2020, eq. 11): boosted cross-entropy on PGD examples plus KL weighted by 1 - p_y(x).

    x' maximises the cross-entropy from x + 0.001 N(0, I). Constants as published, see `losses.mart_loss`.
    Deviation: KL uses log-softmax where the code takes log(p' + 1e-12); they differ where p' underflows.
    """

    Parameters = MartParameters

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        worst = self.adversarial(model, x, y, generator)
        return mart_loss(model(x), model(worst), y, self.parameters.beta)


class IatParameters(ImageSearch):
    """tau: both parameters of the Beta distribution of the two mixing weights. steps: 7, as in the
    re-implementation."""

    tau: float = Field(default=1.0, gt=0)
    steps: int | None = Field(default=7, gt=0)


@DEFENSES.register("iat")
class IAT(ImageDefense):
    """IAT (Lamb et al. 2019, Algorithm 1): half mixup of clean images, half mixup of PGD examples.

    The two halves have independent weights and permutations. No original code is public; steps, Beta(1,1) and
    the order attack-then-mix follow a public re-implementation.
    """

    Parameters = IatParameters

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        worst = self.adversarial(model, x, y, generator)
        halves = [mix(images, y, self.parameters.tau, generator) for images in (x, worst)]
        clean, attacked = (
            mixed_cross_entropy(model(m.x), m.labels, m.partners, m.weight).mean() for m in halves
        )
        return (clean + attacked) / 2
