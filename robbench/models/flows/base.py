"""What every normalizing flow offers: exact encode and decode, densities, bits per dimension, freezing.

Conventions, the same for every flow (L = `grey_levels`, D = C*H*W, u in [0,1) the dequantisation noise):
    pixel x in [0,1]   ->   k = x (L-1)   ->   d = (k + u) / L   ->   v = pre(d)   ->   latents z
    log p_d(d) = log prior(z) + log|det dz/dd|,   dz/dd = dz/dv dv/dd
    log_prob(x) = log p_d(d) - D ln L            [nats]
    bits/dim = -log_prob(x) / (D ln 2)
pre is d - 1/2 ("shift", where dv/dd = 1) or the logit of preprocessing.py. An image of grey levels k occupies
the cube {d in [k/L, (k+1)/L)} of volume L^-D, so its probability is P(k) = E_u[exp log_prob(x; u)], and
bits/dim averaged over u is at least -log2 P(k) / D (Jensen). Attacks move x continuously; the same formulas
hold for every real x (logit: for x in [0,1]). `decode` inverts `encode` exactly for the same u, except in
decode_mode "flp_legacy": the published decoder of Yuksel et al., decode(encode(x)) = .05 + .9 ((L-1) x + u) / L.
Latents are raw z: `whiten` turns them into eps = (z - mu) / sigma of the (possibly learned) prior and back.
"""

import inspect
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.core.random import SampleRandom
from robbench.models.flows.gaussian import coloured, gaussian_log_density, whitened
from robbench.models.flows.preprocessing import (
    DecodeMode,
    PreprocessingKind,
    build_preprocessing,
    check_decode_mode,
)

Shape = tuple[int, ...]
Memory = Literal["none", "mask", "invert"]
Recolour = Callable[[Tensor, Tensor, Tensor], Tensor]  # (z or eps, mu, log sigma) -> eps or z


