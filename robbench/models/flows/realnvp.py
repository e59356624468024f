"""RealNVP (Dinh et al. 2017): checkerboard and channel-wise affine couplings with residual s/t nets.

A scale is: 3 checkerboard couplings at full resolution, squeeze, 3 channel-wise couplings of twice the width, then
half of the variables becomes latents (one pixel diagonal of every 2x2 block of every channel stays, the other one
leaves); the last scale is 4 checkerboard couplings. The width doubles from scale to scale. Prior N(0,I).

Differences from the widely used PyTorch implementation: the latents of the last scale are stored squeezed (a
reordering), which also asks that its sides be even; the scale of tanh is a plain parameter a channel.
"""

import torch
from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.models.flows.base import Flow, Memory
from robbench.models.flows.layers import StandardPrior
from robbench.models.flows.multiscale import MultiScale, Step, squeeze, step_shapes, unsqueeze
from robbench.models.flows.preprocessing import DecodeMode, PreprocessingKind
from robbench.models.flows.residual_net import FrozenResidualNet, ResidualNet

Net = ResidualNet | FrozenResidualNet
COUPLINGS, LAST_COUPLINGS = 3, 4  # of a kind a scale; checkerboards of the last scale


class _Coupling(Step):
    """What both maskings share. The rest h' of the variables, conditioned on those kept:

        h' <- (h' + t) exp(s),   s = scale * tanh(raw),   (raw, t) = net(kept)

    scale: a learned bound per channel, [C,1,1]; a buffer in the frozen copy.
    """

    scale: Tensor

    def __init__(self, net: Net, scale: Tensor) -> None:
        super().__init__()
        self.net = net
        if isinstance(scale, nn.Parameter):
            self.scale = scale
        else:
            self.register_buffer("scale", scale)

    def _scale_and_shift(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        raw, shift = self.net(kept).chunk(2, dim=1)
        return self.scale * torch.tanh(raw), shift

    def _frozen_parts(self, dtype: torch.dtype, memory: Memory) -> tuple[FrozenResidualNet, Tensor]:
        if isinstance(self.net, FrozenResidualNet):
            raise NotImplementedError("a frozen step is final; freeze the flow it came from")
        return self.net.freeze(dtype, small=memory == "mask"), self.scale.detach().to(dtype).clone()

    def _adopt_statistics(self, kept: Tensor) -> None:
        if isinstance(self.net, ResidualNet):
            self.net.adopt_statistics(kept)


class ChannelCoupling(_Coupling):
    """One half of the channels transforms the other. reverse: the second half is transformed."""

    def __init__(self, net: Net, scale: Tensor, reverse: bool) -> None:
        super().__init__(net, scale)
        self.reverse = reverse

    def encode(self, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        kept, changed = self._parts(h)
        s, t = self._scale_and_shift(kept)
        return self._joined(kept, (changed + t) * torch.exp(s)), s.flatten(1).sum(1)

    def decode(self, h: Tensor, y: Tensor | None) -> Tensor:
        kept, changed = self._parts(h)
        s, t = self._scale_and_shift(kept)
        return self._joined(kept, changed * torch.exp(-s) - t)

    def initialize(self, h: Tensor, y: Tensor | None) -> None:
        self._adopt_statistics(self._parts(h)[0])

    def freeze(self, dtype: torch.dtype, memory: Memory, where: str) -> "ChannelCoupling":
        return ChannelCoupling(*self._frozen_parts(dtype, memory), self.reverse)

    def _parts(self, h: Tensor) -> tuple[Tensor, Tensor]:
        first, second = h.chunk(2, dim=1)
        return (first, second) if self.reverse else (second, first)

    def _joined(self, kept: Tensor, changed: Tensor) -> Tensor:
        return torch.cat([kept, changed] if self.reverse else [changed, kept], dim=1)


class CheckerboardCoupling(_Coupling):
    """One colour of a checkerboard of pixels transforms the other; reads and writes squeezed variables.

    size: (H,W) of the image that it unsqueezes to. reverse: the other colour is transformed.
    """

    kept: Tensor  # 1 where a pixel is kept, [1,1,H,W]

    def __init__(self, net: Net, scale: Tensor, size: tuple[int, int], reverse: bool) -> None:
        super().__init__(net, scale)
        self.size, self.reverse = size, reverse
        rows, columns = torch.arange(size[0]), torch.arange(size[1])
        odd = ((rows[:, None] + columns) % 2).to(scale)
        self.register_buffer("kept", (1.0 - odd if reverse else odd)[None, None], persistent=False)

    def encode(self, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        h = unsqueeze(h)
        s, t = self._scale_and_shift(h)
        return squeeze((h + t) * torch.exp(s)), s.flatten(1).sum(1)

    def decode(self, h: Tensor, y: Tensor | None) -> Tensor:
        h = unsqueeze(h)
        s, t = self._scale_and_shift(h)
        return squeeze(h * torch.exp(-s) - t)

    def initialize(self, h: Tensor, y: Tensor | None) -> None:
        self._adopt_statistics(unsqueeze(h) * self.kept)

    def freeze(self, dtype: torch.dtype, memory: Memory, where: str) -> "CheckerboardCoupling":
        return CheckerboardCoupling(*self._frozen_parts(dtype, memory), self.size, self.reverse)

    def _scale_and_shift(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Zero on the pixels kept, so that these pass unchanged."""
        s, t = super()._scale_and_shift(h * self.kept)
        changed = 1.0 - self.kept
        return s * changed, t * changed


class DiagonalOrder(Step):
    """Squeezed channels reordered before the split: position 0 of every channel, then 3, 1 and 2.

    So the half that stays holds one diagonal of every 2x2 block, of every channel.
    """

    order: Tensor
    inverse: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        order = torch.arange(channels).reshape(-1, 4)[:, [0, 3, 1, 2]].T.reshape(-1)
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("inverse", order.argsort(), persistent=False)

    def encode(self, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        return h.index_select(1, self.order), h.new_zeros(())

    def decode(self, h: Tensor, y: Tensor | None) -> Tensor:
        return h.index_select(1, self.inverse)

    def freeze(self, dtype: torch.dtype, memory: Memory, where: str) -> "DiagonalOrder":
        return DiagonalOrder(self.channels)


class RealNVP(Flow):
    """RealNVP of `scales`, with s/t nets of `blocks` residual blocks and `width` channels at the first scale.

    input_shape: (C,H,W); H and W divisible by 2^scales. grey_levels: of the data set (256 for 8 bits).
    preprocessing, decode_mode: see preprocessing.py and base.py. The papers' model is 2 scales, width 64, 8 blocks,
    logit. `UserError` for impossible arguments, and for everything but `log_prob` in training mode, where batch norm
    makes an image's density depend on the batch. `initialize` sets the running statistics from one batch.
    """

    batch_norm = True

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        grey_levels: int,
        *,
        scales: int = 2,
        width: int = 64,
        blocks: int = 8,
        preprocessing: PreprocessingKind = "shift",
        decode_mode: DecodeMode = "exact",
    ) -> None:
        for name, value in (("scales", scales), ("width", width), ("blocks", blocks)):
            if value < 1:
                raise UserError(f"realnvp argument {name}={value}; give at least 1")
        channels, height, columns = input_shape
        shape = (channels, height, columns)
        stacks = [
            _stack(inner, width * 2**scale, blocks, last=scale + 1 == scales)
            for scale, inner in enumerate(step_shapes(shape, scales))
        ]
        transform = MultiScale(shape, stacks, [StandardPrior() for _ in range(scales)])
        super().__init__(shape, grey_levels, transform, preprocessing, decode_mode)


def _stack(inner: tuple[int, int, int], width: int, blocks: int, last: bool) -> list[Step]:
    """Couplings of one scale; inner: the squeezed shape (4C,H/2,W/2)."""
    channels, size = inner[0] // 4, (2 * inner[1], 2 * inner[2])
    steps: list[Step] = [
        CheckerboardCoupling(
            ResidualNet(channels, width, 2 * channels, blocks, doubled=True),
            nn.Parameter(torch.ones(channels, 1, 1)),
            size,
            reverse=i % 2 == 1,
        )
        for i in range(LAST_COUPLINGS if last else COUPLINGS)
    ]
    if last:
        return steps
    half = inner[0] // 2
    steps += [
        ChannelCoupling(
            ResidualNet(half, 2 * width, 2 * half, blocks, doubled=False),
            nn.Parameter(torch.ones(half, 1, 1)),
            reverse=i % 2 == 1,
        )
        for i in range(COUPLINGS)
    ]
    return [*steps, DiagonalOrder(inner[0])]
