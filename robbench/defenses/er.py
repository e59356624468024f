"""ER-Classifier (Li et al. 2021): embeddings in few dimensions, pulled to a prior by a critic.

The paper prints the objective, CE(C(E(x)), y) + lambda D(E(x), prior); the steps are those of the authors' public code.
Its quirks, with `quirks: true` only: (a) gradients are cleared once a batch, so that each step adds to those of steps
before it; (b) the learning rate is never lowered; (c) batch norm and dropout are in eval mode from the second epoch on;
(d) the first gradient of the inner attack may be taken outside [0,1].
"""

from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from robbench.attacks.pgd import LabelSource
from robbench.attacks.search.geometry import Noise
from robbench.attacks.search.spaces import ImageSpace, SearchSpace, State
from robbench.core.schema import Strict
from robbench.defenses.adversarial import ImageDefense
from robbench.defenses.base import DEFENSES, Defense, Optimization, SingleLoss
from robbench.defenses.budgets import ImageSearch
from robbench.defenses.critic import Critic, Prior, draw_prior, gaussian_divergence
from robbench.defenses.schedule import build_optimizer, move_weights
from robbench.defenses.standard import Standard
from robbench.models.embedding import EmbeddingClassifier, require_embedding
from robbench.recipes import Recipe

CRITIC_RATE, CLASSIFIER_RATE = 0.5, 0.05  # learning rates, as parts of the encoder's


class ErMinusParameters(Strict):
    """Parameters of `er-minus`.

    Attributes:
        lambda_classifier: LAMBDA0 of the authors' code, weight of the cross-entropy.
        quirks: train with what the authors' code does by accident, see `robbench.defenses.er`.
    """

    lambda_classifier: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    quirks: bool = False


