"""Trainable layers of Glow (Kingma & Dhariwal 2018): actnorm, LU 1x1 convolution, coupling, priors."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.models.flows.base import Memory
from robbench.models.flows.frozen import FrozenConditionalPrior, FrozenGlowStep, FrozenPrior
from robbench.models.flows.frozen_net import FrozenNet, Kernel
from robbench.models.flows.multiscale import Prior, Step

Coupling = Literal["affine", "additive"]

MIN_STD = 1e-3  # actnorm never scales a channel up by more than 1000, also when the channel is constant
MAX_RESIDUAL = 1e-6  # |W^-1 W - 1| in float64 above this: numerically singular
MAX_LOG_SIGMA = 8.0  # learned prior widths stay in [e^-8, e^8]: densities far off the data stay finite


class ActNorm(nn.Module):
    """Per-channel affine map (h + bias) * exp(log_scale); Glow section 3.1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))

    def initialize(self, h: Tensor) -> None:
        """Makes each channel of `h` zero-mean with unit variance."""
        std, mean = torch.std_mean(h, dim=(0, 2, 3), correction=0)
        self.bias.copy_(-mean)
        self.log_scale.copy_(-torch.log(std.clamp_min(MIN_STD)))

    def encode(self, h: Tensor) -> tuple[Tensor, Tensor]:
        out = (h + _channelwise(self.bias)) * torch.exp(_channelwise(self.log_scale))
        return out, self.log_scale.sum() * (h.shape[2] * h.shape[3])

    def decode(self, h: Tensor) -> Tensor:
        return h * torch.exp(-_channelwise(self.log_scale)) - _channelwise(self.bias)


class InvertibleConv(nn.Module):
    """1x1 convolution W = P L (U + diag(sign * exp(log_diagonal))); Glow section 3.2, LU form.

    P (fixed permutation), the signs and the initial L and U come from a random orthogonal matrix.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        orthogonal, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
        permutation, lower, upper = torch.linalg.lu(orthogonal)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation.float())
        self.register_buffer("sign", diagonal.sign().float())
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(L with unit diagonal, U with its diagonal), [C,C] each, computed in `dtype`."""
        one = torch.eye(len(self.sign), dtype=dtype, device=self.sign.device)
        lower = self.lower.to(dtype).tril(-1) + one
        diagonal = self.sign.to(dtype) * torch.exp(self.log_diagonal.to(dtype))
        return lower, self.upper.to(dtype).triu(1) + torch.diag(diagonal)

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """W, [C,C], computed in `dtype`."""
        lower, upper = self.factors(dtype)
        return self.permutation.to(dtype) @ lower @ upper

    def inverse_matrix(self) -> Tensor:
        """W^-1 in float64, [C,C], by two triangular solves."""
        lower, upper = self.factors(torch.float64)
        permuted = self.permutation.double().T
        half = torch.linalg.solve_triangular(lower, permuted, upper=False, unitriangular=True)
        inverse: Tensor = torch.linalg.solve_triangular(upper, half, upper=True)
        return inverse

    def encode(self, h: Tensor) -> tuple[Tensor, Tensor]:
        log_det = self.log_diagonal.sum() * (h.shape[2] * h.shape[3])
        return F.conv2d(h, _kernel(self.matrix(h.dtype))), log_det

    def decode(self, h: Tensor) -> Tensor:
        return F.conv2d(h, _kernel(self.inverse_matrix().to(h)))


class ZeroConv(nn.Module):
    """3x3 convolution that starts at zero, with a learned output gain exp(3 * log_gain)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.log_gain = nn.Parameter(torch.zeros(outputs))
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(_bias(self.conv))

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.conv(h)
        return out * torch.exp(3.0 * _channelwise(self.log_gain))

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias with the gain multiplied in, float64."""
        gain = torch.exp(3.0 * self.log_gain.double())
        return self.conv.weight.double() * gain[:, None, None, None], _bias(self.conv).double() * gain


