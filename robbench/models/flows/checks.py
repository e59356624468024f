"""What is checked of a flow before its numbers are believed, because anybody may write one.

A density, latents or an image of a sample must be functions of this sample alone: the same in another batch, in another
order, on its own and a second time, with inputs and state left as they were. And the frozen copy, which attacks and
scores use, must compute what the flow computes that it was made from. Each check takes a few images; each refusal is
one line that says what was seen and what to do.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.models.flows.base import Flow, FlowModel, FrozenFlow, Latents
from robbench.models.state import ModelState

# Differences that rounding may make. Among the flows of the zoo the largest are 2e-5 of the latents, 6e-6 bits/dim and
# 4e-4 of an image in [0,1].
LATENT_TOLERANCE = 1e-3  # of the largest latent of the sample
BITS_TOLERANCE = 1e-3  # of max(1, bits/dim)
IMAGE_TOLERANCE = 1e-3  # of images in [0,1]: also how exactly a flow must invert itself
COMPARED = {  # of a flow and its frozen copy
    "log_prob, in bits/dim": BITS_TOLERANCE,
    "bits_per_dim": BITS_TOLERANCE,
    "encode": LATENT_TOLERANCE,
    "log|det| of encode, in bits/dim": BITS_TOLERANCE,
    "decode": 2 * IMAGE_TOLERANCE,
    "whiten": LATENT_TOLERANCE,
}
PROBED = 4  # images of an attack on which a flow is tried before it, and once more after it
Method = Callable[[Tensor, Tensor | None], Tensor]
Result = TypeVar("Result")
CONTRACT = "see docs/models.md, a flow of your own"


def frozen_like(flow: Flow, dtype: torch.dtype = torch.float32, images: Tensor | None = None) -> FrozenFlow:
    """`flow.freeze(dtype)`, seen to compute what `flow` computes; `UserError` for a copy that does not.

    images: [n,C,H,W] in [0,1] to compare on, instead of made-up ones. The flow's modes are as before afterwards.
    """
    kind = type(flow).__name__
    with _evaluating(flow):
        frozen = _guarded(f"{kind}.freeze()", lambda: flow.freeze(dtype))
        if not isinstance(frozen, FrozenFlow) or any(True for _ in frozen.parameters()):
            got = type(frozen).__name__
            raise UserError(
                f"flow {kind}: freeze() returned a {got}{' with parameters' * isinstance(frozen, FrozenFlow)}; "
                f"return a FrozenFlow whose tensors are buffers ({CONTRACT})"
            )
        _require_same_sizes(kind, flow, frozen)
        x = _trial(flow, images)
        compare = partial(_require_same_function, kind, flow, frozen, x, labels_for(flow, len(x)))
        _guarded(f"flow {kind}", compare)
    return frozen


def require_sound(flow: FlowModel, images: Tensor | None = None) -> None:
    """`UserError` unless latents, densities and decoded images of `flow` are functions of one sample each, and a pass
    leaves inputs and state as they were. images: [n,C,H,W] in [0,1], instead of made-up ones."""
    kind = type(flow).__name__
    x = _trial(flow, images)
    y, before = labels_for(flow, len(x)), ModelState.of(flow)
    z = require_steady(f"flow {kind}: encode", partial(_flat, flow), x, y, LATENT_TOLERANCE)
    require_steady(f"flow {kind}: decode", partial(_image, flow), z, y, IMAGE_TOLERANCE)
    require_steady(f"flow {kind}: log_prob", partial(_bits, flow), x, y, BITS_TOLERANCE)
    require_same_state(f"flow {kind}", before, flow)


@contextmanager
def same_density(flow: FlowModel, images: Tensor, y: Tensor) -> Iterator[None]:
    """Tries `log_prob` on a few of images [n,C,H,W], labels y [n], and asks again after what is done inside.

    `UserError` where densities depend on batch, order or call, or have changed since, with the state of the flow.
    """
    what, few = f"flow {type(flow).__name__}", slice(PROBED)
    x, labels, before = images[few].to(flow.device), y[few].to(flow.device), ModelState.of(flow)
    first = require_steady(f"{what}: log_prob", partial(_bits, flow), x, labels, BITS_TOLERANCE)
    yield
    with torch.no_grad():
        last = _bits(flow, x.flip(0), labels.flip(0)).flip(0)
    if largest_gap(first, last, BITS_TOLERANCE) > 1.0:
        raise UserError(
            f"{what} changed during the attack: log_prob gives the same images {_shown(last)} bits/dim, before it was "
            f"{_shown(first)}; let it keep no state between calls ({CONTRACT})"
        )
    require_same_state(what, before, flow)


def require_density_gradient(flow: FlowModel, images: Tensor, y: Tensor) -> None:
    """`UserError` unless `log_prob` has a finite gradient that is not 0 at some of the first images [n,C,H,W], labels y
    [n]: without one, an ascent leaves images as they are, and their bits/dim look unharmed."""
    few = slice(PROBED)
    x = images[few].to(flow.device).clone().requires_grad_(True)
    with torch.enable_grad():
        labels = y[few].to(flow.device)
        value = _guarded(f"log_prob of flow {type(flow).__name__}", lambda: flow.log_prob(x, labels)).sum()
        gradient = torch.autograd.grad(value, x, allow_unused=True)[0] if value.requires_grad else None
    steepest = torch.zeros(1) if gradient is None else gradient.flatten(1).abs().amax(1)
    if len(x) and not bool(((steepest > 0) & torch.isfinite(steepest)).any()):
        raise UserError(
            f"flow {type(flow).__name__}: log_prob has no gradient with respect to the image, or one that is 0 or not "
            f"finite, and the attack follows it; compute log_prob without torch.no_grad or detach ({CONTRACT})"
        )


def require_normalised(flow: FlowModel, bits: Tensor, which: str) -> None:
    """`UserError` where the mean of finite bits/dim [n] of `which` images is below 0, as it is for no density: images
    are cubes of volume L^-D, whose probabilities are at most 1."""
    finite = bits[torch.isfinite(bits)]
    if len(finite) and float(finite.mean()) < -BITS_TOLERANCE:
        raise UserError(
            f"flow {type(flow).__name__} gives {len(finite)} {which} images {float(finite.mean()):.4g} bits/dim on "
            f"average, and no density of grey levels gives less than 0; correct the log-determinants, the prior or the "
            f"scale of its log_prob ({CONTRACT})"
        )


def require_steady(what: str, method: Method, inputs: Tensor, y: Tensor | None, tolerance: float) -> Tensor:
    """Outputs [n,...] of `method` on `inputs` [n,...] and labels [n]; `UserError` unless they do not depend on batch,
    order or call, and the inputs stay as they are. Outputs that are not finite must be so each time.

    tolerance: largest difference, as a share of a sample's largest output or of 1. what: names the method.
    """
    with torch.no_grad():
        given, kept = inputs.clone(), inputs.clone()
        whole = _guarded(what, lambda: method(given, y)).clone()
        if not torch.equal(torch.nan_to_num(given), torch.nan_to_num(kept)):
            raise UserError(f"{what} changes its input in place; let it work on a copy ({CONTRACT})")
        if len(whole) != len(kept) or not whole.is_floating_point():
            raise UserError(
                f"{what} returns {whole.dtype} of shape {tuple(whole.shape)} for {len(kept)} samples; return a row of "
                f"floats a sample ({CONTRACT})"
            )
        again = method(kept.clone(), y)

        def part(rows: Tensor) -> Tensor:
            return method(kept[rows], None if y is None else y[rows])

        order = torch.arange(len(kept) - 1, -1, -1, device=kept.device)
        turned = part(order)[order]
        alone = part(order[:1])  # the last sample, so that its place changes too
    for first, other, how, advice in (
        (whole, again, "a second time", "make it deterministic"),
        (
            whole,
            turned,
            "in another order",
            "let no sample depend on the rest of its batch (batch norm in eval mode, say)",
        ),
        (
            whole[-1:],
            alone,
            "on their own",
            "let no sample depend on the rest of its batch (batch norm in eval mode, say)",
        ),
    ):
        gap = largest_gap(first, other, tolerance)
        if gap > 1.0:
            raise UserError(
                f"{what} gives the same samples other values {how}, {gap * tolerance:.3g} off where {tolerance:g} is "
                f"allowed; {advice} ({CONTRACT})"
            )
    return whole


def largest_gap(one: Tensor, other: Tensor, tolerance: float) -> float:
    """Largest difference of two outputs [n,...], in units of what is allowed: `tolerance` times the larger of 1 and a
    sample's largest entry. Infinite where only one of them is finite, or shapes differ."""
    if one.shape != other.shape:
        return float("inf")
    if not one.numel():
        return 0.0
    first, second = one.flatten(1).double(), other.flatten(1).double()
    finite = torch.isfinite(first)
    if not torch.equal(finite, torch.isfinite(second)):
        return float("inf")
    first, second = (torch.where(finite, part, 0.0) for part in (first, second))
    allowed = tolerance * first.abs().amax(1, keepdim=True).clamp(min=1.0)
    return float(((first - second).abs() / allowed).max())


