"""Images of guarded classifiers scored again with the verifier's own detector: clean, noisy and attacked ones."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from robbench.attacks import Victim
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.trust.context import full_precision, own_context
from robbench.bundle.consistency import bare_rows
from robbench.bundle.findings import Finding, judge
from robbench.bundle.images import CleanImages, stored_examples
from robbench.bundle.rescore import Scored, batch_sizes, count_text, other_numbers, other_verdicts
from robbench.cards import DetectorReference
from robbench.detectors.base import Detector
from robbench.metrics.verdicts import floats
from robbench.models.loading import LoadedModel
from robbench.run.detection import ROUNDING, DetectorScorer, noisy_images
from robbench.store.records import CellResult, Run

CHECK = "detection"
Mask = NDArray[np.bool_]


def bare_result(result: CellResult) -> CellResult:
    """The cell with the margins of the classifier alone."""
    return replace(result, rows=bare_rows(result))


@dataclass(frozen=True)
class DetectionCheck:
    """Checks the cells of one guarded classifier.

    Attributes:
        run: the bundle's.
        model, detector: the verifier's classifier and its guard.
        own: what the verifier's card says of the guard.
        source: clean images.
        device, batch_size: of scoring.
    """

    run: Run
    model: LoadedModel
    detector: Detector
    own: DetectorReference
    source: CleanImages
    device: torch.device
    batch_size: int

    def findings(self, results: Sequence[CellResult]) -> Iterator[Finding]:
        """One finding per cell."""
        modules = (self.model.module, *self.detector.children())
        with own_context(), attack_mode(*modules), full_precision():
            for result in results:
                yield self._finding(result)

    def _finding(self, result: CellResult) -> Finding:
        cell, rows = result.cell, result.rows
        known = rows[np.array(self.source.has([int(i) for i in rows["sample_id"]]), dtype=np.bool_)]
        stored = stored_examples(self.run, result, self.source)
        problems = []
        if cell.detector != self.own:
            problems.append("detector, threshold or noise in the cell are not those of the card here")
        if len(known):
            problems += self._clean_problems(known)
        if len(stored.rows):
            problems += self._scores_of(stored.rows, "score", stored.adversarial)
        count = len(known) + len(stored.rows)
        if not count and not problems:
            reason = "not re-scored: neither clean images nor examples are at hand"
            return Finding(cell.model, cell.attack.label, CHECK, "unchecked", 0, reason)
        finding = judge(cell.model, cell.attack.label, CHECK, count, problems)
        if finding.verdict != "agrees" or not self.source.weaker:
            return finding
        return replace(finding, verdict="weaker", reason="against the bundle's own clean images")

    def _clean_problems(self, rows: pd.DataFrame) -> list[str]:
        """Of clean images and the same with noise."""
        ids = [int(i) for i in rows["sample_id"]]
        images = self.source.of(ids)
        noisy = noisy_images(images, ids, self.run.seed, self.own.noise_std)
        found = self._scores_of(rows, "clean_score", images) + self._scores_of(rows, "noisy_score", noisy)
        labels = torch.tensor(rows["label"].to_numpy(), dtype=torch.int64)
        sizes = batch_sizes(len(ids), self.batch_size)
        victims = [Victim(self.model.module, self.device, size) for size in sizes]
        scored = Scored(labels, tuple(victim.score(noisy) for victim in victims))
        wrong, _ = other_verdicts(scored, rows, "noisy_prediction", "noisy_classifier_margin")
        far = other_numbers(scored, rows, "noisy_classifier_margin", scored.margins())
        return found + [
            count_text(rows, mask, what)
            for mask, what in ((wrong, "noisy verdicts"), (far & ~wrong, "noisy margins"))
            if mask.any()
        ]

    def _scores_of(self, rows: pd.DataFrame, column: str, images: Tensor) -> list[str]:
        scorer = DetectorScorer(self.detector, self.device, max(1, min(len(images), self.batch_size)))
        measured, _ = scorer.score(images, column.removesuffix("_score"))
        said = torch.from_numpy(floats(rows[column]).copy())
        far = ~scorer.alike(measured, said)
        near = (measured - self.own.threshold).abs() <= ROUNDING * measured.abs().clamp(min=1.0)
        flipped = ((measured > self.own.threshold) != (said > self.own.threshold)) & ~near
        wrong: Mask = np.asarray((far | flipped).numpy(), dtype=np.bool_)
        return [count_text(rows, wrong, f"values of {column}")] if wrong.any() else []