class CouplingNet(nn.Module):
    """3x3 - ReLU - 1x1 - ReLU - 3x3 (zero start): half the channels -> shift (and raw scale)."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 1)
        self.last = ZeroConv(width, outputs)
        for conv in (self.first, self.second):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(_bias(conv))

    def forward(self, h: Tensor, y: Tensor | None) -> Tensor:
        """[N,inputs,H,W] -> [N,outputs,H,W]. y is unused: this net is unconditional."""
        hidden = self.second(self.first(h).relu_()).relu_()  # in place: less memory
        out: Tensor = self.last(hidden)
        return out


class CouplingLayer(nn.Module):
    """h2 <- (h2 + shift(h1)) * S(h1), h1 unchanged; Glow's reference implementation with a floor under S.

    affine: S = f + (1 - f) sigmoid(raw + 2); additive: S = 1. The floor keeps inverses finite off the data.
    """

    def __init__(self, channels: int, width: int, kind: Coupling, scale_floor: float) -> None:
        super().__init__()
        self.kind: Coupling = kind
        self.scale_floor = scale_floor
        half = channels // 2
        self.net = CouplingNet(channels - half, width, 2 * half if kind == "affine" else half)

    def encode(self, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        kept, changed = h.tensor_split((h.shape[1] - h.shape[1] // 2,), dim=1)
        shift, scale = self._shift_and_scale(kept, y)
        if scale is None:
            return torch.cat([kept, changed + shift], dim=1), h.new_zeros(len(h))
        log_det = torch.log(scale).flatten(1).sum(1)
        return torch.cat([kept, (changed + shift) * scale], dim=1), log_det

    def decode(self, h: Tensor, y: Tensor | None) -> Tensor:
        kept, changed = h.tensor_split((h.shape[1] - h.shape[1] // 2,), dim=1)
        shift, scale = self._shift_and_scale(kept, y)
        return torch.cat([kept, (changed if scale is None else changed / scale) - shift], dim=1)

    def folded(self) -> tuple[Kernel, Kernel, Kernel]:
        """Kernels of the net in float64, with the output gain and the 2 of sigmoid(raw + 2) multiplied in."""
        weight, bias = self.net.last.folded()
        if self.kind == "affine":
            bias[len(bias) // 2 :] += 2.0
        return _kernel_of(self.net.first), _kernel_of(self.net.second), (weight, bias)

    def _shift_and_scale(self, kept: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out: Tensor = self.net(kept, y)
        if self.kind == "additive":
            return out, None
        shift, raw = out.chunk(2, dim=1)
        return shift, self.scale_floor + (1.0 - self.scale_floor) * torch.sigmoid(raw + 2.0)


class StandardPrior(Prior):
    """N(0, I)."""

    zero: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(()), persistent=False)

    def moments(self, context: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.zero, self.zero

    def freeze(self, dtype: torch.dtype) -> FrozenPrior:
        return FrozenPrior(self.zero.to(dtype), self.zero.to(dtype))


class ConditionalPrior(Prior):
    """Split prior: mean and log sigma of the factored-out half, convolved from the other half; zero start."""

    def __init__(self, context_channels: int, channels: int) -> None:
        super().__init__()
        self.conv = ZeroConv(context_channels, 2 * channels)

    def moments(self, context: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert context is not None
        mean, raw = self.conv(context).chunk(2, dim=1)
        return mean, bounded_log_sigma(raw)

    def freeze(self, dtype: torch.dtype) -> FrozenConditionalPrior:
        return FrozenConditionalPrior(self.conv.folded(), MAX_LOG_SIGMA, dtype)


class TopPrior(Prior):
    """Prior of the coarsest level: a learned mean and width per coordinate (Glow's: per channel)."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(1, *shape))
        self.raw_log_sigma = nn.Parameter(torch.zeros(1, *shape))

    def moments(self, context: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.mean, bounded_log_sigma(self.raw_log_sigma)

    def freeze(self, dtype: torch.dtype) -> FrozenPrior:
        mean, log_sigma = self.moments(None, None)
        return FrozenPrior(mean.to(dtype), log_sigma.to(dtype))


def bounded_log_sigma(raw: Tensor) -> Tensor:
    """Smoothly limited to (-MAX_LOG_SIGMA, MAX_LOG_SIGMA); close to the identity for small values."""
    return MAX_LOG_SIGMA * torch.tanh(raw / MAX_LOG_SIGMA)


class GlowStep(Step):
    """Actnorm, invertible 1x1 convolution, coupling."""

    def __init__(self, channels: int, width: int, coupling: Coupling, scale_floor: float) -> None:
        super().__init__()
        self.actnorm = ActNorm(channels)
        self.mixing = InvertibleConv(channels)
        self.coupling = CouplingLayer(channels, width, coupling, scale_floor)

    def encode(self, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        h, first = self.actnorm.encode(h)
        h, second = self.mixing.encode(h)
        h, third = self.coupling.encode(h, y)
        return h, first + second + third

    def decode(self, h: Tensor, y: Tensor | None) -> Tensor:
        return self.actnorm.decode(self.mixing.decode(self.coupling.decode(h, y)))

    def initialize(self, h: Tensor, y: Tensor | None) -> None:
        self.actnorm.initialize(h)

    def freeze(self, dtype: torch.dtype, memory: Memory, where: str) -> FrozenGlowStep:
        mixing, unmixing = self._folded(dtype, where)
        log_det = self.actnorm.log_scale.double().sum() + self.mixing.log_diagonal.double().sum()
        floor = self.coupling.scale_floor if self.coupling.kind == "affine" else None
        net = FrozenNet(*self.coupling.folded(), dtype, small=memory == "mask")
        return FrozenGlowStep(mixing, unmixing, log_det, net, floor, dtype)

    def _folded(self, dtype: torch.dtype, where: str) -> tuple[Kernel, Kernel]:
        """Actnorm and 1x1 convolution as one kernel, and its inverse, float64; `UserError` when singular."""
        scale, bias = torch.exp(self.actnorm.log_scale.double()), self.actnorm.bias.double()
        matrix, inverse = self.mixing.matrix(torch.float64), self.mixing.inverse_matrix()
        mixing, unmixing = matrix * scale, inverse / scale[:, None]
        residual = unmixing @ mixing - torch.eye(len(scale), dtype=torch.float64, device=scale.device)
        if not (residual.abs().max() < MAX_RESIDUAL and torch.isfinite(unmixing.to(dtype)).all()):
            raise UserError(
                f"flow cannot be inverted: the 1x1 convolution of {where} is singular in {dtype}; "
                f"restore its weights or train it again with a lower learning rate"
            )
        return (_kernel(mixing), mixing @ bias), (_kernel(unmixing), -bias)


def _kernel(matrix: Tensor) -> Tensor:
    return matrix[:, :, None, None]


def _channelwise(vector: Tensor) -> Tensor:
    return vector[:, None, None]


def _kernel_of(conv: nn.Conv2d) -> Kernel:
    return conv.weight.double(), _bias(conv).double()


def _bias(conv: nn.Conv2d) -> Tensor:
    assert conv.bias is not None
    return conv.bias
