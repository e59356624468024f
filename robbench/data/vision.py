"""torchvision's data sets, read through its own classes: from the user's folder, otherwise by its download."""

import contextlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robbench.data.base import DATASETS, Dataset, Split, stratified_split
from robbench.errors import UserError

VALIDATION_SIZE, SPLIT_SEED = 5000, 20260101
Reader = Callable[[Path, bool, bool], Any]


def _train_flag(class_name: str) -> Reader:
    def read(root: Path, train: bool, download: bool) -> Any:
        import torchvision.datasets

        return getattr(torchvision.datasets, class_name)(root=str(root), train=train, download=download)

    return read


def _split_name(class_name: str, folder: str) -> Reader:
    def read(root: Path, train: bool, download: bool) -> Any:
        import torchvision.datasets

        split = "train" if train else "test"
        return getattr(torchvision.datasets, class_name)(
            root=str(root / folder), split=split, download=download
        )

    return read


@dataclass(frozen=True)
class _Arrays:
    """A part of a data set kept as arrays: data uint8 [N,H,W] or [N,H,W,C], targets [N]."""

    data: np.ndarray
    targets: np.ndarray


def _arrays(folder: Path, train: bool) -> _Arrays | None:
    """What `folder`/train.npz or test.npz holds under x and y; None without such a file."""
    path = folder / ("train.npz" if train else "test.npz")
    if not path.is_file():
        return None
    with np.load(path, allow_pickle=False) as file:
        return _Arrays(file["x"], file["y"])


def _pixels(source: Any) -> torch.Tensor:
    """uint8 [N,C,H,W] from torchvision's three storage layouts (NHW tensors, NHWC arrays, NCHW arrays)."""
    data = torch.as_tensor(np.asarray(source.data))
    if data.ndim == 3:
        return data[:, None].contiguous()
    return data.contiguous() if data.shape[1] == 3 else data.permute(0, 3, 1, 2).contiguous()


def _split(source: Any) -> Split:
    labels = source.targets if hasattr(source, "targets") else source.labels
    images = _pixels(source)
    return Split(torch.arange(len(images)), torch.as_tensor(np.asarray(labels)).to(torch.int64), images, 256)


def _read(name: str, reader: Reader, root: Path, train: bool) -> Any:
    try:
        return reader(root, train, False)
    except (
        RuntimeError
    ):  # torchvision's way of saying "not in that folder"; what follows either works or reports
        if (arrays := _arrays(root / name, train)) is not None:
            return arrays
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            return reader(root, train, True)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"data set {name!r} is not in {str(root)!r} and torchvision could not download it ({reason}); "
            f"put its files there, or name their folder with --data-dir or ROBBENCH_DATA"
        ) from error


def _register(name: str, reader: Reader, class_names: tuple[str, ...] | None = None) -> None:
    def load(root: Path) -> Dataset:
        training, test = (_read(name, reader, root, train) for train in (True, False))
        names = class_names or tuple(str(label) for label in training.classes)
        full = _split(training)
        validation, train = stratified_split(full.labels, (min(VALIDATION_SIZE, len(full) // 5),), SPLIT_SEED)
        return Dataset(name, names, 256, full.subset(train), full.subset(validation), _split(test))

    DATASETS.register(name)(load)


_register("mnist", _train_flag("MNIST"), tuple(str(digit) for digit in range(10)))
_register("fashionmnist", _train_flag("FashionMNIST"))
_register(
    "cifar10",
    _train_flag("CIFAR10"),
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
_register("cifar100", _train_flag("CIFAR100"))
_register("svhn", _split_name("SVHN", "svhn"), tuple(str(digit) for digit in range(10)))
_register("stl10", _split_name("STL10", "."))
