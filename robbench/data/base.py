"""Data sets as integer grey levels with stable sample ids."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robbench.core.errors import UserError, spell_argument
from robbench.core.random import derive_seed
from robbench.core.registry import Registry
from robbench.data.card import DatasetCard, SplitCard, SplitName
from robbench.data.decode import FileImages


@dataclass(frozen=True)
class Split:
    """Images of one split. ids: int64 [N], positions in the source's own order; labels: int64 [N];
    images: uint8 [N,C,H,W] holding grey levels 0..levels-1, files that are decoded when they are read,
    or float32 pixels in [0,1] of arrays without grey levels."""

    ids: Tensor
    labels: Tensor
    images: Tensor | FileImages
    levels: int

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def pixels(self) -> Tensor:
        """All images, uint8 [N,C,H,W]."""
        return self.images.all() if isinstance(self.images, FileImages) else self.images

    def x(self, positions: Tensor) -> Tensor:
        """Contiguous float32 images [n,C,H,W] in [0,1] at `positions` (0..N-1) of this split."""
        chosen = self.images[positions]
        if not chosen.is_floating_point():
            chosen = chosen.to(torch.float32) / (self.levels - 1)
        return chosen.contiguous()

    def by_ids(self, ids: Sequence[int] | Tensor) -> tuple[Tensor, Tensor]:
        """Images and labels of the samples called `ids`, in that order. KeyError for a foreign id."""
        order = torch.argsort(self.ids)
        requested = torch.as_tensor(ids, dtype=torch.int64)
        slots = torch.searchsorted(self.ids[order], requested).clamp(max=max(len(self) - 1, 0))
        positions = order[slots]
        if not torch.equal(self.ids[positions], requested):
            raise KeyError("some sample ids are not in this split")
        return self.x(positions), self.labels[positions]

    def subset(self, positions: Tensor) -> "Split":
        """The split restricted to `positions`; ids stay what they were."""
        images = self.images
        images = images.at(positions) if isinstance(images, FileImages) else images[positions]
        return Split(self.ids[positions], self.labels[positions], images, self.levels)


@dataclass(frozen=True)
class Dataset:
    """A data set with its three splits; one without training images has empty ones (`require_training`).

    Attributes:
        name: as in tables.
        class_names: by label.
        grey_levels: pixels are 0..grey_levels-1.
        train, validation, test: the splits; test is what is attacked.
        source, license, note: for its card; the note is printed wherever results are.
        like: a data set whose models and budgets fit.
        folder: name of the user's folder it came from.
        corruptions: folder of its corrupted test images.
        logits: which logit of a model each class is; None where they are the model's classes.
    """

    name: str
    class_names: tuple[str, ...]
    grey_levels: int
    train: Split
    validation: Split
    test: Split
    source: str = ""
    license: str = ""
    note: str = ""
    like: str | None = None
    folder: str = ""
    corruptions: Path | None = None
    logits: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        channels, height, width = self.test.images.shape[1:]
        return int(channels), int(height), int(width)

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @cached_property
    def revision(self) -> str:
        """Hex sha256 of the test split: what every result depends on."""
        return self._sha256(self.test)

    @cached_property
    def card(self) -> DatasetCard:
        """What reports say of the data set."""
        splits: dict[SplitName, Split] = {"train": self.train, "validation": self.validation}
        cards = {name: SplitCard(n=len(s), sha256=self._sha256(s)) for name, s in splits.items() if len(s)}
        return DatasetCard(
            name=self.name,
            source=self.source,
            license=self.license,
            note=self.note,
            folder=self.folder,
            like=self.like,
            shape=self.shape,
            grey_levels=self.grey_levels,
            class_names=self.class_names,
            classes=self.logits,
            splits={**cards, "test": SplitCard(n=len(self.test), sha256=self.revision)},
        )

    def require_training(self, purpose: str) -> None:
        """`UserError` for a data set without training images. purpose: what needs them ("training a model")."""
        if not len(self.train):
            raise UserError(
                f"data set {self.name!r} has only test images and {purpose} needs training images; "
                f"add a `train` split to its card.yaml, or use another data set"
            )

    def _sha256(self, split: Split) -> str:
        digest = hashlib.sha256(f"{self.name}:{self.shape}:{self.grey_levels}".encode())
        tensors = [split.ids, split.labels]
        if isinstance(split.images, FileImages):
            digest.update(split.images.fingerprint())
        else:
            tensors.append(split.images)
        for tensor in tensors:
            digest.update(np.ascontiguousarray(tensor.numpy()).tobytes())
        return digest.hexdigest()


DATASETS: Registry[Callable[[Path], Dataset]] = Registry("data set", "robbench.datasets")


def sample_ids(split: Split, n: int | None, seed: int) -> list[int]:
    """Ids of a seeded random subset of `split`, in random order; `n=None` takes all.

    The first m of a larger draw are the draw of m, so that a larger n extends a smaller one. Never the first n of
    the set: MNIST's first half, for one, is harder than its second.
    """
    if n is not None and not 0 < n <= len(split):
        raise UserError(
            f"{spell_argument('n', n)} is not available: the split has {len(split)} samples; give 1 to {len(split)}"
        )
    generator = np.random.Generator(np.random.Philox(key=derive_seed(seed, "test subset")))
    order = generator.permutation(len(split))[: n if n is not None else len(split)]
    return [int(split.ids[int(position)]) for position in order]


def stratified_split(labels: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Disjoint positions of the given sizes with equal class shares (scikit-learn's stratified shuffle).

    The last part takes what the earlier ones leave; each part is sorted.
    """
    from sklearn.model_selection import train_test_split

    rest = np.arange(len(labels))
    parts: list[Tensor] = []
    for size in sizes:
        rest, part = train_test_split(rest, test_size=size, random_state=seed, stratify=labels[rest].numpy())
        parts.append(torch.from_numpy(np.sort(part)))
    return [*parts, torch.from_numpy(np.sort(rest))]
