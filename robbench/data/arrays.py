"""Splits kept as npz arrays: x, uint8 grey levels, and y, labels. Every malformed file is an error in one line."""

from pathlib import Path

import numpy as np
import torch

from robbench.core.errors import UserError
from robbench.core.npz import Array, npz_names, read_npz
from robbench.data.base import Split
from robbench.data.card import Layout

AXES = {
    "NHW": "images, height, width",
    "NHWC": "images, height, width, 1 or 3 channels",
    "NCHW": "images, 1 or 3 channels, height, width",
}


def read_arrays(path: Path, layout: Layout, classes: int, levels: int) -> Split:
    """The split in an npz file; sample ids are positions. Other arrays in the file are not read.

    x: uint8 in `layout`, values 0..levels-1. y: integers [N] in 0..classes-1. `UserError` for anything else.
    """
    x, y = _loaded(path)
    _check_images(path, x, layout, levels)
    _check_labels(path, y, len(x), classes)
    return Split(
        torch.arange(len(x)), torch.from_numpy(y.astype(np.int64)), _channels_first(x, layout), levels
    )


def _loaded(path: Path) -> tuple[Array, Array]:
    try:
        with path.open("rb") as stream:
            start = stream.read(6)
        if start == b"\x93NUMPY":
            raise UserError(
                f"{path}: is no npz file; write it with numpy.savez_compressed(path, x=..., y=...)"
            )
        if start[:1] == b"\x80":  # how pickles begin
            raise UserError(_unreadable(path, ValueError("allow_pickle")))
        names = npz_names(path)
        missing = [name for name in ("x", "y") if name not in names]
        if missing:
            raise UserError(
                f"{path}: has no array {missing[0]!r} but {', '.join(names[:5]) or 'none'}; it needs x "
                f"(uint8 images) and y (labels)"
            )
        arrays = read_npz(path, ("x", "y"))
        return arrays["x"], arrays["y"]
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing; put it there, or correct `splits` in the card") from error
    except (ValueError, OSError) as error:
        raise UserError(_unreadable(path, error)) from error


def _unreadable(path: Path, error: Exception) -> str:
    if "allow_pickle" in str(error):  # numpy's words for an array of Python objects, and for a bare pickle
        return (
            f"{path}: holds pickled objects, which are never loaded (they could run code); write plain arrays with "
            f"numpy.savez_compressed(path, x=..., y=...)"
        )
    return f"{path}: cannot be read as npz ({' '.join(str(error).split())[:120]}); write or download it again"


def _check_images(path: Path, x: Array, layout: Layout, levels: int) -> None:
    if np.issubdtype(x.dtype, np.floating):
        nan = " with NaN or infinite values" if not np.isfinite(x).all() else ""
        raise UserError(
            f"{path}: x is {x.dtype}{nan}; store uint8 grey levels 0..{levels - 1} without normalisation, "
            f"as in numpy.round({levels - 1} * x).astype('uint8') of images in [0,1]"
        )
    if x.dtype != np.uint8:
        raise UserError(f"{path}: x is {x.dtype}; store uint8 grey levels 0..{levels - 1}")
    channels = 1 if layout == "NHW" else x.shape[layout.index("C")] if x.ndim == 4 else 0
    if x.ndim != len(layout) or channels not in (1, 3):
        raise UserError(
            f"{path}: x has shape {x.shape}; layout {layout} means ({AXES[layout]}): correct `layout` or the array"
        )
    if not x.size:
        raise UserError(f"{path}: x has shape {x.shape} and so no image; give at least one")
    if int(x.max()) >= levels:
        raise UserError(
            f"{path}: x has a grey level {int(x.max())}, and grey_levels {levels} means 0..{levels - 1}; "
            f"correct grey_levels or the array"
        )


def _check_labels(path: Path, y: Array, images: int, classes: int) -> None:
    if not np.issubdtype(y.dtype, np.integer):
        raise UserError(f"{path}: y is {y.dtype}; store labels as integers 0..{classes - 1}")
    if y.shape != (images,):
        raise UserError(f"{path}: y has shape {y.shape} and x {images} images; give one label an image")
    outside = np.flatnonzero((y < 0) | (y >= classes))
    if len(outside):
        first = int(outside[0])
        raise UserError(
            f"{path}: y[{first}] is {int(y[first])}, and {classes} classes mean labels 0..{classes - 1} "
            f"({len(outside)} of {images} are outside); correct class_names or the labels"
        )


def _channels_first(x: Array, layout: Layout) -> torch.Tensor:
    """uint8 [N,C,H,W]."""
    images = torch.from_numpy(x)
    if layout == "NHW":
        return images[:, None].contiguous()
    return images.permute(0, 3, 1, 2).contiguous() if layout == "NHWC" else images.contiguous()
