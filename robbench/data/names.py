"""The built-in data sets as published: names, sizes, sources, licences, where their files lie. No torch here."""

from dataclasses import dataclass
from pathlib import Path

NO_LICENSE = "none stated by its authors"


@dataclass(frozen=True)
class Published:
    """A public data set.

    Attributes:
        files: what lies below --data-dir in torchvision's layout; "" inside a package.
        train, test: numbers of images as published.
        source, license: for its card.
        corruptions: folder below --data-dir of its published corrupted test images.
        corruptions_from: where these are published.
        trains: whether the training images are read too.
    """

    files: str
    train: int
    test: int
    source: str
    license: str
    corruptions: str = ""
    corruptions_from: str = ""
    trains: bool = True


BUILT_IN = {
    "cifar10": Published(
        "cifar-10-batches-py",
        50_000,
        10_000,
        "A. Krizhevsky, Learning multiple layers of features from tiny images, 2009",
        NO_LICENSE,
        "CIFAR-10-C",
        "https://zenodo.org/records/2535967",
    ),
    "cifar100": Published(
        "cifar-100-python",
        50_000,
        10_000,
        "A. Krizhevsky, Learning multiple layers of features from tiny images, 2009",
        NO_LICENSE,
        "CIFAR-100-C",
        "https://zenodo.org/records/3555552",
    ),
    "digits": Published(
        "",
        1_437,
        360,
        "E. Alpaydin, C. Kaynak, Optical recognition of handwritten digits (UCI), as shipped by scikit-learn",
        "CC BY 4.0",
    ),
    "fashionmnist": Published(
        "FashionMNIST/raw",
        60_000,
        10_000,
        "H. Xiao, K. Rasul, R. Vollgraf, Fashion-MNIST, 2017",
        "MIT",
    ),
    "imagenet": Published(
        "imagenet/val",
        1_281_167,
        50_000,
        "O. Russakovsky et al., ImageNet large scale visual recognition challenge (ILSVRC 2012), 2015",
        "non-commercial research only",
        trains=False,
    ),
    "mnist": Published(
        "MNIST/raw",
        60_000,
        10_000,
        "Y. LeCun, C. Cortes, C. J. C. Burges, The MNIST database of handwritten digits",
        NO_LICENSE,
    ),
    "stl10": Published(
        "stl10_binary",
        5_000,
        8_000,
        "A. Coates, H. Lee, A. Y. Ng, An analysis of single-layer networks in unsupervised feature learning, 2011",
        NO_LICENSE,
    ),
    "svhn": Published(
        "svhn/test_32x32.mat",
        73_257,
        26_032,
        "Y. Netzer et al., Reading digits in natural images with unsupervised feature learning, 2011",
        "non-commercial use only",
    ),
}


def dataset_names() -> list[str]:
    """Built-in data sets and those of installed packages (entry points `robbench.datasets`), sorted."""
    from importlib.metadata import entry_points

    return sorted({*BUILT_IN, *(point.name for point in entry_points(group="robbench.datasets"))})


def place(name: str, root: Path) -> Path | None:
    """Where the files of a data set lie below `root`, in torchvision's layout or else as arrays; None for neither. All
    must be there with something in them: a failed download leaves folders, and files that are empty."""
    from robbench.data.checksums import FILES

    folder, arrays = root / BUILT_IN[name].files, root / name
    published = FILES.get(name)
    if all(_filled(root / file) for file in published) if published else _holds_file(folder):
        return folder
    return arrays if all(_filled(arrays / f"{split}.npz") for split in ("train", "test")) else None


def _filled(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _holds_file(folder: Path) -> bool:
    return any(_filled(path) for path in folder.glob("*/*"))
