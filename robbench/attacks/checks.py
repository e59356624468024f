"""Checks of samples, of budgets, and of what a search returns: rounding is removed, anything beyond it raises."""

import math

import torch
from torch import Tensor

from robbench.attacks.search.constraints import BALL_TOLERANCE, Constraint
from robbench.attacks.search.geometry import norm_of, per_sample
from robbench.attacks.search.spaces import Codec
from robbench.core.budget_limits import exact_text, require_inside_box
from robbench.core.errors import AttackViolation, UserError, spell_argument
from robbench.specs import ResolvedAttack

# Rounding allowance of float32 arithmetic on [0,1] pixels before a point counts as outside its set.
BOX_TOLERANCE = 1e-6
PIXEL_ROUNDING = 2.0**-24  # of x + delta and of its difference from x, in [0,1] float32: 2**-25 each at most
LATENT_LENGTHS = 4.0  # longest latent perturbation, in median lengths of the latents


def ball_allowance(norm: str, epsilon: float, dimensions: int) -> float:
    """How far float32 rounding may put an example of D `dimensions` outside its ball of radius `epsilon`: the sum of
    1e-5 max(1, epsilon), which is 168 float32 roundings of a norm, and 2**-24 per pixel (2**-24 D^(1/p)), reached where
    all pixels round to the same side."""
    pixels = {"l1": float(dimensions), "l2": math.sqrt(dimensions)}.get(norm, 1.0)
    return BALL_TOLERANCE * max(1.0, epsilon) + PIXEL_ROUNDING * pixels


def require_image_budget(spec: ResolvedAttack, x: Tensor) -> None:
    """`UserError` where the image budget of a spec exceeds the diameter of the pixel box of images x [N,C,H,W]."""
    if spec.epsilon is not None and spec.space != "rendered":
        require_inside_box(spec.epsilon, spec.norm, tuple(x.shape[1:]), spec.pixel_range, spec.label)


def require_latent_budget(spec: ResolvedAttack, flow: Codec | None, x: Tensor, y: Tensor) -> None:
    """`UserError` where the latent budget of a spec is far larger than the latents of images x [n,C,H,W], labels y [n].

    Limits: for linf, eta at most the largest |z|; for l2, and for the length sqrt(D) eta of untruncated noise, 4 times
    the median norm of the latents.
    """
    if flow is None or not spec.eta or not len(x):
        return
    with torch.no_grad():
        z = flow.latents(x, y)  # the search checks that the flow inverts itself on every image
    if spec.norm == "linf":
        most, what = float(z.abs().max()), "the largest coordinate of these images' latents"
    else:
        most = LATENT_LENGTHS * float(norm_of(z, spec.norm).median())
        what = f"{LATENT_LENGTHS:g} times the median length of these images' latents"
        if spec.norm == "none":
            most, what = most / z.shape[1] ** 0.5, f"{what}, over the square root of their dimension"
    # Latents that are not finite are reported by `probe_flow`.
    if spec.eta > most:
        raise UserError(
            f"eta {exact_text(spec.eta)}: attack {spec.label!r} counts eta in raw latent units of the flow, and this "
            f"is beyond {what}, {most:.4g}; print has 0.02 to 0.25 a coordinate, and no scale of 255: give at most "
            f"{most:.4g}"
        )


def check_inputs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Images as float32 and labels as int64, on the CPU; `UserError` when images leave [0,1], labels are not integers,
    or shapes disagree. Excess over [0,1] within `BOX_TOLERANCE` is clipped as rounding."""
    if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UserError(
            f"labels are {y.dtype}; give integer class numbers 0, 1, ... as torch.int64 (y.long(), once they are whole "
            f"numbers)"
        )
    if not x.is_floating_point():
        raise UserError(
            f"images are {x.dtype}; give floating point pixels in [0,1] (of 8-bit images: x.float() / 255)"
        )
    if x.ndim != 4 or y.shape != (len(x),):
        raise UserError(
            f"images {tuple(x.shape)} with labels {tuple(y.shape)}: give [N,C,H,W] images and [N] labels"
        )
    # Tensors made in inference mode cannot be saved for a backward pass; copies made outside of it can.
    x, y = (values.clone() if values.is_inference() else values.detach() for values in (x, y))
    x, y = x.to("cpu", torch.float32).contiguous(), y.to("cpu", torch.int64)
    if not len(x):
        return x, y
    low, high = float(x.min()), float(x.max())
    if not (low >= -BOX_TOLERANCE and high <= 1.0 + BOX_TOLERANCE):
        raise UserError(
            f"images span [{low:.9g}, {high:.9g}], beyond [0,1] by {max(-low, high - 1.0):.3g}; give pixels in [0,1] "
            f"and put the normalisation inside the model"
        )
    return (x if low >= 0.0 and high <= 1.0 else x.clamp(0.0, 1.0)), y


def check_ids(ids: Tensor, n: int) -> Tensor:
    """Sample ids [n] on the CPU; `UserError` unless they are n different int64 values."""
    if ids.dtype != torch.int64 or ids.shape != (n,) or len(set(ids.tolist())) != n:
        raise UserError(
            f"sample_ids are {ids.dtype} {tuple(ids.shape)} for {n} images; give one int64 id per image, all different"
        )
    return ids.cpu()


def check_seed(seed: int) -> int:
    """`seed`; `UserError` unless it is an integer of at least 0."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UserError(f"seed={seed!r}; give an integer of at least 0")
    return seed


