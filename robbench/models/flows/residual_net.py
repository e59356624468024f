"""The residual s/t net of RealNVP (Dinh et al. 2017, section 4.1), trainable and frozen.

    BN - concat(h, -h) - ReLU - 3x3 - blocks of [BN - ReLU - 3x3 - BN - ReLU - 3x3] with a residual connection;
    1x1 skip convolutions from the input of the first block and from the output of every block, summed;
    BN - ReLU - 1x1.
Every convolution has weight normalisation. In training mode batch norm reads the statistics of the batch, as usual;
everything exact (densities, inverses, attacks) needs eval mode. The frozen net has neither: weight norm is multiplied
out, a batch norm after convolutions alone is folded into them, the other ones become one scale and shift per channel.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from robbench.models.flows.frozen_net import Kernel, NarrowConv, gate, transposed


def _conv(inputs: int, outputs: int, size: int, bias: bool = True) -> nn.Conv2d:
    conv: nn.Conv2d = weight_norm(nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=bias))
    return conv


class ResidualBlock(nn.Module):
    """h + conv(relu(BN(conv(relu(BN(h))))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_norm = nn.BatchNorm2d(width)
        self.in_conv = _conv(width, width, 3, bias=False)
        self.out_norm = nn.BatchNorm2d(width)
        self.out_conv = _conv(width, width, 3)

    def forward(self, h: Tensor) -> Tensor:
        hidden = self.in_conv(F.relu(self.in_norm(h)))
        out: Tensor = h + self.out_conv(F.relu(self.out_norm(hidden)))
        return out


class ResidualNet(nn.Module):
    """[N,inputs,H,W] -> [N,outputs,H,W]. doubled: the first BN is followed by a factor 2 (masked inputs)."""

    def __init__(self, inputs: int, width: int, outputs: int, blocks: int, doubled: bool) -> None:
        super().__init__()
        self.gain = 2.0 if doubled else 1.0
        self.in_norm = nn.BatchNorm2d(inputs)
        self.in_conv = _conv(2 * inputs, width, 3)
        self.in_skip = _conv(width, width, 1)
        self.blocks = nn.ModuleList(ResidualBlock(width) for _ in range(blocks))
        self.skips = nn.ModuleList(_conv(width, width, 1) for _ in range(blocks))
        self.out_norm = nn.BatchNorm2d(width)
        self.out_conv = _conv(width, outputs, 1)

    def forward(self, h: Tensor) -> Tensor:
        h = self.gain * self.in_norm(h)
        h = self.in_conv(F.relu(torch.cat([h, -h], dim=1)))
        total = self.in_skip(h)
        for block, skip in zip(self.blocks, self.skips, strict=True):
            h = block(h)
            total = total + skip(h)
        out: Tensor = self.out_conv(F.relu(self.out_norm(total)))
        return out

    def adopt_statistics(self, h: Tensor) -> None:
        """Running statistics of every batch norm := those of the batch `h`; leaves the net in its mode."""
        norms = [module for module in self.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta, training = [norm.momentum for norm in norms], self.training
        for norm in norms:
            norm.momentum = 1.0
        self.train()(h)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        self.train(training)

    def freeze(self, dtype: torch.dtype, small: bool) -> "FrozenResidualNet":
        """Folded copy; small: keep 1-byte masks, not activations, for the backward pass."""
        blocks = [cast(ResidualBlock, block) for block in self.blocks]
        scale, shift = _affine(self.in_norm)
        skips = [_kernel(cast(nn.Conv2d, conv)) for conv in (self.in_skip, *self.skips)]
        out_scale, out_shift = _affine(self.out_norm)
        skip_bias = out_scale * torch.stack([bias for _, bias in skips]).sum(0) + out_shift
        return FrozenResidualNet(
            (self.gain * scale, self.gain * shift),
            _kernel(self.in_conv),
            [_affine(block.in_norm) for block in blocks],
            [_scaled(_kernel(block.in_conv), _affine(block.out_norm)) for block in blocks],
            [_kernel(block.out_conv) for block in blocks],
            [weight * _channelwise(out_scale)[:, None] for weight, _ in skips],
            skip_bias,
            _kernel(self.out_conv),
            dtype,
            small,
        )


def _kernel(conv: nn.Conv2d) -> Kernel:
    """Weight (normalisation multiplied out) and bias of a convolution, float64."""
    weight = conv.weight.double()
    return weight, weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.double()


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] that a batch norm applies in eval mode, float64."""
    mean, variance = cast(Tensor, norm.running_mean).double(), cast(Tensor, norm.running_var).double()
    scale = norm.weight.double() / torch.sqrt(variance + norm.eps)
    return scale, norm.bias.double() - mean * scale


def _scaled(kernel: Kernel, affine: tuple[Tensor, Tensor]) -> Kernel:
    """The convolution followed by a scale and shift of its outputs."""
    (weight, bias), (scale, shift) = kernel, affine
    return weight * scale[:, None, None, None], bias * scale + shift


def _channelwise(vector: Tensor) -> Tensor:
    return vector[:, None, None]


class FrozenResidualNet(nn.Module):
    """`ResidualNet` in eval mode on buffers, with a backward pass of its own, to the input only and once.

    first: scale and shift of the input. norms: the same of every block's input. ins, outs: a block's two convolutions.
    skips: weights of the 1x1 skip convolutions; skip_bias: the sum of their biases. last: the output convolution.
    """

    scale: Tensor
    shift: Tensor
    skip_bias: Tensor

    def __init__(
        self,
        first: tuple[Tensor, Tensor],
        entry: Kernel,
        norms: list[tuple[Tensor, Tensor]],
        ins: list[Kernel],
        outs: list[Kernel],
        skips: list[Tensor],
        skip_bias: Tensor,
        last: Kernel,
        dtype: torch.dtype,
        small: bool,
    ) -> None:
        super().__init__()
        self.small = small
        for name, vector in (("scale", first[0]), ("shift", first[1])):
            self.register_buffer(name, _channelwise(vector.detach().to(dtype)))
        self.register_buffer("skip_bias", skip_bias.detach().to(dtype))
        self.entry, self.last = _Conv(entry, dtype), _Conv(last, dtype)
        self.entry_back = NarrowConv(transposed(entry[0].detach().to(dtype)))
        self.blocks = nn.ModuleList(
            _Block(*parts, dtype=dtype) for parts in zip(norms, ins, outs, strict=True)
        )
        zero = torch.zeros_like(skip_bias)
        self.skips = nn.ModuleList(_Conv((weight, zero), dtype) for weight in skips)

    def forward(self, h: Tensor) -> Tensor:
        """[N,inputs,H,W] -> [N,outputs,H,W]; differentiable once, in h alone."""
        out: Tensor = _NetFunction.apply(h, self)
        return out


class _Conv(nn.Module):
    """A convolution on buffers, and its transpose."""

    weight: Tensor
    bias: Tensor
    weight_back: Tensor

    def __init__(self, kernel: Kernel, dtype: torch.dtype) -> None:
        super().__init__()
        weight, bias = (tensor.detach().to(dtype) for tensor in kernel)
        self.padding = weight.shape[-1] // 2
        self.register_buffer("weight", weight.contiguous(memory_format=torch.channels_last))
        self.register_buffer("bias", bias.clone())
        self.register_buffer("weight_back", transposed(weight).contiguous(memory_format=torch.channels_last))

    def forward(self, h: Tensor) -> Tensor:
        return F.conv2d(h, self.weight, self.bias, padding=self.padding)

    def back(self, gradient: Tensor) -> Tensor:
        """Gradient to the input."""
        return F.conv2d(gradient, self.weight_back, padding=self.padding)


class _Block(nn.Module):
    scale: Tensor
    shift: Tensor

    def __init__(self, norm: tuple[Tensor, Tensor], first: Kernel, last: Kernel, dtype: torch.dtype) -> None:
        super().__init__()
        for name, vector in zip(("scale", "shift"), norm, strict=True):
            self.register_buffer(name, _channelwise(vector.detach().to(dtype)))
        self.first, self.last = _Conv(first, dtype), _Conv(last, dtype)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output, and the results of both ReLUs."""
        one = torch.addcmul(self.shift, h, self.scale).relu_()
        two = self.first(one).relu_()
        return self.last(two).add_(h), one, two

    def back(self, gradient: Tensor, one: Tensor, two: Tensor) -> Tensor:
        """Gradient to the input; overwrites nothing it is given."""
        inner = gate(self.first.back(gate(self.last.back(gradient), two)), one)
        return torch.addcmul(gradient, inner, self.scale)


class _NetFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, net: FrozenResidualNet) -> Tensor:
        h = torch.addcmul(net.shift, h, net.scale)
        kept = [torch.cat([h, -h], dim=1).relu_()]
        h = net.entry(kept[0])
        total = net.skips[0](h).add_(_channelwise(net.skip_bias))
        for block, skip in zip(net.blocks, net.skips[1:], strict=True):
            h, one, two = block(h)
            total += skip(h)
            kept += [one, two]
        kept.append(total.relu_())
        ctx.net = net
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(*((tensor > 0 for tensor in kept) if net.small else kept))
        out: Tensor = net.last(total)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        net: FrozenResidualNet = ctx.net
        first, *inner, last = ctx.saved_tensors
        skips, blocks = [cast(_Conv, s) for s in net.skips], [cast(_Block, b) for b in net.blocks]
        total = gate(net.last.back(gradient), last)
        gradient = skips[-1].back(total)
        for i in reversed(range(len(blocks))):
            gradient = blocks[i].back(gradient, inner[2 * i], inner[2 * i + 1])
            gradient = gradient + skips[i].back(total)
        positive, negative = gate(net.entry_back(gradient), first).chunk(2, dim=1)
        return (positive - negative) * net.scale, None
