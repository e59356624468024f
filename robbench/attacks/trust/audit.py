"""Checks after a search that the model which was attacked is the one that is scored.

`preflight` tests a model before the attack. It may still change its function after some calls, return other logits in a
search than in scoring, or be random only now and then. So a few forwards of the search are repeated, images that the
search found misclassified must not be scored as right, and all images are scored again in another order and other
batches.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from robbench.attacks.search.decision import margins
from robbench.attacks.trust.agreement import (
    ROUNDING,
    largest_explained_gap,
    relative_gaps,
    sizes,
    spread_gaps,
)
from robbench.attacks.trust.preflight import ALONE, STANDARD_ERRORS, Passed
from robbench.attacks.trust.slopes import FollowedGradient
from robbench.attacks.trust.suspicions import Diagnostics
from robbench.attacks.victim import Victim
from robbench.core.errors import UserError
from robbench.models.state import ModelState

CHANGED = (
    "no accuracy of such a model means anything: make its logits a function of the image alone, without counters, "
    "caches or randomness (attack a randomised model with aa-rand)"
)


KEPT = 2  # forwards, and gradients, of a search
Kept = TypeVar("Kept")


@dataclass(frozen=True)
class Searched:
    """Result of an attack, N rows on the CPU.

    Attributes:
        clean: images [N,C,H,W] before the attack.
        adversarial: images [N,C,H,W] after it, as scored.
        labels: [N].
        clean_logits, logits: [N,K] of clean and adversarial images, from which the verdicts follow.
        claimed: [N] bool, a forward of the search misclassified this very image.
    """

    clean: Tensor
    adversarial: Tensor
    labels: Tensor
    clean_logits: Tensor
    logits: Tensor
    claimed: Tensor


@dataclass(frozen=True)
class Rescored:
    """Attacked logits [N,K] to judge by, the largest relative gap between two scorings (0 for rounding), how many
    verdicts differed between them, and what was seen of the search's gradients."""

    logits: Tensor
    gap: float
    flips: int
    slopes: Diagnostics = field(default_factory=Diagnostics)


class _Drawn(Generic[Kept]):
    """Two of the things that come by, drawn evenly from all of them."""

    def __init__(self) -> None:
        self._random, self._seen = random.Random(0), 0
        self.kept: list[Kept] = []

    def offer(self, make: Callable[[], Kept]) -> None:
        self._seen += 1
        place = self._random.randrange(self._seen)
        if len(self.kept) < KEPT:
            self.kept.append(make())
        elif place < KEPT:
            self.kept[place] = make()


class SearchAudit:
    """A few forwards of a search and a few gradients that it followed, drawn evenly, as long as it runs. images: how
    many went through the model."""

    def __init__(self) -> None:
        self.images = 0
        self._forwards: _Drawn[tuple[Tensor, Tensor]] = _Drawn()
        self._gradients: _Drawn[FollowedGradient] = _Drawn()

    @property
    def forwards(self) -> list[tuple[Tensor, Tensor]]:
        """Images [n,C,H,W] and their logits [n,K]."""
        return self._forwards.kept

    def note(self, images: Tensor, logits: Tensor) -> None:
        """Perhaps keep copies of images [n,C,H,W] of a forward, at most so many of them, of their logits [n,K], and of
        the gradient that comes back."""
        if not len(images):
            return
        self.images += len(images)
        rows = partial(_spread, images)
        self._forwards.offer(lambda: (images.detach()[rows(32)].clone(), logits.detach()[rows(32)].clone()))
        if images.requires_grad and logits.requires_grad:
            self._gradients.offer(lambda: FollowedGradient.of(images, logits, rows(16)))

    def slopes(self, victim: Victim) -> Diagnostics:
        """Of the gradients kept, held to finite differences."""
        return sum((one.compared(victim) for one in self._gradients.kept), Diagnostics())


def _spread(images: Tensor, most: int) -> Tensor:
    """Rows of images [n,...], at most so many, spread evenly."""
    return torch.linspace(0, len(images) - 1, min(most, len(images)), device=images.device).long()


