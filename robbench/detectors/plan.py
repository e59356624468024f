"""The request of `robbench train --detector`, and the checked plan of it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robbench.attacks import Attack, build_attack
from robbench.cards import DetectorSplit
from robbench.core.device import resolve_device
from robbench.core.errors import UserError
from robbench.core.schema import canonical_hash
from robbench.data.base import Dataset
from robbench.data.loading import load_dataset
from robbench.defenses.plan import NAME, check_places
from robbench.defenses.schedule import stratified_positions
from robbench.defenses.settings import read_value, yaml_value
from robbench.detectors.base import DETECTORS, Detector
from robbench.detectors.loading import build_detector
from robbench.models.entry import ModelRequest, ZooEntry
from robbench.models.loading import LoadedModel, load_flow, load_model
from robbench.models.zoo import default_flow, find_model, zoo_entries
from robbench.specs import expand_groups, resolve_attack, threat_models

ATTACKED = 1000  # images that are attacked, at most, unless the user says how many


@dataclass(frozen=True)
class DetectorRequest:
    """Arguments of `robbench train --detector`. None means the default.

    Attributes:
        detector, model, attacks: names; the classifier and the attacks that the score is trained against.
        layers: of the classifier; () for the detector's default ones.
        n: validation images to attack, at most half of them; None for `ATTACKED`, or half where there are fewer.
        false_positive_rate: share of clean images that the threshold flags.
        seed: of the attacks, the noise and all subsets.
        name, out: the zoo folder that is written is `out`/`name`.
        device: "auto", "cpu", "cuda", "cuda:1".
        dataset: its name; None for that of the model's card. data: folder of the user's own.
        data_dir, zoo, checkpoints, threat_models: folders.
        overrides: of `--set key=value`, parameters of the detector; text values are read as YAML.
    """

    detector: str
    model: str
    attacks: tuple[str, ...]
    layers: tuple[str, ...] = ()
    n: int | None = None
    false_positive_rate: float = 0.05
    seed: int = 0
    name: str | None = None
    out: Path = Path("robbench-training")
    device: str = "auto"
    dataset: str | None = None
    data: Path | None = None
    data_dir: Path | None = None
    zoo: Path | None = None
    checkpoints: Path | None = None
    threat_models: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """The command line that trains the same detector again (without places: output, data, device)."""
        options: list[tuple[str, object]] = [
            ("--detector", self.detector),
            ("--model", self.model),
            ("--attacks", ",".join(self.attacks)),
            *(("--layer", layer) for layer in self.layers),
            ("--n", self.n),
            ("--false-positive-rate", self.false_positive_rate),
            ("--seed", self.seed),
            ("--dataset", self.dataset if self.data is None else None),
            ("--data", self.data),
            ("--zoo", self.zoo),
            ("--threat-models", self.threat_models),
            ("--name", self.name),
        ]
        words = [word for key, value in options if value is not None for word in (key, str(value))]
        for key, value in self.overrides.items():
            words += ["--set", f"{key}={value if isinstance(value, str) else yaml_value(value)}"]
        return shlex.join(["robbench", "train", *words])


@dataclass(frozen=True)
class DetectorImages:
    """Positions of the images of a training: `reference` in the training split, `attacked` and `threshold` (disjoint)
    in the validation split."""

    reference: Tensor
    attacked: Tensor
    threshold: Tensor

    def record(self, dataset: Dataset) -> DetectorSplit:
        """What a card says of them."""
        train, validation = dataset.train.ids, dataset.validation.ids
        ids = [train[self.reference], validation[self.attacked], validation[self.threshold]]
        return DetectorSplit(
            reference=len(self.reference),
            attacked=len(self.attacked),
            threshold=len(self.threshold),
            sha256=canonical_hash([part.tolist() for part in ids]),
        )


@dataclass(frozen=True)
class DetectorPlan:
    """A checked request.

    Attributes:
        request: arguments of the user.
        name: of the detector.
        dataset: of all images.
        model, detector: the classifier on `device`, and the detector on it, not fitted yet.
        attacks: that train it.
        images: of the training.
        device: where it is computed.
    """

    request: DetectorRequest
    name: str
    dataset: Dataset
    model: LoadedModel
    detector: Detector
    attacks: tuple[Attack, ...]
    images: DetectorImages
    device: torch.device

    @property
    def folder(self) -> Path:
        """The finished zoo folder."""
        return self.request.out / self.name


def make_detector_plan(request: DetectorRequest) -> DetectorPlan:
    """The plan of a request; `UserError` for all errors of the user."""
    DETECTORS.get(request.detector)
    if not 0 < request.false_positive_rate < 1:
        raise UserError(
            f"--false-positive-rate {request.false_positive_rate}: give a share of clean images, as in 0.05"
        )
    device = resolve_device(request.device)
    entry = _find_classifier(request)
    name = _name(request, entry)
    check_places(request.out, name)
    dataset = load_dataset(request.dataset or entry.card.dataset, request.data_dir, request.data)
    dataset.require_training("training a detector")
    attacks = _build_attacks(request, dataset.like or dataset.name, device)
    model = load_model(_fitting(entry, dataset), device)
    detector = _build(request, model, dataset, device)
    images = _draw(request, detector, dataset)
    return DetectorPlan(request, name, dataset, model, detector, attacks, images, device)


def _find_classifier(request: DetectorRequest) -> ZooEntry:
    entries = zoo_entries(request.zoo, request.checkpoints)
    asked = ModelRequest(request.dataset or "", checkpoints=request.checkpoints)
    entry = find_model(request.model, entries, requested=asked)
    if entry.card.kind != "classifier":
        raise UserError(
            f"--model {request.model!r} is a {entry.card.kind} and a detector guards a classifier; name one "
            f"(robbench list models)"
        )
    return entry


def _fitting(entry: ZooEntry, dataset: Dataset) -> ZooEntry:
    """The classifier restricted to the logits of the data set; `UserError` where it takes other images."""
    if tuple(entry.card.input_shape) != dataset.shape:
        raise UserError(
            f"model {entry.card.name!r} takes images {tuple(entry.card.input_shape)} and {dataset.name} has "
            f"{dataset.shape}; name its data set with --dataset"
        )
    return entry.restricted(dataset.logits)


def _name(request: DetectorRequest, entry: ZooEntry) -> str:
    name = request.name or f"{entry.card.name}-{request.detector}"
    if not NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r} is not a folder name; use at most 100 letters, digits, dots, dashes and underscores"
        )
    return name


def _build_attacks(request: DetectorRequest, dataset: str, device: torch.device) -> tuple[Attack, ...]:
    """The training attacks with their budgets on the data set."""
    known = threat_models(request.threat_models)
    specs = [resolve_attack(name, dataset, known) for name in expand_groups(request.attacks, known)]
    if not specs:
        raise UserError("--attacks is missing; name what the detector is trained against, as in pgd20")
    if adaptive := next((spec.name for spec in specs if spec.target == "detector"), None):
        raise UserError(
            f"--attacks {adaptive}: this attack needs a detector that is trained already; name attacks on the "
            f"classifier alone, as in pgd20"
        )
    found = default_flow(dataset, zoo_entries(request.zoo)) if any(s.needs_flow for s in specs) else None
    flow = None if found is None else load_flow(found, device)
    return tuple(build_attack(spec, flow) for spec in specs)


def _build(request: DetectorRequest, model: LoadedModel, dataset: Dataset, device: torch.device) -> Detector:
    tried = dataset.train.x(torch.arange(min(2, len(dataset.train)))).to(device)
    with torch.no_grad():
        logits = model.module(tried).shape[1]
    if logits != dataset.classes:
        raise UserError(
            f"model {model.card.name!r} has {logits} logits and {dataset.name} {dataset.classes} classes; "
            f"name its data set with --dataset"
        )
    settings = {key: read_value(key, value) for key, value in request.overrides.items()}
    return build_detector(request.detector, model.module, request.layers, settings, tried)


def _draw(request: DetectorRequest, detector: Detector, dataset: Dataset) -> DetectorImages:
    """Seeded subsets with equal class shares."""
    labels, half = dataset.validation.labels, len(dataset.validation) // 2
    n = min(ATTACKED, half) if request.n is None else request.n
    if not 0 < n <= half:
        raise UserError(
            f"--n {n}: {dataset.name} has {len(labels)} validation images, of which half are kept for the threshold; "
            f"give 1 to {half}"
        )
    attacked = stratified_positions(labels, n, request.seed)
    rest = torch.ones(len(labels), dtype=torch.bool).index_fill(0, attacked, False)
    size = min(detector.parameters.reference, len(dataset.train))
    reference = stratified_positions(dataset.train.labels, size, request.seed)
    return DetectorImages(reference, attacked, detector.scored_together(rest.nonzero().squeeze(1)))
