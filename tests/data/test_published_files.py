"""A named data set is what was published: damaged, shifted, swapped and foreign files are refused, in one line."""

import gzip
import hashlib
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from data_folders import array_split, write_card

from robbench.core.errors import UserError
from robbench.data import Dataset, load_dataset
from robbench.data.checksums import ARRAYS, FILES, check_arrays, check_files, records_checksum
from robbench.data.folder import load_folder

Damage = Callable[[bytes], bytes]
IMAGES, LABELS = 16, 8  # bytes of the headers of idx files


def refusal(name: str, root: Path) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset(name, root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------- idx files
def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    path.write_bytes(header + values.astype(np.uint8).tobytes())


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small MNIST in the published format, taken for the published one; nothing can be downloaded."""
    import torchvision.datasets

    def no_network(self: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_network)
    folder = tmp_path / "MNIST" / "raw"
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 200), ("t10k", 50)):
        write_idx(folder / f"{prefix}-images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28)))
        write_idx(folder / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    files = {file: hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() for file in FILES["mnist"]}
    monkeypatch.setitem(FILES, "mnist", files)
    return folder


def test_mnist_is_read_from_torchvisions_layout(raw: Path):
    mnist = load_dataset("mnist", raw.parent.parent)
    assert mnist.shape == (1, 28, 28)
    assert (len(mnist.train), len(mnist.validation), len(mnist.test)) == (160, 40, 50)
    assert mnist.test.ids.tolist() == list(range(50))
    assert mnist.test.labels.tolist() == [i % 10 for i in range(50)]
    stored = np.frombuffer((raw / "t10k-images-idx3-ubyte").read_bytes()[IMAGES:], np.uint8)
    np.testing.assert_array_equal(mnist.test.images.numpy().ravel(), stored)
    assert float(mnist.test.x(torch.arange(50)).min()) >= 0.0
    assert float(mnist.test.x(torch.arange(50)).max()) <= 1.0


def shifted_labels(content: bytes) -> bytes:
    return content[:LABELS] + content[LABELS + 1 :] + content[LABELS : LABELS + 1]


def one_bit(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("t10k-labels-idx1-ubyte", shifted_labels),
        ("t10k-labels-idx1-ubyte", lambda content: content[:LABELS] + bytes(len(content) - LABELS)),
        ("t10k-images-idx3-ubyte", one_bit),
        ("t10k-images-idx3-ubyte", lambda content: b""),
        ("t10k-images-idx3-ubyte", lambda content: content[:3]),
        ("t10k-images-idx3-ubyte", lambda content: content[:-100]),
        ("t10k-images-idx3-ubyte", lambda content: b"\x00\x00\x08\xff" + content[4:]),
        ("t10k-images-idx3-ubyte", gzip.compress),
        ("train-labels-idx1-ubyte", shifted_labels),
        ("train-images-idx3-ubyte", one_bit),
    ],
)
def test_a_file_that_differs_is_named_and_left_alone(raw: Path, file: str, damage: Damage):
    changed = damage((raw / file).read_bytes())
    (raw / file).write_bytes(changed)
    message = refusal("mnist", raw.parent.parent)
    assert message.startswith(f"{raw / file}: is not the published {file} of 'mnist' (sha256 ")
    assert "--data FOLDER" in message
    assert (raw / file).read_bytes() == changed


def test_training_files_under_the_names_of_the_test_files_are_recognised(raw: Path):
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        (raw / f"t10k-{kind}").write_bytes((raw / f"train-{kind}").read_bytes())
    assert "(holds train-images-idx3-ubyte; " in refusal("mnist", raw.parent.parent)


def test_what_cannot_be_read_is_one_line(raw: Path):
    path = raw / "t10k-labels-idx1-ubyte"
    path.unlink()
    path.mkdir()
    assert f"{path}: cannot be read (Is a directory)" in refusal("mnist", raw.parent.parent)


def test_processed_files_beside_the_raw_ones_never_win(raw: Path):
    """Versions of torchvision before 0.9 wrote them, and its class still prefers them to the raw files."""
    right = load_dataset("mnist", raw.parent.parent).revision
    processed = raw.parent / "processed"
    processed.mkdir()
    for name, count in (("training.pt", 200), ("test.pt", 50)):
        torch.save(
            (torch.zeros(count, 28, 28, dtype=torch.uint8), torch.arange(count) % 10), processed / name
        )
    assert load_dataset("mnist", raw.parent.parent).revision == right
    for path in raw.iterdir():
        path.unlink()
    message = refusal("mnist", raw.parent.parent)
    assert "could not download it (network is unreachable)" in message
    assert "MNIST/raw/train-images-idx3-ubyte" in message


def test_absent_data_say_where_to_put_them(raw: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    assert "--data-dir or ROBBENCH_DATA" in refusal("mnist", tmp_path / "empty")


# --------------------------------------------------------------------------------------------- files of other sets
@pytest.mark.parametrize(
    "file",
    [
        "cifar-10-batches-py/test_batch",
        "cifar-100-python/test",
        "svhn/test_32x32.mat",
        "stl10_binary/test_y.bin",
    ],
)
def test_a_foreign_file_is_neither_read_nor_downloaded_over(
    tmp_path: Path, file: str, monkeypatch: pytest.MonkeyPatch
):
    import torchvision.datasets

    name = next(name for name, files in FILES.items() if file in files)
    for kind in ("CIFAR10", "CIFAR100", "SVHN", "STL10"):
        monkeypatch.setattr(
            getattr(torchvision.datasets, kind), "download", lambda self: pytest.fail("download")
        )
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    content = pickle.dumps({b"data": np.zeros((5, 3072), np.uint8), b"labels": [1, 2, 3, 4, 5]})
    path.write_bytes(content)
    assert refusal(name, tmp_path).startswith(f"{path}: is not the published {path.name} of {name!r}")
    assert path.read_bytes() == content


def test_checksums_are_those_that_torchvision_lists():
    from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN

    for name, kind in (("cifar10", CIFAR10), ("cifar100", CIFAR100)):
        listed = {
            **dict([*kind.train_list, *kind.test_list]),
            kind.meta["filename"]: kind.meta["md5"],
        }
        assert FILES[name] == {f"{kind.base_folder}/{file}": md5 for file, md5 in listed.items()}
    stl10 = dict([*STL10.train_list, *STL10.test_list])
    assert (
        FILES["stl10"].items() <= {f"{STL10.base_folder}/{file}": md5 for file, md5 in stl10.items()}.items()
    )
    assert [Path(file).name for file in FILES["svhn"]] == [
        SVHN.split_list[part][1] for part in ("train", "test")
    ]


@pytest.mark.parametrize("name", ["mnist", "fashionmnist"])
def test_real_files_have_these_checksums_and_those_of_arrays_follow_from_them(name: str, shared: Path):
    assert check_files(name, shared / "data")
    for part, prefix in (("train", "train"), ("test", "t10k")):
        folder = shared / "data" / Path(next(iter(FILES[name]))).parent
        images = np.frombuffer((folder / f"{prefix}-images-idx3-ubyte").read_bytes()[IMAGES:], np.uint8)
        labels = np.frombuffer((folder / f"{prefix}-labels-idx1-ubyte").read_bytes()[LABELS:], np.uint8)
        for n, checksum in ARRAYS[name, part].items():
            assert records_checksum(images.reshape(-1, 1, 28, 28)[:n], labels[:n]) == checksum


# ----------------------------------------------------------------------------------------------------------- arrays
@pytest.fixture(scope="module")
def cifar_test(shared: Path) -> tuple[np.ndarray, np.ndarray]:
    path = shared / "data" / "cifar10" / "test.npz"
    if not path.is_file():
        pytest.skip("../shared/data/cifar10 is absent")
    with np.load(path) as file:
        return np.moveaxis(file["x"], 3, 1), file["y"].astype(np.int64)


def test_arrays_are_the_first_published_images_in_their_order(cifar_test: tuple[np.ndarray, np.ndarray]):
    x, y = cifar_test
    check_arrays(Path("test.npz"), "cifar10", "test", x, y)
    swapped = np.array([1, 0, *range(2, 1000)])
    brighter = x.copy()
    brighter[999, 2, 31, 31] ^= 1
    for pixels, labels in ((x, np.roll(y, 1)), (x, (y + 1) % 10), (x[swapped], y[swapped]), (brighter, y)):
        with pytest.raises(UserError, match=r"not the first 1,000 published test images of 'cifar10'"):
            check_arrays(Path("test.npz"), "cifar10", "test", pixels, labels)
    with pytest.raises(UserError, match=r"not the first 1,000 published train images"):
        check_arrays(Path("train.npz"), "cifar10", "train", x, y)
    with pytest.raises(UserError, match=r"has 999 images; only the first 1,000, 10,000 test images"):
        check_arrays(Path("test.npz"), "cifar10", "test", x[:999], y[:999])


def test_the_first_training_images_are_no_test_set(
    tmp_path: Path, shared: Path, cifar_test: tuple[np.ndarray, np.ndarray]
):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    (folder / "train.npz").symlink_to((shared / "data" / "cifar10" / "train.npz").resolve())
    with np.load(folder / "train.npz") as file:
        np.savez(folder / "test.npz", x=file["x"][:1000], y=file["y"][:1000])
    assert "test.npz: images or labels are not the first 1,000 published test images" in refusal(
        "cifar10", tmp_path
    )


def test_arrays_are_checked_whatever_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for part, count in (("train", 60), ("test", 30)):
        pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{part}.npz", x=pixels, y=np.arange(count) % 10)
        digest = records_checksum(np.moveaxis(pixels, 3, 1), np.arange(count) % 10)
        monkeypatch.setitem(ARRAYS, ("cifar10", part), {count: digest})
    data = load_dataset("cifar10", tmp_path)
    assert data.card.note == (
        "test set: only 30 images, the first of the 10,000 published ones; "
        "training set: only 60 images, the first of the 50,000 published ones"
    )
    assert (data.shape, data.classes, len(data.train), len(data.validation)) == ((3, 32, 32), 10, 48, 12)
    with np.load(folder / "test.npz") as file:
        np.testing.assert_array_equal(data.test.images.numpy(), np.moveaxis(file["x"], 3, 1))
    np.savez(folder / "test.npz", x=np.zeros((3, 32, 32, 3), np.float32), y=np.arange(3))
    assert "test.npz: x is float32" in refusal("cifar10", tmp_path)
    (tmp_path / "cifar10").rename(tmp_path / "svhn")
    np.savez(tmp_path / "svhn" / "test.npz", x=np.zeros((3, 32, 32, 3), np.uint8), y=np.arange(3))
    assert "arrays of 'svhn' cannot be compared" in refusal("svhn", tmp_path)


def test_records_are_those_of_cifars_binary_version():
    """By hand: the label, then red, green and blue of one 1x2 image."""
    pixels = np.array([[[[1, 2]], [[3, 4]], [[5, 6]]]], np.uint8)
    assert records_checksum(pixels, np.array([9])) == hashlib.sha256(bytes([9, 1, 2, 3, 4, 5, 6])).hexdigest()


def test_the_first_1000_test_images_of_cifar10(shared: Path, cifar_test: tuple[np.ndarray, np.ndarray]):
    card = load_dataset("cifar10", shared / "data").card
    assert card.note == "test set: only 1,000 images, the first of the 10,000 published ones"
    assert {name: split.n for name, split in card.splits.items()} == {
        "train": 45000,
        "validation": 5000,
        "test": 1000,
    }


def test_digits_of_another_scikit_learn_are_refused(monkeypatch: pytest.MonkeyPatch):
    from sklearn import datasets

    bunch = datasets.load_digits()
    bunch.target = np.roll(bunch.target, 1)
    monkeypatch.setattr(datasets, "load_digits", lambda: bunch)
    assert "install scikit-learn again" in refusal("digits", Path())


# ------------------------------------------------------------------------------------ training images as test images
def test_test_images_that_are_training_images_are_counted_in_the_note(tmp_path: Path):
    generator = np.random.default_rng(0)
    x, y = generator.integers(0, 256, (60, 6, 6, 3), dtype=np.uint8), np.arange(60) % 3
    fresh = generator.integers(0, 256, (20, 6, 6, 3), dtype=np.uint8)
    tested = np.concatenate([fresh, x[40:45]])
    splits = {
        "train": array_split(tmp_path, "train", x, y),
        "test": array_split(tmp_path, "test", tested, np.arange(25) % 3),
    }
    note = load_folder(write_card(tmp_path, splits)).note
    assert note == (
        "random pixels; 5 of 25 test images are training or validation images of insects (the same pixels): "
        "accuracies on them are not those on new images"
    )
    splits["test"] = array_split(tmp_path, "test", fresh, np.arange(20) % 3)
    assert load_folder(write_card(tmp_path, splits)).note == "random pixels"


def test_training_images_of_the_set_it_is_like_are_counted_too(tmp_path: Path, digits: Dataset):
    """Models of that set were trained on them; the folder itself has no training images."""
    known = digits.train.images[:40, 0].numpy()
    splits = {"test": array_split(tmp_path, "test", known, digits.train.labels[:40].numpy())}
    fields = {"class_names": [str(k) for k in range(10)], "layout": "NHW", "grey_levels": 17}
    folder = write_card(tmp_path, splits, like="digits", **fields)
    assert "40 of 40 test images are training or validation images of digits" in load_folder(folder).note
    assert load_folder(write_card(tmp_path, splits, **fields)).note == "random pixels"


def test_a_data_set_of_a_package_is_compared_with_itself(monkeypatch: pytest.MonkeyPatch, digits: Dataset):
    from robbench.data.base import DATASETS

    mixed = replace(digits, name="mixed", test=digits.train.subset(torch.arange(100)))
    monkeypatch.setitem(DATASETS._entries, "mixed", lambda root: mixed)
    assert "100 of 100 test images are training or validation images of mixed" in load_dataset("mixed").note
