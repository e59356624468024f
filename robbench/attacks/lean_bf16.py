"""What a search in bfloat16 computes with on the CPU, and how far such logits can be trusted.

Autocast casts every weight at every call. Here the weights of the lean network (`lean`) are cast once: the products of
convolutions and linear layers are those of autocast, whatever lies between them too, and the layer that gives the
logits stays in float32, whose small differences a search compares.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from robbench.attacks.lean import FirstConvolution, lean, like, logits_and_slope, plain, rebuilt

PROBED = 32  # images of a call, at most, on which precisions are compared, and as many means of two
SAFETY = 2.0  # an error may be larger than those seen
LOGIT_ERROR, SLOPE_ERROR = 0.05, 0.5  # allowed shares of the largest logit, and of the gradients' l2 norm
# Slopes jump where a unit's sign changes: autocast is off by 0.04 (digits) to 0.2 (resnet20) too.


def searchable_in_bf16(module: nn.Module, images: Tensor) -> nn.Module:
    """A network to call inside autocast in place of `module`, on the CPU: seen to have its logits and gradient, as far
    as bfloat16 does, on `images` [n,C,H,W]; `module` itself otherwise. Call it inside
    `attacked(module)`."""
    if not len(images):
        return module
    try:
        quick = rounded(lean(module), images[:1])
        close = _close(module, quick, images)
    except Exception:  # somebody's forward, on layers it was not written for, can fail in any way
        return module
    return quick if close else module


def _close(module: nn.Module, quick: nn.Module, images: Tensor) -> bool:
    logits, slope = logits_and_slope(module, images)
    with torch.autocast("cpu", torch.bfloat16):
        other_logits, other_slope = logits_and_slope(quick, images)
    if logits.shape != other_logits.shape:
        return False
    logit_error = (logits - other_logits).abs().amax() / logits.abs().amax()
    slope_error = (slope - other_slope).norm()
    return bool(logit_error <= LOGIT_ERROR) and bool(slope_error <= SLOPE_ERROR * slope.norm())


def rounded(module: nn.Module, image: Tensor) -> nn.Module:
    """`module` with the weights of its convolutions and linear layers in bfloat16, but for the one whose output is the
    logits; other layers are shared. image: [1,C,H,W]. Call the result inside autocast."""
    last = _gives_logits(module, image)
    return rebuilt(module, lambda layer: _rounded(layer, layer is last))


def _gives_logits(module: nn.Module, image: Tensor) -> nn.Module | None:
    """The linear layer whose output `module` returns."""
    outputs: list[tuple[nn.Module, Any]] = []
    hooks = [
        part.register_forward_hook(lambda layer, _, out: outputs.append((layer, out)))
        for part in module.modules()
        if type(part) is nn.Linear
    ]
    try:
        with torch.no_grad():
            logits = module(image)
    finally:
        for hook in hooks:
            hook.remove()
    return next((layer for layer, out in outputs if out is logits), None)


def _rounded(layer: nn.Module, last: bool) -> nn.Module | None:
    """The layer to use in place of `layer`; None for those to keep."""
    if plain(layer, nn.Linear):
        return _with(like(layer, ExactLinear)) if last else _with(like(layer, nn.Linear), torch.bfloat16)
    if plain(layer, nn.Conv2d) or plain(layer, FirstConvolution):
        return _with(like(layer, nn.Conv2d), torch.bfloat16)  # in bfloat16 oneDNN's backward is the quick one
    return None


def _with(layer: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """`layer` with its parameters as `dtype`."""
    for name, value in layer._parameters.items():
        if value is not None:
            layer._parameters[name] = nn.Parameter(value.detach().to(dtype), requires_grad=False)
    module: nn.Module = layer
    return module


class ExactLinear(nn.Linear):
    """A linear layer that computes in float32 inside autocast too."""

    def forward(self, x: Tensor) -> Tensor:
        """As of the layer; float32."""
        with torch.autocast(x.device.type, enabled=False):
            return linear(x.float(), self.weight, self.bias)


@torch.no_grad()
def blur(exact: Callable[[Tensor], Tensor], rough: Callable[[Tensor], Tensor], images: Tensor) -> float:
    """How near to 0 a margin of `rough` logits may be of either sign: `SAFETY` times the largest difference of two
    errors of one image (the most its margin can be off), over `images` [n,C,H,W] and means of two of them, which lie
    nearer to the boundary. Rounded up to a power of 2, so that it seldom depends on the images; 0 for no images or no
    error, infinity where a logit is not finite."""
    most = 0.0
    for some in (images, (images + images.flip(0)) / 2) if len(images) else ():
        error = rough(some) - exact(some).float()
        off = (error.amax(1) - error.amin(1)).nan_to_num(math.inf, math.inf, math.inf)
        most = max(most, float(off.max()))
    return 2.0 ** math.ceil(math.log2(SAFETY * most)) if 0 < most < math.inf else most
