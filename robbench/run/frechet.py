"""Fréchet distances of a run: its adversarial images, and its clean ones, against the training images.

The reference is the data set's whole original training set (robbench's train and validation splits), as published FIDs
of CIFAR-10 use all 50,000 images. Its statistics are cached, addressed by their content.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from robbench.attacks.trust.context import full_precision
from robbench.attacks.victim import chunks
from robbench.core.device import resolve_device, versions
from robbench.core.errors import UserError
from robbench.core.resources import cache_folder
from robbench.core.schema import canonical_hash
from robbench.core.versions import installed_version
from robbench.data import Dataset, Split, load_dataset
from robbench.models.entry import ZooEntry
from robbench.models.zoo import find_model, zoo_entries
from robbench.run.features import (
    INCEPTION,
    FeatureExtractor,
    classifier_extractor,
    inception_extractor,
)
from robbench.statistics.frechet import GaussianStatistics, frechet_distance, frechet_notes
from robbench.store.columns import decode_images, encode_image
from robbench.store.frechet_records import (
    CLEAN,
    FrechetRecord,
    read_record,
    record_path,
    samples_hash,
    write_record,
)
from robbench.store.ledger import load_run
from robbench.store.records import CellResult, Run

FRECHET_ENGINE = "frechet-1"  # part of every key: raise it when the numbers change
REFERENCE_SPLIT = "train+validation"
INCEPTION_SIDE = 75  # smallest side that Inception itself accepts; smaller grey images need other features


class FrechetProgress(Protocol):
    """Reports the progress of scoring."""

    def advanced(self, what: str, done: int, total: int) -> None:
        """`done` of the `total` images of `what` have gone through the extractor."""

    def message(self, line: str) -> None:
        """One line the user should see."""


@dataclass(frozen=True)
class FrechetRequest:
    """Arguments of `robbench fid`.

    Attributes:
        features: "inception", or the name of a classifier; None for the data set's default.
        fid_weights: weights file of inception; None for the downloaded one.
        data_dir: folder of data sets in torchvision's layout.
        data: folder of the run's data set, where that is one of the user's own.
        zoo: folder of further models.
        device: "auto", "cpu", "cuda" or "cuda:N".
        batch_size: images per batch.
    """

    features: str | None = None
    fid_weights: Path | None = None
    data_dir: Path | None = None
    data: Path | None = None
    zoo: Path | None = None
    device: str = "auto"
    batch_size: int = 64


def score_run(folder: Path, request: FrechetRequest, progress: FrechetProgress) -> list[FrechetRecord]:
    """Score the clean images and every cell of a run folder and store one record each; returns them in that order.

    A cell that cannot be scored has status "not run" with the reason; images that the same extractor scored before are
    not scored again. Raises `UserError` for a folder that is not a run, another data set than the run's, an extractor
    that does not fit, and fewer than 2 samples.
    """
    run = load_run(folder)
    if run.n < 2:
        raise UserError(
            f"{str(folder)!r} has {run.n} sample, and a covariance needs 2; run it again with a larger --n"
        )
    device = resolve_device(request.device)
    choose = _choose_extractor(run, request, device)
    dataset = _load_matching_dataset(run, request)
    scorer = _Scorer(run, dataset, choose(), request.batch_size, progress)
    with full_precision():
        return [scorer.clean(), *(scorer.cell(result) for result in run.cells)]


def _choose_extractor(
    run: Run, request: FrechetRequest, device: torch.device
) -> Callable[[], FeatureExtractor]:
    """A function that builds the requested extractor; `UserError` for bad names and options, before any loading."""
    small_grey = run.shape[0] == 1 and min(run.shape[1:]) < INCEPTION_SIDE
    like = run.data.like if run.data is not None else None
    default = f"{like or run.dataset}-standard" if small_grey and request.fid_weights is None else INCEPTION
    name = request.features or default
    if name == INCEPTION:
        return lambda: inception_extractor(request.fid_weights, device)
    if request.fid_weights is not None:
        raise UserError(
            f"--fid-weights is for --features {INCEPTION}, not for {name!r}; leave one of the two out"
        )
    entry = _extractor_entry(name, request)
    return lambda: classifier_extractor(entry, run.shape, device)


def _extractor_entry(name: str, request: FrechetRequest) -> ZooEntry:
    entries = zoo_entries(request.zoo)
    if request.features is None and name not in entries:
        raise UserError(
            f"the zoo has no {name!r}, the default features of small grey images; "
            f"give --features MODEL (see robbench list models), or --features {INCEPTION}"
        )
    return find_model(name, entries)


def _load_matching_dataset(run: Run, request: FrechetRequest) -> Dataset:
    if request.data is None and run.data is not None and run.data.folder:
        raise UserError(
            f"{str(run.folder)!r} was run on {run.dataset!r}, a data set of a folder; "
            f"name that folder, as in --data {run.data.folder}"
        )
    dataset = load_dataset(run.dataset, request.data_dir, request.data)
    dataset.require_training("a Frechet distance")
    if dataset.revision != run.dataset_revision:
        raise UserError(
            f"{str(run.folder)!r} was run on {run.dataset} {run.dataset_revision[:12]}, here is "
            f"{dataset.revision[:12]}; name the folder of the run's data with "
            f"{'--data' if request.data else '--data-dir'}"
        )
    return dataset


@dataclass(frozen=True)
class _Scorer:
    """Scores one run with one extractor; the reference is computed or read when first needed.

    Attributes:
        run, dataset: the run and its data set.
        extractor: of the features.
        batch_size: images per batch.
        progress: is told how many images are done.
    """

    run: Run
    dataset: Dataset
    extractor: FeatureExtractor
    batch_size: int
    progress: FrechetProgress

    def clean(self) -> FrechetRecord:
        """The distance of the run's clean test images."""
        images, _ = self.dataset.test.by_ids(sorted(self.run.sample_ids))
        return self._score(self._blank(None, None, CLEAN), images)

    def cell(self, result: CellResult) -> FrechetRecord:
        """The distance of a cell's adversarial images, or why there is none."""
        record = result.cell
        blank = self._blank(record.hash, record.model_name, record.attack.label)
        reason = _unusable(result, self.run.n)
        if reason:
            return self._store(blank.without_value(reason))
        rows = result.rows.sort_values("sample_id")
        return self._score(blank, torch.from_numpy(decode_images(list(rows["example"]), self.run.shape)))

    def _blank(self, cell: str | None, model: str | None, attack: str) -> FrechetRecord:
        return FrechetRecord(
            status="not run",
            reason="not scored",
            cell=cell,
            model=model,
            attack=attack,
            extractor=self.extractor.label,
            extractor_sha256=self.extractor.sha256,
            extractor_hash=self.extractor.function_hash,
            dataset=self.run.dataset,
            dataset_revision=self.run.dataset_revision,
            reference_split=REFERENCE_SPLIT,
            reference_n=sum(len(split) for split in _reference_splits(self.dataset)),
            n=self.run.n,
            samples_sha256=samples_hash(self.run.sample_ids),
            versions=self._versions,
        )

    @cached_property
    def _versions(self) -> dict[str, str]:
        return {**versions(), "pytorch-fid": installed_version("pytorch-fid") or "not installed"}

    def _score(self, blank: FrechetRecord, images: Tensor) -> FrechetRecord:
        key = self._key(_images_hash(images))
        known = self._find_known(blank, key)
        if known is not None:
            return known
        reference = self._reference  # outside the `try`: without it nothing can be scored
        what = f"{blank.model} x {blank.attack}" if blank.model else f"{CLEAN} images"
        try:
            statistics = self._statistics(chunks(images, self.batch_size), what, len(images))
            value = frechet_distance(statistics, reference)
        except UserError as error:
            return self._store(blank.without_value(f"{error}"))
        notes = (
            *frechet_notes(statistics, reference),
            *self.extractor.notes,
            *self._note_attacked_model(blank),
        )
        changes = {"status": "ok", "reason": "", "value": value, "key": key, "notes": notes}
        return self._store(blank.model_copy(update=changes))

    def _find_known(self, blank: FrechetRecord, key: str) -> FrechetRecord | None:
        """The stored record of these very images, if any, with the names that the run now uses."""
        path = record_path(self.run.folder, blank.cell, blank.extractor_hash)
        try:
            record = read_record(path) if path.exists() else None
        except UserError as error:
            self.progress.message(f"{error.args[0].partition(';')[0]}; scored again")
            return None
        if record is None or record.key != key:
            return None
        names = {"model": blank.model, "attack": blank.attack, "samples_sha256": blank.samples_sha256}
        return self._store(record.model_copy(update=names))

    def _store(self, record: FrechetRecord) -> FrechetRecord:
        write_record(self.run.folder, record)
        return record

    def _note_attacked_model(self, blank: FrechetRecord) -> Sequence[str]:
        card = self.run.cards.get(blank.model) if blank.model else None
        if card is None or card.weights.sha256 != self.extractor.sha256:
            return ()
        return (
            f"{card.name} is the attacked model and the feature extractor: the attack aims at these features",
        )

    @cached_property
    def _reference_hash(self) -> str:
        """Hash of the reference images, since a data set's revision covers its test split only."""
        digest = hashlib.sha256(
            f"{self.dataset.name}:{self.dataset.shape}:{self.dataset.grey_levels}".encode()
        )
        for split in _reference_splits(self.dataset):
            digest.update(np.ascontiguousarray(split.pixels.numpy()).tobytes())
        return digest.hexdigest()

    def _key(self, images_hash: str) -> str:
        """Address of the distance of images; with "reference", of the reference's own statistics."""
        return canonical_hash(
            {
                "engine": FRECHET_ENGINE,
                "extractor": self.extractor.function_hash,
                "split": REFERENCE_SPLIT,
                "reference": self._reference_hash,
                "images": images_hash,
            }
        )

    @cached_property
    def _reference(self) -> GaussianStatistics:
        """Statistics of the training images, from the cache or computed and cached."""
        path = cache_folder("frechet") / f"{self.run.dataset}-{self._key('reference')[:32]}.npz"
        if path.exists():
            try:
                return GaussianStatistics.load(path)
            except UserError as error:
                self.progress.message(f"{error.args[0].partition(';')[0]}; computed again")
        splits = _reference_splits(self.dataset)
        batches = (
            split.x(rows) for split in splits for rows in chunks(torch.arange(len(split)), self.batch_size)
        )
        what = f"{self.run.dataset} {REFERENCE_SPLIT}"
        statistics = self._statistics(batches, what, sum(len(split) for split in splits))
        statistics.save(path)
        return statistics

    def _statistics(
        self, batches: "Iterator[Tensor] | Sequence[Tensor]", what: str, total: int
    ) -> GaussianStatistics:
        def features() -> Iterator[np.ndarray]:
            done = 0
            for images in batches:
                yield self.extractor(images)
                done += len(images)
                self.progress.advanced(what, done, total)

        return GaussianStatistics.from_batches(features())


def _reference_splits(dataset: Dataset) -> tuple[Split, Split]:
    return dataset.train, dataset.validation


def _images_hash(images: Tensor) -> str:
    return hashlib.sha256(encode_image(images.numpy())).hexdigest()


def _unusable(result: CellResult, requested: int) -> str:
    """Why the images of a cell cannot be scored, and the next step; "" when all `requested` are there."""
    record, present = result.cell, len(result.rows)
    again = "run the same robbench run again, then robbench fid"
    if record.status == "failed":
        return f"the cell failed ({record.error}); remove the cause and {again}"
    if present < requested:
        return f"the cell has {present} of {requested} samples; {again}"
    kept = int(result.rows["example"].notna().sum())
    if kept < requested:
        return (
            f"the cell keeps {kept} of {requested} adversarial images; "
            f"run it again with --keep-examples all --fresh, then robbench fid"
        )
    return ""