def require_same_state(what: str, before: ModelState, module: nn.Module) -> None:
    """`UserError` when a parameter or buffer of `module` has changed since `before`, appeared or gone."""
    moved = list(before.changed_tensors(module))
    if moved:
        raise UserError(
            f"{what} changed its own state ({', '.join(moved[:3])}) while it was only asked for values; leave "
            f"parameters and buffers alone in encode, decode and log_prob ({CONTRACT})"
        )


def _trial(flow: FlowModel, images: Tensor | None) -> Tensor:
    """Those given, or else made-up ones, on the flow's device."""
    return (images if images is not None and len(images) else calm_images(flow)).to(flow.device)


def calm_images(flow: FlowModel, n: int = 4) -> Tensor:
    """n grey images [n,C,H,W] with a little noise, the same each time: where a flow that never saw them is still well
    conditioned, which it need not be on noise."""
    generator = torch.Generator().manual_seed(0)
    grey = torch.linspace(0.1, 0.9, n)[:, None, None, None]
    noise = torch.rand((n, *flow.input_shape), generator=generator) - 0.5
    return (grey + 0.05 * noise).clamp(0.0, 1.0)


def labels_for(flow: FlowModel, n: int) -> Tensor | None:
    """Labels [n] that go round the classes of a conditional flow; None for others."""
    if flow.label_classes is None:
        return None
    return torch.arange(n, device=flow.device) % flow.label_classes


