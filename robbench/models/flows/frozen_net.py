"""The coupling net of a frozen flow, with a backward pass of its own (to the input only).

Three things make it faster than three convolutions under autograd on a CPU. The 1x1 convolution is a matrix product
over positions. A 3x3 convolution to few channels (the last one forward, the first one backward) is one too, to nine
times as many channels, a group a kernel position, followed by shifted additions: convolution routines compute 16
output channels at a time and idle below that. And ReLU and its backward work in place. On a GPU the 3x3
convolutions are plain ones.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kernel = tuple[Tensor, Tensor]  # weight [out,in,k,k], bias [out]

NARROW = 32  # output channels below which the matrix product pays


class NarrowConv(nn.Module):
    """3x3 convolution, padding 1, in whichever of the two forms is fast on the device of its input."""

    weight: Tensor
    shifts: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        outputs, inputs, _, _ = weight.shape
        self.outputs = outputs
        shifts = weight.permute(2, 3, 0, 1).reshape(9 * outputs, inputs)
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("shifts", shifts.contiguous())

    def forward(self, h: Tensor) -> Tensor:
        """[N,in,H,W] -> [N,out,H,W] in channels_last, no bias."""
        if h.device.type != "cpu" or self.outputs >= NARROW:
            return F.conv2d(h, self.weight, padding=1)
        n, _, height, width = h.shape
        products = torch.mm(self.shifts, rows(h).T)
        above, out, below = products.view(3, 3 * self.outputs, n, height, width).unbind()
        out[..., 1:, :] += above[..., :-1, :]
        out[..., :-1, :] += below[..., 1:, :]
        left, out, right = out.view(3, self.outputs, n, height, width).unbind()
        out[..., 1:] += left[..., :-1]
        out[..., :-1] += right[..., 1:]
        return out.transpose(0, 1).contiguous(memory_format=torch.channels_last)


class FrozenNet(nn.Module):
    """3x3 - ReLU - 1x1 - ReLU - 3x3 on buffers. small: keep a byte a pair of activations for backward."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    last_bias: Tensor
    last_back: Tensor

    def __init__(self, first: Kernel, second: Kernel, last: Kernel, dtype: torch.dtype, small: bool) -> None:
        super().__init__()
        self.small = small
        self.last = NarrowConv(last[0].detach().to(dtype))
        self.first_back = NarrowConv(transposed(first[0].detach().to(dtype)))
        for name, weight in (("first", first[0]), ("last_back", transposed(last[0]))):
            weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
            self.register_buffer(name, weight)
        self.register_buffer("second", second[0].detach().to(dtype).flatten(1).contiguous())
        for name, bias in (("first", first[1]), ("second", second[1]), ("last", last[1])):
            self.register_buffer(f"{name}_bias", bias.detach().to(dtype))

    def forward(self, h: Tensor) -> Tensor:
        """[N,inputs,H,W] -> [N,outputs,H,W]; differentiable once, in h alone."""
        out: Tensor = _NetFunction.apply(h, self)
        return out

    def evaluate(self, h: Tensor, keep: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Output, and if asked what `pull_back` needs; outside of autograd."""
        one = rows(F.conv2d(h, self.first, self.first_bias, padding=1)).relu_()
        two = torch.addmm(self.second_bias, one, self.second.T).relu_()
        out = self.last(image(two, h)).add_(self.last_bias[:, None, None])
        if not keep:
            return out, ()
        return out, (packed(one, two),) if self.small else (one, two)

    def pull_back(self, gradient: Tensor, kept: tuple[Tensor, ...]) -> Tensor:
        """Gradient at the input from that at the output."""
        one, two = unpacked(kept[0]) if self.small else kept
        back = gate(rows(F.conv2d(gradient, self.last_back, padding=1)), two)
        back = gate(back @ self.second, one)
        out: Tensor = self.first_back(image(back, gradient))
        return out


class _NetFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, net: FrozenNet) -> Tensor:
        out, kept = net.evaluate(h, ctx.needs_input_grad[0])
        ctx.net = net
        ctx.save_for_backward(*kept)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.net.pull_back(gradient, ctx.saved_tensors), None


def rows(h: Tensor) -> Tensor:
    """[N,C,H,W] as a matrix [N*H*W,C]: a view of a channels_last tensor."""
    return h.permute(0, 2, 3, 1).reshape(-1, h.shape[1])


def image(matrix: Tensor, like: Tensor) -> Tensor:
    """Inverse of `rows`: [N,C,H,W] in channels_last, with N, H and W of `like`."""
    n, _, height, width = like.shape
    return matrix.view(n, height, width, -1).permute(0, 3, 1, 2)


def packed(one: Tensor, two: Tensor) -> Tensor:
    """The masks of the positive entries of two ReLU outputs in one tensor of bytes."""
    return one.bool().view(torch.uint8).add_(two.bool().view(torch.uint8), alpha=2)


def unpacked(masks: Tensor) -> tuple[Tensor, Tensor]:
    """The two masks in `packed`, as bytes of 0 and 1."""
    return masks & 1, masks >> 1


def gate(gradient: Tensor, activation: Tensor) -> Tensor:
    """Backward of ReLU, in place; activation: its output, or the mask of its positive entries (bool or bytes)."""
    if not activation.is_floating_point():
        return gradient.mul_(activation)
    out: Tensor = torch.ops.aten.threshold_backward.grad_input(gradient, activation, 0.0, grad_input=gradient)
    return out


def transposed(weight: Tensor) -> Tensor:
    """Kernel of the convolution that is the transpose of the one with `weight`."""
    return weight.flip(2, 3).transpose(0, 1)