@dataclass(frozen=True)
class Latents:
    """Latent variables of a batch: one tensor [N, ...] per level, fine (first factored out) to coarse."""

    levels: tuple[Tensor, ...]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Per-sample shape of each level."""
        return tuple(tuple(level.shape[1:]) for level in self.levels)

    def flat(self) -> Tensor:
        """All levels as one vector per sample, [N,D], fine to coarse."""
        return torch.cat([level.flatten(1) for level in self.levels], dim=1)

    @classmethod
    def unflat(cls, flat: Tensor, shapes: Sequence[Shape]) -> "Latents":
        """Inverse of `flat`; ValueError when the sizes do not add up."""
        sizes = [math.prod(shape) for shape in shapes]
        if flat.ndim != 2 or flat.shape[1] != sum(sizes):
            raise ValueError(
                f"flat latents of shape {tuple(flat.shape)}; levels {list(shapes)} need [N,{sum(sizes)}]"
            )
        parts = torch.split(flat, sizes, dim=1)
        return cls(tuple(part.reshape(-1, *shape) for part, shape in zip(parts, shapes, strict=True)))


@dataclass(frozen=True)
class Encoded:
    """One pass v -> z. moments: (mu, log sigma) of each level's Gaussian prior, broadcastable to the level.

    log_det: log|det dz/dv|, [N].
    """

    levels: tuple[Tensor, ...]
    moments: tuple[tuple[Tensor, Tensor], ...]
    log_det: Tensor


class Transform(nn.Module, ABC):
    """The bijection v <-> z of a flow together with its prior; what a new flow has to write.

    y: class labels [N] of a conditional flow; unconditional ones ignore it.
    """

    level_shapes: tuple[Shape, ...]
    label_classes: int | None = None  # a conditional flow: labels are 0..label_classes-1

    @abstractmethod
    def encode(self, v: Tensor, y: Tensor | None) -> Encoded:
        """v [N,C,H,W] -> latents, prior moments, log-det."""

    @abstractmethod
    def decode(self, levels: tuple[Tensor, ...], y: Tensor | None) -> Tensor:
        """Raw latents -> v [N,C,H,W]; computes neither priors nor log-dets."""

    @abstractmethod
    def recolour(
        self, levels: tuple[Tensor, ...], y: Tensor | None, rule: Recolour, whitened: bool
    ) -> tuple[Tensor, ...]:
        """`rule(level, mu, log sigma)` for every level, coarse to fine; a prior may depend on coarser raw z.

        whitened: `levels` holds eps and the rule returns raw z (else the other way round).
        """

    @abstractmethod
    def freeze(self, dtype: torch.dtype, memory: Memory) -> "Transform":
        """A copy without parameters (buffers only), folded for speed; `UserError` when not invertible."""

    def initialize(self, v: Tensor, y: Tensor | None) -> None:
        """Data-dependent initialisation from a batch, in place; nothing by default."""


class FlowModel(nn.Module):
    """Everything trainable and frozen flows share: see the module docstring for the conventions.

    input_shape: (C,H,W). grey_levels: L >= 2. y: class labels [N] of a conditional flow, else None.
    u: dequantisation noise, a number in [0,1) or a tensor like x. Images are cast to the flow's dtype.
    preprocessing, decode_mode: see the module docstring. batch_norm: whether layers normalise by the statistics of
    the batch in training mode; then only `log_prob`, which training needs, works in that mode.
    """

    transform: Transform
    batch_norm: ClassVar[bool] = False

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        grey_levels: int,
        transform: Transform,
        preprocessing: PreprocessingKind = "shift",
        decode_mode: DecodeMode = "exact",
    ) -> None:
        super().__init__()
        if grey_levels < 2:
            raise UserError(f"grey_levels={grey_levels}: a flow models images of at least 2 grey levels")
        channels, height, width = input_shape
        self.input_shape = (channels, height, width)
        self.grey_levels = grey_levels
        self.preprocessing = build_preprocessing(preprocessing)
        check_decode_mode(decode_mode, self.preprocessing)
        self.decode_mode: DecodeMode = decode_mode
        self.transform = transform

    @property
    def level_shapes(self) -> tuple[Shape, ...]:
        """Per-sample latent shapes, fine to coarse; their sizes add up to D."""
        return self.transform.level_shapes

    @property
    def label_classes(self) -> int | None:
        """Number of classes a conditional flow takes labels of; None for an unconditional flow."""
        return self.transform.label_classes

    @property
    def dimensions(self) -> int:
        """D = C*H*W."""
        return math.prod(self.input_shape)

    @property
    def device(self) -> torch.device:
        """Where the flow's tensors are."""
        return self._dtype_source().device

    @property
    def dtype(self) -> torch.dtype:
        """What the flow computes in."""
        return self._dtype_source().dtype

    def encode(self, x: Tensor, y: Tensor | None = None, u: float | Tensor = 0.5) -> tuple[Latents, Tensor]:
        """Raw latents of images x [N,C,H,W], and log|det dz/dd| [N] in nats."""
        self._require_eval("encode")
        encoded = self._encoded(x, y, u)
        return Latents(encoded.levels), encoded.log_det

    def decode(self, latents: Latents, y: Tensor | None = None, u: float | Tensor = 0.5) -> Tensor:
        """Images [N,C,H,W], not clipped: the exact inverse of `encode` for the same u. Differentiable.

        In decode_mode "flp_legacy" the squeezed pixels p = .05 + .9 d instead, whatever u is. Images are contiguous,
        whatever memory format the layers compute in: a classifier may call `view` on them.
        """
        self._require_eval("decode")
        v = self.transform.decode(latents.levels, y).contiguous()
        if self.decode_mode == "flp_legacy":
            return torch.sigmoid(v)
        noise = u.to(v) if isinstance(u, Tensor) else u
        return (self.preprocessing.inverse(v) * self.grey_levels - noise) / (self.grey_levels - 1)

    def log_prob(self, x: Tensor, y: Tensor | None = None, u: float | Tensor = 0.5) -> Tensor:
        """log p_d(d) - D ln L in nats, [N]: its mean over u bounds ln P(image) from below. Differentiable."""
        encoded = self._encoded(x, y, u)
        total = encoded.log_det - self.dimensions * math.log(self.grey_levels)
        for level, (mean, log_sigma) in zip(encoded.levels, encoded.moments, strict=True):
            total = total + gaussian_log_density(level, mean, log_sigma)
        return total

    def log_prob_draws(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        n_samples: int,
        seed: int,
        sample_ids: Sequence[int] | Tensor,
    ) -> Tensor:
        """`log_prob` for `n_samples` draws of u, [n_samples,N]. Differentiable in x.

        The noise of a sample is a function of (seed, its id, number of the draw) alone.
        """
        self._require_eval("bits_per_dim")
        if len(sample_ids) != len(x) or n_samples < 1:
            raise UserError(
                f"bits_per_dim of {len(x)} images with {len(sample_ids)} sample_ids, n_samples={n_samples}; "
                f"give one id an image and at least one draw"
            )
        noise = SampleRandom(seed, "dequantization")
        draws = [
            self.log_prob(x, y, noise.draw(sample_ids, self.input_shape, unit_interval, draw))
            for draw in range(n_samples)
        ]
        return torch.stack(draws)

    def bits_per_dim(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        n_samples: int = 1,
        seed: int,
        sample_ids: Sequence[int] | Tensor,
    ) -> Tensor:
        """-log_prob / (D ln 2), averaged over `n_samples` draws of u (see `log_prob_draws`), [N]."""
        draws = self.log_prob_draws(x, y, n_samples=n_samples, seed=seed, sample_ids=sample_ids)
        return -draws.mean(0) / (self.dimensions * math.log(2.0))

    def whiten(self, latents: Latents, y: Tensor | None = None) -> Latents:
        """eps = (z - mu) / sigma: standard normal under the model, comparable across levels."""
        return Latents(self.transform.recolour(latents.levels, y, whitened, whitened=False))

    def unwhiten(self, latents: Latents, y: Tensor | None = None) -> Latents:
        """Raw z = mu + sigma eps, inverse of `whiten`."""
        return Latents(self.transform.recolour(latents.levels, y, coloured, whitened=True))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        y: Tensor | None = None,
    ) -> Tensor:
        """n images [n,C,H,W] clipped to [0,1]; temperature scales the prior's width (0: its mode)."""
        like = self._dtype_source()
        epsilon = (
            torch.randn(n, *shape, generator=generator, dtype=torch.float64) for shape in self.level_shapes
        )
        latents = Latents(tuple((temperature * level).to(like) for level in epsilon))
        return self.decode(self.unwhiten(latents, y), y).clamp(0.0, 1.0)

    @torch.no_grad()
    def roundtrip_error(self, x: Tensor, y: Tensor | None = None, u: float | Tensor = 0.5) -> Tensor:
        """max |decode(encode(x)) - x| of each image in [0,1] units, [N]; NaN where the flow is not finite.

        In decode_mode "flp_legacy" that is the contract's own distortion, at most .055.
        """
        latents, _ = self.encode(x, y, u)
        return (self.decode(latents, y, u) - x.to(self._dtype_source())).abs().flatten(1).amax(1)

    def reconstruction(self, x: Tensor, u: float | Tensor = 0.5) -> Tensor:
        """What `decode(encode(x))` is by the contract, [N,C,H,W]: x itself, or its squeezed pixels in decode_mode
        "flp_legacy"."""
        return torch.sigmoid(self._dequantised(x, u)) if self.decode_mode == "flp_legacy" else x

    def _require_eval(self, method: str) -> None:
        """`UserError` in training mode for flows whose layers then make an image depend on its batch."""
        if self.training and self.batch_norm:
            raise UserError(
                f"{type(self).__name__}.{method} in training mode: batch norm would make every image depend on its "
                f"batch; call eval() or freeze() first"
            )

    def _encoded(self, x: Tensor, y: Tensor | None, u: float | Tensor) -> Encoded:
        """`Transform.encode` with the pre-processing's log-det added."""
        v = self._dequantised(x, u)
        encoded = self.transform.encode(v, y)
        return replace(encoded, log_det=encoded.log_det + self.preprocessing.log_det(v))

    def _dequantised(self, x: Tensor, u: float | Tensor) -> Tensor:
        """v = pre(d) of images, in the flow's dtype."""
        if tuple(x.shape[1:]) != self.input_shape or not x.is_floating_point():
            raise UserError(
                f"{x.dtype} images of shape {tuple(x.shape)}; this flow reads floats in [0,1] of shape "
                f"(N, {', '.join(map(str, self.input_shape))}): choose the flow of this data set"
            )
        x = x.to(self._dtype_source())
        noise = u.to(x) if isinstance(u, Tensor) else u
        return self.preprocessing.forward((x * (self.grey_levels - 1) + noise) / self.grey_levels)

    def _dtype_source(self) -> Tensor:
        """Any floating tensor of the model: says dtype and device."""
        tensors = itertools.chain(self.parameters(), self.buffers())
        return next(tensor for tensor in tensors if tensor.is_floating_point())


