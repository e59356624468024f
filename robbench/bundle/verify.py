"""`robbench verify`: checks a bundle with the verifier's own models, data and engine.

No hash in a bundle is trusted, since a forger can compute it again. Checks without a model come first (`open_bundle`,
`consistency`, `identity`, `tables`); then stored examples are checked and scored again (`images`, `rescore`); last a
random share of the cells is attacked again (`rerun`), the only check that a sample stated as robust is robust.
"""

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from robbench.attacks.named import ENGINE_VERSION
from robbench.bundle.archive import OpenBundle, open_bundle
from robbench.bundle.consistency import consistency_findings, duplicate_labels, incomplete, names_classes
from robbench.bundle.detection import DetectionCheck, bare_result
from robbench.bundle.findings import WHOLE, Finding, Verification
from robbench.bundle.identity import address_findings, bundled_findings, settings_findings
from robbench.bundle.images import CleanImages, clean_images, data_findings, image_findings
from robbench.bundle.rerun import FLIP_RATE, RerunChoice, Reruns
from robbench.bundle.rescore import classifier_findings, classifier_likelihood, flow_findings
from robbench.bundle.subjects import Subjects, find_subjects
from robbench.bundle.suspicions import suspicion_findings
from robbench.bundle.tables import table_finding
from robbench.bundle.zipcheck import refusal
from robbench.core.device import resolve_device, versions
from robbench.core.errors import UserError
from robbench.core.foreign import foreign_code
from robbench.data import Dataset, load_dataset
from robbench.detectors.loading import load_detector
from robbench.models.entry import ZooEntry
from robbench.models.flows.base import FrozenFlow
from robbench.models.loading import load_flow, load_flow_model, load_model
from robbench.results.rows import models
from robbench.specs import threat_models
from robbench.store.records import CellRecord, CellResult, Run

Say = Callable[[str], None]
# Entries of a card that are names or compared elsewhere.
_CHECKED = ("schema_version", "name", "defense", "dataset", "weights", "golden")


@dataclass(frozen=True)
class VerifyRequest:
    """Options of `robbench verify`.

    Attributes:
        bundle: the bundle file.
        models: zoo names, folders or cards, besides the models of the zoo.
        share: see `RerunChoice.share`.
        rerun_samples: see `RerunChoice.samples`.
        seed: see `RerunChoice.seed`; None draws one.
        flip_tolerance: see `RerunChoice.flip_rate`.
        files_only: use no model and run nothing again.
        device: "auto", "cpu", "cuda" or "cuda:N".
        batch_size: images per batch.
        zoo: folder of further models.
        checkpoints: folder of weights that cards name.
        threat_models: folder of further threat models.
        data_dir: folder of data sets in torchvision's layout.
        data: folder of the bundle's data set, where that is one of the user's own.
        several: whether `models` are for several bundles, so that this one may lack some of them.
    """

    bundle: Path
    models: tuple[str, ...] = ()
    share: float = 0.1
    rerun_samples: int | None = None
    seed: int | None = None
    flip_tolerance: float = FLIP_RATE
    files_only: bool = False
    device: str = "auto"
    batch_size: int = 256
    zoo: Path | None = None
    checkpoints: Path | None = None
    threat_models: Path | None = None
    data_dir: Path | None = None
    data: Path | None = None
    several: bool = False

    @property
    def choice(self) -> RerunChoice:
        """The cells and samples to run again; without a seed, a new one per access."""
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return RerunChoice(self.share, self.rerun_samples, seed, self.flip_tolerance)


def verify_bundle(request: VerifyRequest, say: Say | None = None) -> Verification:
    """All findings about a bundle. `UserError` for a refused bundle and for options that do not fit it. say: called
    with a line before every long step."""
    check_options(request)
    with open_bundle(request.bundle) as bundle:
        return verify_open(bundle, request, say)


def check_options(request: VerifyRequest) -> None:
    """`UserError` for numbers out of range and options that contradict each other."""
    for option, value in (("--share", request.share), ("--flip-tolerance", request.flip_tolerance)):
        if not 0 <= value <= 1:
            raise UserError(f"{option} {value:g} is no share; give a number from 0 to 1")
    if request.files_only and request.models:
        raise UserError("--files-only asks no model; leave it or --model out")


def verify_open(bundle: OpenBundle, request: VerifyRequest, say: Say | None = None) -> Verification:
    """`verify_bundle` for an open bundle."""
    _require_cards(bundle)
    choice = request.choice
    result = Verification(about=_about(bundle, request, choice), files_only=request.files_only)
    verifier = _Verifier(bundle, request, choice, say or (lambda _text: None))
    result.findings += verifier.findings()
    result.notes += verifier.notes()
    return result


