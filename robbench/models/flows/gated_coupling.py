"""The MNIST flow of phlippe/saved_models (UvA tutorial 11): checkerboard couplings with gated convolutions.

A coupling keeps one colour of a checkerboard of pixels and transforms the other one, h':

    h' <- (h' + t) exp(s),   s = f tanh(raw / f),   (raw, t) = net(kept),   f = exp(scaling_factor) per channel

so that |s| < f and every coupling is invertible anywhere. The net is a 3x3 convolution, gated residual blocks, each
followed by a layer norm over channels, and a 3x3 convolution that starts at zero. All couplings work at full
resolution: one level of D latents, prior N(0,I). Decoding is exact and costs as much as encoding: no iteration.

Names of parameters, and their layout, are those of the published checkpoint, which `load_state_dict` takes as it is.
"""

from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from robbench.core.errors import UserError
from robbench.models.flows.base import Encoded, Flow, Memory, Recolour, Transform
from robbench.models.flows.frozen import frozen_module
from robbench.models.flows.layers import StandardPrior
from robbench.models.flows.multiscale import Prior, Step, decode_steps, encode_steps
from robbench.models.flows.preprocessing import DecodeMode, PreprocessingKind

PUBLISHED_STEPS = "flows."  # entry 0 of the published list is the dequantisation, without parameters


