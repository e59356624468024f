"""Norm balls: projection, steepest ascent and random starts, one row per sample.

All attacks and trainings use these functions, so that they share one definition of a ball. The first dimension of all
tensors is the sample; norms run over all other dimensions and are accumulated in float64, since in float32 a sum over
the 150,000 entries of a photograph is off by up to 1e-4 of its size.
"""

import math
from typing import Literal, Protocol

import torch
from torch import Tensor

from robbench.core.random import KeyedNumbers, SampleRandom
from robbench.specs import Norm

Start = Literal["zero", "uniform", "cube", "gaussian"]
TINY = 1e-12


class Noise(Protocol):
    """Random rows for the samples of one batch."""

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        """Uniform on [-1, 1), [n, *shape]."""

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal, [n, *shape]."""

    def scene(self) -> "Noise":
        """Noise for what is random in a renderer and not searched: the same in every restart."""


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

    def scene(self) -> "SampleNoise":
        return SampleNoise(self._seed, f"{self._stream}/scene", self._ids, 0, self._device)


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

    def scene(self) -> "GeneratorNoise":
        return self


def keyed_noise(seed: int, stream: str, ids: Tensor, restart: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """The first `drawn_noise` of samples keyed by id, of the shape [n, ...] and on the device of `like`."""
    keys = KeyedNumbers(seed, stream, ids, restart, like.device).keys
    return drawn_noise(keys, torch.zeros_like(keys), like)


def drawn_noise(keys: Tensor, draw: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers uniform on [-1, 1), and standard normal ones made of them (Box and Muller), of the shape [n, ...] of
    `like`. keys: [n] of `KeyedNumbers`; draw: [n] int64, number of the draw."""
    count = like.shape[1:].numel()
    first, second = (
        KeyedNumbers.uniform(keys, 2 * draw + place, count).reshape(like.shape) for place in (0, 1)
    )
    normal = (-2.0 * (1.0 - first).log()).sqrt() * (2.0 * math.pi * second).cos()
    return 2.0 * first - 1.0, normal


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """`values` [n] with trailing singleton dimensions, to broadcast against `like` [n, ...]."""
    return values.reshape(-1, *([1] * (like.ndim - 1)))


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether Python can read values without waiting for a device."""
    return tensor.device.type == "cpu"


def known_empty(where: Tensor) -> bool:
    """Whether no entry of `where` [n] bool is True; False where reading it would wait for a device."""
    return is_on_cpu(where) and not bool(where.any())


def put(into: Tensor, values: Tensor, where: Tensor) -> None:
    """Copy the rows `where` [n] bool of `values` [n, ...] into `into`; on the CPU the other rows are not touched."""
    if not is_on_cpu(where):
        torch.where(per_sample(where, into), values, into, out=into)
        return
    rows = where.nonzero().squeeze(1)
    if len(rows):
        into.index_copy_(0, rows, values.index_select(0, rows))


def _length(delta: Tensor, norm: Norm) -> Tensor:
    """Norm of every row in float64, [n]."""
    flat = delta.flatten(1)
    if norm == "linf":
        return (flat.abs().amax(1) if flat.shape[1] else flat.new_zeros(len(flat))).double()
    if norm == "l0":
        return (flat != 0).sum(1).double()
    return flat.abs().sum(1, dtype=torch.float64) if norm == "l1" else flat.double().norm(dim=1)


def norm_of(delta: Tensor, norm: Norm) -> Tensor:
    """Norm of every row, [n], accumulated in float64 and rounded once to the type of `delta`. "l0" counts the
    entries that are not 0; "none" is l2."""
    return _length(delta, norm).to(delta.dtype)


def project(delta: Tensor, norm: Norm, radius: float | Tensor) -> Tensor:
    """Nearest point (Euclidean) of the closed ball of `radius`, one for all samples or [n], to one rounding per
    coordinate; identity for "none". In l0 the `radius` largest entries stay."""
    if norm == "none":
        return delta
    if norm == "l0":
        return _keep_largest(delta, torch.as_tensor(radius, device=delta.device).expand(len(delta)))
    if norm == "linf":
        if not isinstance(radius, Tensor):
            return delta.clamp(-radius, radius)
        limit = per_sample(radius, delta)
        return delta.clamp(-limit, limit)
    if norm == "l2":
        scale = (radius / _length(delta, "l2").clamp(min=TINY)).clamp(max=1.0)
        return delta * per_sample(scale.to(delta.dtype), delta)
    return _project_l1(delta, radius)


def _keep_largest(delta: Tensor, count: Tensor) -> Tensor:
    """delta [n,...] with all but its `count` [n] largest entries 0."""
    flat = delta.flatten(1)
    order = flat.abs().argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(flat.shape[1], device=flat.device).expand_as(flat)
    kept = torch.zeros_like(flat, dtype=torch.bool).scatter_(1, order, ranks < count[:, None])
    return (flat * kept).reshape(delta.shape)


def _project_l1(delta: Tensor, radius: float | Tensor) -> Tensor:
    """Projection on the L1 ball by sorting (Duchi et al. 2008, figure 1)."""
    if isinstance(radius, Tensor):
        radius = radius[:, None]
    elif radius == 0:
        return torch.zeros_like(delta)
    flat = delta.flatten(1)
    magnitude = flat.abs()
    ordered = magnitude.sort(dim=1, descending=True).values.double()
    cumulative = ordered.cumsum(1) - radius
    ranks = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=torch.float64)
    support = (ordered - cumulative / ranks > 0).sum(1, keepdim=True).clamp(min=1)
    threshold = (cumulative.gather(1, support - 1) / support).clamp(min=0)
    kept = (magnitude.double() - threshold).clamp_(min=0).to(delta.dtype)
    return (flat.sign() * kept).reshape(delta.shape)


def finite_part(gradient: Tensor) -> Tensor:
    """A copy of `gradient` with 0 for every NaN or infinite entry, so that only these coordinates stand still."""
    return gradient.nan_to_num(0.0, 0.0, 0.0)


def rescale(gradient: Tensor) -> Tensor:
    """`finite_part` divided per sample by its largest absolute entry, a new tensor with entries in [-1, 1]: sums and
    squares neither underflow nor overflow, whatever the scale of the model's logits. 0 for a zero gradient."""
    finite = finite_part(gradient)
    largest = finite.flatten(1).abs().amax(1)
    return finite.div_(per_sample(largest.masked_fill_(largest == 0, 1.0), finite))


