"""`robbench train --detector`: from a request to a finished zoo folder.

Clean training images say what is ordinary. Half of the validation images are attacked and fit the score; the threshold
is fixed on the other half, clean.
"""

import time
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save

from robbench.attacks import Victim
from robbench.attacks.search.task import Samples
from robbench.cards import ClassifierReference, DetectorCard, Weights
from robbench.core.device import versions
from robbench.core.foreign import foreign_code
from robbench.core.resources import sha256_file, write_atomically, write_text_atomically
from robbench.core.schema import dump_yaml
from robbench.defenses.plan import check_places, training_lock
from robbench.detectors.attacked import Triples, attack_samples, evidence_of_triples
from robbench.detectors.base import Reference
from robbench.detectors.plan import DetectorPlan, DetectorRequest, make_detector_plan

__all__ = ["DetectorRequest", "train_detector"]
BATCH = 256
STEP = "name another --layer, or correct the package that the detector comes from"
Tell = Callable[[str], None]


def train_detector(request: DetectorRequest, tell: Tell = lambda text: None) -> Path:
    """Train and write the folder OUT/NAME; returns it. tell: called with a line for every step.

    `UserError` for errors of the user, and while another process writes OUT/NAME.
    """
    started, plan = time.perf_counter(), make_detector_plan(request)
    with training_lock(plan.folder):
        check_places(request.out, plan.name)
        _learn(plan)
        tell(f"{len(plan.images.reference)} clean training images say what is ordinary")
        found = [_attack(plan, number, tell) for number in range(len(plan.attacks))]
        measured = _fit(plan, found)
        tell(
            f"threshold {plan.detector.threshold:.4g}: flags {measured:.1%} of {len(plan.images.threshold)} clean "
            f"validation images"
        )
        _write(plan, found, measured, (time.perf_counter() - started) / 60)
    return plan.folder


def _learn(plan: DetectorPlan) -> None:
    dataset, rows = plan.dataset, plan.images.reference
    family = dataset.like or dataset.name
    reference = Reference(dataset.train.x(rows), dataset.train.labels[rows], dataset.classes, family)
    with foreign_code(f"detector {plan.detector.name!r}", STEP):
        plan.detector.learn(reference)
    plan.detector.to(plan.device)


def _attack(plan: DetectorPlan, number: int, tell: Tell) -> Triples:
    rows, split = plan.images.attacked, plan.dataset.validation
    samples = Samples(split.ids[rows], split.x(rows), split.labels[rows])
    victim = Victim(plan.model.module, plan.device, BATCH)
    found = attack_samples(plan.detector, victim, plan.attacks[number], samples, plan.request.seed)
    record = found.record
    tell(
        f"{record.name}: {record.examples} of {len(rows)} attacked images train the score, mean L2 "
        f"{record.mean_l2:.4g}, noise of deviation {record.noise_std:.4g}"
    )
    return found


def _fit(plan: DetectorPlan, found: list[Triples]) -> float:
    """Fit score and threshold; the share of clean images that is flagged."""
    detector, clean = plan.detector, plan.dataset.validation.x(plan.images.threshold)
    with foreign_code(f"detector {detector.name!r}", STEP):
        negatives, positives = evidence_of_triples(detector, found)
        detector.fit_scores(negatives, positives, detector.evidence_of(clean))
        return detector.fix_threshold(detector.scores_of(clean), plan.request.false_positive_rate)


def _write(plan: DetectorPlan, found: list[Triples], measured: float, minutes: float) -> None:
    """Weights, then card.yaml, so that a folder with a card is complete."""
    weights, state = plan.folder / "weights.safetensors", plan.detector.state()
    write_atomically(weights, lambda path: path.write_bytes(save(state)))
    classifier, attacks = plan.model.card, tuple(each.record for each in found)
    against = ", ".join(each.name for each in attacks)
    card = DetectorCard(
        name=plan.name,
        description=f"{plan.request.detector} on {classifier.name}, trained against {against}",
        dataset=plan.dataset.name,
        detector=plan.request.detector,
        parameters=plan.detector.parameters.model_dump(mode="json"),
        classifier=ClassifierReference(name=classifier.name, function_hash=classifier.function_hash),
        layers=plan.detector.layers,
        input_shape=plan.dataset.shape,
        classes=plan.dataset.classes,
        attacks=attacks,
        split=plan.images.record(plan.dataset),
        seed=plan.request.seed,
        threshold=plan.detector.threshold,
        false_positive_rate=plan.request.false_positive_rate,
        measured_false_positive_rate=measured,
        weights=Weights(file=weights.name, sha256=sha256_file(weights)),
        command=plan.request.command,
        versions=versions(),
        minutes=round(minutes, 2),
    )
    write_text_atomically(plan.folder / "card.yaml", dump_yaml(card))
