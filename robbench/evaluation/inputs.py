"""What the Python API is given as data, as images and labels: read once, copied and checked."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from robbench.attacks.checks import BOX_TOLERANCE
from robbench.core.errors import UserError
from robbench.data.base import Split, sample_ids

Array = Tensor | np.ndarray | Sequence[object]
Data = Array | Dataset[Any] | Iterable[Any]
SCALED = "x is uint8: its pixels were divided by 255"


@dataclass(frozen=True)
class Inputs:
    """Images and labels of a call, copies on the CPU.

    Attributes:
        images: float32 [N,C,H,W] in [0,1].
        labels: int64 [N].
        ids: int64 [N], the position of each sample in what the caller gave.
        device: where the caller's images are.
        dtype: theirs.
        notes: what was done to them, one line each.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor
    device: torch.device
    dtype: torch.dtype
    notes: tuple[str, ...] = ()


def read_inputs(x: Data, y: Array | None = None, n: int | None = None, seed: int = 0) -> Inputs:
    """The samples of arrays `x`, `y`, or of a data set, loader or other iterable `x` of pairs or batches.

    n: of arrays and data sets with random access, so many samples drawn at random by `seed`; of anything else the first
    n; None for all. `UserError` in one line for what is no images in [0,1] with one integer label each.
    """
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise UserError(
            f"n={n!r} is no number of samples; give a whole number of at least 1, or leave it out"
        )
    if y is not None:
        return _of_arrays(x, y, n, seed)
    if isinstance(x, Tensor | np.ndarray):
        raise UserError("y is missing: give the labels of the images, [N] integers")
    if _has_random_access(x):
        ids = _draw(len(x), n, seed)  # type: ignore[arg-type]
        return _collect((x[int(i)] for i in ids), len(ids), ids)  # type: ignore[index]
    if not hasattr(x, "__iter__"):
        raise UserError(
            f"x is of type {type(x).__name__} and y is missing: give images x and labels y, or for x a data set, a "
            f"DataLoader or another iterable of (image, label) pairs or (images, labels) batches"
        )
    if n is None and not _is_sized(x):
        raise UserError(
            f"x is of type {type(x).__name__} without a length, which may never end; say how many samples "
            f"to read: n=1000"
        )
    return _collect(iter(x), n)


def _of_arrays(x: Data, y: Array, n: int | None, seed: int) -> Inputs:
    if isinstance(x, Dataset) or not _is_sized(x):
        raise UserError(
            f"x is of type {type(x).__name__}, which brings its own labels, and y is given too; leave y out, "
            f"or give arrays"
        )
    given = to_tensor("x", x)
    images, labels = _images(given, x), _labels(y)
    if len(images) != len(labels):
        raise UserError(f"x has {len(images)} images and y {len(labels)} labels; give one label per image")
    ids = _draw(len(images), n, seed)
    notes = (SCALED,) if given.dtype == torch.uint8 else ()
    return Inputs(images[ids], labels[ids], ids, given.device, given.dtype, notes)


def _draw(size: int, n: int | None, seed: int) -> Tensor:
    """Positions of all, or of n drawn as `robbench run` draws them, in ascending order."""
    if not size:
        raise UserError("x has no images; give at least one")
    positions = torch.arange(size)
    if n is None:
        return positions
    return torch.tensor(sorted(sample_ids(Split(positions, positions, positions, 2), n, seed)))


def _has_random_access(x: object) -> bool:
    if isinstance(x, IterableDataset):
        return False
    return (
        hasattr(x, "__getitem__") and _is_sized(x) and (isinstance(x, Dataset) or not hasattr(x, "__iter__"))
    )


def _is_sized(x: object) -> bool:
    try:
        len(x)  # type: ignore[arg-type]
    except TypeError:
        return False
    return True


