"""Cells of guarded classifiers as frames: nothing is read from disk and nothing computed."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from publish_runs import attack, cell, frame

from robbench.cards import DetectorReference
from robbench.specs import ResolvedAttack
from robbench.store.records import CellResult

THRESHOLD = 0.5
GUARD = DetectorReference(
    name="digits-standard-kde", sha256="e" * 64, function_hash="f" * 64, threshold=THRESHOLD, noise_std=0.1
)
ADAPTIVE = attack("adaptive-pgd", target="detector")


def guarded_rows(
    scores: tuple[Sequence[float], Sequence[float], Sequence[float]],
    right: tuple[Sequence[bool], Sequence[bool]],
) -> pd.DataFrame:
    """Rows with these scores of clean, noisy and attacked images, and these verdicts of the classifier on clean and
    attacked ones."""
    clean, noisy, attacked = (np.asarray(part, dtype=np.float64) for part in scores)
    before, after = (np.where(part, 1.0, -1.0).astype(np.float32) for part in right)
    rows = frame(len(clean), 1.0, 1.0, 1)
    labels = rows["label"].to_numpy()
    accepted = ~(clean > THRESHOLD)
    flagged = attacked > THRESHOLD
    own = (before > 0) & accepted
    robust = own & ((after > 0) | flagged)
    return rows.assign(
        clean_prediction=np.where(before > 0, labels, (labels + 1) % 10),
        prediction=np.where(after > 0, labels, (labels + 1) % 10),
        noisy_prediction=labels,
        clean_score=clean,
        noisy_score=noisy,
        score=attacked,
        clean_classifier_margin=before,
        noisy_classifier_margin=np.float32(1.0),
        classifier_margin=after,
        clean_margin=np.where(own, 0.2, -0.2).astype(np.float32),
        margin=np.where((after > 0) | flagged, 0.2, -0.2).astype(np.float32),
        robust=robust,
        broken_by=[None if r else ("pgd20" if o else "clean") for r, o in zip(robust, own, strict=True)],
        broken_at=np.where(robust, -1, np.where(own, 4, 0)),
    )


def guarded_cell(
    rows: pd.DataFrame,
    spec: ResolvedAttack | None = None,
    model: str = "digits-standard-kde",
    **changes: object,
) -> CellResult:
    return cell(model, spec or attack(), rows, detector=GUARD, **changes)


def random_cell(
    n: int, seed: int, spec: ResolvedAttack | None = None, model: str = "digits-standard-kde"
) -> CellResult:
    """A plausible cell: attacked images have higher scores, all scores are rounded, so that some are equal."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(999)
    scores = (
        shared.normal(-1, 1, n).round(1),
        shared.normal(-0.8, 1, n).round(1),
        rng.normal(0.7, 1, n).round(1),
    )
    return guarded_cell(guarded_rows(scores, (shared.random(n) < 0.9, rng.random(n) < 0.2)), spec, model)
