"""The conditional flow of Yuksel et al. 2022 for MNIST and Fashion-MNIST: fully connected coupling blocks, a label.

A block splits its D variables into x1 and x2 and transforms both halves in turn (FrEIA's GLOWCouplingBlock):

    z1 = x1 exp(s2) + t2,  (raw2, t2) = net2(x2, label);    z2 = x2 exp(s1) + t1,  (raw1, t1) = net1(z1, label)
    s = clamp * 0.636 * atan(raw)

followed by a fixed random permutation, NumPy's `RandomState(number of the block).permutation(D)`. A net is linear -
ReLU - linear on the half and the one-hot label. Prior N(0,I). |s| < clamp, so that every block is invertible anywhere.
"""

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.models.flows.base import Encoded, Flow, Memory, Recolour, Transform
from robbench.models.flows.frozen_net import gate
from robbench.models.flows.layers import StandardPrior
from robbench.models.flows.multiscale import Prior, Step, decode_steps, encode_steps
from robbench.models.flows.preprocessing import DecodeMode, PreprocessingKind

ATAN_SLOPE = 0.636  # about 2 / pi: FrEIA's soft clamp reaches +-clamp at infinity


class LabelledNet(nn.Module):
    """Linear - ReLU - linear on [h, one-hot(y)]: [N,inputs] and labels [N] -> [N,outputs]."""

    def __init__(self, inputs: int, classes: int, width: int, outputs: int) -> None:
        super().__init__()
        self.classes = classes
        self.first = nn.Linear(inputs + classes, width)
        self.last = nn.Linear(width, outputs)

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        labelled = torch.cat([h, F.one_hot(y, self.classes).to(h)], dim=1)
        out: Tensor = self.last(F.relu(self.first(labelled)))
        return out


class FrozenLabelledNet(nn.Module):
    """`LabelledNet` on buffers; a label selects a row of biases. Differentiable once, in h alone.

    small: keep 1-byte masks, not activations, for the backward pass.
    """

    first: Tensor
    biases: Tensor
    last: Tensor
    last_bias: Tensor

    def __init__(self, net: LabelledNet, dtype: torch.dtype, small: bool) -> None:
        super().__init__()
        self.small = small
        weight, labels = net.first.weight.detach().double().tensor_split((-net.classes,), dim=1)
        buffers = {
            "first": weight,
            "biases": labels.T + net.first.bias.detach().double(),
            "last": net.last.weight.detach(),
            "last_bias": net.last.bias.detach(),
        }
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor.to(dtype).clone(memory_format=torch.contiguous_format))

    def forward(self, h: Tensor, y: Tensor) -> Tensor:
        out: Tensor = _LabelledFunction.apply(h, y, self)
        return out


class _LabelledFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, y: Tensor, net: FrozenLabelledNet) -> Tensor:
        hidden = torch.addmm(net.biases[y], h, net.first.T).relu_()
        ctx.net = net
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(hidden > 0 if net.small else hidden)
        return torch.addmm(net.last_bias, hidden, net.last.T)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (hidden,) = ctx.saved_tensors
        return gate(gradient @ ctx.net.last, hidden) @ ctx.net.first, None, None