def _require_same_sizes(kind: str, flow: Flow, frozen: FrozenFlow) -> None:
    for name in ("input_shape", "grey_levels", "level_shapes", "label_classes", "decode_mode"):
        live, copy = getattr(flow, name), getattr(frozen, name)
        if live != copy:
            raise UserError(
                f"flow {kind}: the copy that freeze() returns has {name} {copy!r} and the flow {live!r}; pass it on "
                f"({CONTRACT})"
            )


def _require_same_function(kind: str, flow: Flow, frozen: FrozenFlow, x: Tensor, y: Tensor | None) -> None:
    with torch.no_grad():
        z = _flat(flow, x, y)
        gap = (_image(flow, z, y) - flow.reconstruction(x)).abs().flatten(1).amax(1)
        exact = gap <= IMAGE_TOLERANCE  # elsewhere float32 itself loses the image
        live, copy = (_outputs(model, x, y, z, exact) for model in (flow, frozen))
    for name, tolerance in COMPARED.items():
        if largest_gap(live[name], copy[name], tolerance) > 1.0:
            raise UserError(
                f"flow {kind} and its frozen copy disagree in {name}: {_shown(live[name])} and "
                f"{_shown(copy[name])} for the same image; override freeze() so that the copy computes what the flow "
                f"does ({CONTRACT})"
            )


def _outputs(flow: FlowModel, x: Tensor, y: Tensor | None, z: Tensor, exact: Tensor) -> dict[str, Tensor]:
    """What two flows must agree in, by the names of `COMPARED`, a row per sample. z: latents [n,D] to decode where
    `exact` [n]."""
    latents, log_det = flow.encode(x, y)
    bits = flow.bits_per_dim(x, y, seed=0, sample_ids=range(len(x)))
    z, labels = z[exact].to(flow.dtype), None if y is None else y[exact]
    return {
        "encode": latents.flat(),
        "log|det| of encode, in bits/dim": log_det[:, None] / (flow.dimensions * math.log(2.0)),
        "log_prob, in bits/dim": _bits(flow, x, y),
        "bits_per_dim": bits[:, None],
        "decode": _image(flow, z, labels),
        "whiten": flow.whiten(Latents.unflat(z, flow.level_shapes), labels).flat(),
    }


def _shown(values: Tensor) -> str:
    first = values[:1].flatten()
    return f"{float(first[0]):.4g}" if len(first) == 1 else f"{float(first.norm()):.6g} in length"


def _flat(flow: FlowModel, x: Tensor, y: Tensor | None) -> Tensor:
    return flow.encode(x, y)[0].flat()


def _image(flow: FlowModel, z: Tensor, y: Tensor | None) -> Tensor:
    return flow.decode(Latents.unflat(z, flow.level_shapes), y)


def _bits(flow: FlowModel, x: Tensor, y: Tensor | None) -> Tensor:
    """-log_prob in bits/dim, [n,1]."""
    return -flow.log_prob(x, y)[:, None] / (flow.dimensions * math.log(2.0))


def _guarded(what: str, call: Callable[[], Result]) -> Result:
    """`call()`; somebody else's code that fails becomes a `UserError`."""
    try:
        return call()
    except (UserError, torch.OutOfMemoryError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        raise UserError(
            f"{what} fails ({type(error).__name__}: {' '.join(str(error).split())[:160]}); repair it ({CONTRACT})"
        ) from error


@contextmanager
def _evaluating(flow: Flow) -> Iterator[None]:
    """Eval mode inside; every submodule's mode restored after."""
    modes = [(part, part.training) for part in flow.modules()]
    flow.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
