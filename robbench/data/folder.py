"""A data set of one's own: a folder with a card.yaml and npz files or image folders, every checksum verified."""

from collections.abc import Mapping
from pathlib import Path

import torch

from robbench.core.errors import UserError
from robbench.core.resources import dataset_root, sha256_file
from robbench.data.arrays import read_arrays
from robbench.data.base import DATASETS, Dataset, Split, stratified_split
from robbench.data.card import CARD_FILE, FolderCard, SplitFiles, SplitName, read_folder_card
from robbench.data.images import folder_sha256, image_files, lossy_note, read_images, resize_note
from robbench.data.names import BUILT_IN, place
from robbench.data.overlap import with_overlap_noted

VALIDATION_SIZE, SPLIT_SEED = 5000, 20260101


def load_folder(path: Path, data_dir: str | Path | None = None) -> Dataset:
    """The data set in a folder with a card.yaml. data_dir: folder of the named data sets.

    Without a validation split, 5,000 training images (at most a fifth) are set aside, as for torchvision's data sets;
    without a train split the data set is for evaluation only. Its note says how many test images are training images,
    its own or, where they are at hand, those of the data set that it is like. `UserError` for everything malformed.
    """
    card, folder = read_folder_card(path)
    folder = Path(card.root) if card.root else folder
    notes = [card.note]
    parts = {name: _split(folder, card, files, notes) for name, files in card.splits.items()}
    test = parts["test"]
    for name, part in parts.items():
        if part.images.shape[1:] != test.images.shape[1:]:
            raise UserError(
                f"{folder}: images of split {name} are {_sides(part)} and those of test {_sides(test)} (channels x "
                f"height x width); give all splits one size"
            )
    train, validation = _training(card, parts)
    dataset = Dataset(
        card.name,
        card.class_names,
        card.grey_levels,
        train,
        validation,
        test,
        source=card.source,
        license=card.license,
        note="; ".join(note for note in dict.fromkeys(notes) if note),
        like=card.like,
        folder=folder.resolve().name,
        corruptions=folder / card.corruptions if card.corruptions else None,
        logits=card.classes,
    )
    return with_overlap_noted(dataset, _at_hand(card.like, data_dir))


def _at_hand(name: str | None, data_dir: str | Path | None) -> Dataset | None:
    """A built-in data set whose files are here; nothing is downloaded for a comparison."""
    from robbench.data import digits, vision  # noqa: F401  (they register themselves)

    if name not in BUILT_IN or not BUILT_IN[name].trains:
        return None
    root = dataset_root(data_dir) if BUILT_IN[name].files else Path()
    return DATASETS.get(name)(root) if not BUILT_IN[name].files or place(name, root) else None


def _split(folder: Path, card: FolderCard, files: SplitFiles, notes: list[str]) -> Split:
    if card.layout is not None and files.file is not None:
        path = folder / files.file
        if not path.is_file():
            raise UserError(f"{path}: is missing; put it there, or correct `splits` in the card")
        _check_sha256(path, sha256_file(path), files.sha256)
        return read_arrays(path, card.layout, len(card.class_names), card.grey_levels)
    assert card.image_folder is not None  # the card's schema
    assert files.folder is not None
    root = folder / files.folder
    images = image_files(root, card.class_names)
    _check_sha256(
        root, folder_sha256(root, images), files.sha256, f", or remove {CARD_FILE} if robbench wrote it"
    )
    notes += [lossy_note(images), resize_note(card.image_folder)]
    return read_images(images, card.image_folder, files.sha256)


def _check_sha256(path: Path, found: str, requested: str, otherwise: str = "") -> None:
    if found != requested:
        raise UserError(
            f"{path}: has sha256 {found}, and its card says {requested}; restore the data, or correct the card if this "
            f"is what is meant{otherwise}"
        )


def _training(card: FolderCard, parts: Mapping[SplitName, Split]) -> tuple[Split, Split]:
    """(training images, validation images)."""
    train = parts.get("train")
    if train is None:
        nothing = parts["test"].subset(torch.arange(0))
        return nothing, nothing
    if "validation" in parts:
        return train, parts["validation"]
    size = min(VALIDATION_SIZE, len(train) // 5)
    try:
        validation, rest = stratified_split(train.labels, (size,), SPLIT_SEED)
    except ValueError as error:  # scikit-learn's: a class with one image, or fewer images than classes
        raise UserError(
            f"data set {card.name!r}: cannot set aside {size} of {len(train)} training images for validation "
            f"({' '.join(str(error).split())[:120]}); give a `validation` split of its own"
        ) from error
    return train.subset(rest), train.subset(validation)


def _sides(split: Split) -> str:
    return " x ".join(map(str, split.images.shape[1:]))