class ConcatELU(nn.Module):
    """[elu(h), elu(-h)]: twice the channels."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat([F.elu(h), F.elu(-h)], dim=1)


class GatedConv(nn.Module):
    """h + value * sigmoid(gate), both computed from h by a 3x3 and a 1x1 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            ConcatELU(),
            nn.Conv2d(2 * width, width, 3, padding=1),
            ConcatELU(),
            nn.Conv2d(2 * width, 2 * width, 1),
        )

    def forward(self, h: Tensor) -> Tensor:
        value, gate = self.net(h).chunk(2, dim=1)
        return torch.addcmul(h, value, torch.sigmoid(gate))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of every pixel on its own."""

    EPSILON = 1e-5

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, width, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, width, 1, 1))

    def forward(self, h: Tensor) -> Tensor:
        last = h.permute(0, 2, 3, 1)
        normal = F.layer_norm(last, last.shape[-1:], self.gamma.flatten(), self.beta.flatten(), self.EPSILON)
        return normal.permute(0, 3, 1, 2)


class GatedConvNet(nn.Module):
    """[N,C,H,W] -> [N,2C,H,W]; see the module docstring. It starts as zero."""

    def __init__(self, channels: int, width: int, blocks: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, padding=1)]
        for _ in range(blocks):
            layers += [GatedConv(width), ChannelNorm(width)]
        last = nn.Conv2d(2 * width, 2 * channels, 3, padding=1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(cast(Tensor, last.bias))
        self.nn = nn.Sequential(*layers, ConcatELU(), last)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.nn(h.contiguous(memory_format=torch.channels_last))
        return out


class GatedCoupling(Step):
    """One coupling on images [N,C,H,W]. invert: which colour is transformed. recompute: the net's activations are not
    kept for the backward pass but computed again."""

    mask: Tensor  # 1 where a pixel is kept, [1,1,H,W]

    def __init__(self, net: nn.Module, size: tuple[int, int], channels: int, invert: bool) -> None:
        super().__init__()
        self.network = net
        self.recompute = False
        self.scaling_factor = nn.Parameter(torch.zeros(channels))
        odd = (torch.arange(size[0])[:, None] + torch.arange(size[1])) % 2
        self.register_buffer("mask", (1 - odd if invert else odd).float()[None, None])

    def encode(self, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        s, t = self._scale_and_shift(h)
        return (h + t) * torch.exp(s), s.flatten(1).sum(1)

    def decode(self, h: Tensor, y: Tensor | None) -> Tensor:
        s, t = self._scale_and_shift(h)
        return h * torch.exp(-s) - t

    def freeze(self, dtype: torch.dtype, memory: Memory, where: str) -> "GatedCoupling":
        frozen = frozen_module(self, dtype).to(memory_format=torch.channels_last)
        frozen.recompute = memory == "mask"
        return frozen

    def pull_back(self, after: Tensor, gradient: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """The base class's, with one run of the net where encode and decode have two: both read the same pixels."""
        after = after.detach().requires_grad_()
        with torch.enable_grad():
            s, t = self._scale_and_shift(after)
        moved = (after + t).detach()  # the input times exp(-s)
        (through_net,) = torch.autograd.grad((s, t), after, (-moved * gradient, -gradient))
        return moved * torch.exp(s.detach()), gradient * torch.exp(-s.detach()) + through_net

    def _scale_and_shift(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Zero on the pixels kept, so that these pass unchanged."""
        kept, changed = h * self.mask, 1.0 - self.mask
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(self.network, kept, use_reentrant=False, preserve_rng_state=False)
        else:
            out = self.network(kept)
        raw, t = out.chunk(2, dim=1)
        limit = torch.exp(self.scaling_factor)[:, None, None]
        return limit * torch.tanh(raw / limit) * changed, t * changed


class GatedCouplingStack(Transform):
    """Couplings one after the other. flows: by number from "1". recompute: see `MultiScale`."""

    def __init__(
        self, input_shape: tuple[int, int, int], steps: list[Step], prior: Prior, recompute: bool = False
    ) -> None:
        super().__init__()
        self.level_shapes = (input_shape,)
        self.flows = nn.ModuleDict({str(number): step for number, step in enumerate(steps, 1)})
        self.prior = prior
        self.recompute = recompute

    def encode(self, v: Tensor, y: Tensor | None) -> Encoded:
        z, log_det = encode_steps(v, y, self._steps())
        return Encoded((z,), (self.prior.moments(None, y),), log_det)

    def decode(self, levels: tuple[Tensor, ...], y: Tensor | None) -> Tensor:
        return decode_steps(levels[0], y, self._steps(), self.recompute)

    def recolour(
        self, levels: tuple[Tensor, ...], y: Tensor | None, rule: Recolour, whitened: bool
    ) -> tuple[Tensor, ...]:
        return (rule(levels[0], *self.prior.moments(None, y)),)

    def freeze(self, dtype: torch.dtype, memory: Memory) -> "GatedCouplingStack":
        steps = [step.freeze(dtype, memory, f"coupling {i}") for i, step in enumerate(self._steps(), 1)]
        (shape,) = self.level_shapes
        channels, height, width = shape
        return GatedCouplingStack(
            (channels, height, width), steps, self.prior.freeze(dtype), recompute=memory == "invert"
        )

    def _steps(self) -> list[Step]:
        return [cast(Step, step) for step in self.flows.values()]


class GatedCouplingFlow(Flow):
    """`couplings` checkerboard couplings with nets of `blocks` gated blocks and `width` channels.

    input_shape: (C,H,W). grey_levels: of the data set. preprocessing, decode_mode: see preprocessing.py and base.py.
    The published flow of MNIST is the default: 8 couplings, width 32, 3 blocks, logit with alpha 1e-5. A frozen copy
    with memory="mask" keeps the input of every coupling and computes its net again: there are no ReLUs to mask.
    `UserError` for impossible arguments.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        grey_levels: int,
        *,
        couplings: int = 8,
        width: int = 32,
        blocks: int = 3,
        preprocessing: PreprocessingKind = "logit-1e-5",
        decode_mode: DecodeMode = "exact",
    ) -> None:
        for name, value in (("couplings", couplings), ("width", width), ("blocks", blocks)):
            if value < 1:
                raise UserError(f"gated-coupling argument {name}={value}; give at least 1")
        channels, height, columns = input_shape
        steps: list[Step] = [
            GatedCoupling(
                GatedConvNet(channels, width, blocks), (height, columns), channels, invert=number % 2 == 1
            )
            for number in range(couplings)
        ]
        shape = (channels, height, columns)
        transform = GatedCouplingStack(shape, steps, StandardPrior())
        super().__init__(shape, grey_levels, transform, preprocessing, decode_mode)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As of any module; names of the published checkpoint ("flows.1.mask") are understood too."""
        published = {
            f"transform.{n}" if n.startswith(PUBLISHED_STEPS) else n: v for n, v in state_dict.items()
        }
        return super().load_state_dict(published, strict, assign)
