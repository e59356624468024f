"""torchvision's data sets, read through its own classes: from the user's folder, otherwise by its download.

Where the folder has NAME/train.npz and NAME/test.npz (x: uint8 NHWC, or NHW for grey images; y: labels) instead, in the
published order, these are read.
"""

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robbench.data.arrays import read_arrays
from robbench.data.base import DATASETS, Dataset, Split, stratified_split
from robbench.data.names import BUILT_IN
from robbench.errors import UserError

VALIDATION_SIZE, SPLIT_SEED = 5000, 20260101
GREY = ("mnist", "fashionmnist")
CIFAR100_CLASSES = tuple(
    re.findall(
        r"\w+",
        """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm""",
    )
)
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


def _read(name: str, reader: Reader, root: Path, train: bool, classes: int) -> Split:
    """A split from torchvision's files below `root`, else from root/NAME/train.npz or test.npz, else downloaded."""
    arrays = root / name / ("train.npz" if train else "test.npz")
    try:
        return _split(reader(root, train, False))
    except RuntimeError:
        # torchvision's way of saying "not in that folder"; what follows either works or reports
        if arrays.is_file():
            return read_arrays(arrays, "NHW" if name in GREY else "NHWC", classes, 256)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            return _split(reader(root, train, True))
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"data set {name!r} is not in {str(root)!r} and torchvision could not download it ({reason}); "
            f"put its files there, or name their folder with --data-dir or ROBBENCH_DATA"
        ) from error


def _note(name: str, train: Split, test: Split) -> str:
    """Where the files at hand are not the whole published data set."""
    sizes = (("test", len(test), BUILT_IN[name].test), ("training", len(train), BUILT_IN[name].train))
    return "; ".join(
        f"{split} set: only {found:,} images, the first of the {published:,} published ones"
        for split, found, published in sizes
        if found != published
    )


def _register(name: str, reader: Reader, class_names: tuple[str, ...]) -> None:
    def load(root: Path) -> Dataset:
        full, test = (_read(name, reader, root, train, len(class_names)) for train in (True, False))
        validation, train = stratified_split(full.labels, (min(VALIDATION_SIZE, len(full) // 5),), SPLIT_SEED)
        about = BUILT_IN[name]
        return Dataset(
            name,
            class_names,
            256,
            full.subset(train),
            full.subset(validation),
            test,
            source=about.source,
            license=about.license,
            note=_note(name, full, test),
            corruptions=root / about.corruptions if about.corruptions else None,
        )

    DATASETS.register(name)(load)


DIGITS = tuple(str(digit) for digit in range(10))
_register("mnist", _train_flag("MNIST"), DIGITS)
_register("svhn", _split_name("SVHN", "svhn"), DIGITS)
_register(
    "fashionmnist",
    _train_flag("FashionMNIST"),
    (
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ),
)
_register(
    "cifar10",
    _train_flag("CIFAR10"),
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
_register(
    "stl10",
    _split_name("STL10", "."),
    ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"),
)
_register("cifar100", _train_flag("CIFAR100"), CIFAR100_CLASSES)
