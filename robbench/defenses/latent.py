"""Defenses that train on latent perturbations of a normalizing flow: R-LA and A-LA (Yuksel et al. 2022)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from robbench.attacks.latent import random_latent
from robbench.attacks.search.geometry import GeneratorNoise
from robbench.core.schema import Strict
from robbench.defenses.base import DEFENSES, Defense, perturb
from robbench.defenses.budgets import LatentSearch, attack_labels, find_attack, latent_space, resolve_latent
from robbench.specs import Norm


class RandomLatentParameters(Strict):
    """attack: named attack that gives norm and eta where they are None. eta: raw z units."""

    attack: str = "r-la"
    norm: Norm | None = None
    eta: float | None = None


@DEFENSES.register("r-la")
class RandomLatentTraining(Defense):
    """R-LA training (Yuksel et al., eq. 3): training images are replaced by clip(G(F(x) + Pi(eta N(0, I)))).

    Deviation: the decoder inverts the encoder exactly; the published one also squeezes the contrast by 10 %.
    """

    Parameters = RandomLatentParameters
    needs_flow = True

    def resolve(self, parameters: Any) -> Any:
        spec = find_attack(parameters.attack, "latent", self.setting, eta=parameters.eta)
        return parameters.model_copy(
            update={"norm": parameters.norm or spec.norm, "eta": float(spec.eta or 0.0)}
        )

    def perturb_images(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Perturbed images [B,C,H,W], independent of the classifier."""
        assert self.setting.flow is not None
        noise = GeneratorNoise(len(x), generator, x.device)
        image, _ = random_latent(self.setting.flow, x, y, self.current.norm, self.current.eta, noise)
        return image

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return functional.cross_entropy(model(self.perturb_images(x, y, generator)), y)


@DEFENSES.register("a-la")
class AdversarialLatentTraining(Defense):
    """A-LA training (Yuksel et al., eq. 4): training images are replaced by their latent adversarial examples.

    Deviations, each an option: the label is the true one (label_source "predicted" as in the CIFAR and SVHN
    code); the classifier is attacked in eval mode (attack_bn "train" as in the code). Decoder: see
    `RandomLatentTraining`.
    """

    Parameters = LatentSearch
    needs_flow = True

    def resolve(self, parameters: Any) -> Any:
        return resolve_latent(parameters, self.setting)

    def adversarial(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Latent adversarial examples [B,C,H,W]."""
        p: LatentSearch = self.current
        assert p.steps is not None
        target = attack_labels(model, x, y, p)
        space = latent_space(p, self.setting)

        def loss(image: Tensor) -> Tensor:
            return functional.cross_entropy(model(image), target, reduction="none")

        return perturb(model, space, loss, p.steps, x, y, generator, p.attack_bn)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return functional.cross_entropy(model(self.adversarial(model, x, y, generator)), y)
