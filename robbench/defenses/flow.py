"""Training of normalizing flows by maximum likelihood, and a Gaussian baseline."""

import math
from typing import ClassVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from robbench.attacks.likelihood import RELATIVE_STEP, build_likelihood_attack
from robbench.attacks.search.geometry import Start
from robbench.attacks.search.spaces import ImageSpace
from robbench.core.schema import Strict
from robbench.data import Split
from robbench.defenses.base import FLOW_DEFENSES, Criterion, Defense, perturb
from robbench.models.flows.base import Flow, FlowModel
from robbench.specs import resolve_attack


class FlowDefense(Defense):
    """Base: actnorm is initialised on the first batch; the best epoch has the lowest loss on validation images."""

    criterion: ClassVar[Criterion] = "bits_per_dim"

    def prepare(self, model: nn.Module, x: Tensor) -> None:
        cast(Flow, model).initialize(x)


@FLOW_DEFENSES.register("clean")
class Clean(FlowDefense):
    """Maximum likelihood on clean images (Kingma & Dhariwal 2018, eq. 2): the loss is bits/dim with fresh
    dequantisation noise u ~ U[0,1) for every image of every epoch."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return _bits_per_dim(cast(Flow, model), x, y, generator).mean()


class FlowSearch(Strict):
    """Inner likelihood attack.

    Attributes:
        attack: named attack whose settings replace those that are None.
        epsilon, step_size: on the 0..255 scale; step_size None means 2.5 epsilon / steps.
        steps: sign steps, 10 as in the paper.
        start: where the search starts.
    """

    attack: str = "nll-in"
    epsilon: float | None = Field(default=None, ge=0)
    steps: int = Field(default=10, gt=0)
    step_size: float | None = Field(default=None, ge=0)
    start: Start = "zero"


class AttackedFlowDefense(FlowDefense):
    """Base of the defenses that train on images attacked in distribution."""

    Parameters = FlowSearch

    def resolve(self, parameters: FlowSearch) -> FlowSearch:
        setting = self.setting
        spec = resolve_attack(
            parameters.attack, setting.dataset, dict(setting.threat_models), parameters.epsilon
        )
        build_likelihood_attack(spec)
        epsilon = float(spec.epsilon or 0.0)
        step = parameters.step_size or RELATIVE_STEP * epsilon / parameters.steps
        return parameters.model_copy(update={"epsilon": epsilon, "step_size": step})

    def adversarial(self, flow: Flow, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Images [B,C,H,W] in the Linf ball around x, in the box, that raise the current model's NLL.

        The attack uses a frozen copy (norm layers in eval mode) and new dequantisation noise at every step.
        """
        p = self.current
        space = ImageSpace("linf", p.epsilon / 255.0, (p.step_size or 0.0) / 255.0, p.start)
        frozen = flow.freeze()

        def loss(image: Tensor) -> Tensor:
            return _bits_per_dim(frozen, image, y, generator)

        return perturb(frozen, space, loss, p.steps, x, y, generator)


@FLOW_DEFENSES.register("at")
class FlowAdversarialTraining(AttackedFlowDefense):
    """Adversarial training of a flow (Pope et al. 2020, section 4): maximum likelihood on attacked images only."""

    criterion = "attacked_bits_per_dim"

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        flow = cast(Flow, model)
        return _bits_per_dim(flow, self.adversarial(flow, x, y, generator), y, generator).mean()


@FLOW_DEFENSES.register("hybrid")
class HybridAdversarialTraining(AttackedFlowDefense):
    """Hybrid adversarial training (Pope et al. 2020, section 5): half the sum of the NLL of every image of the batch
    and of its attacked version (clean and attacked 1:1). Not stated in the paper: both halves are the same images."""

    criterion = "hybrid_bits_per_dim"

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        flow = cast(Flow, model)
        attacked = self.adversarial(flow, x, y, generator)
        both = torch.cat([x, attacked]), torch.cat([y, y])
        return _bits_per_dim(flow, *both, generator).mean()


def _bits_per_dim(flow: FlowModel, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
    """Bits/dim per image [B] with fresh noise of the generator (on the CPU)."""
    noise = torch.rand(x.shape, generator=generator).to(x.device)
    return -flow.log_prob(x, y, u=noise) / (flow.dimensions * math.log(2.0))


def gaussian_bits_per_dim(train: Split, test: Split) -> NDArray[np.float64]:
    """Bits/dim [N] of the test images under the full-covariance Gaussian of the dequantised training pixels.

    d = (k + u) / L with u ~ U[0,1), as the flows' bits/dim. Both the maximum-likelihood fit and the test
    average over u are exact expectations in float64: the noise has mean 1/2 and adds I / (12 L^2) to the
    covariance.
    """
    levels = train.levels
    middle = (train.pixels.flatten(1).numpy().astype(np.float64) + 0.5) / levels
    noise_variance = 1.0 / (12.0 * levels**2)
    dimensions = middle.shape[1]
    mean = middle.mean(0)
    centred = middle - mean
    covariance = centred.T @ centred / len(middle) + noise_variance * np.eye(dimensions)
    root = np.linalg.cholesky(covariance)
    points = (test.pixels.flatten(1).numpy().astype(np.float64) + 0.5) / levels - mean
    squares = (np.linalg.solve(root, points.T) ** 2).sum(0)
    inverse_root = np.linalg.solve(root, np.eye(dimensions))
    squares += noise_variance * (inverse_root**2).sum()  # trace of the precision
    log_determinant = 2.0 * np.log(np.diag(root)).sum()
    nats = -0.5 * (squares + log_determinant + dimensions * math.log(2.0 * math.pi))
    bits: NDArray[np.float64] = -(nats - dimensions * math.log(levels)) / (dimensions * math.log(2.0))
    return bits
