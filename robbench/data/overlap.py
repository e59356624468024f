"""Test images that are training images: a number measured on them says nothing of new images, and a note says so."""

import hashlib
from dataclasses import replace

from robbench.data.base import Dataset, Split


def with_overlap_noted(dataset: Dataset, like: Dataset | None = None) -> Dataset:
    """`dataset`, whose note says besides how many of its test images are training images; see `overlap_notes`."""
    found = overlap_notes(dataset, like)
    return replace(dataset, note="; ".join(filter(None, [dataset.note, *found]))) if found else dataset


def overlap_notes(dataset: Dataset, like: Dataset | None = None) -> list[str]:
    """One line for each training set that holds test images of `dataset`, pixel by pixel: its own, and that of the data
    set `like` whose models are used on it. Both with their validation images, which select the epoch of a training."""
    notes, kind = [], (dataset.shape, dataset.grey_levels)
    owners = [
        one for one in (dataset, like) if one and len(one.train) and (one.shape, one.grey_levels) == kind
    ]
    tested = _fingerprints(dataset.test) if owners else []
    for owner in owners:
        known = {*_fingerprints(owner.train), *_fingerprints(owner.validation)}
        if count := sum(image in known for image in tested):
            notes.append(
                f"{count:,} of {len(tested):,} test images are training or validation images of {owner.name} (the same "
                f"pixels): accuracies on them are not those on new images"
            )
    return notes


def _fingerprints(split: Split) -> list[bytes]:
    """16 bytes an image, equal where all pixels are."""
    return [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in split.pixels.numpy()]
