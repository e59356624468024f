"""What a reader must know besides the verdicts: probabilities for logits, signs of masked gradients, halved batches.

Nothing here changes a verdict. The signs are those of Athalye et al. (2018, section 3.1) and of the checks in the
reference AutoAttack (Croce & Hein 2020), as counts: `Diagnostics` of shards add up, and are judged once, over the cell.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from robbench.attacks.decision import margins
from robbench.metrics.accuracy import wilson
from robbench.schema import Strict
from robbench.specs import ResolvedAttack

Kind = Literal[
    "probabilities",
    "zero-gradients",
    "flat-loss",
    "square-only",
    "chance",
    "not-finite",
    "ties",
    "batch-gap",
    "batch",
]
SUM_TOLERANCE = 1e-4  # how far from 1 the sum of a row of probabilities may be
SQUARE_SHARE = (
    0.002  # of all samples; more that only Square breaks are suspicious (the reference's threshold)
)
LEAST_FOR_CHANCE = 20  # samples, below which an interval excludes hardly anything
PROBED = 64  # samples of a call whose gradient at the clean image is looked at
ASCENDING = frozenset({"pgd", "latent-pgd", "jsa"})  # algorithms that climb the cross-entropy


class RobbenchWarning(UserWarning):
    """A number was measured and something about it is suspicious; the text says what, and the next step."""


@dataclass(frozen=True)
class Suspicion:
    """One finding. numbers: by name, what the text is made of. text: one line that ends in the next step."""

    kind: Kind
    numbers: dict[str, float]
    text: str


class Diagnostics(Strict):
    """Counts of one call of an attack, or with `+` of several on other samples of the same model.

    samples: scored clean. probability_rows: those whose output is non-negative and sums to 1. probed, zero_gradients:
    clean images whose input gradient of the cross-entropy was looked at, and those where it is exactly 0 or not
    finite. square_given, square_broke: samples that no gradient component of an ensemble broke, and those of them that
    Square broke. held, loss_before, loss_after: samples that stayed robust under an attack that climbs the
    cross-entropy, and the sums of it. batch_asked, batch_fits: batch sizes before and after halving, 0 for not halved.
    clean_right: samples right before the attack; classes: of the model, 0 where unknown. clean_ties, attacked_ties:
    images whose label's logit equals the largest other one, before the attack and after it. not_finite: attacked images
    with a logit that is NaN or infinite. batch_gap: largest relative difference of an image's logits between two
    batches, beyond rounding; batch_flips: verdicts that it changed.
    """

    samples: int = 0
    probability_rows: int = 0
    probed: int = 0
    zero_gradients: int = 0
    square_given: int = 0
    square_broke: int = 0
    held: int = 0
    loss_before: float = 0.0
    loss_after: float = 0.0
    batch_asked: int = 0
    batch_fits: int = 0
    clean_right: int = 0
    classes: int = 0
    clean_ties: int = 0
    attacked_ties: int = 0
    not_finite: int = 0
    batch_gap: float = 0.0
    batch_flips: int = 0

    def __add__(self, other: "Diagnostics") -> "Diagnostics":
        fits = [size for size in (self.batch_fits, other.batch_fits) if size]
        sums = {name: getattr(self, name) + getattr(other, name) for name in type(self).model_fields}
        batch = {
            "batch_asked": max(self.batch_asked, other.batch_asked),
            "batch_fits": min(fits, default=0),
            "batch_gap": max(self.batch_gap, other.batch_gap),
            "classes": max(self.classes, other.classes),
        }
        return Diagnostics(**sums | batch)

    @property
    def suspicions(self) -> tuple[Suspicion, ...]:
        """What the counts give away, most serious first."""
        found = (
            self._chance(),
            self._not_finite(),
            self._batch_gap(),
            self._probabilities(),
            self._square_only(),
            self._zero_gradients(),
            self._flat_loss(),
            self._ties(),
        )
        return tuple(one for one in (*found, self._batch()) if one is not None)

    def _chance(self) -> Suspicion | None:
        if not self.samples or not self.classes:
            return None
        clean, chance = wilson(self.clean_right, self.samples), 100 / self.classes
        if clean.lower > chance or self.samples < LEAST_FOR_CHANCE:
            return None
        return Suspicion(
            "chance",
            {"right": self.clean_right, "samples": self.samples, "chance": chance / 100},
            f"clean accuracy is {clean.value:.1f} % of {self.samples} [{clean.lower:.1f}, {clean.upper:.1f}], not "
            f"above the {chance:.3g} % of chance for {self.classes} classes: no number of this model says anything; "
            f"check its weights, the order of its classes, and that its normalisation is inside the model",
        )

    def _not_finite(self) -> Suspicion | None:
        if not self.not_finite:
            return None
        return Suspicion(
            "not-finite",
            {"images": self.not_finite, "samples": self.samples},
            f"the model returned NaN or infinite logits for {self.not_finite} of {self.samples} attacked images: they "
            f"count as broken; find the operation that overflows or divides by zero",
        )

    def _batch_gap(self) -> Suspicion | None:
        if not self.batch_gap:
            return None
        return Suspicion(
            "batch-gap",
            {"gap": self.batch_gap, "flips": self.batch_flips},
            f"logits of an image differ by up to {100 * self.batch_gap:.2g} % of their size between two batches, and "
            f"{_counted(self.batch_flips)} had another verdict in the second: the worse one counts; layers quantised "
            f"by the range of the whole batch, or low precision inside the model, do this",
        )

    def _ties(self) -> Suspicion | None:
        if not self.clean_ties and not self.attacked_ties:
            return None
        return Suspicion(
            "ties",
            {"clean": self.clean_ties, "attacked": self.attacked_ties, "samples": self.samples},
            f"tied logits: the label's logit equals the largest other one for {self.clean_ties} of {self.samples} "
            f"clean and {self.attacked_ties} attacked images; a tie counts as wrong, before and after an attack; "
            f"return logits before they are rounded, clipped or squashed",
        )

    def _probabilities(self) -> Suspicion | None:
        if not self.samples or self.probability_rows < self.samples:
            return None
        return Suspicion(
            "probabilities",
            {"samples": self.samples},
            f"the model returns probabilities, not logits (all {self.samples} clean outputs are non-negative and "
            f"sum to 1): their cross-entropy has weak gradients, and gradient attacks may look weaker than they are; "
            f"return logits, not probabilities (leave out the last softmax)",
        )

    def _square_only(self) -> Suspicion | None:
        if self.square_broke <= SQUARE_SHARE * self.samples:
            return None
        share = self.square_broke / self.samples
        return Suspicion(
            "square-only",
            {"broken": self.square_broke, "given": self.square_given, "share": share},
            f"Square broke {self.square_broke} of the {self.square_given} samples that no gradient component broke "
            f"({100 * share:.1f} % of {self.samples}): gradients may be masked and the accuracy too high; raise "
            f"square_queries, or attack with gradients of a smooth stand-in for the part that masks them",
        )

    def _zero_gradients(self) -> Suspicion | None:
        if not self.zero_gradients:
            return None
        share = self.zero_gradients / self.probed
        return Suspicion(
            "zero-gradients",
            {"zero": self.zero_gradients, "probed": self.probed, "share": share},
            f"the input gradient of the cross-entropy is zero or not finite at {self.zero_gradients} of {self.probed} "
            f"clean images ({100 * share:.1f} %): gradients may be masked; compare with square, which needs none",
        )

    def _flat_loss(self) -> Suspicion | None:
        if not self.held or self.loss_after > self.loss_before:
            return None
        before, after = self.loss_before / self.held, self.loss_after / self.held
        return Suspicion(
            "flat-loss",
            {"held": self.held, "before": before, "after": after},
            f"the attack did not raise the loss: mean cross-entropy {before:.4g} before and {after:.4g} after it over "
            f"the {_counted(self.held)} that stayed robust; gradients may be masked: compare with square and aa",
        )

    def _batch(self) -> Suspicion | None:
        if not self.batch_fits:
            return None
        return Suspicion(
            "batch",
            {"asked": self.batch_asked, "fits": self.batch_fits},
            f"batches of {self.batch_asked} do not fit into memory and were halved to {self.batch_fits}; "
            f"give batch size {self.batch_fits} from the start to save the failed attempts",
        )


def _counted(samples: int) -> str:
    return f"{samples} sample" + ("" if samples == 1 else "s")


def diagnose(
    spec: ResolvedAttack,
    labels: Tensor,
    clean: Tensor,
    attacked: Tensor,
    robust: Tensor,
    broken_by: Sequence[str | None],
    searched: Tensor,
) -> Diagnostics:
    """Counts of an attack's outcome, without gradients and batches. labels: [N]; clean, attacked: logits [N,K] of clean
    and attacked images; robust, searched: [N] bool, right after the attack, and handed to the search; broken_by: as in
    the ledger."""
    before, after = margins(clean, labels), margins(attacked, labels)
    held = robust & searched if climbs_cross_entropy(spec) else torch.zeros_like(robust)
    by_square = sum(name == "square" for name in broken_by) if square_follows_gradients(spec) else 0
    return Diagnostics(
        samples=len(labels),
        probability_rows=int(probability_rows(clean).sum()),
        square_given=by_square + int((robust & searched).sum()) if square_follows_gradients(spec) else 0,
        square_broke=by_square,
        held=int(held.sum()),
        loss_before=float(cross_entropy(clean[held], labels[held]).sum()),
        loss_after=float(cross_entropy(attacked[held], labels[held]).sum()),
        clean_right=int((before > 0).sum()),
        classes=clean.shape[1],
        clean_ties=int((before == 0).sum()),
        attacked_ties=int((after == 0).sum()),
        not_finite=int((~attacked.isfinite().all(1)).sum()),
    )


def climbs_cross_entropy(spec: ResolvedAttack) -> bool:
    """Whether who stays robust is handed back as an iterate of ascent on the cross-entropy. Ensembles hand back what
    their last component did, which climbs another loss unless it is APGD-CE."""
    return spec.algorithm in ASCENDING or list(spec.parameters.get("components") or ()) == ["apgd-ce"]


def square_follows_gradients(spec: ResolvedAttack) -> bool:
    """Whether Square is the last of several components: what it breaks, no gradient component broke."""
    components = list(spec.parameters.get("components") or ())
    return len(components) > 1 and components[-1] == "square"


def probability_rows(outputs: Tensor) -> Tensor:
    """True [N] for rows of outputs [N,K] that are non-negative and sum to 1 within `SUM_TOLERANCE`.

    Log-probabilities are logits like any other and not meant here.
    """
    return (outputs >= 0).all(1) & ((outputs.double().sum(1) - 1).abs() <= SUM_TOLERANCE)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [N] in float64 of logits [N,K], exact also where the label's share rounds to 1: a loss of 1e-20 and
    one of 1e-30 differ, where log_softmax gives 0 for both."""
    logits = logits.double()
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf")).logsumexp(1)
    lead = others - own
    return torch.logaddexp(torch.zeros_like(lead), lead)


def zero_gradients(gradients: Tensor) -> Tensor:
    """True [N] where the gradient [N,...] of a sample is exactly 0 or has an entry that is not finite."""
    rows = gradients.flatten(1)
    return (rows == 0).all(1) | ~rows.isfinite().all(1)