def _require_cards(bundle: OpenBundle) -> None:
    absent = [cell.cell.model for cell in bundle.run.cells if cell.cell.model not in bundle.run.cards]
    if absent:
        raise refusal(bundle.path, f"run.yaml plans cells of {absent[0]!r}, which is none of its models")


def _about(bundle: OpenBundle, request: VerifyRequest, choice: RerunChoice) -> dict[str, object]:
    return {
        "bundle": str(request.bundle),
        "sha256": bundle.sha256,
        "dataset": bundle.run.dataset,
        "n": bundle.run.n,
        "cells": len(bundle.run.cells),
        "examples": bundle.manifest.examples.exported,
        "share": 0.0 if request.files_only else choice.share,
        "rerun_samples": choice.samples,
        "seed": choice.seed,
        "flip_tolerance": choice.flip_rate,
        "versions": versions(),
        "bundle_versions": bundle.run.versions,
    }


@dataclass
class _Verifier:
    bundle: OpenBundle
    request: VerifyRequest
    choice: RerunChoice
    say: Say

    @cached_property
    def run(self) -> Run:
        """The run without cells whose rows name non-existent classes, which models cannot score; other findings report
        them."""
        run = self.bundle.run
        return replace(run, cells=[result for result in run.cells if names_classes(run, result)])

    @cached_property
    def device(self) -> torch.device:
        return resolve_device(self.request.device)

    @cached_property
    def subjects(self) -> Subjects:
        request = self.request
        return find_subjects(
            self.run, request.models, request.zoo, request.checkpoints, strict=not request.several
        )

    @cached_property
    def _data(self) -> tuple[Dataset | None, str]:
        """The data set, or why it is not available; `UserError` for a missing one that the user named."""
        request = self.request
        try:
            return load_dataset(self.run.dataset, request.data_dir, request.data), ""
        except UserError as error:
            if request.data is not None:
                raise
            return None, f"the data set is not at hand ({error})"

    @cached_property
    def source(self) -> CleanImages:
        return clean_images(self.run, *self._data)

    def findings(self) -> Iterator[Finding]:
        run, request = self.run, self.request
        yield Finding(WHOLE, "", "files", "agrees", len(self.bundle.manifest.files))
        yield table_finding(self.bundle)
        yield from consistency_findings(self.bundle.run)
        yield from settings_findings(run, threat_models(request.threat_models), self.source.dataset)
        yield from bundled_findings(self.bundle.folder, run)
        yield from suspicion_findings(self.bundle.folder, run)
        yield from address_findings(run, self.subjects.flow_cards)
        yield from data_findings(run, self.source, self._data[0])
        yield from image_findings(run, self.source, self._attack_flow)
        yield from self.subjects.findings if not request.files_only else self._no_model()
        if not request.files_only:
            yield from self._rescore()
            yield from self._rerun()

    def _no_model(self) -> Iterator[Finding]:
        for name in self.run.cards:
            yield Finding(name, "", "model", "unchecked", 0, "not re-scored: --files-only")

    def _flow(self, sha256: str) -> FrozenFlow | None:
        """A flow by the sha256 of its weights, loaded once; None where it is not available, or with files_only."""
        if self.request.files_only or sha256 not in self.subjects.flows:
            return None
        if sha256 not in self._flows:
            self._flows[sha256] = self._load_flow(self.subjects.flows[sha256])
        return self._flows[sha256]

    @cached_property
    def _flows(self) -> dict[str, FrozenFlow | None]:
        return {}

    def _load_flow(self, entry: ZooEntry) -> FrozenFlow | None:
        """A flow; None for a zoo flow without available weights; `UserError` for one that the user named."""
        try:
            return load_flow(entry, self.device)
        except UserError as error:
            if any(entry is named for named in self.subjects.given.values()):
                raise
            self.say(f"Flow {entry.card.name} is not at hand: {error}")
            return None

    def _attack_flow(self, cell: CellRecord) -> FrozenFlow | None:
        return self._flow(cell.attack_flow.sha256) if cell.attack_flow else None

    def _rescore(self) -> Iterator[Finding]:
        for model in models(self.run):
            if model.name in self.subjects.models:
                self.say(f"Re-scoring {model.name} ({len(model.cells)} cells)")
                try:
                    with foreign_code(f"scoring with model {model.name!r}"):
                        found = list(self._of_model(model.name, model.cells))
                    yield from found
                except UserError as error:
                    if any(
                        self.subjects.models[model.name] is named for named in self.subjects.given.values()
                    ):
                        raise
                    yield Finding(model.name, "", "model", "unchecked", 0, f"not re-scored: {error}")

    def _of_model(self, name: str, cells: Sequence[CellResult]) -> Iterator[Finding]:
        entry, size = self.subjects.models[name], self.request.batch_size
        if entry.card.kind == "flow":
            dtypes = {"fp32": torch.float32, "fp64": torch.float64}
            for precision in dict.fromkeys(result.cell.precision for result in cells):
                flow = load_flow_model(entry, self.device, dtypes[precision])
                own = [result for result in cells if result.cell.precision == precision]
                yield from flow_findings(self.run, flow, own, self.source, size)
            return
        module = load_model(entry.bare, self.device)
        bare = [bare_result(result) for result in cells]
        yield from classifier_findings(self.run, module, bare, self.source, self.device, size)
        if entry.guard is not None:
            detector, card = load_detector(entry.guard, module), entry.guard.card
            check = DetectionCheck(self.run, module, detector, card.reference, self.source, self.device, size)
            yield from check.findings(cells)
        for result in cells:
            flow_of_cell = self._flow(result.cell.nll_flow.sha256) if result.cell.nll_flow else None
            yield from classifier_likelihood(self.run, result, self.source, flow_of_cell, size)

    def _rerun(self) -> Iterator[Finding]:
        if not self.choice.share:
            return
        if self.source.dataset is None:
            yield Finding(WHOLE, "", "re-run", "unchecked", 0, f"nothing re-run: {self.source.reason}")
            return
        size = self.request.batch_size
        reruns = Reruns(self.run, self.subjects, self._flow, self.source.dataset, self.device, size)
        if not reruns.runnable():
            reason = "nothing re-run: no cell that can be run again has its model at hand"
            yield Finding(WHOLE, "", "re-run", "unchecked", 0, reason)
        yield from reruns.findings(self.choice, self.say)

    def notes(self) -> list[str]:
        """Remarks on the verification that are not findings."""
        return [
            *self._version_notes(),
            *self._coverage(),
            *self._choice(),
            *self._claims(),
            *incomplete(self.bundle.run),
        ]

    def _claims(self) -> Iterator[str]:
        """Claims of the bundle that tables would repeat and that are not checked."""
        if self.bundle.run.note:
            yield f"the bundle says of itself: {self.bundle.run.note!r}"
        if not self.request.files_only:
            for name, entry in self.subjects.models.items():
                theirs, mine = self.run.cards[name].model_dump(), entry.card.model_dump()
                other = [
                    key for key, value in theirs.items() if value != mine.get(key) and key not in _CHECKED
                ]
                if other:
                    yield f"the card of {name} in the bundle is not the one here in {', '.join(other)}"
        yield from duplicate_labels(self.bundle.run)

    def _choice(self) -> Iterator[str]:
        choice = self.choice
        if self.request.files_only or not choice.share:
            return
        part = "all samples" if choice.samples is None else f"{choice.samples} samples each"
        yield (
            f"{100 * choice.share:g} % of the cells re-run, {part}, chosen by seed {choice.seed} (--seed repeats the "
            f"choice); flips fail beyond a binomial at {100 * choice.flip_rate:g} %"
        )

    def _version_notes(self) -> Iterator[str]:
        here = versions()
        for name in ("robbench", "torch"):
            theirs = self.run.versions.get(name, "unknown")
            if theirs != here[name]:
                yield f"measured with {name} {theirs}, verified with {here[name]}"
        engines = {result.cell.engine.partition(",")[0] for result in self.run.cells}
        if foreign := sorted(engines - {f"robbench engine {ENGINE_VERSION}"}):
            yield f"measured with {', '.join(foreign)}, verified with robbench engine {ENGINE_VERSION}"

    def _coverage(self) -> Iterator[str]:
        rows = sum(len(result.rows) for result in self.run.cells)
        examples = sum(int(result.rows["example"].notna().sum()) for result in self.run.cells)
        yield (
            f"{examples} of {rows} rows store their example; of the others only re-runs speak, and so of every sample "
            f"said to hold"
        )
        if (self.bundle.folder / "frechet").is_dir():
            yield "Fréchet distances are taken as stated: nobody computed them again (robbench fid)"
