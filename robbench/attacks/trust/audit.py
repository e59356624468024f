"""Checks after a search that the model which was attacked is the one that is scored.

`preflight` tests a model before the attack. It may still change its function after some calls, return other logits in a
search than in scoring, or be random only now and then. So a few forwards of the search are repeated, images that the
search found misclassified must not be scored as right, and all images are scored again in another order and other
batches.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from robbench.attacks.search.decision import margins
from robbench.attacks.trust.agreement import ROUNDING, largest_explained_gap, relative_gaps, spread_gaps
from robbench.attacks.trust.preflight import STANDARD_ERRORS, Passed
from robbench.attacks.victim import Victim
from robbench.core.errors import UserError
from robbench.models.state import ModelState

CHANGED = (
    "no accuracy of such a model means anything: make its logits a function of the image alone, without counters, "
    "caches or randomness (attack a randomised model with aa-rand)"
)


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
    """logits: [N,K], final ones of the attacked images. gap: largest relative gap between two scorings, 0 for rounding.
    flips: verdicts that differed between them."""

    logits: Tensor
    gap: float
    flips: int


class SearchAudit:
    """A uniform random sample of a search's forwards."""

    def __init__(self, kept: int = 2, images: int = 32) -> None:
        self._random, self._seen = random.Random(0), 0
        self._kept, self._images = kept, images
        self.forwards: list[tuple[Tensor, Tensor]] = []

    def note(self, images: Tensor, logits: Tensor) -> None:
        """Keep copies of some images [n,C,H,W] of a forward and of their logits [n,K], if this forward is drawn."""
        self._seen += 1
        place = self._random.randrange(self._seen)
        if place >= self._kept or not len(images):
            return
        rows = torch.linspace(0, len(images) - 1, min(self._images, len(images)), device=images.device).long()
        forward = images.detach()[rows].clone(), logits.detach()[rows].clone()
        if len(self.forwards) < self._kept:
            self.forwards.append(forward)
        else:
            self.forwards[place] = forward


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
    _check_forwards(victim, audit)
    clean_gap = _rescore(victim, found.clean, found.clean_logits, "clean")[1]
    again, gap = _rescore(victim, found.adversarial, found.logits, "attacked")
    _check_claims(found, again, max(passed.gap, clean_gap, gap))
    return _judge(found, again, max(clean_gap, gap))


def _rescore(victim: Victim, images: Tensor, before: Tensor, which: str) -> tuple[Tensor, float]:
    """Logits in reverse order and other batches, and their largest relative gap to `before`; `UserError` beyond what
    arithmetic explains."""
    size = max(1, (min(len(images), victim.batch_size) + 1) // 2)
    again = victim.score(images.flip(0), size).flip(0)
    gaps = relative_gaps(before, again)
    worst = float(gaps.max()) if len(gaps) else 0.0
    limit = largest_explained_gap(victim.module)
    if worst > limit:
        count = int((gaps > limit).sum())
        raise UserError(
            f"the model gives {count} of {len(images)} {which} images other logits at the end of an attack, in other "
            f"batches, than before: they differ by {100 * worst:.3g} % of their size; {CHANGED}"
        )
    return again, worst


def _check_forwards(victim: Victim, audit: SearchAudit) -> None:
    for images, logits in audit.forwards:
        size = max(1, len(images) // 2)
        gaps = relative_gaps(logits, victim.score(images.flip(0), size).flip(0))
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
    scale = (logits - logits.mean(1, keepdim=True)).abs().amax(1)
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
    far = relative_gaps(found.logits, again) > ROUNDING
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
