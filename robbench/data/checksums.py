"""What the named data sets were published as: a file or array under such a name is exactly that, or it is refused.

Files of MNIST and Fashion-MNIST: sha256 of the uncompressed idx files inside the published .gz archives, whose MD5 sums
torchvision lists. SVHN: sha256 of the published .mat files. CIFAR-10, CIFAR-100 and STL-10 have no published sha256 of
their single files; theirs are the MD5 sums that torchvision lists.

Arrays (NAME/train.npz, NAME/test.npz): sha256 over one record an image, the byte of its label and then its pixels
channel by channel, which is the binary format of CIFAR-10 (so that 10,000 training images hash to its data_batch_1.bin,
and all test images have the MD5 sum of its test_batch.bin). Computed from the files above, and for CIFAR-10 from arrays
whose five training batches have the MD5 sums of its binary version.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from robbench.core.errors import UserError

Pixels = np.ndarray[tuple[int, ...], np.dtype[np.uint8]]
Labels = np.ndarray[tuple[int, ...], np.dtype[Any]]
Part = Literal["train", "test"]
_AS_ONES_OWN = "or use the data under another name with --data FOLDER (docs/data.md)"

# By data set and path below --data-dir.
FILES: dict[str, dict[str, str]] = {
    "mnist": {
        "MNIST/raw/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "MNIST/raw/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "MNIST/raw/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "MNIST/raw/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashionmnist": {
        "FashionMNIST/raw/train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "FashionMNIST/raw/train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "FashionMNIST/raw/t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "FashionMNIST/raw/t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
    "cifar10": {
        "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
        "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
        "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
        "cifar-10-batches-py/batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
    "cifar100": {
        "cifar-100-python/train": "16019d7e3df5f24257cddd939b257f8d",
        "cifar-100-python/test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "cifar-100-python/meta": "7973b15100ade9c7d40fb424638fde48",
    },
    "svhn": {
        "svhn/train_32x32.mat": "435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
        "svhn/test_32x32.mat": "cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    },
    "stl10": {
        "stl10_binary/train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
        "stl10_binary/train_y.bin": "5a34089d4802c674881badbb80307741",
        "stl10_binary/test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
        "stl10_binary/test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
    },
}

# By data set, part, and how many of the part's first images.
ARRAYS: dict[tuple[str, Part], dict[int, str]] = {
    ("mnist", "train"): {
        1_000: "ec28379a5226a70df947608b9696c4939ceeb7065c96341e789884c0d478da20",
        10_000: "d6bf0ae4af9a3a92ca5b87f7323ff458aaea0ab5cf663720c21bdf5339969c0c",
        60_000: "baedb0edd00a28e97b281c967f6c7514bedfea1d17b30334caccd6ec0d75cf98",
    },
    ("mnist", "test"): {
        1_000: "ecd720191b3af6034731f49999a474a8166fe42b604dfbd8c1fe2ec5c888932d",
        10_000: "ad39c4e3d6eb0920f4ea84533a577cc5afbb47c5e8034d374d0605316c8923f3",
    },
    ("fashionmnist", "train"): {
        1_000: "b65f9b75de2e37e58051ff5bb697d2736fd7a5261ea14647f9cc75d4e775765c",
        10_000: "39b79869a06eca64066bfdf460e11e2608fcc978eec84c968b3c7ea8c63af777",
        60_000: "6d226526ff970f03ea8725a39e125b1ab590f498a25f501e69a46359e7478773",
    },
    ("fashionmnist", "test"): {
        1_000: "cc950d993f92377f0744c89ad8071e4ead3587bf5f3f0856e5edbfbee768aa7b",
        10_000: "c1f40a40017890ce0b14203aa6b8340d8bead8df69f0a9baba26c47b226338ba",
    },
    ("cifar10", "train"): {
        1_000: "1c5f9ea0fc1111d586f29115efd3db25eecf7db27b29aaebbe84721446b052cc",
        10_000: "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
        50_000: "a0181da372c0d63a5920fdbea2ec3f83ecbc552d378218e1cb473cf634941a3b",
    },
    ("cifar10", "test"): {
        1_000: "8314c96d7cd65618193bab23acdd5d4c4af15bf6dd00a1781d55beedf3be1ef5",
        10_000: "803d5f7f4d78ea53de84dbe85f74fb6d",
    },
}
# All 1,797 scans as scikit-learn ships them, in the same records.
DIGITS = "d8121ca7764eccfaef1df6bc4589c6527c58fcbab0cb1b079e79f97f8cb8219a"


def check_files(name: str, root: Path) -> bool:
    """Whether all published files of the data set `name` lie below `root`.

    `UserError` for a file that is there and is not the published one, or cannot be read.
    """
    published = FILES[name]
    found = [_check_file(name, root / file, checksum, published) for file, checksum in published.items()]
    return all(found)


def _check_file(name: str, path: Path, checksum: str, published: Mapping[str, str]) -> bool:
    """Whether the file is there."""
    try:
        found = _file_checksum(path, checksum)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); restore it") from error
    if found == checksum:
        return True
    other = next((Path(file).name for file, its in published.items() if its == found), None)
    size = path.stat().st_size
    what = f"holds {other}" if other else f"{_algorithm(checksum)} {found[:12]}, {size:,} bytes"
    raise UserError(
        f"{path}: is not the published {path.name} of {name!r} ({what}; published: {_algorithm(checksum)} "
        f"{checksum[:12]}); restore it, move it away, {_AS_ONES_OWN}"
    )


def check_arrays(path: Path, name: str, part: Part, images: Pixels, labels: Labels) -> None:
    """`UserError` unless images [N,C,H,W] and labels [N], read from `path`, are the first N published ones.

    Accepted are the numbers N whose checksum is known (`ARRAYS`).
    """
    known = ARRAYS.get((name, part))
    if known is None:
        raise UserError(
            f"{path}: arrays of {name!r} cannot be compared with the published files, whose checksums are all that is "
            f"known; put those files there ({', '.join(FILES[name])}), {_AS_ONES_OWN}"
        )
    if len(images) not in known:
        numbers = ", ".join(f"{n:,}" for n in known)
        raise UserError(
            f"{path}: has {len(images):,} images; only the first {numbers} {part} images of {name!r} can be compared "
            f"with the published ones: give one of these numbers, {_AS_ONES_OWN}"
        )
    checksum = known[len(images)]
    if records_checksum(images, labels, _algorithm(checksum)) != checksum:
        raise UserError(
            f"{path}: images or labels are not the first {len(images):,} published {part} images of {name!r}, in their "
            f"order; restore the file, {_AS_ONES_OWN}"
        )


def records_checksum(images: Pixels, labels: Labels, algorithm: str = "sha256") -> str:
    """Hex digest over the records (label byte, pixels channel by channel) of images [N,C,H,W] and labels [N]."""
    rows = np.concatenate([labels.astype(np.uint8)[:, None], images.reshape(len(images), -1)], 1)
    return hashlib.new(algorithm, rows.tobytes(), usedforsecurity=False).hexdigest()


def _algorithm(checksum: str) -> str:
    return {32: "md5", 64: "sha256"}[len(checksum)]


def _file_checksum(path: Path, like: str) -> str:
    with path.open("rb") as stream:
        algorithm = _algorithm(like)
        return hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
