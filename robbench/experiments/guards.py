"""The detectors of an experiment: one for every seed of the classifier that it guards."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from robbench.core.errors import UserError
from robbench.data import Dataset
from robbench.defenses.settings import read_value
from robbench.detectors.plan import ATTACKED, DetectorRequest
from robbench.detectors.training import train_detector
from robbench.experiments.request import ExperimentRequest
from robbench.experiments.schema import LEAST_TEST, TrainedDetector
from robbench.models.entry import DetectorEntry
from robbench.models.zoo import detector_entries, read_detector


class Guarded(Protocol):
    """What a detector's job knows of its classifier's."""

    @property
    def name(self) -> str:
        """Name of its folder."""

    @property
    def member(self) -> str:
        """Its name in the experiment."""

    @property
    def folder(self) -> Path:
        """Its folder, which may not exist yet."""


@dataclass(frozen=True)
class GuardJob:
    """A detector of the experiment, trained or to be trained.

    Attributes:
        name: of its folder.
        member: its name in the experiment.
        request: the training.
        requires: name of the classifier's job.
        finished: the detector where it exists; else None.
    """

    name: str
    member: str
    request: DetectorRequest
    requires: str
    finished: DetectorEntry | None

    @property
    def folder(self) -> Path:
        """Folder of the detector, which may not exist yet."""
        return self.finished.folder if self.finished else self.request.out / self.name


def guard_jobs(
    request: ExperimentRequest, out: Path, dataset: Dataset, jobs: Sequence[Guarded], named: set[str]
) -> tuple[GuardJob, ...]:
    """The detectors in `named`. out: folder of their folders. jobs: of the experiment's classifiers."""
    entries = detector_entries(request.zoo)
    return tuple(
        _guard_job(request, out, dataset, job, member, entries)
        for member, spec in request.experiment.detectors.items()
        if member in named
        for job in jobs
        if job.member == spec.model
    )


def guarded_zoo(guards: Sequence[GuardJob], jobs: Sequence[Guarded]) -> Path:
    """The folder of the classifiers that detectors guard, where a run looks them up; `UserError` for several."""
    required = {guard.requires for guard in guards}
    folders = {job.folder.resolve().parent: job for job in jobs if job.name in required}
    if len(folders) > 1:
        (first, _), (second, job) = list(folders.items())[:2]
        raise UserError(
            f"the classifiers of detectors lie in {str(first)!r} and {str(second)!r}; copy {job.name!r} into the "
            f"former, or leave --zoo out to train all"
        )
    return next(iter(folders))


def _guard_job(
    request: ExperimentRequest,
    out: Path,
    dataset: Dataset,
    job: Guarded,
    member: str,
    entries: Mapping[str, DetectorEntry],
) -> GuardJob:
    spec, scale = request.experiment.detectors[member], request.scale
    name = member + job.name.removeprefix(job.member)
    images = min(ATTACKED, len(dataset.validation) // 2)
    training = DetectorRequest(
        detector=spec.detector,
        model=str(job.folder),
        attacks=spec.attacks,
        layers=spec.layers,
        n=None if scale.full else scale.count(images, LEAST_TEST),
        seed=request.seed,
        name=name,
        out=out,
        device=request.device,
        data=request.data,
        data_dir=request.data_dir,
        zoo=request.zoo,
        threat_models=request.threat_models,
        overrides=spec.settings,
    )
    own = out / name / "card.yaml"
    found = read_detector(own) if own.is_file() else entries.get(name)
    if found is not None:
        _check_finished(found, spec, job.name, request.seed)
    return GuardJob(name, member, training, job.name, found)


def _check_finished(found: DetectorEntry, spec: TrainedDetector, classifier: str, seed: int) -> None:
    """`UserError` for a detector of the right name that is another one."""
    card, settings = found.card, {key: read_value(key, value) for key, value in spec.settings.items()}
    pairs = {
        "detector": (card.detector, spec.detector),
        "classifier": (card.classifier.name, classifier),
        "seed": (card.seed, seed),
        "layers": (card.layers, spec.layers or card.layers),
        **{f"parameter {key}": (card.parameters.get(key), value) for key, value in settings.items()},
    }
    if different := [key for key, (recorded, requested) in pairs.items() if recorded != requested]:
        raise UserError(
            f"{found.folder} is another detector than the experiment's {card.name!r} (its {', '.join(different)} "
            f"differ); move it away, or give another --out or --zoo"
        )


def train_guards(
    guards: Sequence[GuardJob], failed: Mapping[str, str], tell: Callable[[str], None]
) -> dict[str, str]:
    """Train every missing detector whose classifier did not fail; returns the reasons of those that have none, by name.

    failed: why classifiers failed to train, by name.
    """
    reasons: dict[str, str] = {}
    for guard in guards:
        if guard.finished is not None:
            tell(f"detector {guard.name}: trained already, {guard.folder}")
            continue
        if guard.requires in failed:
            reasons[guard.name] = f"its classifier {guard.requires} failed to train"
            continue
        tell(f"detector {guard.name}: {guard.request.detector} against {', '.join(guard.request.attacks)}")
        try:
            train_detector(guard.request, tell)
        except UserError as error:
            reasons[guard.name] = f"{error}"
            tell(f"failed: {error}")
    return reasons