class Flow(FlowModel):
    """A trainable flow."""

    @torch.no_grad()
    def initialize(self, x: Tensor, y: Tensor | None = None, u: float | Tensor = 0.5) -> None:
        """Data-dependent initialisation from images [N,C,H,W] in [0,1]; call it once, before training."""
        self.transform.initialize(self._dequantised(x, u), y)

    def freeze(
        self,
        dtype: torch.dtype = torch.float32,
        memory: Memory = "none",
        decode_mode: DecodeMode | None = None,
    ) -> "FrozenFlow":
        """An independent copy for attacks: no parameters, layers folded, inverses computed in float64.

        Later changes of this flow do not reach the copy. memory: what decode keeps for the backward pass to
        the latents: "none" saves no memory (all activations, fastest), "mask" keeps 1-byte ReLU masks,
        "invert" keeps the output of each level and recomputes the rest by the inverse (slowest).
        decode_mode: the copy's; None keeps that of this flow. Gradients of the copy are first-order only.

        A class that overrides a method of `FlowModel` overrides this one too, and returns a `FrozenFlow` that computes
        the same: the copy made here has the methods of `FlowModel` alone. `UserError` otherwise.
        """
        lost = overridden(self)
        if lost:
            raise UserError(
                f"flow {type(self).__name__} has a {', '.join(lost)} of its own, which the copy for attacks would not "
                f"have; override freeze() to return a FrozenFlow that has it too (docs/models.md, a flow of your own)"
            )
        if memory not in get_args(Memory):
            raise UserError(
                f"freeze(memory={memory!r}) is unknown; choose one of: {', '.join(get_args(Memory))}"
            )
        if dtype not in (torch.float32, torch.float64):
            raise UserError(f"freeze(dtype={dtype}) is not supported; use torch.float32 or torch.float64")
        with torch.no_grad():
            frozen = FrozenFlow(
                self.input_shape,
                self.grey_levels,
                self.transform.freeze(dtype, memory),
                self.preprocessing.kind,
                self.decode_mode if decode_mode is None else decode_mode,
            )
        return frozen.to(self._dtype_source().device)  # layers build fixed orders and masks on the CPU


