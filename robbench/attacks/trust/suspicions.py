"""Reasons to doubt a number: squashed outputs, signs of masked gradients, halved batches.

Nothing here changes a verdict. The signs are those of Athalye et al. (2018, section 3.1) and of the checks in the
reference AutoAttack (Croce & Hein 2020), as counts: `Diagnostics` of shards are added and judged over the whole cell.
"""

import math
from dataclasses import dataclass
from typing import Literal

from robbench.core.schema import Strict
from robbench.statistics.accuracy import wilson

Kind = Literal[
    "probabilities",
    "squashed",
    "square-only",
    "weak-cross-entropy",
    "zero-gradients",
    "zero-score-gradients",
    "zero-steps",
    "wrong-gradients",
    "flat-loss",
    "not-found",
    "chance",
    "not-finite",
    "ties",
    "batch-gap",
    "misplaced",
    "batch",
]
# What chance may bring: of the samples that only Square breaks (the reference's threshold), and of gradients that are
# exactly 0. A sign shows once the exact interval of the share lies above it.
CHANCE_SHARE = 0.002
LEAST_FOR_CHANCE = 20  # samples; with fewer an interval excludes hardly anything
CONFIDENCE = 0.95  # of the intervals that must exclude chance
LEAST_ROWS = 10  # outputs; the range of fewer is not informative
SAME_FLOOR = 0.01  # standard deviation of the rows' smallest outputs, as a share of the rows' mean range
WRONG_SLOPES = 0.1  # of the slopes measured; kinks of a network make less
NOT_FOUND = 0.1  # share of the samples for which a search of the whole box may find nothing
WEAK_SHARE = 0.2  # of the samples that APGD-CE left; more that APGD-T breaks are suspicious
WEAK_OF_ALL = 0.1  # and more than this share of all samples


class RobbenchWarning(UserWarning):
    """A number was measured and is suspicious; the text gives the reason and the next step."""


@dataclass(frozen=True)
class Suspicion:
    """One finding. numbers: those in the text, by name. text: one line that ends with the next step."""

    kind: Kind
    numbers: dict[str, float]
    text: str