def require_labels(y: Tensor, classes: int) -> None:
    """`UserError` for labels y [N] outside a model's `classes`."""
    outside = y[(y < 0) | (y >= classes)]
    if len(outside):
        raise UserError(
            f"label {int(outside[0])} is outside the model's {classes} classes; check the labels and "
            f"{spell_argument('dataset')}"
        )


def check_tensor(spec: ResolvedAttack, adversarial: Tensor, x: Tensor, ids: Tensor) -> None:
    """`AttackViolation` unless `adversarial` is finite float32 of the shape of x [N,C,H,W]."""
    if adversarial.shape != x.shape or adversarial.dtype != torch.float32:
        raise AttackViolation(
            f"attack {spec.label!r} returned {adversarial.dtype} {tuple(adversarial.shape)} "
            f"instead of float32 {tuple(x.shape)}"
        )
    finite = torch.isfinite(adversarial).flatten(1).all(1).cpu()
    if not finite.all():
        first = int(ids[int((~finite).nonzero()[0])])
        raise AttackViolation(f"attack {spec.label!r} returned NaN or infinite pixels for sample {first}")


def inside_box(spec: ResolvedAttack, ids: Tensor, adversarial: Tensor) -> Tensor:
    """`adversarial` clipped to [0,1]; `AttackViolation` when that is more than rounding."""
    excess = (adversarial - adversarial.clamp(0, 1)).flatten(1).abs()
    require(spec, ids, excess, 0, BOX_TOLERANCE, "box [0,1]")
    return adversarial.clamp(0.0, 1.0)


def inside_ball(spec: ResolvedAttack, ids: Tensor, x: Tensor, adversarial: Tensor) -> Tensor:
    """`adversarial` in the spec's image ball around x and in the box; `AttackViolation` beyond `ball_allowance`.

    The result lies exactly in an l1 or l2 ball, and in an linf ball up to the rounding of x + epsilon (2**-24).
    """
    epsilon = spec.radius
    moved = adversarial.double() - x.double()
    distance = norm_of(moved, spec.norm)
    allowance = ball_allowance(spec.norm, epsilon, x.shape[1:].numel())
    require(spec, ids, distance[:, None], epsilon, allowance, f"{spec.norm} ball")
    if spec.norm == "linf":
        return torch.maximum(torch.minimum(adversarial, x + epsilon), x - epsilon).clamp(0.0, 1.0)
    outside = distance > epsilon
    if not bool(outside.any()):
        return adversarial
    # Slightly below the radius, so that the norm of the result does not exceed it in float64 either.
    shrink = (epsilon * (1 - 1e-12) / distance[outside].clamp(min=epsilon))[:, None]
    brought_in = adversarial.clone()
    brought_in[outside] = _shorten(x[outside], moved[outside], shrink)
    return brought_in


def require_constraint(spec: ResolvedAttack, ids: Tensor, values: Tensor, constraint: Constraint) -> None:
    """`AttackViolation` where a perturbation [N,...] does not meet a constraint."""
    if math.isfinite(constraint.limit):
        sizes = constraint.sizes(values)
        require(spec, ids, sizes, constraint.limit, constraint.allowance, constraint.what)


def _shorten(x: Tensor, moved: Tensor, share: Tensor) -> Tensor:
    """x + share moved rounded towards x in float32: no coordinate is further from x than share |moved| (float64)."""
    requested = moved * per_sample(share.squeeze(1), moved)
    images = (x.double() + requested).to(x.dtype)
    too_far = (images.double() - x.double()).abs() > requested.abs()
    return torch.where(too_far, torch.nextafter(images, x), images)


def require(
    spec: ResolvedAttack, ids: Tensor, values: Tensor, limit: float, tolerance: float, what: str
) -> None:
    """`AttackViolation` naming the worst sample when a row of `values` [N,M] exceeds limit + tolerance, or is NaN."""
    excess = values.amax(1) - limit if values.numel() else values.new_zeros(len(ids))
    # amax, max and argmax all treat NaN as the largest value
    if len(ids) and not float(excess.max()) <= tolerance:
        worst = int(excess.argmax())
        raise AttackViolation(
            f"attack {spec.label!r} left its set: sample {int(ids[worst])} is {float(excess[worst]):.3g} "
            f"outside the {what} (limit {limit:g}, rounding allowance {tolerance:g})"
        )
