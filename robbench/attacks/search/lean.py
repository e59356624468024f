"""The same network for less arithmetic: what a search on the CPU differentiates in place of the model itself.

`lean` returns a network with the model's function up to rounding; weights are fixed while it is in use. What a search
claims on it is confirmed by the model itself, so that no verdict rests on it. Batch norms behind convolutions and
linear layers behind linear layers are multiplied out, convolutions keep their weights in channels_last, and the
gradient with respect to the image is one matrix product and a `fold` (oneDNN's own is several times slower for few
channels).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, fold

from robbench.attacks.trust.model_call import call_model

LEAST_PIXELS = (
    400  # smaller images gain nothing: 8x8 digits take 24.8 us forward and back, on a lean network 25.8
)
PROBED = 4  # images on which the two networks are compared
ALIKE = 1e-3  # largest difference, of the largest logit or gradient; rounding makes about 1e-6
IMAGE_CHANNELS = 4  # a convolution with at most so many inputs is taken for the first one
Leaf = nn.Conv2d | nn.Linear | nn.BatchNorm2d


def searchable(module: nn.Module, images: Tensor) -> nn.Module:
    """`lean(module)` where it is worth it and seen to have the logits and the gradient of `module` on the first of
    `images` [n,C,H,W]; `module` itself otherwise: code that reads its layers' weights, or takes apart a chain, may
    compute something else with other layers. Call it inside `attacked(module)`."""
    if images.shape[2] * images.shape[3] < LEAST_PIXELS or not len(images):
        return module
    try:
        quick = lean(module)
    except Exception:  # weights in a form that no layer of torch's own has
        return module
    return quick if quick is module or _alike(module, quick, images[:PROBED]) else module


def _alike(module: nn.Module, quick: nn.Module, images: Tensor) -> bool:
    try:
        logits, gradient = logits_and_gradient(module, images)
        other_logits, other_gradient = logits_and_gradient(quick, images)
    # Somebody's forward or backward, on layers it was not written for or without a gradient at all, can fail in any
    # way. A speed-up that cannot be checked is not used, and the attack itself says what the module lacks.
    except Exception:
        return False
    return all(
        one.shape == other.shape and bool(((one - other).abs() <= ALIKE * one.abs().amax()).all())
        for one, other in ((logits, other_logits), (gradient, other_gradient))
    )


def logits_and_gradient(module: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [n,K] at images [n,C,H,W] and the gradient of a fixed combination of them, 0 where there is none."""
    leaf = images.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        logits = call_model(module, leaf)
        if not logits.requires_grad:  # no way back to the image: nothing to save
            return logits.detach(), torch.zeros_like(leaf)
        weights = torch.linspace(-1.0, 2.0, logits[0].numel(), device=logits.device)
        (gradient,) = torch.autograd.grad((logits * weights).sum(), leaf)
    return logits.detach(), gradient


def lean(module: nn.Module) -> nn.Module:
    """A network that maps [n,C,H,W] float32 to the logits of `module`, to rounding; `module` itself where nothing can
    be saved. Call it inside `attacked(module)`; it shares the parameters that are not multiplied out, and is valid
    until one of them changes. Layers of other classes, with hooks or with parametrisations are used as they are."""
    return _lean(module, {})


