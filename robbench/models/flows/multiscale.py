"""Multi-scale flows: squeeze, steps, factor out half of the channels, repeat (Dinh et al. 2017, 3.6)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.models.flows.base import Encoded, Memory, Recolour, Shape, Transform


class Step(nn.Module, ABC):
    """One invertible layer (or group of layers), [N,C,H,W] -> the same shape. Log-dets are in nats."""

    @abstractmethod
    def encode(self, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Output like h, and log|det| ([N], or a scalar that holds for all samples)."""

    @abstractmethod
    def decode(self, h: Tensor, y: Tensor | None) -> Tensor:
        """Exact inverse of `encode`; no log-det."""

    def pull_back(self, after: Tensor, gradient: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """(before, its gradient) of `decode`, before -> after, from the output and its gradient alone; without a
        graph."""
        before = self.encode(after, y)[0].detach().requires_grad_()
        with torch.enable_grad():
            again = self.decode(before, y)
        (found,) = torch.autograd.grad(again, before, gradient)
        return before.detach(), found

    @abstractmethod
    def freeze(self, dtype: torch.dtype, memory: Memory, where: str) -> "Step":
        """Copy without parameters; `where` names the layer in errors. "invert" is the caller's work."""

    def initialize(self, h: Tensor, y: Tensor | None) -> None:
        """Data-dependent initialisation from the layer's input; nothing by default."""


class Prior(nn.Module, ABC):
    """Gaussian prior of one level of latents."""

    @abstractmethod
    def moments(self, context: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """(mu, log sigma), broadcastable to the level; context: the variables that stay, None at the top."""

    @abstractmethod
    def freeze(self, dtype: torch.dtype) -> "Prior":
        """Copy without parameters."""


def squeeze(h: Tensor) -> Tensor:
    """[N,C,H,W] -> [N,4C,H/2,W/2]: every 2x2 block becomes four channels."""
    return F.pixel_unshuffle(h, 2)


def unsqueeze(h: Tensor) -> Tensor:
    """Inverse of `squeeze`."""
    return F.pixel_shuffle(h, 2)


def step_shapes(input_shape: tuple[int, int, int], levels: int) -> list[tuple[int, int, int]]:
    """Shape seen by the steps of each level; `UserError` when a level cannot be squeezed.

    (1,28,28), 2 levels -> [(4,14,14), (8,7,7)]; latents are [(2,14,14), (8,7,7)].
    """
    channels, height, width = input_shape
    if levels < 1:
        raise UserError(f"levels={levels}: a multi-scale flow has at least 1 level")
    shapes: list[tuple[int, int, int]] = []
    for level in range(1, levels + 1):
        if height % 2 or width % 2 or min(height, width) < 2:
            raise UserError(
                f"levels={levels}: level {level} would squeeze {height}x{width} pixels, and both sides must "
                f"be even; images of shape {tuple(input_shape)} allow at most {level - 1} levels"
            )
        channels, height, width = 4 * channels, height // 2, width // 2
        shapes.append((channels, height, width))
        channels //= 2
    return shapes


class MultiScale(Transform):
    """Per level: squeeze, steps, then (except at the last) the second half of the channels becomes latents.

    stacks: the steps of each level, fine to coarse. priors: one a level. channels_last: memory format inside.
    recompute: decode keeps no activations for backward, which costs about one more decode and encode.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        stacks: Sequence[Sequence[Step]],
        priors: Sequence[Prior],
        channels_last: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.level_shapes = latent_shapes(input_shape, len(stacks))
        self.stacks = nn.ModuleList(nn.ModuleList(stack) for stack in stacks)
        self.priors = nn.ModuleList(priors)
        self.channels_last = channels_last
        self.recompute = recompute

    def encode(self, v: Tensor, y: Tensor | None) -> Encoded:
        h, log_det = v, v.new_zeros(len(v))
        levels: list[Tensor] = []
        moments: list[tuple[Tensor, Tensor]] = []
        for level in range(len(self.stacks)):
            h = self._laid_out(squeeze(h))
            h, change = encode_steps(h, y, self._steps(level))
            log_det = log_det + change
            context: Tensor | None = None
            z = h
            if level + 1 < len(self.stacks):
                context, z = h.chunk(2, dim=1)
                h = context
            levels.append(z)
            moments.append(self._prior(level).moments(context, y))
        return Encoded(tuple(levels), tuple(moments), log_det)

    def decode(self, levels: tuple[Tensor, ...], y: Tensor | None) -> Tensor:
        h: Tensor | None = None
        for level in reversed(range(len(self.stacks))):
            h = self._ascend(level, h, levels[level], y)
        assert h is not None
        return h

    def recolour(
        self, levels: tuple[Tensor, ...], y: Tensor | None, rule: Recolour, whitened: bool
    ) -> tuple[Tensor, ...]:
        context: Tensor | None = None
        found: list[Tensor] = []
        for level in reversed(range(len(self.stacks))):
            mean, log_sigma = self._prior(level).moments(context, y)
            found.append(rule(levels[level], mean, log_sigma))
            if level > 0:
                context = self._ascend(level, context, found[-1] if whitened else levels[level], y)
        return tuple(reversed(found))

    def initialize(self, v: Tensor, y: Tensor | None) -> None:
        h = v
        for level in range(len(self.stacks)):
            h = squeeze(h)
            for step in self._steps(level):
                step.initialize(h, y)
                h, _ = step.encode(h, y)
            h, _ = h.chunk(2, dim=1)

    def freeze(self, dtype: torch.dtype, memory: Memory) -> "MultiScale":
        stacks = [
            [
                step.freeze(dtype, memory, f"level {level}, step {i}")
                for i, step in enumerate(self._steps(level - 1), 1)
            ]
            for level in range(1, len(self.stacks) + 1)
        ]
        priors = [self._prior(level).freeze(dtype) for level in range(len(self.priors))]
        recompute = memory == "invert"
        return MultiScale(self.input_shape, stacks, priors, channels_last=True, recompute=recompute)

    def _ascend(self, level: int, context: Tensor | None, z: Tensor, y: Tensor | None) -> Tensor:
        """From the coarser variables and the raw latents of a level to the input of that level."""
        h = self._laid_out(z if context is None else torch.cat([context, z], dim=1))
        return unsqueeze(decode_steps(h, y, self._steps(level), self.recompute))

    def _laid_out(self, h: Tensor) -> Tensor:
        return h.contiguous(memory_format=torch.channels_last) if self.channels_last else h

    def _steps(self, level: int) -> list[Step]:
        return [cast(Step, step) for step in cast(nn.ModuleList, self.stacks[level])]

    def _prior(self, level: int) -> Prior:
        return cast(Prior, self.priors[level])


def encode_steps(h: Tensor, y: Tensor | None, steps: Sequence[Step]) -> tuple[Tensor, Tensor]:
    """`encode` of every step, first to last, and the sum of their log-dets, [N]."""
    log_det = h.new_zeros(len(h))
    for step in steps:
        h, change = step.encode(h, y)
        log_det = log_det + change
    return h, log_det


def decode_steps(h: Tensor, y: Tensor | None, steps: Sequence[Step], recompute: bool = False) -> Tensor:
    """`decode` of every step, last to first. recompute: see `MultiScale`."""
    if recompute:
        out: Tensor = _RecomputedDecode.apply(h, y, steps)
        return out
    for step in reversed(steps):
        h = step.decode(h, y)
    return h


class _RecomputedDecode(torch.autograd.Function):
    """`decode_steps` that stores its output alone: `Step.pull_back` finds every step's input again."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, y: Tensor | None, steps: Sequence[Step]) -> Tensor:
        out = decode_steps(h, y, steps)
        ctx.steps, ctx.y = steps, y
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (after,) = ctx.saved_tensors
        for step in ctx.steps:
            after, gradient = step.pull_back(after, gradient, ctx.y)
        return gradient, None, None


def latent_shapes(input_shape: tuple[int, int, int], levels: int) -> tuple[Shape, ...]:
    """Per-sample latent shapes, fine to coarse."""
    shapes = step_shapes(input_shape, levels)
    return (*((channels // 2, height, width) for channels, height, width in shapes[:-1]), shapes[-1])
