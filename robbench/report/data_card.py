"""Data sets in words: their cards for terminal and HTML, and what `robbench list datasets` and `show NAME` print.

Nothing is downloaded here, and no torch imported before a data set is loaded.
"""

from collections.abc import Iterator
from pathlib import Path

from robbench.core.errors import printable
from robbench.core.resources import dataset_root
from robbench.data.card import CARD_FILE, DatasetCard
from robbench.data.names import BUILT_IN, dataset_names, place

HEADER = ("data set", "training images", "test images", "license", "where from")
Lines = list[tuple[str, str]]  # (term, text)


def data_card(card: DatasetCard) -> Lines:
    """What there is to know of a data set: note first, then source, licence, images, classes and revisions."""
    lines = [
        ("Note", card.note),
        ("Source", card.source),
        ("License", card.license or "not stated"),
        ("Folder", card.folder),
        ("Like", card.like or ""),
        (
            "Images",
            f"{' x '.join(map(str, card.shape))} (channels x height x width), {card.grey_levels} grey levels",
        ),
        ("Classes", f"{len(card.class_names)}: {', '.join(card.class_names)}"),
    ]
    lines += [
        (f"Split {name}", f"{split.n:,} images, sha256 {split.sha256}") for name, split in card.splits.items()
    ]
    return [(term, text) for term, text in lines if text]


def dataset_rows(data_dir: Path | None) -> Iterator[tuple[str, ...]]:
    """A row of `HEADER` a named data set, with the sizes it was published with."""
    root = dataset_root(data_dir)
    for name in dataset_names():
        about = BUILT_IN.get(name)
        sizes = (f"{about.train:,}", f"{about.test:,}") if about else ("", "")
        yield name, *sizes, about.license if about else "", _source(name, root)


def is_data_folder(name: str) -> bool:
    """Whether `name` is the path of a folder with the card of a data set."""
    path = Path(name).expanduser() / CARD_FILE
    return path.is_file() and "\nsplits:" in f"\n{path.read_text(encoding='utf-8', errors='replace')}"


def dataset_text(name: str, data_dir: Path | None) -> str:
    """The card of a data set, by name or by the path of its folder; of one that is not at hand, how to get it."""
    root = dataset_root(data_dir)
    source = _source(name, root)
    about = BUILT_IN.get(name)
    if about is not None and about.files and place(name, root) is None:
        sizes = f"{about.train:,} training and {about.test:,} test images"
        return f"{name}: {about.source}. License: {about.license}. {sizes} as published. Here: {source}"
    from robbench.data import load_dataset
    from robbench.data.folder import load_folder

    dataset = load_dataset(name, data_dir) if name in dataset_names() else load_folder(Path(name))
    lines = [("Data set", dataset.name), ("Here", source), *data_card(dataset.card)]
    return "\n".join(f"{term + ':':18} {printable(text)}" for term, text in lines)


def _source(name: str, root: Path) -> str:
    if name not in BUILT_IN:
        return "installed package" if name in dataset_names() else str(Path(name).expanduser())
    if not BUILT_IN[name].files:
        return "embedded (scikit-learn)"
    return str(
        place(name, root) or "not here; torchvision downloads it at first use, or name its folder: --data-dir"
    )
