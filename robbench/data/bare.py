"""A folder of class folders without a card is a data set too: its card is written at first use.

No torch here: options are looked at before anything heavy is imported.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from robbench.core.errors import UserError, unknown_name
from robbench.core.resources import write_text_atomically
from robbench.core.schema import dump_yaml, load_yaml
from robbench.data.card import CARD_FILE, FolderCard, ImageFolders, Resize, SplitFiles, read_folder_card
from robbench.data.names import dataset_names

HEADER = (
    "# Written by robbench when the folder was first used; edit it, or remove it to read the images anew.\n"
)
SPLIT_NAMES = ("test", "train", "training", "val", "valid", "validation")
COLOUR = ("1", "L", "P", "RGB")


@dataclass(frozen=True)
class OwnData:
    """A data set of one's own. name: of the data set. path: its folder, or its card where that lies elsewhere. line:
    what to tell the user, "" where nothing was written."""

    name: str
    path: Path
    line: str = ""


def own_data(folder: Path, size: str | None, like: str | None, run_folder: Callable[[str], Path]) -> OwnData:
    """The data set in `folder`, whose card is written where it has none: into the folder, or where that cannot be
    written into the run folder, `run_folder` of the data set's name.

    size: "32" or "32x48" (height x width), to which images are resized; None for images of one size. like: the known
    data set whose models and budgets fit. `UserError` for what is no data set, and for a card that says otherwise.
    """
    folder = folder.expanduser()
    if folder.name == CARD_FILE or (folder / CARD_FILE).is_file() or not folder.is_dir():
        return _with_card(folder, size, like)
    _require_class_folders(folder)
    name = _name(folder)
    elsewhere = run_folder(name) / CARD_FILE
    if elsewhere.is_file() and load_yaml(elsewhere, FolderCard).root == str(folder.resolve()):
        return _with_card(elsewhere, size, like)
    card = _card(folder, name, size, like)
    try:
        _write(folder / CARD_FILE, card)
    except OSError:
        _write(elsewhere, card.model_copy(update={"root": str(folder.resolve())}))
        return OwnData(name, elsewhere, _line(card, elsewhere))
    return OwnData(name, folder, _line(card, folder / CARD_FILE))


def _require_class_folders(folder: Path) -> None:
    from robbench.data.images import class_folders

    if not class_folders(folder):
        raise UserError(
            f"{folder}: holds no card.yaml and no class folders; give a folder of class folders of images, or one "
            f"with a card (docs/data.md)"
        )


def _with_card(path: Path, size: str | None, like: str | None) -> OwnData:
    card, folder = read_folder_card(path)
    file = folder / CARD_FILE
    if size is not None and (card.image_folder is None or _sizes(size) != _stated(card.image_folder)):
        read = "is read from arrays" if card.image_folder is None else f"says {_described(card.image_folder)}"
        raise UserError(
            f"--size {size}: {file} {read}; leave --size out, or remove the card to read the images anew"
        )
    if like is None or card.like == like:
        return OwnData(card.name, path)
    if not file.read_text(encoding="utf-8").startswith(HEADER):
        raise UserError(f"--like {like}: {file} says like: {card.like or 'nothing'}; change it there")
    _write(file, _checked(card.model_copy(update={"like": like})))
    return OwnData(card.name, path, f"{file}: now like {like}")


def _write(path: Path, card: FolderCard) -> None:
    write_text_atomically(path, HEADER + dump_yaml(card))


def _checked(card: FolderCard) -> FolderCard:
    """`card` once more through its schema, which `model_copy` does not ask."""
    if card.like is not None and card.like not in dataset_names():
        raise unknown_name("data set", card.like, dataset_names(), "as --like NAME")
    return card


def _name(folder: Path) -> str:
    """A name for the data set: that of its folder, with its parent's where it says nothing."""
    path = folder.resolve()
    parts = [path.parent.name, path.name] if path.name.lower() in (*SPLIT_NAMES, "images") else [path.name]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts)).strip("-._")[:80] or "images"
    return f"{name}-folder" if name in dataset_names() else name


def _card(folder: Path, name: str, size: str | None, like: str | None) -> FolderCard:
    from robbench.data.images import class_folders, folder_sha256, image_files

    names = class_folders(folder)
    if {one.lower() for one in names} <= {*SPLIT_NAMES}:
        raise UserError(
            f"{folder}: holds {', '.join(names)}, which look like splits, not classes; name the one to attack, as in "
            f"--dataset {folder / names[0]}"
        )
    if len(names) < 2:
        raise UserError(
            f"{folder}: holds one class folder, {names[0]!r}; a data set has two classes or more, a folder each"
        )
    files = image_files(folder, names)
    how = _how([path for path, _ in files], size)
    split = SplitFiles(folder=".", sha256=folder_sha256(folder, files))
    card = FolderCard.model_construct(
        name=name, class_names=tuple(names), image_folder=how, splits={"test": split}, like=like
    )
    return FolderCard.model_validate(_checked(card).model_dump())


def _how(paths: Sequence[Path], size: str | None) -> ImageFolders:
    """How the images are to be read; `UserError` for images of several sizes where none is given, and for those whose
    pixels would have to be changed to fit."""
    from robbench.data.decode import header

    first: dict[tuple[int, int], Path] = {}
    modes: Counter[str] = Counter()
    for path in paths:
        sides, mode = header(path)
        first.setdefault(sides, path)
        modes[mode] += 1
        if mode not in COLOUR:
            raise UserError(
                f"{path}: has mode {mode}; save it as grey or RGB with 8 bits and without transparency, as in "
                f"PIL.Image.open(path).convert('RGB')"
            )
    channels: Literal[1, 3] = 1 if {*modes} <= {"1", "L"} else 3
    if size is not None:
        sides, shorter = _sizes(size)
        return ImageFolders(size=sides, channels=channels, resize=Resize(shorter=shorter))
    if len(first) > 1:
        (a, one), (b, other) = list(first.items())[:2]
        raise UserError(
            f"images have {len(first)} sizes, as {a[0]} x {a[1]} ({one}) and {b[0]} x {b[1]} ({other}); "
            f"give --size N to resize them all (Pillow's Lanczos, centre cut out), or resize them beforehand"
        )
    return ImageFolders(size=next(iter(first)), channels=channels)


def _sizes(text: str) -> tuple[tuple[int, int], int]:
    """((height, width), shorter side before the cut) of `--size`."""
    found = re.fullmatch(r"([0-9]{1,5})(?:x([0-9]{1,5}))?", text.strip())
    height, width = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not (0 < height <= 10_000 and 0 < width <= 10_000):
        raise UserError(f"--size {text[:40]!r} is no size; give 32, or 32x48 (height x width)")
    return (height, width), max(height, width)


def _stated(how: ImageFolders) -> tuple[tuple[int, int], int]:
    return how.size, how.resize.shorter if how.resize else 0


def _described(how: ImageFolders) -> str:
    text = f"{how.size[0]} x {how.size[1]}"
    return (
        f"{text}, resized to {how.resize.shorter} by {how.resize.filter}"
        if how.resize
        else f"{text}, as the files are"
    )


def _line(card: FolderCard, path: Path) -> str:
    assert card.image_folder is not None
    kind = "grey" if card.image_folder.channels == 1 else "RGB"
    classes = f"{len(card.class_names)} classes in the order of their names"
    return f"Data set {card.name}: {classes}, {kind} {_described(card.image_folder)}; card written to {path}"
