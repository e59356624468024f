"""Image files decoded by Pillow: their headers, their pixels, and splits of files that are decoded when asked for."""

import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from robbench.core.errors import UserError
from robbench.data.card import ImageFolders, Resize

if TYPE_CHECKING:
    from PIL import Image

MODES = {1: "L", 3: "RGB"}
# Conversions that change no pixel's meaning: bits to grey, grey and palettes to colour.
EXACT = {("1", "L"), ("1", "RGB"), ("L", "RGB"), ("P", "RGB")}


def header(path: Path) -> tuple[tuple[int, int], str]:
    """((height, width), mode) of an image from its first bytes; " with transparency" ends the mode of one with it."""
    with _opened(path) as image:
        return (image.size[1], image.size[0]), _mode(image)


def _mode(image: "Image.Image") -> str:
    return image.mode + (" with transparency" if "transparency" in image.info else "")


@contextmanager
def _opened(path: Path) -> "Iterator[Image.Image]":
    """An image file; whatever is wrong with it is a `UserError` that names it, and so is what Pillow
    warns of: half the size that it refuses."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            warnings.filterwarnings("ignore", category=UserWarning)  # about metadata
            with Image.open(path) as image:
                yield image
    except (
        UnidentifiedImageError,
        Image.DecompressionBombError,
        Image.DecompressionBombWarning,
        OSError,
        SyntaxError,
        ValueError,
        struct.error,
        zlib.error,
    ) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: cannot be decoded ({reason}); write or download it again") from error


def _pixels(path: Path, shape: ImageFolders) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """uint8 [H,W,C]."""
    requested = MODES[shape.channels]
    with _opened(path) as image:
        mode = _mode(image)
        if not shape.any_mode and mode != requested and (mode, requested) not in EXACT:
            raise UserError(
                f"{path}: has mode {mode}, not {requested} (channels: {shape.channels}); convert it beforehand, or "
                f"correct `channels`"
            )
        converted = image.convert(requested)
        if shape.resize is not None:
            converted = _resized(converted, shape.resize, shape.size)
        if converted.size != (shape.size[1], shape.size[0]):
            raise UserError(
                f"{path}: is {image.size[1]} x {image.size[0]} (height x width), not {shape.size[0]} x "
                f"{shape.size[1]}; resize all images beforehand, since how it is done changes results"
            )
        pixels: np.ndarray[tuple[int, ...], np.dtype[np.uint8]] = np.array(converted, np.uint8)
    return pixels.reshape(*shape.size, shape.channels)


def _resized(image: "Image.Image", how: Resize, size: tuple[int, int]) -> "Image.Image":
    """As torchvision's Resize(shorter) and CenterCrop(size) do it with images of Pillow."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as transforms

    resized = transforms.resize(image, [how.shorter], InterpolationMode(how.filter))
    cropped: Image.Image = transforms.center_crop(resized, list(size))
    return cropped


@dataclass(frozen=True)
class FileImages:
    """Images that are decoded when they are asked for, and then kept: of a split too large for memory.

    Attributes:
        paths: the files.
        how: size, channels and resizing.
        identity: the checksum of the files.
    """

    paths: tuple[Path, ...]
    how: ImageFolders
    identity: str
    _kept: dict[Path, torch.Tensor] = field(default_factory=dict, repr=False)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N,C,H,W)."""
        return (len(self.paths), self.how.channels, *self.how.size)

    def __getitem__(self, positions: torch.Tensor) -> torch.Tensor:
        """uint8 [n,C,H,W] at `positions` [n]."""
        paths = [self.paths[position] for position in positions.tolist()]
        for path in paths:
            if path not in self._kept:
                self._kept[path] = torch.from_numpy(_pixels(path, self.how)).permute(2, 0, 1)
        return torch.stack([self._kept[path] for path in paths]) if paths else self._nothing()

    def at(self, positions: torch.Tensor) -> "FileImages":
        """The images at `positions` alone."""
        paths = tuple(self.paths[position] for position in positions.tolist())
        return replace(self, paths=paths)

    def all(self) -> torch.Tensor:
        """Every image, uint8 [N,C,H,W], of which nothing else is kept."""
        pixels = [torch.from_numpy(_pixels(path, self.how)).permute(2, 0, 1) for path in self.paths]
        return torch.stack(pixels) if pixels else self._nothing()

    def _nothing(self) -> torch.Tensor:
        return torch.zeros((0, *self.shape[1:]), dtype=torch.uint8)

    def fingerprint(self) -> bytes:
        """What the pixels follow from: the files and how they are read."""
        return f"{self.identity}:{self.how.model_dump_json()}:{len(self.paths)}".encode()