def _collect(items: Iterator[Any], n: int | None, ids: Tensor | None = None) -> Inputs:
    """The first n samples of pairs or batches (None: all)."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    device, dtype, count = torch.device("cpu"), torch.float32, 0
    for item in items:
        x, y = _pair(item)
        if not images:
            device, dtype = x.device, x.dtype
        elif (x.dtype == torch.uint8) != (dtype == torch.uint8):
            raise UserError(f"x yields images of {dtype} and of {x.dtype}; give all of them in one type")
        images.append(_images(x, x))
        labels.append(y)
        if images[-1].shape[1:] != images[0].shape[1:]:
            first, other = (" x ".join(map(str, part.shape[1:])) for part in (images[0], images[-1]))
            raise UserError(f"x yields images of {first} and of {other}; give all of them one size")
        count += len(x)
        if n is not None and count >= n:
            break
    if not count:
        raise UserError("x has no images; give at least one")
    if n is not None and count < n:
        raise UserError(f"n={n}: x ended after {count} samples; give n={count} or less")
    taken = torch.arange(min(count, n or count)) if ids is None else ids
    notes = (SCALED,) if dtype == torch.uint8 else ()
    every = slice(len(taken))
    return Inputs(torch.cat(images)[every], torch.cat(labels)[every], taken, device, dtype, notes)


def _pair(item: Any) -> tuple[Tensor, Tensor]:
    """A batch of an (image, label) pair or an (images, labels) batch."""
    if not isinstance(item, list | tuple) or len(item) != 2:
        raise UserError(f"x yields {_in_words(item)}; {_next_step(item)}")
    if hasattr(item[0], "getbands"):  # an image of Pillow
        raise UserError(
            "x yields Pillow images; give the data set transform=torchvision.transforms.ToTensor(), which makes "
            "tensors in [0,1] of them"
        )
    x, y = to_tensor("x", item[0]), item[1]
    if x.ndim != 3:
        labels = _labels(y)
        if x.ndim == 4 and len(x) != len(labels):
            raise UserError(f"x yields {len(x)} images with {len(labels)} labels; give one label per image")
        return x, labels
    label = to_tensor("y", y)
    if label.ndim:
        raise UserError(
            f"x yields an image {tuple(x.shape)} with labels {tuple(label.shape)}; give (image, label) pairs of "
            f"[C,H,W] and an integer, or batches of [N,C,H,W] and [N]"
        )
    return x[None], _labels(label[None])


def _in_words(item: Any) -> str:
    if isinstance(item, list | tuple):
        return f"a {type(item).__name__} of {len(item)}, not (x, y)"
    return f"a {type(item).__name__}, not (x, y)"


def _next_step(item: Any) -> str:
    if isinstance(item, dict):
        keys = ", ".join(map(repr, list(item)[:4]))
        return f"give pairs, as in ((item[IMAGE], item[LABEL]) for item in x), with keys of {keys}, and n="
    if isinstance(item, list | tuple) and len(item) > 2:
        return "give pairs, as in ((x, y) for x, y, *_ in data), and n="
    return "give (image, label) pairs or (images, labels) batches, or images x and labels y"


def to_tensor(name: str, values: object) -> Tensor:
    """`values` as a detached tensor; `UserError` for what is no array of numbers. name: of the argument."""
    try:
        if isinstance(values, list | tuple) and values and isinstance(values[0], Tensor):
            values = torch.stack(list(values))
        if isinstance(values, Tensor):
            dense = values.detach()
        else:
            array = np.array(
                values, order="C"
            )  # a copy: of negative strides and read-only memory torch knows nothing
            dense = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
        if dense.layout != torch.strided or dense.is_quantized or dense.is_meta:
            raise TypeError(f"a tensor of layout {dense.layout}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{name} is no array of numbers ({' '.join(str(error).split())[:100]}); give a tensor, a NumPy array or a "
            f"list of numbers"
        ) from error
    return dense


def _images(given: Tensor, x: object) -> Tensor:
    """float32 copies [N,C,H,W] of images; `UserError` for other shapes, types and ranges. x: what the caller gave."""
    if not given.numel():
        raise UserError(f"x has no images (shape {tuple(given.shape)}); give at least one")
    _require_shape(given, x)
    if given.dtype == torch.uint8:
        return given.cpu().to(torch.float32, copy=True) / 255
    if not given.is_floating_point():
        raise UserError(
            f"x is {given.dtype}; give uint8 pixels 0..255 or floating point pixels in [0,1], as in x / 255"
        )
    _require_range(given)
    return given.cpu().to(torch.float32, copy=True, memory_format=torch.contiguous_format).clamp_(0.0, 1.0)


def _require_shape(images: Tensor, x: object) -> None:
    shape = tuple(images.shape)
    if images.ndim == 3:
        raise UserError(
            f"x has shape {shape}, not [N,C,H,W]; give x[:, None] of grey images [N,H,W], or x[None] of one image"
        )
    if images.ndim != 4:
        raise UserError(f"x has shape {shape}; give images [N,C,H,W], as in x.reshape(N, C, H, W)")
    channels, height, last = shape[1:]
    if last in (1, 3) and channels not in (1, 3) and height > 3:
        turned = {Tensor: "x.permute", np.ndarray: "x.transpose"}.get(type(x), "numpy.asarray(x).transpose")
        raise UserError(f"x has shape {shape}, channels last; give {turned}(0, 3, 1, 2), which is [N,C,H,W]")


def _require_range(images: Tensor) -> None:
    finite = torch.isfinite(images).flatten(1).all(1)
    if not bool(finite.all()):
        bad = (~finite).nonzero().squeeze(1)
        raise UserError(
            f"x has NaN or infinite pixels in {len(bad)} of {len(images)} images (the first is x[{int(bad[0])}]); "
            f"give pixels in [0,1]"
        )
    low, high = float(images.min()), float(images.max())
    if low >= -BOX_TOLERANCE and high <= 1.0 + BOX_TOLERANCE:
        return
    step = "put the normalisation inside the model"
    if low >= 0.0 and 1.5 < high <= 255.0:
        step = "divide by 255 where these are 0..255: x / 255"
    raise UserError(f"x spans [{low:.9g}, {high:.9g}], and pixels are in [0,1]; {step}")


def _labels(y: object) -> Tensor:
    """int64 copies [N] of labels; `UserError` for other shapes and types."""
    labels = to_tensor("y", y)
    shape, whole = (
        tuple(labels.shape),
        "y.long()" if isinstance(y, Tensor) else "numpy.asarray(y).astype('int64')",
    )
    if labels.ndim == 2:
        many = shape[1] > 1
        raise UserError(
            f"y has shape {shape}{', as one-hot labels have' if many else ''}; give class numbers [N]: "
            f"{'y.argmax(1)' if many else 'y.reshape(-1)'}"
        )
    if labels.ndim != 1:
        raise UserError(f"y has shape {shape}; give one class number per image, [N]")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise UserError(
            f"y is {labels.dtype}; give integer class numbers 0, 1, ... ({whole}, once they are whole numbers)"
        )
    return labels.cpu().to(torch.int64, copy=True)
