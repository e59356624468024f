"""torchvision's data sets, read by torchvision: from the user's folder, otherwise by its download.

Where the folder has NAME/train.npz and NAME/test.npz (x: uint8 NHWC, or NHW for grey images; y: labels) instead, in the
published order, these are read. Whatever is read must be what was published (`robbench.data.checksums`).
"""

import contextlib
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from robbench.core.errors import UserError
from robbench.data.arrays import read_arrays
from robbench.data.base import DATASETS, Dataset, Split, stratified_split
from robbench.data.checksums import FILES, Part, check_arrays, check_files
from robbench.data.names import BUILT_IN

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
# (root, training images?) -> split. Of files that `check_files` has found to be the published ones.
Reader = Callable[[Path, bool], Split]
Downloader = Callable[[Path], object]


@dataclass(frozen=True)
class _Source:
    """How torchvision reads a data set below a folder, and gets it there."""

    read: Reader
    download: Downloader


def _idx(class_name: str) -> _Source:
    """MNIST's format. The functions that read the raw files, not the class: that prefers a `processed` folder of older
    versions of itself, whose files nobody published."""

    def read(root: Path, train: bool) -> Split:
        from torchvision.datasets.mnist import read_image_file, read_label_file

        prefix = str(root / class_name / "raw" / ("train" if train else "t10k"))
        images = read_image_file(f"{prefix}-images-idx3-ubyte")
        return _split(images, read_label_file(f"{prefix}-labels-idx1-ubyte"))

    def download(root: Path) -> None:
        import torchvision.datasets

        kind = getattr(torchvision.datasets, class_name)
        source = kind.__new__(kind)  # __init__ would return early where there is a `processed` folder
        source.root = str(root)
        source.download()

    return _Source(read, download)


def _train_flag(class_name: str) -> _Source:
    def made(root: Path, train: bool, download: bool) -> Any:
        import torchvision.datasets

        return getattr(torchvision.datasets, class_name)(root=str(root), train=train, download=download)

    def read(root: Path, train: bool) -> Split:
        source = made(root, train, False)
        return _split(source.data, source.targets)

    return _Source(read, lambda root: made(root, True, True))


def _split_name(class_name: str, folder: str) -> _Source:
    def made(root: Path, train: bool, download: bool) -> Any:
        import torchvision.datasets

        kind, split = getattr(torchvision.datasets, class_name), "train" if train else "test"
        return kind(root=str(root / folder), split=split, download=download)

    def read(root: Path, train: bool) -> Split:
        source = made(root, train, False)
        return _split(source.data, source.labels)

    return _Source(read, lambda root: [made(root, train, True) for train in (True, False)])


def _split(images: Any, labels: Any) -> Split:
    """From torchvision's three storage layouts (NHW tensors, NHWC arrays, NCHW arrays)."""
    data = torch.as_tensor(np.asarray(images))
    if data.ndim == 3:
        data = data[:, None]
    elif data.shape[1] != 3:
        data = data.permute(0, 3, 1, 2)
    targets = torch.as_tensor(np.asarray(labels)).to(torch.int64)
    return Split(torch.arange(len(data)), targets, data.contiguous(), 256)


def _parts(name: str, source: _Source, root: Path, classes: int) -> tuple[Split, Split]:
    """Training and test images from the published files below `root`, else from root/NAME/train.npz and test.npz, else
    downloaded."""
    if check_files(name, root):
        with contextlib.suppress(RuntimeError):  # torchvision misses other files: STL-10's unlabelled images
            return source.read(root, True), source.read(root, False)
    train, test = (root / name / f"{part}.npz" for part in ("train", "test"))
    if train.is_file() and test.is_file():
        tested = _arrays(test, name, "test", classes)  # the smaller one first
        return _arrays(train, name, "train", classes), tested
    _download(name, source, root)
    return source.read(root, True), source.read(root, False)


def _arrays(path: Path, name: str, part: Part, classes: int) -> Split:
    split = read_arrays(path, "NHW" if name in GREY else "NHWC", classes, 256)
    check_arrays(path, name, part, split.pixels.numpy(), split.labels.numpy())
    return split


def _download(name: str, source: _Source, root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()):
            source.download(root)
        if not check_files(name, root):
            raise OSError("it left some of them out")
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"data set {name!r} is not in {str(root)!r} and torchvision could not download it ({reason}); "
            f"put its files there ({_listed(name)}), or name their folder with --data-dir or ROBBENCH_DATA"
        ) from error


def _listed(name: str) -> str:
    first, *more = FILES[name]
    return f"{first} and {len(more)} more"


def _note(name: str, train: Split, test: Split) -> str:
    """Where the files at hand are not the whole published data set."""
    sizes = (("test", len(test), BUILT_IN[name].test), ("training", len(train), BUILT_IN[name].train))
    return "; ".join(
        f"{split} set: only {found:,} images, the first of the {published:,} published ones"
        for split, found, published in sizes
        if found != published
    )


def _register(name: str, source: _Source, class_names: tuple[str, ...]) -> None:
    def load(root: Path) -> Dataset:
        full, test = _parts(name, source, root, len(class_names))
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
_register("mnist", _idx("MNIST"), DIGITS)
_register("svhn", _split_name("SVHN", "svhn"), DIGITS)
_register(
    "fashionmnist",
    _idx("FashionMNIST"),
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
