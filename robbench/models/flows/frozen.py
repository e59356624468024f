"""Frozen layers for attacks: no parameters, actnorm and 1x1 convolution folded into one kernel each way."""

import torch
import torch.nn.functional as F
from torch import Tensor

from robbench.models.flows.base import Memory
from robbench.models.flows.frozen_net import FrozenNet, Kernel
from robbench.models.flows.multiscale import Prior, Step


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
        kept, changed = h[:, : self.kept], h[:, self.kept :]
        shift, scale = self._shift_and_scale(kept)
        changed = (changed if scale is None else changed / scale) - shift
        return F.conv2d(torch.cat([kept, changed], dim=1), self.unmixing, self.unmixing_bias)

    def freeze(self, dtype: torch.dtype, memory: Memory, where: str) -> "Step":
        raise NotImplementedError("a frozen step is final; freeze the flow it came from")

    def _shift_and_scale(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        out: Tensor = self.net(kept)
        if self.scale_floor is None:
            return out, None
        shift, raw = out.chunk(2, dim=1)
        return shift, self.scale_floor + (1.0 - self.scale_floor) * torch.sigmoid(raw)


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