class FrozenFlow(FlowModel):
    """A flow without parameters, always in eval mode, made by `Flow.freeze`. `.to(device)` works."""

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        grey_levels: int,
        transform: Transform,
        preprocessing: PreprocessingKind = "shift",
        decode_mode: DecodeMode = "exact",
    ) -> None:
        super().__init__(input_shape, grey_levels, transform, preprocessing, decode_mode)
        for name, tensor in self.named_buffers():
            if not torch.isfinite(tensor).all():
                raise UserError(f"flow tensor {name!r} holds NaN or infinity; restore the weights or retrain")
        super().train(False)

    def train(self, mode: bool = True) -> "FrozenFlow":
        """Stays in eval mode: a parent module in training must not change an attack."""
        return self


def overridden(flow: Flow) -> tuple[str, ...]:
    """Methods and properties of `FlowModel` that the class of `flow`, or `flow` itself, defines anew."""
    return tuple(
        name
        for name, value in vars(FlowModel).items()
        if not name.startswith("__")
        and (callable(value) or isinstance(value, property))
        and (inspect.getattr_static(type(flow), name) is not value or name in vars(flow))
    )


def unit_interval(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 in [0,1): drawn in float32, because rounding a float64 draw could give 1."""
    return generator.random(shape, dtype=np.float32)
