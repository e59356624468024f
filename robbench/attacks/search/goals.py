"""Goals of targeted attacks: the class that an attack must reach, chosen per sample."""

from typing import Literal

import torch
from torch import Tensor

from robbench.attacks.search.geometry import SampleNoise
from robbench.core.errors import UserError, spell_argument

Target = int | Literal["random", "least-likely"]  # a class, or how to choose a wrong class per sample


def choose_targets(rule: Target, logits: Tensor, labels: Tensor, ids: Tensor, seed: int) -> Tensor:
    """The class [N] that each sample must be classified as.

    random: uniform over the wrong classes, keyed by sample id; least-likely: the wrong class with the smallest clean
    logit; a number: that class, also for samples whose label it is, which cannot be attacked. logits: clean, [N,K];
    labels, ids: [N]. `UserError` for a class that the model does not have.
    """
    classes = logits.shape[1]
    require_class(rule, classes)
    if isinstance(rule, int):
        return torch.full_like(labels, rule)
    if rule == "least-likely":
        return logits.scatter(1, labels[:, None], float("inf")).argmin(1)
    drawn = SampleNoise(seed, "target", ids, 0, labels.device).uniform(())
    shift = ((drawn.double() + 1.0) / 2.0 * (classes - 1)).long().clamp(0, classes - 2)
    return (labels + 1 + shift) % classes


def require_class(rule: Target | None, classes: int) -> None:
    """`UserError` for a class to reach that a model of so many `classes` does not have."""
    if isinstance(rule, int) and not 0 <= rule < classes:
        raise UserError(
            f"{spell_argument('target', rule)} is none of the model's {classes} classes; give 0 to {classes - 1}, "
            f"random or least-likely"
        )


def goal_margins(logits: Tensor, targets: Tensor) -> Tensor:
    """Largest other logit minus the target's, [n]: at most 0 where the target is reached; a tie is not, and neither is
    a target where logits are not finite."""
    own = logits.gather(1, targets[:, None]).squeeze(1)
    missing = logits.scatter(1, targets[:, None], float("-inf")).amax(1) - own
    return missing_lead(missing, logits.isfinite().all(1))


def missing_lead(missing: Tensor, finite: Tensor) -> Tensor:
    """`goal_margins` from largest other logits minus the targets' [n], and which rows of logits are finite, [n]."""
    tie = torch.finfo(missing.dtype).tiny
    return torch.where(finite, missing.masked_fill(missing == 0, tie), float("inf"))