class CouplingBlock(Step):
    """Both couplings and the permutation, [N,D] -> [N,D]. number: seeds the permutation."""

    permutation: Tensor
    inverse: Tensor

    def __init__(
        self, first: nn.Module, second: nn.Module, dimensions: int, number: int, clamp: float
    ) -> None:
        super().__init__()
        self.net1, self.net2 = first, second
        self.dimensions, self.number, self.clamp = dimensions, number, clamp
        permutation = torch.from_numpy(np.random.RandomState(number).permutation(dimensions))
        self.register_buffer("permutation", permutation, persistent=False)
        self.register_buffer("inverse", permutation.argsort(), persistent=False)

    def encode(self, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        x1, x2 = self._halves(h)
        s2, t2 = self._scale_and_shift(self.net2, x2, y)
        z1 = x1 * torch.exp(s2) + t2
        s1, t1 = self._scale_and_shift(self.net1, z1, y)
        z2 = x2 * torch.exp(s1) + t1
        return torch.cat([z1, z2], dim=1)[:, self.permutation], s1.sum(1) + s2.sum(1)

    def decode(self, h: Tensor, y: Tensor | None) -> Tensor:
        z1, z2 = self._halves(h[:, self.inverse])
        s1, t1 = self._scale_and_shift(self.net1, z1, y)
        x2 = (z2 - t1) * torch.exp(-s1)
        s2, t2 = self._scale_and_shift(self.net2, x2, y)
        return torch.cat([(z1 - t2) * torch.exp(-s2), x2], dim=1)

    def freeze(self, dtype: torch.dtype, memory: Memory, where: str) -> "CouplingBlock":
        first, second = (_frozen(net, dtype, memory) for net in (self.net1, self.net2))
        return CouplingBlock(first, second, self.dimensions, self.number, self.clamp)

    def _halves(self, h: Tensor) -> tuple[Tensor, Tensor]:
        half = self.dimensions // 2
        return h[:, :half], h[:, half:]

    def _scale_and_shift(self, net: nn.Module, half: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        raw, shift = net(half, y).chunk(2, dim=1)
        return self.clamp * ATAN_SLOPE * torch.atan(raw), shift


def _frozen(net: nn.Module, dtype: torch.dtype, memory: Memory) -> FrozenLabelledNet:
    if not isinstance(net, LabelledNet):
        raise NotImplementedError("a frozen step is final; freeze the flow it came from")
    return FrozenLabelledNet(net, dtype, small=memory == "mask")


class LabelledStack(Transform):
    """Steps on the flattened image, one level of D latents, prior N(0,I); every call needs labels.

    recompute: see `MultiScale`.
    """

    label_classes: int

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        classes: int,
        steps: list[Step],
        prior: Prior,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.input_shape = input_shape
        self.label_classes = classes
        channels, height, width = input_shape
        self.level_shapes = ((channels * height * width,),)
        self.steps = nn.ModuleList(steps)
        self.prior = prior
        self.recompute = recompute

    def encode(self, v: Tensor, y: Tensor | None) -> Encoded:
        self._check(y, len(v))
        h, log_det = encode_steps(v.flatten(1), y, self._steps())
        return Encoded((h,), (self.prior.moments(None, y),), log_det)

    def decode(self, levels: tuple[Tensor, ...], y: Tensor | None) -> Tensor:
        (z,) = levels
        self._check(y, len(z))
        return decode_steps(z, y, self._steps(), self.recompute).reshape(-1, *self.input_shape)

    def recolour(
        self, levels: tuple[Tensor, ...], y: Tensor | None, rule: Recolour, whitened: bool
    ) -> tuple[Tensor, ...]:
        return (rule(levels[0], *self.prior.moments(None, y)),)

    def freeze(self, dtype: torch.dtype, memory: Memory) -> "LabelledStack":
        steps = [step.freeze(dtype, memory, f"block {i}") for i, step in enumerate(self._steps())]
        prior, recompute = self.prior.freeze(dtype), memory == "invert"
        return LabelledStack(self.input_shape, self.label_classes, steps, prior, recompute)

    def _steps(self) -> list[Step]:
        return [cast(Step, step) for step in self.steps]

    def _check(self, y: Tensor | None, n: int) -> None:
        top = self.label_classes - 1
        if y is None:
            raise UserError(f"conditional flow called without labels; give y, {n} labels from 0 to {top}")
        if y.dtype != torch.int64 or tuple(y.shape) != (n,):
            raise UserError(
                f"conditional flow: labels y of {y.dtype} and shape {tuple(y.shape)} for {n} samples; "
                f"give int64 labels of shape ({n},)"
            )
        if n and not (int(y.min()) >= 0 and int(y.max()) <= top):
            raise UserError(
                f"conditional flow: labels y from {int(y.min())} to {int(y.max())}; it knows 0 to {top}"
            )


class ConditionalFlow(Flow):
    """p(x | label) by `blocks` coupling blocks with nets of `width` hidden units, on any number of pixels.

    input_shape: (C,H,W). grey_levels: of the data set. classes: labels are 0..classes-1. clamp: see the module
    docstring. zero_start: blocks begin as permutations; else with PyTorch's initial weights as in the published
    code, where latents of logit images reach 1e9 and cannot be inverted, in float64 neither. preprocessing,
    decode_mode: see preprocessing.py and base.py. The paper's: 12 blocks, width 512, clamp 2, no zero start, 784
    pixels. `UserError` for impossible arguments and for calls without labels.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        grey_levels: int,
        *,
        classes: int = 10,
        blocks: int = 12,
        width: int = 512,
        clamp: float = 2.0,
        zero_start: bool = True,
        preprocessing: PreprocessingKind = "shift",
        decode_mode: DecodeMode = "exact",
    ) -> None:
        channels, height, columns = input_shape
        shape, dimensions = (channels, height, columns), channels * height * columns
        for name, value in (("classes", classes), ("blocks", blocks), ("width", width)):
            if value < 1:
                raise UserError(f"conditional-flow argument {name}={value}; give at least 1")
        if not 0.0 < clamp < float("inf"):
            raise UserError(f"conditional-flow argument clamp={clamp}; give a positive number")
        if dimensions < 2:
            raise UserError(f"conditional-flow on images of shape {shape}; it needs at least 2 pixels")
        sizes = dimensions // 2, dimensions - dimensions // 2
        steps: list[Step] = [
            CouplingBlock(
                LabelledNet(sizes[0], classes, width, 2 * sizes[1]),
                LabelledNet(sizes[1], classes, width, 2 * sizes[0]),
                dimensions,
                number,
                clamp,
            )
            for number in range(blocks)
        ]
        if zero_start:
            for net in (net for step in steps for net in step.modules() if isinstance(net, LabelledNet)):
                nn.init.zeros_(net.last.weight)
                nn.init.zeros_(net.last.bias)
        transform = LabelledStack(shape, classes, steps, StandardPrior())
        super().__init__(shape, grey_levels, transform, preprocessing, decode_mode)
