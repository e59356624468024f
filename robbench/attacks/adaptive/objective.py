"""What adaptive attacks climb: the classifier's error and the detector's acceptance, as one direction and one order.

Nothing here depends on the scale of logits or scores: logits are brought to a common spread, gradients to length 1, and
iterates are compared by order alone.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from robbench.attacks.guard import Guard, call_guard, excess, excess_and_gradient
from robbench.attacks.search.decision import margins
from robbench.attacks.search.geometry import normalise, per_sample, put, stands_still
from robbench.attacks.search.inner import SURE, error_log_odds
from robbench.attacks.search.spaces import State
from robbench.attacks.search.task import Task
from robbench.attacks.victim import Victim

Strategy = Literal["oblivious", "combined", "selective", "orthogonal"]
BEHIND = 4000.0  # in `rank`, of images that are right; above twice the range of `_logarithm`
PACE, MOST = 0.3, 4.0  # of the log-odds of a combined direction's weight: move per step, largest size
PARALLEL = 1e-6  # length of what a projection leaves of a unit gradient below which only rounding is left


@dataclass(frozen=True)
class GuardedTask(Task):
    """A task with, per sample, the image [n,C,H,W] from which a search starts, None for a random start, and the wrong
    class [n] to which it moves, None for any."""

    start: Tensor | None = None
    towards: Tensor | None = None

    def part(self, rows: Tensor) -> "GuardedTask":
        where, base = rows.to(self.x.device), Task.part(self, rows)
        assert isinstance(base, GuardedTask)
        return replace(
            base,
            start=None if self.start is None else self.start[where],
            towards=None if self.towards is None else self.towards[where],
        )


class GuardedVictim(Victim):
    """A victim and its guard: a margin is above 0 where the classifier is right or the detector flags the image."""

    def __init__(self, victim: Victim, guard: Guard) -> None:
        self.__dict__.update(vars(victim))  # with its forward and whoever listens to it
        self.guard = guard

    def margins(self, x: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
        return torch.maximum(*self.verdict(x, labels))

    def verdict(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The classifier's margins by a clean fp32 forward and the detector's `excess`, float64 [n], of images on the
        device."""
        with torch.no_grad():
            return super().margins(x, labels).double(), excess(self.guard, call_guard(self.guard, x))


@dataclass(frozen=True)
class Look:
    """What a search sees of its iterates.

    Attributes:
        margin, excess: the classifier's margin and the score above the threshold, float64 [n].
        direction: where to go, [n,C,H,W].
    """

    margin: Tensor
    excess: Tensor
    direction: Tensor

    @property
    def verdict(self) -> Tensor:
        """Above 0 where the image is right or flagged, [n]."""
        return torch.maximum(self.margin, self.excess)

    @property
    def rank(self) -> Tensor:
        """Larger for an image nearer to success, float64 [n]."""
        return rank(self.margin, self.excess)


def rank(margin: Tensor, excess: Tensor) -> Tensor:
    """An order of images, [n]: misclassified ones, the smaller `excess` [n] the larger, above those that are right, the
    smaller the margin [n] the larger. Only its order means anything, which no scale of logits or scores changes."""
    return torch.where(margin <= 0, -_logarithm(excess), -BEHIND - _logarithm(margin))


def _logarithm(values: Tensor) -> Tensor:
    """Increasing in values [n], odd, within 1600 of 0, and as fine for large and small values as float64 is."""
    limits = torch.finfo(values.dtype)
    return values.sign() * (values.abs().clamp(limits.tiny, limits.max).log() + 800.0)


def look(victim: GuardedVictim, images: Tensor, state: State, strategy: Strategy) -> Look:
    """One forward and backward of classifier and detector at images [n,C,H,W].

    state: with labels "y" [n], "towards" [n] where there is a class to reach, and "weight" [n], which a combined
    direction moves. The oblivious strategy does not ask the detector for a gradient.
    """
    error, margin = _error_gradient(victim, images, state)
    if strategy == "oblivious":
        return Look(margin, _excess_where_wrong(victim, images, margin), error)
    above, gradient = excess_and_gradient(victim.guard, images)
    calm = normalise(-gradient, "l2")
    calm = torch.where(per_sample(stands_still(calm), calm), error, calm)
    wrong = margin <= 0
    if strategy == "combined":
        state["weight"] = _balanced(state["weight"], wrong, above > 0)
        return Look(margin, above, torch.lerp(error, calm, per_sample(state["weight"].sigmoid(), error)))
    if strategy == "orthogonal":
        error, calm = _without(error, calm), _without(calm, error)
    return Look(margin, above, torch.where(per_sample(wrong, error), calm, error))


def _balanced(weight: Tensor, wrong: Tensor, flagged: Tensor) -> Tensor:
    """Log-odds [n] of the detector's weight: more where only the detector is in the way, less where only the classifier
    is. No fixed weight reaches every image that is misclassified and accepted."""
    moved = weight + PACE * (wrong & flagged).float() - PACE * (~wrong & ~flagged).float()
    return moved.clamp(-MOST, MOST)


def _without(unit: Tensor, other: Tensor) -> Tensor:
    """The part of a unit vector that is orthogonal to another one; all of it where nothing is left."""
    along = (unit.double() * other.double()).flatten(1).sum(1)
    left = unit - per_sample(along, unit).to(unit.dtype) * other
    return torch.where(per_sample(left.flatten(1).norm(dim=1) > PARALLEL, unit), left, unit)


def _excess_where_wrong(victim: GuardedVictim, images: Tensor, margin: Tensor) -> Tensor:
    """`excess` [n] of misclassified images, +inf for others."""
    above, rows = torch.full_like(margin, float("inf")), (margin <= 0).nonzero().squeeze(1)
    if len(rows):
        with torch.no_grad():
            above[rows] = excess(victim.guard, call_guard(victim.guard, images[rows]))
    return above


def _error_gradient(victim: GuardedVictim, images: Tensor, state: State) -> tuple[Tensor, Tensor]:
    """Unit gradient [n,C,H,W] of the log-odds of a mistake, or of the class to reach, and float64 margins [n]."""
    point = images.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = victim.differentiable(point)
        scaled = _of_common_spread(logits)
        towards = state.get("towards")
        climbed = error_log_odds(scaled, state["y"]) if towards is None else -error_log_odds(scaled, towards)
        (gradient,) = torch.autograd.grad(climbed.sum(), point)
    return normalise(gradient, "l2"), margins(logits.detach(), state["y"]).double()


def _of_common_spread(logits: Tensor) -> Tensor:
    """Logits [n,K] divided so that they spread over `SURE`."""
    spread = (logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)).detach() / SURE
    return logits / spread.masked_fill((spread == 0) | ~spread.isfinite(), 1.0)


def keep_nearest(state: State, images: Tensor, seen: Look) -> None:
    """Keep in place the images [n,C,H,W] of the largest `rank` so far, as "nearest" and "rank"."""
    better = seen.rank > state["rank"]
    put(state["nearest"], images, better)
    state["rank"] = torch.where(better, seen.rank, state["rank"])


def nothing_kept(x: Tensor) -> State:
    """State entries of `keep_nearest` before the first look, for clean images [n,C,H,W]."""
    return {
        "nearest": x.clone(),
        "rank": torch.full((len(x),), float("-inf"), dtype=torch.float64, device=x.device),
    }


def as_nearest(state: State) -> State:
    """State of samples that leave: those that were not broken return the nearest image."""
    broken = per_sample(state["broken"], state["nearest"])
    return {**state, "adversarial": torch.where(broken, state["adversarial"], state["nearest"])}
