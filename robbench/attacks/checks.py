"""Checks of what a search returns. Beyond rounding they raise; rounding itself is removed."""

import torch
from torch import Tensor

from robbench.attacks.geometry import norm_of, per_sample
from robbench.errors import AttackViolation
from robbench.specs import ResolvedAttack

# Rounding allowance of float32 arithmetic on [0,1] pixels before a point counts as outside its set.
BALL_TOLERANCE, BOX_TOLERANCE = 1e-5, 1e-6


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
    """`adversarial` in the spec's image ball around x and in the box; `AttackViolation` beyond rounding."""
    epsilon = spec.radius
    distance = norm_of(adversarial - x, spec.norm)
    require(spec, ids, distance[:, None], epsilon, BALL_TOLERANCE * max(1.0, epsilon), f"{spec.norm} ball")
    if spec.norm == "linf":
        return torch.maximum(torch.minimum(adversarial, x + epsilon), x - epsilon).clamp(0.0, 1.0)
    shrink = (epsilon / distance.clamp(min=1e-12)).clamp(max=1.0)
    return torch.where(per_sample(shrink < 1, x), x + (adversarial - x) * per_sample(shrink, x), adversarial)


def require(
    spec: ResolvedAttack, ids: Tensor, values: Tensor, limit: float, tolerance: float, what: str
) -> None:
    """`AttackViolation` naming the worst sample when a row of `values` [N,M] exceeds limit + tolerance, or is NaN."""
    excess = values.amax(1) - limit if values.numel() else values.new_zeros(len(ids))
    # amax, max and argmax all take a NaN for the largest
    if len(ids) and not float(excess.max()) <= tolerance:
        worst = int(excess.argmax())
        raise AttackViolation(
            f"attack {spec.label!r} left its set: sample {int(ids[worst])} is {float(excess[worst]):.3g} "
            f"outside the {what} (limit {limit:g}, rounding allowance {tolerance:g})"
        )
