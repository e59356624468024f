"""Training of normalizing flows by maximum likelihood, and the Gaussian they should beat."""

import math
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.data import Split
from robbench.defenses.base import DEFENSES, Defense
from robbench.models.flows.base import Flow


@DEFENSES.register("clean")
class Clean(Defense):
    """Maximum likelihood on clean images (Kingma & Dhariwal 2018, eq. 2): the loss is bits/dim with fresh
    dequantisation noise u ~ U[0,1) for every image of every epoch. Actnorm is initialised on the first
    batch."""

    kinds = ("flow",)
    criterion = "bits_per_dim"

    def prepare(self, model: nn.Module, x: Tensor) -> None:
        cast(Flow, model).initialize(x)

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        flow = cast(Flow, model)
        noise = torch.rand(x.shape, generator=generator).to(x.device)
        return -flow.log_prob(x, y, u=noise).mean() / (flow.dimensions * math.log(2.0))


def gaussian_bits_per_dim(train: Split, test: Split) -> NDArray[np.float64]:
    """Bits/dim of every test image under the full-covariance Gaussian of the dequantised training pixels,
    [N].

    d = (k + u) / L with u ~ U[0,1), as the flows' bits/dim. Both the maximum-likelihood fit and the test
    average over u are exact expectations in float64: the noise has mean 1/2 and adds I / (12 L^2) to the
    covariance.
    """
    levels = train.levels
    middle = (train.images.flatten(1).numpy().astype(np.float64) + 0.5) / levels
    noise_variance = 1.0 / (12.0 * levels**2)
    dimensions = middle.shape[1]
    mean = middle.mean(0)
    centred = middle - mean
    covariance = centred.T @ centred / len(middle) + noise_variance * np.eye(dimensions)
    root = np.linalg.cholesky(covariance)
    points = (test.images.flatten(1).numpy().astype(np.float64) + 0.5) / levels - mean
    squares = (np.linalg.solve(root, points.T) ** 2).sum(0)
    inverse_root = np.linalg.solve(root, np.eye(dimensions))
    squares += noise_variance * (inverse_root**2).sum()  # trace of the precision
    log_determinant = 2.0 * np.log(np.diag(root)).sum()
    nats = -0.5 * (squares + log_determinant + dimensions * math.log(2.0 * math.pi))
    bits: NDArray[np.float64] = -(nats - dimensions * math.log(levels)) / (dimensions * math.log(2.0))
    return bits
