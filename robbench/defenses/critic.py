"""What pulls embeddings [B,D] to a prior: draws of priors, the critic of ER-Classifier, and a KL divergence."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

Prior = Literal["gaussian", "uniform", "cauchy"]
UNIFORM_LIMIT = 3.0  # 99.7 % of a standard Gaussian lies within
WEIGHT_LIMIT = 0.01
HIDDEN_LAYERS, HIDDEN_UNITS = 4, 512
SMALLEST_VARIANCE = 1e-12  # below it the divergence of a constant coordinate stays finite


def draw_prior(prior: Prior, shape: torch.Size, sigma: float, generator: torch.Generator) -> Tensor:
    """Independent draws of `shape`, on the CPU: N(0, sigma^2), Uniform(-3, 3) or Cauchy(0, 1)."""
    if prior == "gaussian":
        return sigma * torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    if prior == "uniform":
        return UNIFORM_LIMIT * (2.0 * uniform - 1.0)
    # The quantile function, at the middle of each of the 2^24 values of `uniform`: at 0 itself it is infinite.
    return torch.tan(math.pi * (uniform.double() + 2.0**-25 - 0.5)).float()


class Critic(nn.Module):
    """log sigmoid of four hidden layers of 512 units: a score [B] of embeddings [B,D], higher for those of images."""

    def __init__(self, dimension: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for size in (dimension, *[HIDDEN_UNITS] * (HIDDEN_LAYERS - 1)):
            layers += [nn.Linear(size, HIDDEN_UNITS), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear(HIDDEN_UNITS, 1), nn.LogSigmoid())

    def forward(self, z: Tensor) -> Tensor:
        scores: Tensor = self.layers(z)
        return scores.squeeze(1)

    def clamp_weights(self) -> None:
        """Every weight and bias into [-0.01, 0.01], which bounds the critic's slope."""
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.clamp_(-WEIGHT_LIMIT, WEIGHT_LIMIT)


def gaussian_divergence(z: Tensor, sigma: float) -> Tensor:
    """KL(N(m, diag(v)) || N(0, sigma^2 I)) in nats, with mean m and variance v of the embeddings z [B,D] of a batch."""
    ratio = z.var(0, correction=0).clamp_min(SMALLEST_VARIANCE) / sigma**2
    return 0.5 * (ratio + z.mean(0).square() / sigma**2 - 1.0 - ratio.log()).sum()
