"""The coupling net of a frozen flow, with a backward pass of its own (to the input only).

Two things make it faster than three convolutions under autograd on a CPU, whose vector units compute 16
output channels at a time. A 3x3 convolution to few channels (the last one forward, the first one backward)
becomes a 3x1 convolution to three times as many channels, a group a kernel column, and two shifted additions.
And ReLU and its backward work in place. On a GPU the plain convolutions are used.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kernel = tuple[Tensor, Tensor]  # weight [out,in,k,k], bias [out]

NARROW = 16  # output channels below which splitting the kernel by columns pays


class NarrowConv(nn.Module):
    """3x3 convolution, padding 1, in whichever of the two forms is fast on the device of its input."""

    weight: Tensor
    columns: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        outputs, inputs, height, width = weight.shape
        self.outputs = outputs
        columns = weight.permute(3, 0, 1, 2).reshape(width * outputs, inputs, height, 1)
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("columns", columns.contiguous(memory_format=torch.channels_last))

    def forward(self, h: Tensor) -> Tensor:
        """[N,in,H,W] -> [N,out,H,W], no bias."""
        if h.device.type != "cpu" or self.outputs >= NARROW:
            return F.conv2d(h, self.weight, padding=1)
        parts = F.conv2d(h, self.columns, padding=(1, 0))
        left, middle, right = parts.split_with_sizes([self.outputs] * 3, dim=1)
        out = middle.contiguous(memory_format=torch.channels_last)
        out[..., 1:] += left[..., :-1]
        out[..., :-1] += right[..., 1:]
        return out


class FrozenNet(nn.Module):
    """3x3 - ReLU - 1x1 - ReLU - 3x3 on buffers. small: keep 1-byte masks, not activations, for backward."""

    first: Tensor
    first_bias: Tensor
    second: Tensor
    second_bias: Tensor
    second_back: Tensor
    last_bias: Tensor
    last_back: Tensor

    def __init__(self, first: Kernel, second: Kernel, last: Kernel, dtype: torch.dtype, small: bool) -> None:
        super().__init__()
        self.small = small
        self.last = NarrowConv(last[0].detach().to(dtype))
        self.first_back = NarrowConv(transposed(first[0].detach().to(dtype)))
        buffers = {
            "first": first[0],
            "second": second[0],
            "second_back": transposed(second[0]),
            "last_back": transposed(last[0]),
        }
        for name, weight in buffers.items():
            weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
            self.register_buffer(name, weight)
        for name, bias in (("first", first[1]), ("second", second[1]), ("last", last[1])):
            self.register_buffer(f"{name}_bias", bias.detach().to(dtype))

    def forward(self, h: Tensor) -> Tensor:
        """[N,inputs,H,W] -> [N,outputs,H,W]; differentiable once, in h alone."""
        out: Tensor = _NetFunction.apply(h, self)
        return out


class _NetFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, net: FrozenNet) -> Tensor:
        one = F.conv2d(h, net.first, net.first_bias, padding=1).relu_()
        two = F.conv2d(one, net.second, net.second_bias).relu_()
        ctx.net = net
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*((one > 0, two > 0) if net.small else (one, two)))
        return net.last(two).add_(net.last_bias[:, None, None])  # type: ignore[no-any-return]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        net: FrozenNet = ctx.net
        one, two = ctx.saved_tensors
        gradient = gate(F.conv2d(gradient, net.last_back, padding=1), two)
        gradient = gate(F.conv2d(gradient, net.second_back), one)
        return net.first_back(gradient), None


def gate(gradient: Tensor, activation: Tensor) -> Tensor:
    """Backward of ReLU, in place; activation: its output, or the mask of its positive entries."""
    if activation.dtype == torch.bool:
        return gradient.mul_(activation)
    out: Tensor = torch.ops.aten.threshold_backward.grad_input(gradient, activation, 0.0, grad_input=gradient)
    return out


def transposed(weight: Tensor) -> Tensor:
    """Kernel of the convolution that is the transpose of the one with `weight`."""
    return weight.flip(2, 3).transpose(0, 1)