def check_afterwards(
    victim: Victim, state: ModelState, passed: Passed, audit: SearchAudit, found: Searched
) -> Rescored:
    """Score again and compare; where two scorings of a sample differ by more than rounding, the worse one counts.

    `UserError` for a model that changed, or that returns other logits in a search than in scoring.
    """
    changed = state.change(victim.module)
    if changed is not None:
        raise UserError(f"the model changed while it was attacked: {changed}; {CHANGED}")
    if victim.draws > 1:
        _check_means(victim, passed)
        return Rescored(found.logits, 0.0, 0)
    _check_forwards(victim, audit, found.clean_logits)
    clean_gap = _rescore(victim, found, found.clean, found.clean_logits, "clean")[1]
    again, gap = _rescore(victim, found, found.adversarial, found.logits, "attacked")
    _check_claims(found, again, max(passed.gap, clean_gap, gap))
    return replace(_judge(found, again, max(clean_gap, gap)), slopes=audit.slopes(victim))


def _rescore(
    victim: Victim, found: Searched, images: Tensor, before: Tensor, which: str
) -> tuple[Tensor, float]:
    """Logits in reverse order and other batches, of a few images alone, and the largest relative gap to those
    `before`."""
    size = max(1, (min(len(images), victim.batch_size) + 1) // 2)
    again = victim.score(images.flip(0), size).flip(0)
    if which == "attacked" and size > 1:
        rows = _spread(images, ALONE)
        again[rows] = victim.score(images[rows], 1)
    gaps = relative_gaps(before, again, found.clean_logits)
    worst = float(gaps.max()) if len(gaps) else 0.0
    limit = largest_explained_gap(victim.module)
    if worst > limit:
        count = int((gaps > limit).sum())
        raise UserError(
            f"the model gives {count} of {len(images)} {which} images other logits at the end of an attack, in other "
            f"batches, than before: they differ by {100 * worst:.3g} % of their size; {CHANGED}"
        )
    return again, worst


def _check_forwards(victim: Victim, audit: SearchAudit, clean: Tensor) -> None:
    for images, logits in audit.forwards:
        size = max(1, len(images) // 2)
        gaps = relative_gaps(logits, victim.score(images.flip(0), size).flip(0), clean)
        worst = float(gaps.max()) if len(gaps) else 0.0
        if worst > largest_explained_gap(victim.module):
            raise UserError(
                f"the model answered the attack other than it answers now: logits of the same images differ by "
                f"{100 * worst:.3g} % of their size between a forward of the search and a later one; {CHANGED}"
            )


def _check_claims(found: Searched, again: Tensor, gap: float) -> None:
    """`UserError` where an image that the search found misclassified is scored as right, near ties aside."""
    lower = margins(found.logits, found.labels) < margins(again, found.labels)
    logits = torch.where(lower[:, None], found.logits, again)
    margin = margins(logits, found.labels)
    scale = torch.maximum(sizes(logits), sizes(found.clean_logits).median())
    refuted = found.claimed & (margin > 2 * max(ROUNDING, gap) * scale)
    if bool(refuted.any()):
        raise UserError(
            f"the model classifies {int(refuted.sum())} images correctly that it misclassified when the attack found "
            f"them: its logits for the same image change between calls; {CHANGED}"
        )


def _judge(found: Searched, again: Tensor, gap: float) -> Rescored:
    if gap <= ROUNDING:
        return Rescored(found.logits, 0.0, 0)
    first, second = margins(found.logits, found.labels), margins(again, found.labels)
    far = relative_gaps(found.logits, again, found.clean_logits) > ROUNDING
    worse = (far & (second < first))[:, None]
    flips = int(((first > 0) != (second > 0)).sum())
    return Rescored(torch.where(worse, again, found.logits), gap, flips)


def _check_means(victim: Victim, passed: Passed) -> None:
    """`UserError` where a randomised model's mean logits of the same images have changed by more than their spread."""
    if passed.draws is None:
        return
    later = victim.score_draws(passed.images.flip(0), max(1, len(passed.images) // 2)).flip(1)
    gaps = spread_gaps(passed.draws, later)
    worst = float(gaps.max()) if len(gaps) else 0.0
    if worst > STANDARD_ERRORS:
        raise UserError(
            f"the randomised model changed while it was attacked: means of its logits for the same images differ by "
            f"{worst:.3g} standard errors from those before; {CHANGED}"
        )
