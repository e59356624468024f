"""Norm balls: projection, steepest ascent and random starts, one row a sample.

Every attack uses these and only these, so that two attacks in one ball mean the same ball. All tensors have the
sample as first dimension; norms run over all other dimensions together.
"""

from typing import Literal, Protocol

import torch
from torch import Tensor

from robbench.random import SampleRandom
from robbench.specs import Norm

Start = Literal["zero", "uniform", "cube", "gaussian"]
TINY = 1e-12


class Noise(Protocol):
    """Random rows for the samples of one batch."""

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Uniform on [-1, 1), [n, *shape]."""

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal, [n, *shape]."""


class SampleNoise:
    """Noise keyed by sample id (evaluation): independent of batch, order and device.

    Successive draws come from different streams, so that a direction and a radius are independent.
    """

    def __init__(self, seed: int, stream: str, ids: Tensor, restart: int, device: torch.device) -> None:
        self._seed, self._stream, self._ids = seed, stream, ids
        self._restart, self._device, self._draws = restart, device, 0

    def _next(self) -> SampleRandom:
        self._draws += 1
        return SampleRandom(self._seed, f"{self._stream}/{self._draws}")

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        return self._next().uniform(self._ids, shape, self._restart).to(self._device)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return self._next().normal(self._ids, shape, self._restart).to(self._device)


class GeneratorNoise:
    """Noise from one torch generator (training), drawn on the generator's own device."""

    def __init__(self, n: int, generator: torch.Generator, device: torch.device | str = "cpu") -> None:
        self._n, self._generator, self._device = n, generator, device

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        source = self._generator.device
        return (torch.rand((self._n, *shape), generator=self._generator, device=source) * 2 - 1).to(
            self._device
        )

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        source = self._generator.device
        return torch.randn((self._n, *shape), generator=self._generator, device=source).to(self._device)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """`values` [n] with trailing singleton dimensions, to broadcast against `like` [n, ...]."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def looking_is_free(tensor: Tensor) -> bool:
    """Whether Python may look at values without waiting for the device."""
    return tensor.device.type == "cpu"


def put(into: Tensor, values: Tensor, where: Tensor) -> None:
    """Copy the rows `where` [n] bool of `values` [n, ...] in place. On the CPU, where looking at `where` is free, the
    other rows cost nothing."""
    if not looking_is_free(where):
        torch.where(per_sample(where, into), values, into, out=into)
        return
    rows = where.nonzero().squeeze(1)
    if len(rows):
        into.index_copy_(0, rows, values.index_select(0, rows))


def norm_of(delta: Tensor, norm: Norm) -> Tensor:
    """Norm of every row, [n]."""
    flat = delta.flatten(1)
    if norm == "linf":
        return flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(len(flat))
    return flat.abs().sum(1) if norm == "l1" else flat.norm(dim=1)


def project(delta: Tensor, norm: Norm, radius: float) -> Tensor:
    """Nearest point (Euclidean) of the closed ball of `radius`; identity for norm "none"."""
    if norm == "none":
        return delta
    if norm == "linf":
        return delta.clamp(-radius, radius)
    if norm == "l2":
        length = delta.flatten(1).norm(dim=1)
        return delta * per_sample((radius / (length + TINY)).clamp(max=1.0), delta)
    return _project_l1(delta, radius)


def _project_l1(delta: Tensor, radius: float) -> Tensor:
    """Projection on the L1 ball by sorting (Duchi et al. 2008, figure 1)."""
    if radius == 0:
        return torch.zeros_like(delta)
    flat = delta.flatten(1)
    magnitude = flat.abs()
    ordered, _ = magnitude.sort(dim=1, descending=True)
    cumulative = ordered.cumsum(1) - radius
    ranks = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
    support = (ordered - cumulative / ranks > 0).sum(1, keepdim=True).clamp(min=1)
    threshold = (cumulative.gather(1, support - 1) / support).clamp(min=0)
    return (flat.sign() * (magnitude - threshold).clamp(min=0)).reshape(delta.shape)


def direction(gradient: Tensor, norm: Norm, l1_share: float = 0.05) -> Tensor:
    """Steepest-ascent direction of unit size in the norm.

    linf: sign(g), sgn(0) = sgn(NaN) = 0. l2: g/(||g||_2 + 1e-12), 0 for a zero gradient. l1: sign over the share
    `l1_share` of coordinates with the largest |g|, divided by their number (SLIDE, Tramer & Boneh 2019, q = 95 %).
    """
    if norm == "linf":
        return gradient.sign()  # of NaN: 0
    if norm in ("l2", "none"):
        return gradient / per_sample(gradient.flatten(1).norm(dim=1) + TINY, gradient)
    flat = gradient.flatten(1)
    count = max(1, round(l1_share * flat.shape[1]))
    top = flat.abs().topk(count, dim=1).indices
    sparse = torch.zeros_like(flat).scatter(1, top, flat.gather(1, top).sign() / count)
    return sparse.reshape(gradient.shape)


def random_start(kind: Start, norm: Norm, radius: float, shape: tuple[int, ...], noise: Noise) -> Tensor:
    """Start of a search in the ball, [n, *shape].

    zero: the centre. uniform: uniform in the ball. cube: uniform in [-r, r]^D, then projected (so on the sphere for
    l2; what the latent attacks of Yuksel et al. do). gaussian: 0.001 N(0,I), not projected (TRADES, MART).
    """
    if kind == "gaussian":
        return 0.001 * noise.normal(shape)
    uniform = noise.uniform(shape) * radius
    if kind == "zero":
        return torch.zeros_like(uniform)
    if norm == "linf":
        return uniform
    if kind == "cube" or norm == "none":
        return project(uniform, norm, radius)
    dimensions = int(torch.tensor(shape).prod())
    reach = noise.uniform(()).abs() ** (1.0 / dimensions) * radius
    if norm == "l2":
        ray = noise.normal(shape)
        return ray / per_sample(ray.flatten(1).norm(dim=1) + TINY, ray) * per_sample(reach, ray)
    # |coordinates| exponential and normalised to sum 1: uniform on the L1 sphere; signs from another draw.
    exponential = -torch.log((noise.uniform(shape) * 0.5 + 0.5).clamp(min=1e-30))
    ray = exponential * noise.uniform(shape).sign()
    return ray / per_sample(ray.flatten(1).abs().sum(1) + TINY, ray) * per_sample(reach, ray)