def _lean(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    def chained(part: nn.Module) -> nn.Module | None:
        if plain(part, nn.Conv2d):
            return _convolution(part)
        if type(part) is nn.Sequential and not _hooked(part):
            return _chain([_lean(child, done) for child in _multiplied_out(list(part))])
        return None

    return rebuilt(module, chained, done)


def rebuilt(
    module: nn.Module,
    instead: Callable[[nn.Module], nn.Module | None],
    done: dict[int, nn.Module] | None = None,
) -> nn.Module:
    """`module` with every part replaced by what `instead` gives for it, the outermost first; parts for which that is
    None are rebuilt from their children, or kept where none changes. done: by id of a part, what is used instead."""
    done = {} if done is None else done
    known = done.get(id(module))
    if known is None:
        known = instead(module)
        known = done[id(module)] = _from_children(module, instead, done) if known is None else known
    return known


def _from_children(
    module: nn.Module, instead: Callable[[nn.Module], nn.Module | None], done: dict[int, nn.Module]
) -> nn.Module:
    if isinstance(module, torch.jit.ScriptModule):
        return module
    children = {name: child for name, child in module._modules.items() if child is not None}
    changed = {name: rebuilt(child, instead, done) for name, child in children.items()}
    if all(changed[name] is child for name, child in children.items()):
        return module
    copy = object.__new__(type(module))  # shares everything but the children; no code of the model's runs
    copy.__dict__ = {**module.__dict__, "_modules": {**module._modules, **changed}}
    return copy


def _chain(layers: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*layers).eval()


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def plain(module: nn.Module, kind: type[Leaf]) -> bool:
    """A layer of exactly this class with float32 parameters on the CPU and nothing added to it."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    floats = [t for t in tensors if t.is_floating_point()]
    fits = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in floats)
    return type(module) is kind and fits and not _hooked(module)


def _multiplied_out(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers of a chain: an affine layer takes in the one that follows, in whose place nothing happens."""
    out: list[nn.Module] = []
    last = 0  # place of the last layer that does something
    for layer in layers:
        joined = _joined(out[last], layer) if out else None
        if joined is None:
            last = len(out)
            out.append(layer)
        else:
            out[last] = joined
            out.append(nn.Identity())  # so that every other layer keeps its number
    return out


def _joined(first: nn.Module, second: nn.Module) -> nn.Module | None:
    """One layer for two, None where there is none, it costs more, or its weights are not finite."""
    if plain(first, nn.Conv2d) and plain(second, nn.BatchNorm2d):
        joined: nn.Module | None = _normalised(first, second)
    elif plain(first, nn.Linear) and plain(second, nn.Linear):
        joined = _product(first, second)
    else:
        return None
    return joined if joined is not None and all(p.isfinite().all() for p in joined.parameters()) else None


def _normalised(conv: Any, norm: Any) -> nn.Module | None:
    if norm.training or norm.running_mean is None or norm.num_features != conv.out_channels:
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    bias = 0.0 if conv.bias is None else conv.bias.double()
    shift = 0.0 if norm.bias is None else norm.bias.double()
    joined: nn.Conv2d = like(conv, nn.Conv2d)
    joined.weight = _fixed(conv.weight.double() * scale[:, None, None, None])
    joined.bias = _fixed((bias - norm.running_mean.double()) * scale + shift)
    return joined


def like(layer: nn.Module, kind: type[Leaf]) -> Any:
    """A layer of class `kind` with the same settings, without weights of its own."""
    copy = object.__new__(kind)
    copy.__dict__ = {**layer.__dict__, "_parameters": dict(layer._parameters)}
    return copy


def _product(first: Any, second: Any) -> nn.Module | None:
    inputs, between, outputs = first.in_features, first.out_features, second.out_features
    if second.in_features != between or inputs * outputs >= between * (inputs + outputs):
        return None
    joined = nn.Linear(inputs, outputs)
    weight = second.weight.double()
    joined.weight = _fixed(weight @ first.weight.double())
    bias = torch.zeros(outputs, dtype=torch.float64) if second.bias is None else second.bias.double()
    joined.bias = _fixed(bias if first.bias is None else bias + weight @ first.bias.double())
    return joined


def _fixed(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().float(), requires_grad=False)


def _convolution(conv: Any) -> nn.Module:
    simple = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    few = conv.in_channels <= IMAGE_CHANNELS and not isinstance(conv.padding, str)
    copy = like(conv, FirstConvolution if simple and few else nn.Conv2d)
    # Of one channel a weight is in both formats; only a clone has the strides that say which is meant.
    weight = conv.weight.detach().clone(memory_format=torch.channels_last)
    copy.weight = nn.Parameter(weight, requires_grad=False)
    layer: nn.Module = copy
    return layer


class FirstConvolution(nn.Conv2d):
    """A convolution of images [n,C,H,W] whose gradient with respect to the image is cheap."""

    def forward(self, x: Tensor) -> Tensor:
        """As of the convolution."""
        out: Tensor = _Convolve.apply(x, self.weight, self.bias, self.stride, self.padding)
        return out


class _Convolve(torch.autograd.Function):
    """conv2d, differentiable once and in x alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any
    ) -> Tensor:
        ctx.weight, ctx.stride, ctx.padding, ctx.extent = weight, stride, padding, x.shape[2:]
        return conv2d(x, weight, bias, stride, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        columns = ctx.weight.flatten(1).T @ gradient.flatten(2)  # [n, C k k, positions]
        back = fold(columns, ctx.extent, ctx.weight.shape[2:], padding=ctx.padding, stride=ctx.stride)
        return back, None, None, None, None
