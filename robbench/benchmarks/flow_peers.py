"""The flows of `robbench bench flows` in FrEIA, normflows and nflows, at the weights of a robbench flow.

Each builder takes a trainable `Glow` (scale_floor 0, no permutation in its 1x1 convolutions and positive diagonals,
since nflows supports neither signs nor a permutation on that side) or a `ConditionalFlow`, and returns a module whose
`decode(levels, y)` is the same function from latents to dequantised images. The libraries' own layers are used
unchanged, with one exception per library: where its coupling cannot express Glow's h2 / sigmoid(raw + 2) - shift, that
method is overridden with no more operations than the original. Log-dets are computed as each library computes them.

robbench itself needs none of the libraries: `pip install FrEIA normflows nflows`.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robbench.models.flows import ConditionalFlow, Flow, Glow
from robbench.models.flows.conditional import ATAN_SLOPE, CouplingBlock, LabelledNet
from robbench.models.flows.layers import GlowStep

Levels = tuple[Tensor, ...]
Decode = Callable[[Levels, Tensor | None], Tensor]
Build = Callable[[Flow, bool], "Peer"]  # (flow, frozen): frozen uses the library's cache where there is one


class Peer(nn.Module):
    """A library's decoder. layers: modules with the weights; decode(levels, y): from latents, fine to coarse with
    robbench's shapes, and labels [n] to dequantised images [n,C,H,W]."""

    def __init__(self, layers: nn.Module, decode: Decode) -> None:
        super().__init__()
        self.layers, self.decode = layers, decode


def coupling_net(step: GlowStep, order: Tensor, flip: bool, leaky: bool = False) -> nn.Sequential:
    """The step's coupling net with its gain folded in. order: of output channels; flip: invert the shift's sign."""
    (first, first_bias), (second, second_bias), (last, last_bias) = step.coupling.folded()
    last_bias = last_bias.clone()
    half = len(last_bias) // 2
    last_bias[half:] -= 2.0  # the libraries add it themselves
    sign = torch.ones_like(last_bias)
    sign[:half] = -1.0 if flip else 1.0
    last, last_bias = (last * sign[:, None, None, None])[order], (last_bias * sign)[order]
    relu: Callable[[], nn.Module] = (lambda: nn.LeakyReLU(0.0)) if leaky else nn.ReLU
    convolutions = [
        _convolution(weight, bias)
        for weight, bias in ((first, first_bias), (second, second_bias), (last, last_bias))
    ]
    return nn.Sequential(convolutions[0], relu(), convolutions[1], relu(), convolutions[2])