class Diagnostics(Strict):
    """Counts of one call of an attack, or with `+` of several on other samples of the same model.

    Attributes:
        samples: all of the call.
        probability_rows: samples whose clean output is non-negative and sums to 1.
        shaped: samples whose range of outputs was recorded.
        unit_rows, signed_rows: of these, the ones with outputs in [0,1] and in [-1,1].
        unit_reached, signed_reached: of those, the ones with an output of size at least 0.5 and 0.75.
        floor_sum, floor_squares, range_sum: sums over samples of the smallest output, of its square, and of the
            largest minus the smallest.
        probed, zero_gradients: clean images whose input gradient of the cross-entropy was inspected, and those where
            it is exactly 0 or not finite.
        score_probed, zero_score_gradients: clean and attacked images whose input gradient of a detector's score was
            inspected, and those where it is exactly 0, not finite, or absent.
        gradients, zero_steps: gradients that searches followed, and those without an entry that is finite and not 0.
        slopes, wrong_slopes: slopes of the logits measured at images of a search, and those that the gradient which
            it followed contradicts.
        weak_given, weak_broke: samples that APGD-CE left to APGD-T, and of them those that APGD-T broke.
        square_given, square_broke: samples that no gradient component of an ensemble broke, and of them those that
            Square broke.
        held, loss_before, loss_after: robust samples under an attack that raises the cross-entropy, and the sums of
            their cross-entropy before and after it.
        batch_asked, batch_fits: batch sizes before and after halving, 0 for not halved.
        clean_right, classes: samples right before the attack; classes of the model, 0 where unknown.
        clean_ties, attacked_ties: clean and attacked images whose label's logit equals the largest other one.
        not_finite: attacked images whose logits are not finite.
        batch_gap, batch_flips: largest relative gap of logits between two batches, 0 for rounding; samples whose
            verdict differed between two scorings.
        unbounded, not_found: samples searched without a budget, and those for which no adversarial image was found.
        decoded, misplaced: images decoded from perturbed latents, and those that, encoded, are far from these latents.
    """

    samples: int = 0
    probability_rows: int = 0
    shaped: int = 0
    unit_rows: int = 0
    unit_reached: int = 0
    signed_rows: int = 0
    signed_reached: int = 0
    floor_sum: float = 0.0
    floor_squares: float = 0.0
    range_sum: float = 0.0
    probed: int = 0
    zero_gradients: int = 0
    score_probed: int = 0
    zero_score_gradients: int = 0
    gradients: int = 0
    zero_steps: int = 0
    slopes: int = 0
    wrong_slopes: int = 0
    weak_given: int = 0
    weak_broke: int = 0
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
    unbounded: int = 0
    not_found: int = 0
    decoded: int = 0
    misplaced: int = 0

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
        """Findings from the counts, most serious first."""
        found = (
            self._chance(),
            self._not_finite(),
            self._batch_gap(),
            self._misplaced(),
            self._probabilities() or self._squashed(),
            self._square_only(),
            self._weak_cross_entropy(),
            self._zero_gradients(),
            self._zero_score_gradients(),
            self._zero_steps(),
            self._wrong_gradients(),
            self._flat_loss(),
            self._not_found(),
            self._ties(),
            self._batch(),
        )
        return tuple(one for one in found if one is not None)

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
            f"{_samples(self.batch_flips)} had another verdict in the second: the worse one counts; layers quantised "
            f"by the range of the whole batch, or low precision inside the model, do this",
        )

    def _misplaced(self) -> Suspicion | None:
        if not self.misplaced:
            return None
        return Suspicion(
            "misplaced",
            {"misplaced": self.misplaced, "decoded": self.decoded},
            f"{self.misplaced} of {self.decoded} images that the flow decoded are not images of the latents that the "
            f"attack chose: encoding gives others, off by more than a tenth of the perturbation; the flow does not "
            f"invert itself there or its decoder explodes: give a smaller budget, or another flow",
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

    def _squashed(self) -> Suspicion | None:
        """Outputs with a bound that logits do not have."""
        n = self.shaped  # counts of an older version have none
        if n < LEAST_ROWS:
            return None
        floor = self.floor_sum / n
        deviation = math.sqrt(max(self.floor_squares / n - floor * floor, 0.0))
        if self.unit_rows == n and 2 * self.unit_reached >= n:
            seen = "lie in [0,1], as those of a sigmoid or a clipped softmax do"
        elif self.signed_rows == n and 2 * self.signed_reached >= n:
            seen = "lie in [-1,1], as those of tanh or a clip do"
        elif deviation <= SAME_FLOOR * self.range_sum / n:
            seen = f"have the same smallest value ({floor:.4g}), as those of a clip, a ReLU or a scaled sigmoid do"
        else:
            return None
        return Suspicion(
            "squashed",
            {"samples": n, "floor": floor, "deviation": deviation, "range": self.range_sum / n},
            f"the model's outputs look squashed, not like logits (all {n} clean outputs {seen}): gradients vanish "
            f"where they saturate, and attacks on the cross-entropy (fgsm, pgd, mim, apgd-ce, latent and joint ones) "
            f"may look weaker than they are; return the values before the squashing, or trust aa (aa-l2, aa-l1), "
            f"whose apgd-t, fab-t and square follow the differences of the outputs",
        )

    def _square_only(self) -> Suspicion | None:
        low, high = exact_interval(self.square_broke, self.samples)
        if self.square_broke < 2 or low <= CHANCE_SHARE:
            return None
        share = self.square_broke / self.samples
        return Suspicion(
            "square-only",
            {
                "broken": self.square_broke,
                "given": self.square_given,
                "share": share,
                "low": low,
                "high": high,
            },
            f"Square broke {self.square_broke} of the {self.square_given} samples that no gradient component broke "
            f"({100 * share:.1f} % of {self.samples}, {_interval(low, high)}): gradients may be masked and the "
            f"accuracy too high; attack again with square_queries: 20000 in a file of --threat-models DIR, or with "
            f"gradients of a smooth stand-in for the part that masks them",
        )

    def _weak_cross_entropy(self) -> Suspicion | None:
        of_left, _ = exact_interval(self.weak_broke, self.weak_given)
        of_all, _ = exact_interval(self.weak_broke, self.samples)
        if of_left <= WEAK_SHARE or of_all <= WEAK_OF_ALL:
            return None
        share = self.weak_broke / self.weak_given
        return Suspicion(
            "weak-cross-entropy",
            {"broken": self.weak_broke, "given": self.weak_given, "share": share},
            f"APGD-T broke {self.weak_broke} of the {self.weak_given} samples that APGD-CE left ({100 * share:.1f} %): "
            f"the cross-entropy of this model is a poor guide, as with squashed outputs; trust this ensemble and "
            f"apgd-t, not pgd20, mim and apgd-ce",
        )

    def _zero_gradients(self) -> Suspicion | None:
        low, high = exact_interval(self.zero_gradients, self.probed)
        if low <= CHANCE_SHARE:
            return None
        share = self.zero_gradients / self.probed
        return Suspicion(
            "zero-gradients",
            {"zero": self.zero_gradients, "probed": self.probed, "share": share},
            f"the input gradient of the cross-entropy is zero or not finite at {self.zero_gradients} of {self.probed} "
            f"clean images ({100 * share:.1f} %, {_interval(low, high)}): gradients may be masked; compare with "
            f"square, which needs none",
        )

    def _zero_score_gradients(self) -> Suspicion | None:
        low, _ = exact_interval(self.zero_score_gradients, self.score_probed)
        if low <= CHANCE_SHARE:
            return None
        return Suspicion(
            "zero-score-gradients",
            {"zero": self.zero_score_gradients, "probed": self.score_probed},
            f"{self.zero_score_gradients} of {self.score_probed} images have no gradient of the detector's score; "
            f"adaptive attacks that follow it may fail",
        )

    def _zero_steps(self) -> Suspicion | None:
        if not self.zero_steps:
            return None
        share = self.zero_steps / self.gradients
        draws = min(self.samples, self.gradients)  # the gradients of one sample are zero together
        low, high = exact_interval(share * draws, draws)
        if low <= CHANCE_SHARE:
            return None
        return Suspicion(
            "zero-steps",
            {"zero": self.zero_steps, "gradients": self.gradients, "share": share},
            f"{self.zero_steps} of the {self.gradients} gradients that the search followed ({100 * share:.2g} %, "
            f"{_interval(low, high)}) were zero or not finite, and moved nothing: gradients may be masked and the "
            f"accuracy too high; compare with square (square-l2, square-l1), which needs none",
        )

    def _wrong_gradients(self) -> Suspicion | None:
        low, _ = exact_interval(self.wrong_slopes, self.slopes)
        if low <= WRONG_SLOPES:
            return None
        share = self.wrong_slopes / self.slopes
        return Suspicion(
            "wrong-gradients",
            {"wrong": self.wrong_slopes, "slopes": self.slopes, "share": share},
            f"the gradients that the search followed are not the slopes of the logits: {self.wrong_slopes} of "
            f"{self.slopes} finite differences contradict them ({100 * share:.1f} %), as with a wrong backward pass, a "
            f"detach, or a straight-through estimate; the accuracy may be too high: compare with square (square-l2, "
            f"square-l1), which needs none",
        )

    def _flat_loss(self) -> Suspicion | None:
        if not self.held or self.loss_after > self.loss_before:
            return None
        before, after = self.loss_before / self.held, self.loss_after / self.held
        return Suspicion(
            "flat-loss",
            {"held": self.held, "before": before, "after": after},
            f"the attack did not raise the loss: mean cross-entropy {before:.4g} before and {after:.4g} after it over "
            f"the {_samples(self.held)} that stayed robust; gradients may be masked: compare with square and aa",
        )

    def _not_found(self) -> Suspicion | None:
        low, _ = exact_interval(self.not_found, self.unbounded)
        if low <= NOT_FOUND:
            return None
        share = self.not_found / self.unbounded
        return Suspicion(
            "not-found",
            {"not_found": self.not_found, "unbounded": self.unbounded, "share": share},
            f"the search, which no budget bounds, found no adversarial image for {self.not_found} of "
            f"{self.unbounded} samples ({100 * share:.1f} %): that is a failure of the search, not robustness; give it "
            f"more steps, or compare with fmn-l2, aa and square",
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


def exact_interval(successes: float, n: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Bounds in [0,1] of the exact interval of a share, (0, 1) for n = 0 (Clopper and Pearson, Biometrika 26, 1934).
    successes: also a mean over several trials of each of the n."""
    from scipy.special import betaincinv  # takes half a second to import

    tail = (1.0 - confidence) / 2
    low = float(betaincinv(successes, n - successes + 1, tail)) if successes else 0.0
    high = float(betaincinv(successes + 1, n - successes, 1.0 - tail)) if successes < n else 1.0
    return low, high


def _interval(low: float, high: float) -> str:
    chance = f"up to {100 * CHANCE_SHARE:g} % may be chance"
    return f"95 % interval {100 * low:.1f} to {100 * high:.1f} %; {chance}"


def _samples(count: int) -> str:
    """ "1 sample", "2000 samples": without separators, since bundles are verified by the exact text."""
    return f"{count} sample" + ("" if count == 1 else "s")
