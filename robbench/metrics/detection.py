"""What a detector does: whom it accepts, whom it flags, and what is left of an attack.

The share of natural and noisy images that are accepted (ACC-NADV) and the share of attacked images that are flagged or
still right (ACC-COM) are told together: a detector that flags everything has an ACC-COM of 100. The robust accuracy of
a guarded classifier, in every table, is that with rejection: the clean image is right and accepted, the attacked one
right or flagged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from robbench.metrics.registry import Metric, Number, register
from robbench.metrics.verdicts import Floats, floats, is_beyond_budget
from robbench.statistics.accuracy import Verdicts, accuracy, wilson
from robbench.statistics.roc import Scored, separation
from robbench.store.records import CellResult


@dataclass(frozen=True)
class Detection:
    """The rows of a cell of a guarded classifier.

    Attributes:
        right, noisy_right, attacked_right: whether the classifier is right, bool [n].
        accepted, noisy_accepted, attacked_accepted: whether the detector accepts the image, bool [n].
        fooled: right on the clean image and wrong on the attacked one, bool [n].
    """

    right: Verdicts
    noisy_right: Verdicts
    attacked_right: Verdicts
    accepted: Verdicts
    noisy_accepted: Verdicts
    attacked_accepted: Verdicts

    @property
    def fooled(self) -> Verdicts:
        found: Verdicts = self.right & ~self.attacked_right
        return found


def read_detection(result: CellResult) -> Detection:
    """Who is right and who is accepted, from the scores and the threshold of the cell."""
    guard, rows = result.cell.detector, result.rows
    assert guard is not None
    right = [floats(rows[f"{part}classifier_margin"]) > 0 for part in ("clean_", "noisy_", "")]
    accepted = [~(floats(rows[f"{part}score"]) > guard.threshold) for part in ("clean_", "noisy_", "")]
    return Detection(*right, *accepted)


def scored(result: CellResult) -> Scored:
    """Natural and noisy images against the attacked ones that fool the classifier."""
    rows, fooled = result.rows, read_detection(result).fooled
    everyone = np.arange(len(rows))
    parts: list[tuple[Floats, bool]] = [
        (floats(rows["clean_score"]), False),
        (floats(rows["noisy_score"]), False),
        (floats(rows["score"])[fooled], True),
    ]
    return Scored(
        np.concatenate([part for part, _ in parts]),
        np.concatenate([np.full(len(part), attacked) for part, attacked in parts]),
        np.concatenate([everyone, everyone, everyone[fooled]]),
    )


def _accepted_naturals(result: CellResult) -> Number:
    """Both versions of an image count as one draw in the interval, which is too wide rather than too narrow."""
    found = read_detection(result)
    share = (found.accepted.sum() + found.noisy_accepted.sum()) / 2
    estimate = wilson(float(share), len(found.accepted))
    scope = f"over {len(found.accepted)} natural images and the same with noise"
    return Number(estimate.value, estimate.lower, estimate.upper, scope=scope)


def _flagged_or_right(result: CellResult) -> Number:
    found = read_detection(result)
    return _share(~found.attacked_accepted | found.attacked_right, "attacked images")


def _share(verdicts: Verdicts, of: str) -> Number:
    estimate = accuracy(verdicts)
    return Number(estimate.value, estimate.lower, estimate.upper, scope=f"over {len(verdicts)} {of}")


def _right_if_accepted(attacked: bool) -> Callable[[CellResult], Number | None]:
    def compute(result: CellResult) -> Number | None:
        found = read_detection(result)
        right, accepted = (
            (found.attacked_right, found.attacked_accepted) if attacked else (found.right, found.accepted)
        )
        of = f"{'attacked' if attacked else 'clean'} images that are accepted"
        return _share(right[accepted], of) if accepted.any() else None

    return compute


def _bare(result: CellResult) -> Number:
    """The accuracy that tables would show without the detector."""
    found = read_detection(result)
    if result.cell.attack.semantics == "perturbation":
        return _share(found.attacked_right, "images")
    return _share(found.right & (found.attacked_right | is_beyond_budget(result)), "images")


def _separates(name: str) -> Callable[[CellResult], Number | None]:
    def compute(result: CellResult) -> Number | None:
        images = scored(result)
        found = separation(images, result.cell.seed)
        if found is None:
            return None
        estimate, positives = getattr(found, name), int(images.attacked.sum())
        scope = (
            f"{positives} attacked images that fool the classifier against {len(images.scores) - positives} natural "
            f"and noisy ones"
        )
        return Number(estimate.value, estimate.lower, estimate.upper, scope=scope)

    return compute


_metric = partial(
    Metric, unit="%", absolute=0.5, relative=0.0, decimals=1, place=50, targets=("detector",)
)  # fmt: skip
ACC_NADV = _metric(
    "acc_nadv", "natural and noisy images accepted (ACC-NADV)", better="higher", attacked=False, column="ACC-NADV",
    compute=_accepted_naturals,
)  # fmt: skip
ACC_COM = _metric(
    "acc_com", "attacked images flagged or right (ACC-COM)", better="higher", column="ACC-COM",
    compute=_flagged_or_right,
)  # fmt: skip
CLEAN_IF_ACCEPTED = _metric(
    "accepted_accuracy_clean", "accuracy among accepted clean images", better="higher", attacked=False,
    column="clean, accepted", compute=_right_if_accepted(attacked=False),
)  # fmt: skip
ATTACKED_IF_ACCEPTED = _metric(
    "accepted_accuracy_attacked", "accuracy among accepted attacked images", better="higher",
    column="attacked, accepted", compute=_right_if_accepted(attacked=True),
)  # fmt: skip
BARE_ACCURACY = _metric(
    "bare_accuracy", "accuracy of the classifier without its detector, on the same images", better="higher",
    column="without detector", compute=_bare,
)  # fmt: skip
AUROC, AUPR, TPR = (
    _metric(name, title, better="higher", column=column, compute=_separates(field))
    for name, title, column, field in (
        ("auroc", "area under the ROC curve", "AUROC", "auroc"),
        ("aupr", "average precision", "AUPR", "aupr"),
        ("tpr_at_fpr5", "true positive rate at 5 % false positives", "TPR at 5 % FPR", "tpr"),
    )
)
DETECTION_METRICS = (
    ACC_NADV, ACC_COM, BARE_ACCURACY, CLEAN_IF_ACCEPTED, ATTACKED_IF_ACCEPTED, AUROC, AUPR, TPR,
)  # fmt: skip
register(*DETECTION_METRICS)
