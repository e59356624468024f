"""Splits kept as image files in class folders, found by torchvision's ImageFolder and decoded by Pillow."""

import hashlib
from pathlib import Path

import numpy as np
import torch

from robbench.core.errors import UserError
from robbench.core.resources import sha256_file
from robbench.data.base import Split
from robbench.data.card import ImageFolders

LOSSLESS = (".bmp", ".pgm", ".png", ".ppm", ".tif", ".tiff")
LOSSY = (".jpeg", ".jpg", ".webp")
MODES = {1: "L", 3: "RGB"}
# Conversions that change no pixel's meaning: bits to grey, grey and palettes to colour.
EXACT = {("1", "L"), ("1", "RGB"), ("L", "RGB"), ("P", "RGB")}


def image_files(folder: Path, class_names: tuple[str, ...]) -> list[tuple[Path, int]]:
    """(file, label) of every image below `folder`/CLASS/, sorted by the path relative to `folder`: a sample's id is its
    position. `UserError` for class folders other than `class_names`, and for files that are no images."""
    from torchvision.datasets import ImageFolder

    if not folder.is_dir():
        raise UserError(f"{folder}: is no folder; put it there, or correct `splits` in the card")
    # Hidden files are nobody's images; a hidden folder would be a class to torchvision.
    entries = {entry.name for entry in folder.iterdir() if entry.is_dir() or not entry.name.startswith(".")}
    strange = sorted(entries - {*class_names})
    if strange:
        raise UserError(
            f"{folder}: holds {strange[0]!r}, which class_names does not have ({', '.join(class_names[:8])}); "
            f"give a folder a class, and nothing else"
        )
    try:
        found = ImageFolder(str(folder), is_valid_file=lambda path: not Path(path).name.startswith("."))
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}: {' '.join(str(error).split())[:160]}; give every class folder an image"
        ) from error
    labels = {number: class_names.index(name) for name, number in found.class_to_idx.items()}
    files = [(Path(path), labels[number]) for path, number in found.samples]
    for path, _ in files:
        if path.suffix.lower() not in (*LOSSLESS, *LOSSY):
            raise UserError(
                f"{path}: {path.suffix or 'a file without an ending'} is no image format read here; use "
                f"{', '.join(LOSSLESS)} (lossless) or {', '.join(LOSSY)}"
            )
    return sorted(files, key=lambda entry: entry[0].relative_to(folder).as_posix())


def folder_sha256(folder: Path, files: list[tuple[Path, int]]) -> str:
    """Hex sha256 over the lines `SHA256  RELATIVE/PATH` of all files, sorted by path: what
    `sha256sum */* | sha256sum` prints in that folder (in the C locale, for class folders without subfolders)."""
    lines = "".join(f"{sha256_file(path)}  {path.relative_to(folder).as_posix()}\n" for path, _ in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def read_images(files: list[tuple[Path, int]], shape: ImageFolders) -> Split:
    """The images as a split with ids 0..N-1; `UserError` for one of another size or mode, or that cannot be decoded."""
    pixels = np.stack([_pixels(path, shape) for path, _ in files])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    labels = torch.tensor([label for _, label in files], dtype=torch.int64)
    return Split(torch.arange(len(files)), labels, images, 256)


def lossy_note(files: list[tuple[Path, int]]) -> str:
    """What to know about formats that decoders may read differently; "" for lossless files."""
    lossy = sum(path.suffix.lower() in LOSSY for path, _ in files)
    return (
        f"{lossy} of {len(files)} images are lossy (JPEG, WebP): pixels may differ between decoders"
        if lossy
        else ""
    )


def _pixels(path: Path, shape: ImageFolders) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """uint8 [H,W,C]."""
    from PIL import Image, UnidentifiedImageError

    requested = MODES[shape.channels]
    try:
        with Image.open(path) as image:
            if image.size != (shape.size[1], shape.size[0]):
                raise UserError(
                    f"{path}: is {image.size[1]} x {image.size[0]} (height x width), not {shape.size[0]} x "
                    f"{shape.size[1]}; resize all images beforehand, since how it is done changes results"
                )
            transparent = "transparency" in image.info
            if image.mode != requested and ((image.mode, requested) not in EXACT or transparent):
                raise UserError(
                    f"{path}: has mode {image.mode}{' with transparency' if transparent else ''}, not {requested} "
                    f"(channels: {shape.channels}); convert it beforehand, or correct `channels`"
                )
            pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = np.asarray(
                image.convert(requested), np.uint8
            )
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: cannot be decoded ({reason}); write or download it again") from error
    return pixels.reshape(*shape.size, shape.channels)
