"""Published corruption benchmarks of a test set (CIFAR-10-C and files in its layout), read by sample id.

A folder holds CORRUPTION.npy for each corruption: uint8 [5 N,H,W,C], severities 1 to 5 in blocks of N images in test
order, and labels.npy [5 N] (Hendrycks and Dietterich 2019). N may exceed the images of the test set at hand: image i of
severity s is row (s - 1) N + i. Accuracy is averaged over 15 corruptions and 5 severities with equal weights; four
further corruptions are no part of it. The files were generated without a seed, so that files made again are another
benchmark: cells carry the sha256 of the file they read.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from robbench.core.errors import UserError
from robbench.core.npz import Array
from robbench.core.resources import sha256_file
from robbench.data.base import Dataset
from robbench.data.corruption_names import SEVERITIES
from robbench.data.names import BUILT_IN
from robbench.specs import ResolvedAttack


def located(attacks: list[ResolvedAttack], dataset: Dataset) -> list[ResolvedAttack]:
    """`attacks`, where those that read corrupted images know the folder of `dataset`'s, and the sha256 of their file.

    `UserError` when the data set has no such images, a file is missing, or it does not fit the test set.
    """
    asked = [attack for attack in attacks if attack.algorithm == "corruption"]
    if not asked:
        return attacks
    folder = _folder(asked[0], dataset)
    _require_files(folder, asked, dataset)
    _check_labels(folder, dataset)
    rows = len(_opened(folder / "labels.npy"))
    return [_located(attack, folder, dataset, rows) if attack in asked else attack for attack in attacks]


def corrupted_images(folder: Path, corruption: str, severity: int, ids: Tensor) -> Tensor:
    """Float32 images [n,C,H,W] in [0,1] of the samples `ids` [n]."""
    array = _opened(folder / f"{corruption}.npy")
    rows = (severity - 1) * (len(array) // SEVERITIES) + ids.numpy()
    images = torch.from_numpy(np.ascontiguousarray(array[rows]))
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return images.contiguous().to(torch.float32) / 255


def _located(attack: ResolvedAttack, folder: Path, dataset: Dataset, rows: int) -> ResolvedAttack:
    path = folder / f"{attack.parameters['corruption']}.npy"
    _check_images(path, dataset, rows)
    stat = path.stat()
    digest = _sha256(path, stat.st_size, stat.st_mtime_ns)
    return attack.model_copy(update={"parameters": {**attack.parameters, "folder": folder, "sha256": digest}})


@lru_cache(maxsize=64)
def _sha256(path: Path, _size: int, _modified: int) -> str:
    """sha256 of a file that is read once, not once a severity, as long as it stays what it was."""
    return sha256_file(path)


def _folder(attack: ResolvedAttack, dataset: Dataset) -> Path:
    if dataset.corruptions is None or dataset.grey_levels != 256:
        known = " or ".join(name for name, about in BUILT_IN.items() if about.corruptions)
        raise UserError(
            f"attack {attack.name!r} reads corrupted test images, and data set {dataset.name!r} has none; use "
            f"--dataset {known}, or name their folder with `corruptions` in the card of your own data (docs/data.md)"
        )
    return dataset.corruptions.resolve()


def _require_files(folder: Path, asked: list[ResolvedAttack], dataset: Dataset) -> None:
    requested = dict.fromkeys([*(f"{attack.parameters['corruption']}.npy" for attack in asked), "labels.npy"])
    missing = [name for name in requested if not (folder / name).is_file()]
    if missing:
        about = BUILT_IN.get(dataset.name)
        get = "put the files there"
        if about is not None:
            get = f"unpack {about.corruptions}.tar of {about.corruptions_from} in {folder.parent}"
        raise UserError(
            f"attack {asked[0].name!r}: {folder} lacks {', '.join(missing[:3])} "
            f"({len(missing)} of {len(requested)} files are missing); {get}, or name another folder "
            f"around {folder.name} with --data-dir"
        )


def _check_images(path: Path, dataset: Dataset, rows: int) -> None:
    """`UserError` unless the array has five blocks of images of the data set's shape that hold every test id, and as
    many `rows` as there are labels: with another number the blocks are other severities."""
    array = _opened(path)
    channels, height, width = dataset.shape
    shapes = [(height, width, channels), *([(height, width)] if channels == 1 else [])]
    if array.dtype != np.uint8 or array.shape[1:] not in shapes or len(array) % SEVERITIES:
        raise UserError(
            f"{path}: holds {array.dtype} {array.shape}, not uint8 (5 N, {', '.join(map(str, shapes[0]))}), severities "
            f"1 to 5 in blocks of N; download the file again"
        )
    _check_rows(path, len(array), dataset)
    if len(array) != rows:
        raise UserError(
            f"{path}: holds {len(array)} images and labels.npy {rows} labels; download both again"
        )


def _check_labels(folder: Path, dataset: Dataset) -> None:
    """`UserError` unless every test image has its own label in every block: else the images are in another order."""
    path = folder / "labels.npy"
    labels = _opened(path)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or len(labels) % SEVERITIES:
        raise UserError(
            f"{path}: holds {labels.dtype} {labels.shape}, not (5 N,) labels; download the file again"
        )
    _check_rows(path, len(labels), dataset)
    blocks = np.asarray(labels).reshape(SEVERITIES, -1)[:, dataset.test.ids.numpy()]
    if (blocks != dataset.test.labels.numpy()).any():
        raise UserError(
            f"{path}: labels differ from those of the test set of {dataset.name!r}, so that its images are in another "
            f"order or of other data; use the files made from this test set"
        )


def _check_rows(path: Path, rows: int, dataset: Dataset) -> None:
    largest = int(dataset.test.ids.max())
    if rows // SEVERITIES <= largest:
        raise UserError(
            f"{path}: has {rows // SEVERITIES} images a severity, and test images of {dataset.name!r} have ids up to "
            f"{largest}; use the files made from this test set"
        )


def _opened(path: Path) -> Array:
    """The array in an npy file, mapped into memory."""
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        text = " ".join(str(error).split())[:120]
        reason = "pickled objects" if "Python objects" in text or "allow_pickle" in text else text
        raise UserError(
            f"{path}: cannot be read as an npy array ({reason}); download the file again"
        ) from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path}: is an npz archive, not an npy array; download the file again")
    return array