class ErParameters(ErMinusParameters):
    """Parameters of `er`.

    Attributes:
        lambda_critic: LAMBDA, weight of the critic's objective.
        lambda_encoder: LAMBDA1, weight of the regulariser in the encoder's step.
        regularizer: the critic, or "kl": KL(N(m, v) || prior) with means m and variances v of the batch's embeddings.
        prior: where embeddings are pulled to.
        sigma: standard deviation of the Gaussian prior.
        lambda_classifier, quirks: see `ErMinusParameters`.
    """

    lambda_critic: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    lambda_encoder: float = Field(default=5e-4, ge=0, allow_inf_nan=False)
    regularizer: Literal["critic", "kl"] = "critic"
    prior: Prior = "gaussian"
    sigma: float = Field(default=1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _gaussian_only(self) -> Self:
        if self.prior == "gaussian":
            return self
        if self.regularizer == "kl":
            raise ValueError(
                f"regularizer kl has a formula for prior gaussian only, not for {self.prior}; choose critic"
            )
        if self.sigma != 1.0:
            raise ValueError(f"sigma is of prior gaussian; leave it out for {self.prior}")
        return self


class ErAtParameters(ErParameters, ImageSearch):
    """Parameters of `er` and of the inner PGD, which aims at the model's own prediction by default."""

    label_source: LabelSource = "predicted"


@DEFENSES.register("er-minus")
class ErMinus(Defense):
    """ER1- and ER2- (supplement, Table 6): encoder and classifier of `er` with its learning rates, no regulariser."""

    Parameters = ErMinusParameters

    def optimization(self, model: nn.Module, recipe: Recipe) -> Optimization:
        return EmbeddingTraining(self, require_embedding(model, f"defense {self.name!r}"), recipe)

    @property
    def note(self) -> str:
        return "trained with the quirks of the authors' code" if self.parameters.quirks else ""

    @property
    def keeps_rate(self) -> bool:
        return bool(self.parameters.quirks)

    def batches(
        self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        """The batches [B,C,H,W] that a step trains on, clean images first."""
        return (x,)

    def classification(self, model: nn.Module, batches: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """LAMBDA0 times the cross-entropy, mean over batches and images."""
        losses = [functional.cross_entropy(model(images), y) for images in batches]
        mean: Tensor = torch.stack(losses).mean() * self.parameters.lambda_classifier
        return mean

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return self.classification(model, self.batches(model, x, y, generator), y)


@DEFENSES.register("er")
class ER(ErMinus):
    """ER-Classifier (Li et al. 2021): embeddings pulled to a prior by a critic, without adversarial examples.

    A step, in the order of the authors' code: the critic T learns to tell draws of the prior from embeddings (it
    minimises LAMBDA (mean T(prior) - mean T(E(x))), then all its weights are clamped to [-0.01, 0.01]); classifier and
    encoder minimise LAMBDA0 CE; the encoder minimises LAMBDA1 mean T(E(x)). Learning rates: encoder 1, critic 0.5,
    classifier 0.05 of the recipe's. Regulariser `kl` has no published formula and no critic: LAMBDA1 KL.
    """

    Parameters = ErParameters

    @property
    def note(self) -> str:
        kl = self.parameters.regularizer == "kl"
        ours = "regularizer kl is our reading: its formula is unpublished" if kl else ""
        return "; ".join(filter(None, (ours, super().note)))


@DEFENSES.register("er-at")
class ErAt(ER, ImageDefense):
    """ER-Classifier with adversarial training: every step of `er` once more with PGD examples of the batch; the
    cross-entropy is the mean over clean and adversarial images. PGD aims at the predicted label."""

    Parameters = ErAtParameters
    criterion = "pgd10_accuracy"

    def batches(
        self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, ...]:
        return x, self.adversarial(model, x, y, generator)

    def space(self, p: Any) -> SearchSpace:
        space = super().space(p)
        if not (p.quirks and isinstance(space, ImageSpace)):
            return space
        return StartOffTheBox(space.norm, space.epsilon, space.step_size, space.start_kind, space.box)

    @property
    def note(self) -> str:
        label = "predicted" if self.parameters.label_source == "predicted" else "true"
        return "; ".join(filter(None, (f"PGD of the training aims at the {label} label", super().note)))


@DEFENSES.register("e-cla")
class ECla(Standard):
    """E-CLA (supplement, Figures 5 and 6): encoder and classifier as one network under the cross-entropy, with one
    learning rate. How the authors train it is unpublished."""

    def optimization(self, model: nn.Module, recipe: Recipe) -> Optimization:
        return SingleLoss(self, require_embedding(model, f"defense {self.name!r}"), recipe)


class StartOffTheBox(ImageSpace):
    """`ImageSpace` whose start is projected on the ball alone, so that its first gradient may be one outside [0,1]."""

    def start(self, x: Tensor, y: Tensor, noise: Noise) -> State:
        free = ImageSpace(self.norm, self.epsilon, self.step_size, self.start_kind, box="end")
        return free.start(x, y, noise)


class EmbeddingTraining(Optimization):
    """The steps of ER-Classifier on a batch, see `ER`; without a regulariser those of encoder and classifier alone."""

    def __init__(self, defense: ErMinus, model: EmbeddingClassifier, recipe: Recipe) -> None:
        self.defense, self.model, self.recipe = defense, model, recipe
        p = defense.parameters
        self.regularizer: str | None = getattr(p, "regularizer", None)
        self.quirks: bool = p.quirks
        self.networks: dict[str, nn.Module] = {"encoder": model.encoder, "classifier": model.classifier}
        if self.regularizer == "critic":
            self.critic = Critic(model.dimension).to(next(model.parameters()).device)
            self.networks["critic"] = self.critic
        self.optimizers = {name: build_optimizer(recipe, net) for name, net in self.networks.items()}

    def step(self, x: Tensor, y: Tensor, generator: torch.Generator, rate: float, epoch: int) -> float:
        if self.quirks:
            self.model.train(epoch == 0)
            self._clear(*self.networks)
        batches = self.defense.batches(self.model, x, y, generator)
        if self.regularizer == "critic":
            for images in batches:
                self._move_critic(images, rate, generator)
        value = self._move_classifier(batches, y, rate)
        if self.regularizer is not None:
            value += sum(self._move_encoder(images, rate) for images in batches)
        return value

    def _move_critic(self, images: Tensor, rate: float, generator: torch.Generator) -> None:
        p = self.defense.parameters
        with torch.no_grad():
            z = self.model.encoder(images)
        prior = draw_prior(p.prior, z.shape, p.sigma, generator).to(z)
        self._descend(p.lambda_critic * (self.critic(prior).mean() - self.critic(z).mean()), rate, "critic")
        self.critic.clamp_weights()

    def _move_classifier(self, batches: tuple[Tensor, ...], y: Tensor, rate: float) -> float:
        loss = self.defense.classification(self.model, batches, y)
        return self._descend(loss, rate, "classifier", "encoder")

    def _move_encoder(self, images: Tensor, rate: float) -> float:
        p, z = self.defense.parameters, self.model.encoder(images)
        critic = self.regularizer == "critic"
        distance = self.critic(z).mean() if critic else gaussian_divergence(z, p.sigma)
        return self._descend(p.lambda_encoder * distance, rate, "encoder")

    def _descend(self, loss: Tensor, rate: float, *names: str) -> float:
        """One step of each named network along the gradient of `loss`, which reaches no other network."""
        if not self.quirks:
            self._clear(*names)
        reached = [p for name in names for p in self.networks[name].parameters() if p.requires_grad]
        loss.backward(inputs=reached)  # type: ignore[no-untyped-call]
        factors = {"critic": CRITIC_RATE, "classifier": CLASSIFIER_RATE}
        for name in names:
            move_weights(self.optimizers[name], rate * factors.get(name, 1.0), self.recipe.gradient_clip_norm)
        return float(loss.detach())

    def _clear(self, *names: str) -> None:
        for name in names:
            self.optimizers[name].zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        critic = {"critic": self.critic.state_dict()} if self.regularizer == "critic" else {}
        return {**critic, "optimizers": {name: o.state_dict() for name, o in self.optimizers.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.regularizer == "critic":
            self.critic.load_state_dict(state["critic"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
