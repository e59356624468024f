"""A network with the model's function and less arithmetic, which a search on the CPU differentiates.

`lean` returns a network equal to the model up to rounding, with fixed weights. The model itself confirms every
candidate found on it, so that no verdict rests on it. Batch norms behind convolutions and linear layers behind linear
layers are multiplied out, convolutions keep their weights in channels_last, and the gradient with respect to the image
is one matrix product and a `fold` (oneDNN's own is several times slower for few channels).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d, fold

from robbench.attacks.trust.model_call import call_model

LEAST_PIXELS = (
    400  # smaller images gain nothing: 8x8 digits take 24.8 us forward and backward, on a lean network 25.8
)
PROBED = 4  # images on which the two networks are compared
ALIKE = 1e-3  # largest difference, of the largest logit or gradient; rounding makes about 1e-6
IMAGE_CHANNELS = 4  # a convolution with at most so many inputs is taken for the first one
# Outputs per input from which `fold` is faster than oneDNN: it takes 0.3 to 0.7 of the time with 16 or 64 outputs of 1
# channel and with 64 of 3, but 1.1 to 2 times as long with 16 of 3.
OUTPUTS_PER_CHANNEL = 8
Leaf = nn.Conv2d | nn.Linear | nn.BatchNorm2d


def searchable(module: nn.Module, images: Tensor) -> nn.Module:
    """`lean(module)` for images of at least `LEAST_PIXELS`, where it has the logits and the gradient of `module` on the
    first of `images` [n,C,H,W]; else `module` itself. A forward that reads its layers' weights or takes a chain of
    layers apart may compute something else with other layers. Call it inside `attack_mode(module)`."""
    if images.shape[2] * images.shape[3] < LEAST_PIXELS or not len(images):
        return module
    try:
        quick = lean(module)
    except Exception:  # weights in a form that no layer of torch's own has
        return module
    return quick if quick is module or _agree(module, quick, images[:PROBED]) else module


def _agree(module: nn.Module, quick: nn.Module, images: Tensor) -> bool:
    try:
        logits, gradient = logits_and_gradient(module, images)
        other_logits, other_gradient = logits_and_gradient(quick, images)
    # A foreign forward or backward on replaced layers, or without a gradient, can raise anything. A speed-up that
    # cannot be checked is not used; the attack itself reports what the module lacks.
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
    """A network that maps [n,C,H,W] float32 to the logits of `module`, up to rounding; `module` itself where nothing
    can be saved. Call it inside `attack_mode(module)`; it shares the parameters that are not multiplied out, and is
    valid until one of them changes. Layers of other classes, with hooks or with parametrisations stay as they are."""
    return _lean(module, {})


def _lean(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    def replace(part: nn.Module) -> nn.Module | None:
        if is_plain_layer(part, nn.Conv2d):
            return _convolution(part)
        if type(part) is nn.Sequential and not _has_hooks(part):
            return _chain([_lean(child, done) for child in _multiply_out(list(part))])
        return None

    return rebuild(module, replace, done)


def rebuild(
    module: nn.Module,
    instead: Callable[[nn.Module], nn.Module | None],
    done: dict[int, nn.Module] | None = None,
) -> nn.Module:
    """`module` with every submodule replaced by `instead(submodule)`, the outermost first; where that is None the
    submodule is rebuilt from its children, or kept where none changes. done: replacements by id of the submodule."""
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
    changed = {name: rebuild(child, instead, done) for name, child in children.items()}
    if all(changed[name] is child for name, child in children.items()):
        return module
    copy = object.__new__(type(module))  # shares everything but the children; no code of the model's runs
    copy.__dict__ = {**module.__dict__, "_modules": {**module._modules, **changed}}
    return copy


def _chain(layers: list[nn.Module]) -> nn.Module:
    return nn.Sequential(*layers).eval()


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def is_plain_layer(module: nn.Module, kind: type[Leaf]) -> bool:
    """Whether a layer is of exactly this class, with float32 parameters on the CPU and no hooks."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    floats = [t for t in tensors if t.is_floating_point()]
    fits = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in floats)
    return type(module) is kind and fits and not _has_hooks(module)


def _multiply_out(layers: list[nn.Module]) -> list[nn.Module]:
    """The layers of a chain, each affine layer merged with the one before it and replaced by an identity."""
    out: list[nn.Module] = []
    last = 0  # place of the last layer that is not a placeholder
    for layer in layers:
        joined = _join_layers(out[last], layer) if out else None
        if joined is None:
            last = len(out)
            out.append(layer)
        else:
            out[last] = joined
            out.append(nn.Identity())  # so that the other layers keep their numbers
    return out


def _join_layers(first: nn.Module, second: nn.Module) -> nn.Module | None:
    """One layer equal to two; None where there is none, where it costs more, or where its weights are not finite."""
    if is_plain_layer(first, nn.Conv2d) and is_plain_layer(second, nn.BatchNorm2d):
        joined: nn.Module | None = _fold_batch_norm(first, second)
    elif is_plain_layer(first, nn.Linear) and is_plain_layer(second, nn.Linear):
        joined = _multiply_linear(first, second)
    else:
        return None
    return joined if joined is not None and all(p.isfinite().all() for p in joined.parameters()) else None


def _fold_batch_norm(conv: Any, norm: Any) -> nn.Module | None:
    if norm.training or norm.running_mean is None or norm.num_features != conv.out_channels:
        return None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    bias = 0.0 if conv.bias is None else conv.bias.double()
    shift = 0.0 if norm.bias is None else norm.bias.double()
    joined: nn.Conv2d = copy_settings(conv, nn.Conv2d)
    joined.weight = _freeze(conv.weight.double() * scale[:, None, None, None])
    joined.bias = _freeze((bias - norm.running_mean.double()) * scale + shift)
    return joined


def copy_settings(layer: nn.Module, kind: type[Leaf]) -> Any:
    """A layer of class `kind` with the same settings, without weights of its own."""
    copy = object.__new__(kind)
    copy.__dict__ = {**layer.__dict__, "_parameters": dict(layer._parameters)}
    return copy


def _multiply_linear(first: Any, second: Any) -> nn.Module | None:
    inputs, between, outputs = first.in_features, first.out_features, second.out_features
    if second.in_features != between or inputs * outputs >= between * (inputs + outputs):
        return None
    joined = nn.Linear(inputs, outputs)
    weight = second.weight.double()
    joined.weight = _freeze(weight @ first.weight.double())
    bias = torch.zeros(outputs, dtype=torch.float64) if second.bias is None else second.bias.double()
    joined.bias = _freeze(bias if first.bias is None else bias + weight @ first.bias.double())
    return joined


def _freeze(values: Tensor) -> nn.Parameter:
    return nn.Parameter(values.detach().float(), requires_grad=False)


def _convolution(conv: Any) -> nn.Module:
    simple = conv.groups == 1 and conv.dilation == (1, 1) and conv.padding_mode == "zeros"
    few = conv.in_channels <= IMAGE_CHANNELS and not isinstance(conv.padding, str)
    few = few and conv.out_channels >= OUTPUTS_PER_CHANNEL * conv.in_channels
    copy = copy_settings(conv, FirstConvolution if simple and few else nn.Conv2d)
    # A weight of one channel is in both memory formats; only a clone has the strides of channels_last.
    weight = conv.weight.detach().clone(memory_format=torch.channels_last)
    copy.weight = nn.Parameter(weight, requires_grad=False)
    layer: nn.Module = copy
    return layer


class FirstConvolution(nn.Conv2d):
    """A convolution of images [n,C,H,W] whose gradient with respect to the image is cheap."""

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of x."""
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