def normalise(gradient: Tensor, norm: Norm) -> Tensor:
    """gradient / ||gradient|| per sample, non-finite entries as 0; 0 for a zero gradient. A new tensor.

    In float64, where squares and sums of float32 entries (1e-45 to 3e38) neither underflow nor overflow.
    """
    finite = finite_part(gradient).double()
    length = _length(finite, norm)
    length.masked_fill_(length == 0, 1.0)
    return finite.div_(per_sample(length, finite)).to(gradient.dtype)


def direction(gradient: Tensor, norm: Norm, l1_share: float = 0.05) -> Tensor:
    """Steepest-ascent direction of size 1 in the norm, the same for gradients of any scale. A new tensor.

    NaN and infinite entries count as 0; a zero gradient gives 0. linf: sign(g). l2 and none: g / ||g||_2. l1: signs of
    the share `l1_share` of coordinates with the largest |g|, divided by their number (SLIDE, Tramer & Boneh 2019,
    q = 95 %).
    """
    if norm == "linf":
        return finite_part(gradient).sign_()
    if norm in ("l2", "none"):
        return normalise(gradient, "l2")
    flat = finite_part(gradient).flatten(1)
    top = flat.abs().topk(max(1, round(l1_share * flat.shape[1])), dim=1).indices
    signs = flat.gather(1, top).sign_()
    signs.div_(signs.abs().sum(1, keepdim=True).clamp_(min=1.0))
    return torch.zeros_like(flat).scatter_(1, top, signs).reshape(gradient.shape)


def stands_still(gradient: Tensor) -> Tensor:
    """Samples whose `direction` is 0, [n] bool: every entry of the gradient is 0, NaN or infinite."""
    return (finite_part(gradient).flatten(1) == 0).all(1)


def random_start(kind: Start, norm: Norm, radius: float, shape: tuple[int, ...], noise: Noise) -> Tensor:
    """Start of a search in the ball, [n, *shape].

    zero: the centre. uniform: uniform in the ball. cube: uniform in [-r, r]^D, then projected, hence on the sphere for
    l2 (the latent attacks of Yuksel et al.). gaussian: 0.001 N(0,I), not projected (TRADES, MART).
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
        return normalise(ray, "l2") * per_sample(reach, ray)
    # |coordinates| exponential and normalised to sum 1: uniform on the L1 sphere; signs from another draw.
    exponential = -torch.log((noise.uniform(shape) * 0.5 + 0.5).clamp(min=1e-30))
    ray = exponential * noise.uniform(shape).sign()
    return normalise(ray, "l1") * per_sample(reach, ray)
