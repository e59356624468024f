"""Are the gradients that a search follows the slopes of the logits? Finite differences against what autograd returned.

A backward pass that was written by hand, a `detach`, or another path where a gradient is asked for leave the logits as
they are, and a search goes astray and finds nothing. So a few gradients are kept as the search got them, and afterwards
the model is evaluated a little way along them, and along a random direction, in which parts that the gradient lacks
show.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from robbench.attacks.trust.suspicions import Diagnostics
from robbench.attacks.victim import Victim

STEPS = (2.0**-9, 2.0**-11)  # in every pixel, of images in [0,1]
STRAIGHT = 0.25  # of the slope: how far those of the two steps may be apart where a slope is measured at all
WRONG = 0.5  # of the larger one: how far a gradient may be from the slope
_ULPS = 64  # of the logits, that a difference of two forwards is uncertain by


@dataclass
class FollowedGradient:
    """A few images [n,C,H,W] of a forward; once its backward pass has run, the weights [n,K] of its logits and the
    gradient [n,C,H,W] of their weighted sum."""

    images: Tensor
    kept: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, images: Tensor, logits: Tensor, rows: Tensor) -> "FollowedGradient":
        """Listens to the backward pass of logits [N,K] to images [N,C,H,W], for `rows` of them."""
        found = cls(images.detach()[rows].clone())

        def keep(name: str, values: Tensor) -> None:
            found.kept[name] = values.detach()[rows].clone()

        logits.register_hook(lambda values: keep("weights", values))  # type: ignore[no-untyped-call]
        images.register_hook(lambda values: keep("gradient", values))  # type: ignore[no-untyped-call]
        return found

    def compared(self, victim: Victim) -> Diagnostics:
        """How many slopes could be measured, and how many of them are not what the gradient says."""
        if self.kept.keys() != {"weights", "gradient"}:
            return Diagnostics()
        gradient = self.kept["gradient"]
        followed = (gradient != 0).flatten(1).any(1) & gradient.isfinite().flatten(1).all(1)
        followed &= self.kept["weights"].isfinite().all(1)
        if not bool(followed.any()):
            return Diagnostics()
        parts = self.images[followed], self.kept["weights"][followed], gradient[followed]
        generator = torch.Generator().manual_seed(0)
        any_way = (torch.randint(0, 2, gradient.shape[1:], generator=generator) * 2.0 - 1.0).to(gradient)
        return _compare(victim, *parts, parts[2].sign()) + _compare(
            victim, *parts, any_way.expand_as(parts[2])
        )


def _compare(victim: Victim, images: Tensor, weights: Tensor, gradient: Tensor, along: Tensor) -> Diagnostics:
    """Slopes at images [n,C,H,W] in the direction `along` [n,C,H,W], of the pixels that can go both ways in the box."""
    free = (images >= STEPS[0]) & (images <= 1.0 - STEPS[0])
    along = along * free
    claimed = (gradient.double() * along.double()).flatten(1).sum(1).cpu()
    measured, error = zip(*_slopes(victim, images, weights, along), strict=True)
    largest = torch.maximum(measured[0].abs(), measured[1].abs())
    straight = (measured[0] - measured[1]).abs() <= STRAIGHT * largest
    judged = straight & (torch.maximum(largest, claimed.abs()) > 4.0 * error[1])
    apart = (claimed - measured[1]).abs() - error[1]
    wrong = judged & (apart > WRONG * torch.maximum(measured[1].abs(), claimed.abs()))
    return Diagnostics(slopes=int(judged.sum()), wrong_slopes=int(wrong.sum()))


def _slopes(victim: Victim, images: Tensor, weights: Tensor, along: Tensor) -> list[tuple[Tensor, Tensor]]:
    """By step, the central difference [n] of the weighted logits, and what rounding may add to it, [n], both float64.
    One call of the model for all, because small forwards cost what their overhead costs."""
    points = [images + sign * step * along for step in STEPS for sign in (1.0, -1.0)]
    logits = victim.score(torch.cat(points)).double()
    ends = logits.view(len(STEPS), 2, len(images), -1)
    weights, found = weights.double().cpu(), []
    for step, (ahead, behind) in zip(STEPS, ends, strict=True):
        difference = ((ahead - behind) * weights).sum(1) / (2.0 * step)
        size = (ahead.abs() * weights.abs()).sum(1)
        rounding = size * _ULPS * torch.finfo(torch.float32).eps / (2.0 * step)
        found.append((difference.nan_to_num(nan=torch.inf), rounding))
    return found
