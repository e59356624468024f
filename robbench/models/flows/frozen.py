"""Frozen layers for attacks: no parameters, actnorm and 1x1 convolution folded into one kernel each way."""

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robbench.models.flows.base import Memory
from robbench.models.flows.frozen_net import FrozenNet, Kernel, image, rows
from robbench.models.flows.multiscale import Prior, Step

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def frozen_module(module: ModuleT, dtype: torch.dtype) -> ModuleT:
    """An independent copy of a layer in eval mode and `dtype`, its parameters turned into buffers: what `freeze` of a
    layer without a faster form returns."""
    frozen = copy.deepcopy(module).to(dtype).eval()
    for part in frozen.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, parameter.detach())
    return frozen


class FrozenGlowStep(Step):
    """Folded step: encode = 1x1 convolution, coupling; decode = inverse coupling, 1x1 convolution.

    mixing, unmixing: the folded 1x1 kernels, float64 before casting. net: the coupling net, its output gain
    and the 2 of sigmoid(raw + 2) folded in. log_det: of the folded convolution, nats a position. scale_floor:
    f of affine coupling in S = f + (1 - f) sigmoid(raw), None for additive coupling.
    """

    mixing: Tensor
    mixing_bias: Tensor
    unmixing: Tensor
    unmixing_bias: Tensor
    log_det: Tensor

    def __init__(
        self,
        mixing: Kernel,
        unmixing: Kernel,
        log_det: Tensor,
        net: FrozenNet,
        scale_floor: float | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.scale_floor = scale_floor
        self.net = net
        self.kept = net.first.shape[1]
        for name, (weight, bias) in (("mixing", mixing), ("unmixing", unmixing)):
            weight = weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
            self.register_buffer(name, weight)
            self.register_buffer(f"{name}_bias", bias.detach().to(dtype))
        self.register_buffer("log_det", log_det.detach().to(dtype))

    def encode(self, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        log_det = self.log_det * (h.shape[2] * h.shape[3])
        h = F.conv2d(h, self.mixing, self.mixing_bias)
        kept, changed = h[:, : self.kept], h[:, self.kept :]
        shift, scale = self._shift_and_scale(kept)
        if scale is None:
            return torch.cat([kept, changed + shift], dim=1), log_det
        log_det = log_det + torch.log(scale).flatten(1).sum(1)
        return torch.cat([kept, (changed + shift) * scale], dim=1), log_det

    def decode(self, h: Tensor, y: Tensor | None) -> Tensor:
        out: Tensor = _DecodeFunction.apply(h, self)
        return out

    @torch.no_grad()
    def pull_back(self, after: Tensor, gradient: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """The base class's, with one run of the coupling net where encode and decode have two."""
        h = F.conv2d(after, self.mixing, self.mixing_bias)
        kept, moved = h[:, : self.kept], h[:, self.kept :]
        out, activations = self.net.evaluate(kept, True)
        if self.scale_floor is None:
            return torch.cat([kept, moved + out], dim=1), self.gradient_before(gradient, activations)
        shift, raw = out.chunk(2, dim=1)
        scale, quotient = self.scale(raw), moved + shift
        found = self.gradient_before(gradient, (scale, quotient, *activations))
        return torch.cat([kept, quotient * scale], dim=1), found

    def gradient_before(self, gradient: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        """Gradient at the input of `decode` from that at its output; S: the scale, q = changed / S.

        dq/dchanged = 1 / S,   dq/draw = -q / S dS/draw,   dS/draw = (S - f) (1 - S) / (1 - f)
        saved: activations of the coupling net, before them S and q where the coupling is affine.
        """
        floor = self.scale_floor
        gradient = image(rows(gradient) @ self.unmixing.flatten(1), gradient)
        kept, changed = gradient[:, : self.kept], gradient[:, self.kept :]
        if floor is None:
            return torch.cat([kept + self.net.pull_back(-changed, saved), changed], dim=1)
        scale, quotient, *activations = saved
        at_changed = changed / scale
        slope = (1.0 - scale) if floor == 0.0 else (scale - floor) * (1.0 - scale) / ((1.0 - floor) * scale)
        at_out = torch.cat([changed, quotient.mul(changed).mul_(slope)], dim=1).neg_()
        return torch.cat([kept + self.net.pull_back(at_out, tuple(activations)), at_changed], dim=1)

    def freeze(self, dtype: torch.dtype, memory: Memory, where: str) -> "Step":
        raise NotImplementedError("a frozen step is final; freeze the flow it came from")

    def scale(self, raw: Tensor) -> Tensor:
        """S of affine coupling."""
        scale = torch.sigmoid(raw)
        return scale.mul_(1.0 - self.scale_floor).add_(self.scale_floor) if self.scale_floor else scale

    def _shift_and_scale(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        out: Tensor = self.net(kept)
        if self.scale_floor is None:
            return out, None
        shift, raw = out.chunk(2, dim=1)
        return shift, self.scale_floor + (1.0 - self.scale_floor) * torch.sigmoid(raw)


class _DecodeFunction(torch.autograd.Function):
    """`FrozenGlowStep.decode` with its backward pass in closed form (`gradient_before`)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, step: FrozenGlowStep) -> Tensor:
        keep, kept, changed = ctx.needs_input_grad[0], h[:, : step.kept], h[:, step.kept :]
        out, activations = step.net.evaluate(kept, keep)
        ctx.step = step
        if step.scale_floor is None:
            ctx.save_for_backward(*activations)
            joined = torch.cat([kept, changed - out], dim=1)
        else:
            shift, raw = out.chunk(2, dim=1)
            scale = step.scale(raw)
            quotient = changed / scale
            if keep:
                ctx.save_for_backward(scale, quotient, *activations)
            joined = torch.cat([kept, quotient - shift], dim=1)
        return image(torch.addmm(step.unmixing_bias, rows(joined), step.unmixing.flatten(1).T), h)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.step.gradient_before(gradient, ctx.saved_tensors), None


class FrozenPrior(Prior):
    """N(mean, exp(log_sigma)^2), constant."""

    mean: Tensor
    log_sigma: Tensor

    def __init__(self, mean: Tensor, log_sigma: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.detach().clone())
        self.register_buffer("log_sigma", log_sigma.detach().clone())

    def moments(self, context: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.mean, self.log_sigma

    def freeze(self, dtype: torch.dtype) -> "Prior":
        raise NotImplementedError("a frozen prior is final; freeze the flow it came from")


class FrozenConditionalPrior(Prior):
    """Split prior with its gain folded; raw widths are limited as in training by `max_log_sigma`."""

    weight: Tensor
    bias: Tensor

    def __init__(self, kernel: Kernel, max_log_sigma: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.max_log_sigma = max_log_sigma
        weight, bias = kernel
        self.register_buffer(
            "weight", weight.detach().to(dtype).contiguous(memory_format=torch.channels_last)
        )
        self.register_buffer("bias", bias.detach().to(dtype))

    def moments(self, context: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert context is not None
        mean, raw = F.conv2d(context, self.weight, self.bias, padding=1).chunk(2, dim=1)
        return mean, self.max_log_sigma * torch.tanh(raw / self.max_log_sigma)

    def freeze(self, dtype: torch.dtype) -> "Prior":
        raise NotImplementedError("a frozen prior is final; freeze the flow it came from")