def _convolution(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    outputs, inputs, size, _ = weight.shape
    made = nn.Conv2d(inputs, outputs, size, padding=size // 2)
    _set(made.weight, weight)
    _set(cast(Tensor, made.bias), bias)
    return made


def _set(target: Tensor, value: Tensor) -> None:
    with torch.no_grad():
        target.copy_(value.detach().reshape(target.shape))


def _stacks(flow: Flow) -> list[list[GlowStep]]:
    stacks = cast(Sequence[Sequence[GlowStep]], flow.transform.stacks)
    return [list(stack) for stack in stacks]


def _coarse_to_fine(
    levels: Levels, stacks: nn.ModuleList, undo: Callable[[nn.Module, Tensor], Tensor]
) -> Tensor:
    """Images, from the inverse of every stack: the coarsest first, each with the latents of its level."""
    h: Tensor | None = None
    for z, stack in zip(reversed(levels), reversed(stacks), strict=True):
        h = undo(stack, z if h is None else torch.cat([h, z], dim=1))
    assert h is not None
    return h


def freia_glow(flow: Flow, frozen: bool) -> Peer:
    """One AllInOneBlock per step, in its forward direction: coupling, scale and offset, 1x1 convolution."""
    from FrEIA.modules import AllInOneBlock

    class Block(AllInOneBlock):  # type: ignore[misc]
        def _affine(self, x: Tensor, a: Tensor, rev: bool = False) -> tuple[Tensor, Tensor]:
            shift, raw = a.chunk(2, dim=1)
            scale = torch.sigmoid(raw + 2.0)
            return x / scale - shift, -torch.sum(torch.log(scale), dim=self.sum_dims)

    def block(step: GlowStep) -> nn.Module:
        channels = len(step.mixing.sign)
        net = coupling_net(step, torch.arange(channels), flip=False)
        made = Block([(channels, 2, 2)], subnet_constructor=lambda _inputs, _outputs: net)
        made.to(step.actnorm.bias.dtype)  # FrEIA creates its permutation in float32
        inverse = step.mixing.inverse_matrix() / torch.exp(step.actnorm.log_scale.double())[:, None]
        # unmixing is W^-1 diag(global scale) (h + offset / global scale); the actnorm goes into the permutation matrix
        _set(made.w_perm, inverse)
        _set(
            made.global_scale, 2.0 * torch.log(torch.expm1(torch.full((channels,), 5.0, dtype=torch.float64)))
        )
        _set(made.global_offset, torch.linalg.solve(inverse, -step.actnorm.bias.double()))
        return cast(nn.Module, made)

    def undo(stack: nn.Module, h: Tensor) -> Tensor:
        for step in reversed(cast(nn.ModuleList, stack)):
            (h,), _ = step((h,))
        return F.pixel_shuffle(h, 2)

    stacks = nn.ModuleList(nn.ModuleList(map(block, stack)) for stack in _stacks(flow))
    return Peer(stacks, lambda levels, _: _coarse_to_fine(levels, stacks, undo))


def normflows_glow(flow: Flow, frozen: bool) -> Peer:
    """GlowBlocks with LU convolutions in a MultiscaleFlow, all the library's."""
    import normflows

    def block(step: GlowStep) -> nn.Module:
        channels, width = len(step.mixing.sign), step.coupling.net.second.in_channels
        made = normflows.flows.GlowBlock(channels, width, scale_map="sigmoid", use_lu=True)
        coupling, mixing, actnorm = made.flows
        interleaved = torch.arange(channels).reshape(2, -1).T.flatten()
        source = coupling_net(step, interleaved, flip=True, leaky=True)
        coupling.flows[1].param_map.net.load_state_dict(source.state_dict())
        for target, value in (
            (mixing.P, step.mixing.permutation),
            (mixing.sign_S, step.mixing.sign),
            (mixing.log_S, step.mixing.log_diagonal),
            (mixing.L, step.mixing.lower),
            (mixing.U, step.mixing.upper),
            (actnorm.s, -step.actnorm.log_scale),
            (actnorm.t, -step.actnorm.bias),
            (actnorm.data_dep_init_done, torch.ones(())),
        ):
            _set(target, value)
        return cast(nn.Module, made)

    coarse_to_fine = list(reversed(_stacks(flow)))
    made = normflows.MultiscaleFlow(
        [normflows.distributions.DiagGaussian(shape) for shape in reversed(flow.level_shapes)],
        [[*map(block, reversed(stack)), normflows.flows.Squeeze()] for stack in coarse_to_fine],
        [normflows.flows.Merge() for _ in coarse_to_fine[1:]],
    )
    return Peer(made, lambda levels, _: cast(Tensor, made.forward_and_log_det(list(reversed(levels)))[0]))


def nflows_glow(flow: Flow, frozen: bool) -> Peer:
    """ActNorm, OneByOneConvolution (cached when frozen) and AffineCouplingTransform in CompositeTransforms."""
    from nflows import transforms

    class Coupling(transforms.AffineCouplingTransform):  # type: ignore[misc]
        def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
            shift, raw = transform_params.chunk(2, dim=1)
            return torch.sigmoid(raw + 2.0), shift

        def _coupling_transform_inverse(
            self, inputs: Tensor, transform_params: Tensor
        ) -> tuple[Tensor, Tensor]:
            scale, shift = self._scale_and_shift(transform_params)
            log_det = -torch.log(scale).flatten(1).sum(1)
            return inputs / scale - shift, log_det

    def layers(step: GlowStep) -> list[nn.Module]:
        channels = len(step.mixing.sign)
        net = _WithContext(coupling_net(step, torch.arange(channels), flip=False))
        actnorm, mixing = (
            transforms.ActNorm(channels),
            transforms.OneByOneConvolution(channels, using_cache=frozen),
        )
        _set(actnorm.log_scale, step.actnorm.log_scale)
        _set(actnorm.shift, step.actnorm.bias * torch.exp(step.actnorm.log_scale))
        _set(actnorm.initialized, torch.ones((), dtype=torch.bool))
        lower, upper = step.mixing.factors(torch.float64)
        _set(mixing.lower_entries, lower[mixing.lower_indices])
        _set(mixing.upper_entries, upper[mixing.upper_indices])
        _set(mixing.unconstrained_upper_diag, torch.log(torch.expm1(upper.diagonal() - mixing.eps)))
        _set(mixing.permutation._permutation, torch.arange(channels))
        mask = (torch.arange(channels) >= channels - channels // 2).int()
        return [actnorm, mixing, Coupling(mask, lambda _inputs, _outputs: net)]

    def undo(stack: nn.Module, h: Tensor) -> Tensor:
        with warnings.catch_warnings():  # nflows 0.14 solves with a function that PyTorch deprecates
            warnings.filterwarnings("ignore", "torch.triangular_solve is deprecated", UserWarning)
            return cast(Tensor, cast(Any, stack).inverse(h)[0])

    stacks = nn.ModuleList(
        transforms.CompositeTransform(
            [transforms.SqueezeTransform(), *(layer for step in stack for layer in layers(step))]
        )
        for stack in _stacks(flow)
    )
    return Peer(stacks, lambda levels, _: _coarse_to_fine(levels, stacks, undo))


class _WithContext(nn.Module):
    """A net as nflows calls it, with the context, if any, concatenated to the input."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, h: Tensor, context: Tensor | None) -> Tensor:
        return cast(Tensor, self.net(h if context is None else torch.cat([h, context], dim=1)))


def _blocks(flow: Flow) -> list[CouplingBlock]:
    return list(cast(Sequence[CouplingBlock], flow.transform.steps))


def _sequential(net: LabelledNet) -> nn.Sequential:
    made = nn.Sequential(
        nn.Linear(net.first.in_features, net.first.out_features),
        nn.ReLU(),
        nn.Linear(net.last.in_features, net.last.out_features),
    )
    for target, source in ((made[0], net.first), (made[2], net.last)):
        target.load_state_dict(source.state_dict())
    return made


def _labels(flow: Flow, levels: Levels, y: Tensor | None) -> Tensor:
    """One-hot labels [n,classes] in the latents' dtype."""
    assert y is not None
    assert flow.label_classes is not None
    return F.one_hot(y, flow.label_classes).to(levels[0])


def freia_conditional(flow: Flow, frozen: bool) -> Peer:
    """GLOWCouplingBlocks and PermuteRandom in a SequenceINN, all the library's."""
    from FrEIA.framework import SequenceINN
    from FrEIA.modules import GLOWCouplingBlock, PermuteRandom

    inn = SequenceINN(flow.dimensions)
    for block in _blocks(flow):
        nets = iter(_sequential(cast(LabelledNet, net)) for net in (block.net1, block.net2))
        inn.append(
            GLOWCouplingBlock,
            cond=0,
            cond_shape=(flow.label_classes,),
            subnet_constructor=lambda _inputs, _outputs, nets=nets: next(nets),
            clamp=block.clamp,
            clamp_activation="ATAN",
        )
        inn.append(PermuteRandom, seed=block.number)

    def decode(levels: Levels, y: Tensor | None) -> Tensor:
        v, _ = inn(levels[0], c=[_labels(flow, levels, y)], rev=True)
        return cast(Tensor, v).reshape(-1, *flow.input_shape)

    return Peer(inn, decode)


def nflows_conditional(flow: Flow, frozen: bool) -> Peer:
    """Two AffineCouplingTransforms and a Permutation per block, with the clamp in `_scale_and_shift`."""
    from nflows import transforms

    def coupling(net: nn.Module, changed: Tensor, clamp: float) -> nn.Module:
        class Coupling(transforms.AffineCouplingTransform):  # type: ignore[misc]
            def _scale_and_shift(self, transform_params: Tensor) -> tuple[Tensor, Tensor]:
                raw, shift = transform_params.chunk(2, dim=1)
                return torch.exp(clamp * ATAN_SLOPE * torch.atan(raw)), shift

        inner = _WithContext(_sequential(cast(LabelledNet, net)))
        return cast(nn.Module, Coupling(changed.int(), lambda _inputs, _outputs: inner))

    first_half = torch.arange(flow.dimensions) < flow.dimensions // 2
    layers: list[nn.Module] = []
    for block in _blocks(flow):
        layers.append(coupling(block.net2, first_half, block.clamp))
        layers.append(coupling(block.net1, ~first_half, block.clamp))
        layers.append(transforms.Permutation(block.permutation))
    made = transforms.CompositeTransform(layers)

    def decode(levels: Levels, y: Tensor | None) -> Tensor:
        v, _ = made.inverse(levels[0], _labels(flow, levels, y))
        return cast(Tensor, v).reshape(-1, *flow.input_shape)

    return Peer(made, decode)


GLOW: dict[str, Build] = {"FrEIA": freia_glow, "normflows": normflows_glow, "nflows": nflows_glow}
CONDITIONAL: dict[str, Build] = {"FrEIA": freia_conditional, "nflows": nflows_conditional}


def benchmark_glow(levels: int, steps: int, width: int, shape: tuple[int, int, int], seed: int = 0) -> Glow:
    """A Glow with every layer alive, activations of order 1, and weights that all the libraries can express."""
    calm = min(1.0, 8.0 / steps)  # deep flows amplify float32 rounding less
    torch.manual_seed(seed)
    flow = Glow(shape, 256, levels=levels, steps=steps, width=width, scale_floor=0.0)
    with torch.no_grad():
        for step in (step for stack in _stacks(flow) for step in stack):
            channels = len(step.mixing.sign)
            step.mixing.permutation.copy_(torch.eye(channels))
            step.mixing.sign.fill_(1.0)
            for triangle in (step.mixing.lower, step.mixing.upper):
                triangle.normal_(std=0.3 * calm / channels**0.5)
            step.mixing.log_diagonal.normal_(std=0.1 * calm)
            step.coupling.net.last.conv.weight.normal_(std=0.05 * calm / width**0.5)
            step.coupling.net.last.log_gain.normal_(std=0.05)
    flow.initialize(torch.rand(32, *shape))
    return flow


def benchmark_conditional(
    blocks: int, width: int, shape: tuple[int, int, int], seed: int = 0
) -> ConditionalFlow:
    """A conditional flow with random nets; small last layers keep activations of order 1."""
    torch.manual_seed(seed)
    flow = ConditionalFlow(shape, 256, blocks=blocks, width=width, zero_start=False)
    with torch.no_grad():
        for net in (net for net in flow.modules() if isinstance(net, LabelledNet)):
            net.last.weight.mul_(0.5)
    return flow
