"""The Gaussian prior of a level of latents."""

import math

import torch
from torch import Tensor


def gaussian_log_density(z: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """ln N(z; mean, exp(log_sigma)^2) summed over all but the first dimension, [N]."""
    epsilon = whitened(z, mean, log_sigma)
    density = -0.5 * (epsilon.square() + math.log(2.0 * math.pi)) - log_sigma
    return density.flatten(1).sum(1)


def whitened(z: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """eps = (z - mean) / sigma."""
    return (z - mean) * torch.exp(-log_sigma)


def coloured(epsilon: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """z = mean + sigma eps."""
    return mean + torch.exp(log_sigma) * epsilon
