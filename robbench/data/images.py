"""Splits kept as image files in class folders, decoded by Pillow."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from robbench.core.errors import UserError
from robbench.core.resources import sha256_file
from robbench.data.base import Split
from robbench.data.card import ImageFolders
from robbench.data.decode import FileImages

IN_MEMORY = 1 << 30  # bytes of pixels
DEEPEST = 32  # folders in a class folder
LOSSLESS = (".bmp", ".pgm", ".png", ".ppm", ".tif", ".tiff")
LOSSY = (".jpeg", ".jpg", ".webp")


def image_files(folder: Path, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    """(file, label) of every image below `folder`/CLASS/, sorted by the path relative to `folder`: a sample's id is its
    position. Hidden entries, Thumbs.db and desktop.ini are nobody's images and are passed over, as are files beside the
    class folders that are no images. `UserError` for class folders other than `class_names`, for files that are no
    images, and for links."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; put it there, or correct `splits` in the card")
    labels = {name: label for label, name in enumerate(class_names)}
    strange = [e.name for e in _entries(folder) if e.name not in labels and (e.is_dir() or _is_image(e))]
    if strange:
        raise UserError(
            f"{folder}: holds {strange[0]!r}, which class_names does not have ({', '.join(class_names[:8])}); "
            f"give a folder a class, and nothing else"
        )
    found = [(path, labels[name]) for name in class_names for path in _class_files(folder / name)]
    return sorted(found, key=lambda entry: entry[0].relative_to(folder).as_posix())


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders of a folder without a card, sorted; `UserError` for images beside them and for names
    that would be lost on paper or on another machine."""
    for entry in _entries(folder):
        if _is_image(entry) and not entry.is_dir():
            raise UserError(f"{entry}: lies beside the class folders; move it into the folder of its class")
    names = [entry.name for entry in _entries(folder) if entry.is_dir()]
    for name in names:
        if not name.isprintable():
            raise UserError(
                f"{folder}: class folder {name!r} has characters that cannot be printed; rename it"
            )
    lowered: dict[str, str] = {}
    for name in names:
        if (other := lowered.setdefault(name.casefold(), name)) != name:
            raise UserError(
                f"{folder}: class folders {other!r} and {name!r} differ in case only, which makes one folder of them "
                f"on other machines; merge or rename them"
            )
    return names


def _entries(folder: Path) -> list[Path]:
    """What lies in a folder, sorted by name, without what is passed over."""
    try:
        found = sorted(folder.iterdir(), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); allow reading it") from error
    return [
        entry
        for entry in found
        if not entry.name.startswith(".") and entry.name.lower() not in ("thumbs.db", "desktop.ini")
    ]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in (*LOSSLESS, *LOSSY)


def _class_files(folder: Path) -> list[Path]:
    """Every image in a class folder and the folders in it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is missing; give every class a folder")
    files = list(_files(folder))
    if not files:
        raise UserError(f"{folder}: holds no image; give every class folder an image, or remove it")
    return files


def _files(folder: Path, depth: int = 1) -> Iterator[Path]:
    _refuse_link(folder)
    if depth > DEEPEST:
        raise UserError(
            f"{folder}: lies more than {DEEPEST} folders deep; give a folder a class, with images in it"
        )
    for entry in _entries(folder):
        _refuse_link(entry)
        if entry.is_dir():
            yield from _files(entry, depth + 1)
        elif not _is_image(entry):
            raise UserError(
                f"{entry}: {entry.suffix or 'a file without an ending'} is no image format read here; use "
                f"{', '.join(LOSSLESS)} (lossless) or {', '.join(LOSSY)}"
            )
        elif not entry.is_file():
            raise UserError(f"{entry}: is no file; remove it")
        else:
            yield entry


def _refuse_link(path: Path) -> None:
    """A link may lead anywhere, and what it leads to would end up in reports."""
    if path.is_symlink():
        raise UserError(
            f"{path}: is a link; put the images themselves there (cp -rL copies what links lead to)"
        )


def folder_sha256(folder: Path, files: list[tuple[Path, int]]) -> str:
    """Hex sha256 over the lines `SHA256  RELATIVE/PATH` of all files, sorted by path: what
    `sha256sum */* | sha256sum` prints in that folder (in the C locale, for class folders without subfolders)."""
    lines = "".join(f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path, _ in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_images(files: list[tuple[Path, int]], shape: ImageFolders, identity: str) -> Split:
    """The images as a split with ids 0..N-1; `UserError` for one of another size or mode, or that cannot be decoded.

    More than `IN_MEMORY` bytes of pixels are decoded when they are asked for; their revision then stands on `identity`,
    the checksum of the files.
    """
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    images = FileImages(tuple(path for path, _ in files), shape, identity)
    eager = math.prod(images.shape) <= IN_MEMORY
    return Split(torch.arange(len(files)), labels, images.all() if eager else images, 256)


def lossy_note(files: list[tuple[Path, int]]) -> str:
    """What to know about formats that decoders may read differently; "" for lossless files."""
    lossy = sum(path.suffix.lower() in LOSSY for path, _ in files)
    return (
        f"{lossy} of {len(files)} images are lossy (JPEG, WebP): pixels may differ between decoders"
        if lossy
        else ""
    )


def resize_note(how: ImageFolders) -> str:
    """How images were resized, "" where they were not: it changes results."""
    if how.resize is None:
        return ""
    height, width = how.size
    return (
        f"images resized to a shorter side of {how.resize.shorter} (Pillow's {how.resize.filter}), centre {height} x "
        f"{width} cut out"
    )
