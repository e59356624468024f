"""What a detector says of the images of an attack: the rows of a guarded classifier.

Neither the attack's word counts nor the detector's. Every set of images is scored twice, in order and reversed in other
batches, and flagged by the threshold of the card.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from robbench.attacks import Outcome, Victim
from robbench.attacks.search.decision import margins, predictions
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.trust.context import full_precision, own_context
from robbench.attacks.trust.diagnosis import PROBED, zero_gradients
from robbench.attacks.trust.model_call import out_of_memory
from robbench.attacks.trust.suspicions import Diagnostics
from robbench.attacks.victim import chunks
from robbench.core.errors import UserError
from robbench.core.random import SampleRandom
from robbench.detectors.base import Detector
from robbench.models.state import ModelState
from robbench.run.cells import DetectionCell

ROUNDING = 1e-3  # of a score between two batches, relative to scores above 1
LARGEST, SMALLEST = float(torch.finfo(torch.float32).max), float(torch.finfo(torch.float32).tiny)
NEXT = "correct the package that the detector comes from"


def noisy_images(images: Tensor, ids: Sequence[int], seed: int, noise_std: float) -> Tensor:
    """Images [N,C,H,W] with Gaussian noise keyed by their sample ids, clipped to [0,1]."""
    noise = SampleRandom(seed, "detection noise").normal(ids, images.shape[1:])
    return (images + noise_std * noise).clamp(0, 1)


def pair_margin(margin: Tensor, score: Tensor, threshold: float, attacked: bool) -> Tensor:
    """Margin float32 [N] of a classifier with this one and a detector with these scores float64 [N]: above 0 where an
    attacked image is right or flagged, and where a clean one is right and accepted. A score that is NaN, or the
    threshold itself, is accepted."""
    beyond = (score - threshold).nan_to_num(-LARGEST, LARGEST, -LARGEST)
    beyond = torch.where(score > threshold, beyond.clamp(min=SMALLEST), beyond.clamp(max=-SMALLEST))
    both = (margin.double(), beyond) if attacked else (margin.double(), -beyond)
    return (torch.maximum(*both) if attacked else torch.minimum(*both)).float()


@dataclass(frozen=True)
class DetectorScorer:
    """A detector on `device` that scores images in batches of `batch_size` and is believed where it repeats itself."""

    detector: Detector
    device: torch.device
    batch_size: int

    def score(self, images: Tensor, which: str) -> tuple[Tensor, Tensor]:
        """Scores float64 [N] of images [N,C,H,W], in order and reversed in other batches, on the CPU; `UserError` where
        they differ by more than rounding. which: of the images, for messages."""
        first = self._score(images, self.batch_size)
        again = self._score(images.flip(0), max(1, (min(len(images), self.batch_size) + 1) // 2)).flip(0)
        other = ~self.alike(first, again)
        if bool(other.any()):
            raise UserError(
                f"detector {self.detector.name!r} gives {int(other.sum())} of {len(images)} {which} images other "
                f"scores in another order and other batches; a score must depend on its image alone: {NEXT}"
            )
        return first, again

    @staticmethod
    def alike(first: Tensor, second: Tensor) -> Tensor:
        """Whether scores [N] are equal up to rounding, [N] bool; NaN equals NaN."""
        near = (first - second).abs() <= ROUNDING * first.abs().clamp(min=1.0)
        return near | (first == second) | (first.isnan() & second.isnan())

    def _score(self, images: Tensor, size: int) -> Tensor:
        with torch.no_grad():
            return torch.cat([self._call(part) for part in chunks(images, size)])

    def _call(self, images: Tensor) -> Tensor:
        given = images.to(self.device).clone()
        found = self.detector.scores(given)
        if not isinstance(found, Tensor) or found.shape != (len(images),) or found.dtype != torch.float64:
            got = f"{list(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"detector {self.detector.name!r} returned {got} for {len(images)} images, not [{len(images)}] "
                f"float64; {NEXT}"
            )
        if not torch.equal(given.cpu(), images.cpu()):
            raise UserError(
                f"detector {self.detector.name!r} writes into the images that it scores, so that nothing after it can "
                f"be believed; {NEXT}"
            )
        return found.cpu()

    def gradients(self, images: Tensor) -> Tensor | None:
        """Gradient of the scores at images [N,C,H,W]; None where the detector is not differentiable."""
        point = images.to(self.device).clone().requires_grad_(True)
        try:
            with torch.enable_grad():
                (found,) = torch.autograd.grad(self.detector.scores(point).sum(), point)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            return None
        return found.cpu()


@dataclass(frozen=True)
class Detected:
    """The outcome of an attack on a guarded classifier, and its columns besides, by name, [N] each."""

    outcome: Outcome
    columns: dict[str, list[object]]


def detect(
    cell: DetectionCell, before: ModelState, victim: Victim, outcome: Outcome, x: Tensor, seed: int
) -> Detected:
    """Judge the outcome of the cell's attack on the classifier, of clean images x [N,C,H,W], by the detector.

    before: state of the detector before the attack. When memory runs out, batches are halved as often as necessary.
    `UserError` for a detector that changes, contradicts itself or returns no scores.
    """
    asked = size = min(victim.batch_size, len(x))
    while True:
        try:
            with own_context(), attack_mode(*cell.detector.children()), full_precision():
                found = _detect(
                    cell, DetectorScorer(cell.detector, victim.device, size), victim, outcome, x, seed
                )
                break
        except (RuntimeError, MemoryError) as error:
            if size <= 1 or not out_of_memory(error):
                raise
        # Outside the handler: the exception would keep the failed attempt's tensors alive.
        size //= 2
        victim.use_batches_of(size)
    _require_unchanged(cell, before)
    if size < asked:
        found.outcome.diagnostics += Diagnostics(batch_asked=asked, batch_fits=size)
    return found


def _detect(
    cell: DetectionCell, scorer: DetectorScorer, victim: Victim, outcome: Outcome, x: Tensor, seed: int
) -> Detected:
    guard = cell.record.detector
    assert guard is not None
    noisy = noisy_images(x, outcome.sample_ids.tolist(), seed, guard.noise_std)
    # Of two scores that differ by rounding the worse one counts: a clean image flagged, an attacked one accepted.
    clean_score = torch.maximum(*scorer.score(x, "clean"))
    noisy_score = torch.maximum(*scorer.score(noisy, "noisy"))
    score = torch.minimum(*scorer.score(outcome.adversarial, "attacked"))
    logits = victim.score(noisy)
    columns = {
        "clean_score": clean_score,
        "noisy_score": noisy_score,
        "score": score,
        "noisy_prediction": predictions(logits),
        "clean_classifier_margin": outcome.clean_margins,
        "noisy_classifier_margin": margins(logits, outcome.labels),
        "classifier_margin": outcome.margins,
    }
    judged = _judge(
        outcome,
        pair_margin(outcome.clean_margins, clean_score, guard.threshold, attacked=False),
        pair_margin(outcome.margins, score, guard.threshold, attacked=True),
    )
    judged.diagnostics = outcome.diagnostics + _probe(scorer, x, outcome.adversarial)
    return Detected(judged, {name: values.tolist() for name, values in columns.items()})


def _judge(outcome: Outcome, clean: Tensor, attacked: Tensor) -> Outcome:
    """The outcome with the margins [N] of classifier and detector together."""
    beyond = outcome.robust & ~(outcome.margins > 0)  # of a minimal-norm attack, an image beyond its budget
    right = clean > 0
    robust = right & ((attacked > 0) | beyond)
    step = outcome.broken_at.masked_fill(robust, -1).masked_fill(~right, 0)
    broken_by = [
        None if stays else (name if ordinary else "clean")
        for stays, ordinary, name in zip(robust.tolist(), right.tolist(), outcome.broken_by, strict=True)
    ]
    return replace(
        outcome, clean_margins=clean, margins=attacked, robust=robust, broken_by=broken_by, broken_at=step
    )


def _probe(scorer: DetectorScorer, clean: Tensor, attacked: Tensor) -> Diagnostics:
    """How many of a few clean and attacked images have no gradient of the score."""
    few = min(PROBED // 2, max(1, scorer.batch_size // 2))
    images = torch.cat([clean[:few], attacked[:few]])
    gradients = scorer.gradients(images)
    missing = len(images) if gradients is None else int(zero_gradients(gradients).sum())
    return Diagnostics(score_probed=len(images), zero_score_gradients=missing)


def _require_unchanged(cell: DetectionCell, before: ModelState) -> None:
    guard, detector = cell.record.detector, cell.detector
    changed = before.change(detector)
    if guard is not None and detector.threshold != guard.threshold:
        changed = f"its threshold is {detector.threshold:g}, its card says {guard.threshold:g}"
    if changed is not None:
        raise UserError(
            f"detector {detector.name!r} changed while it was attacked or scored: {changed}; {NEXT}, or leave the "
            f"attack out"
        )
