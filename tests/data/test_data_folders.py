"""Data sets of one's own: arrays and images as written here, every malformed file in one line."""

import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_folders import CLASSES, array_folder, array_split, arrays, tree_sha256, write_card
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from robbench.core.errors import UserError
from robbench.data import load_dataset
from robbench.data.arrays import read_arrays
from robbench.data.folder import load_folder


def refused(folder: Path, *parts: str) -> None:
    """`load_folder` refuses with one line that has all `parts`."""
    with pytest.raises(UserError) as caught:
        load_folder(folder)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


# ----------------------------------------------------------------------------------------------------- arrays
def test_arrays_are_read_as_written(tmp_path: Path) -> None:
    data = load_folder(array_folder(tmp_path, like="cifar10"))
    x, y = arrays(20, 2)
    assert (data.name, data.class_names, data.grey_levels) == ("insects", tuple(CLASSES), 256)
    assert data.test.ids.tolist() == list(range(20))
    assert data.test.labels.tolist() == y.tolist()
    np.testing.assert_array_equal(data.test.images.numpy(), np.moveaxis(x, 3, 1))
    assert (len(data.train), len(data.validation)) == (48, 12)
    ids = torch.cat([data.train.ids, data.validation.ids])
    assert sorted(ids.tolist()) == list(range(60)), (
        "a fifth of the training images is for validation, each used once"
    )
    assert torch.bincount(data.validation.labels).tolist() == [4, 4, 4]
    card = data.card
    assert (card.like, card.folder, card.note) == ("cifar10", tmp_path.name, "random pixels")
    assert {name: split.n for name, split in card.splits.items()} == {
        "train": 48,
        "validation": 12,
        "test": 20,
    }
    assert card.splits["test"].sha256 == data.revision


@given(
    x=hnp.arrays(np.uint8, hnp.array_shapes(min_dims=3, max_dims=3, max_side=5)),
    channels=st.sampled_from([None, 1, 3]),
    first=st.booleans(),
)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_layouts_name_axes(x: np.ndarray, channels: int | None, first: bool, tmp_path: Path) -> None:
    """The same pixels whatever axis holds the channels."""
    expected = np.stack([x] * (channels or 1), 1)
    layout: Any = "NHW" if channels is None else "NCHW" if first else "NHWC"
    stored = x if channels is None else expected if first else np.moveaxis(expected, 1, 3)
    np.savez(tmp_path / "a.npz", x=stored, y=np.zeros(len(x), np.uint8))
    split = read_arrays(tmp_path / "a.npz", layout, 2, 256)
    np.testing.assert_array_equal(split.images.numpy(), expected)


def test_a_validation_split_of_ones_own(tmp_path: Path) -> None:
    sizes = {"train": 9, "validation": 5, "test": 6}
    splits = {name: array_split(tmp_path, name, *arrays(n, n)) for name, n in sizes.items()}
    data = load_folder(write_card(tmp_path, splits))
    assert [len(part) for part in (data.train, data.validation, data.test)] == [9, 5, 6]


def test_without_training_images_a_data_set_is_for_evaluation(tmp_path: Path) -> None:
    data = load_folder(array_folder(tmp_path, train=0))
    assert (len(data.train), len(data.validation), len(data.test)) == (0, 0, 20)
    assert list(data.card.splits) == ["test"]
    with pytest.raises(
        UserError, match=r"'insects' has only test images and training a model needs .*`train` split"
    ):
        data.require_training("training a model")


X, Y = arrays(6)
BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "float": ({"x": (X / 255).astype(np.float32), "y": Y}, "x is float32; store uint8"),
    "nan": ({"x": np.full(X.shape, np.nan), "y": Y}, "x is float64 with NaN"),
    "signed": ({"x": X.astype(np.int64), "y": Y}, "x is int64"),
    "no labels": ({"x": X}, "has no array 'y'"),
    "other names": ({"data": X, "targets": Y}, "has no array 'x' but data, targets"),
    "fewer labels": ({"x": X, "y": Y[:4]}, "y has shape (4,) and x 6 images"),
    "two-dimensional labels": ({"x": X, "y": Y[:, None]}, "y has shape (6, 1)"),
    "float labels": ({"x": X, "y": Y.astype(float)}, "y is float64"),
    "a class too many": ({"x": X, "y": Y + 1}, "y[2] is 3, and 3 classes mean labels 0..2 (2 of 6"),
    "negative label": ({"x": X, "y": Y - 1}, "y[0] is -1"),
    "other layout": (
        {"x": np.moveaxis(X, 3, 1), "y": Y},
        "layout NHWC means (images, height, width, 1 or 3 channels)",
    ),
    "grey without channels": ({"x": X[..., 0], "y": Y}, "x has shape (6, 6, 6)"),
    "empty": ({"x": X[:0], "y": Y[:0]}, "and so no image"),
    "pickled": ({"x": X.astype(object), "y": Y}, "pickled objects, which are never loaded"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_malformed_arrays(case: str, tmp_path: Path) -> None:
    stored, message = BAD_ARRAYS[case]
    np.savez(tmp_path / "test.npz", **stored)
    split = {"file": "test.npz", "sha256": sha256_by_coreutils(tmp_path / "test.npz")}
    write_card(tmp_path, {"test": split})
    refused(tmp_path, str(tmp_path / "test.npz"), message)


def sha256_by_coreutils(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, check=True, text=True).stdout.split()[0]


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 and no more", b"\x80\x04\x95 a pickle", b"\x93NUMPY"])
def test_files_that_are_no_npz(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "test.npz").write_bytes(damage)
    write_card(tmp_path, {"test": {"file": "test.npz", "sha256": sha256_by_coreutils(tmp_path / "test.npz")}})
    refused(tmp_path, str(tmp_path / "test.npz"))


def test_an_encrypted_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "test.npz", x=X, y=np.zeros(len(X), np.int64))
    packed = bytearray((tmp_path / "test.npz").read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        packed[packed.index(signature) + flags] |= 1
    test_files_that_are_no_npz(bytes(packed), tmp_path)


def test_an_npy_file_is_no_npz(tmp_path: Path) -> None:
    with (tmp_path / "test.npz").open("wb") as stream:
        np.save(stream, X)
    write_card(tmp_path, {"test": {"file": "test.npz", "sha256": sha256_by_coreutils(tmp_path / "test.npz")}})
    refused(tmp_path, "is no npz file; write it with numpy.savez_compressed")


def test_a_truncated_npz(tmp_path: Path) -> None:
    array_folder(tmp_path, train=0)
    whole = (tmp_path / "test.npz").read_bytes()
    (tmp_path / "test.npz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, "has sha256", "restore the data")
    write_card(tmp_path, {"test": {"file": "test.npz", "sha256": sha256_by_coreutils(tmp_path / "test.npz")}})
    refused(tmp_path, "cannot be read as npz")


def test_missing_and_changed_files(tmp_path: Path) -> None:
    array_folder(tmp_path)
    np.savez_compressed(tmp_path / "test.npz", x=X, y=Y)
    found = sha256_by_coreutils(tmp_path / "test.npz")
    refused(tmp_path, f"test.npz: has sha256 {found}, and its card says ")
    (tmp_path / "train.npz").unlink()
    refused(tmp_path, "train.npz: is missing")


def test_splits_have_one_image_size(tmp_path: Path) -> None:
    train, test = (
        array_split(tmp_path, "train", *arrays(9)),
        array_split(tmp_path, "test", *arrays(9, side=5)),
    )
    refused(
        write_card(tmp_path, {"train": train, "test": test}),
        "train are 3 x 6 x 6 and those of test 3 x 5 x 5",
    )


def test_grey_levels_bound_the_pixels(tmp_path: Path) -> None:
    refused(array_folder(tmp_path, train=0, grey_levels=17), "x has a grey level 255", "0..16")


def test_a_class_with_one_image_cannot_be_split(tmp_path: Path) -> None:
    x, _ = arrays(20)
    splits = {"train": array_split(tmp_path, "train", x, np.array([0] * 19 + [1]))}
    splits["test"] = array_split(tmp_path, "test", *arrays(6))
    refused(write_card(tmp_path, splits), "cannot set aside 4 of 20", "give a `validation` split")


BAD_CARDS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"class_name": ["a", "b"]}, "key class_name: is not known; did you mean 'class_names'?"),
    "no layout": ({"layout": None}, "`layout` (NHW, NHWC or NCHW) belongs to splits that are npz files"),
    "bad layout": ({"layout": "CHW"}, "key layout"),
    "normalised": ({"normalisation": "imagenet"}, "key normalisation"),
    "repeated class": ({"class_names": ["ant", "ant", "bee"]}, "class_names repeats a name"),
    "one class": ({"class_names": ["ant"]}, "key class_names"),
    "no test": ({"splits": {"train": {"file": "train.npz", "sha256": "0" * 64}}}, "splits has no `test`"),
    "outside": (
        {"splits": {"test": {"file": "../x.npz", "sha256": "0" * 64}}},
        "below the folder of the card",
    ),
    "absolute": (
        {"splits": {"test": {"file": "/x.npz", "sha256": "0" * 64}}},
        "below the folder of the card",
    ),
    "short hash": ({"splits": {"test": {"file": "x.npz", "sha256": "abc"}}}, "key splits.test.sha256"),
    "both": ({"splits": {"test": {"file": "x", "folder": "y", "sha256": "0" * 64}}}, "one of the two"),
    "built-in name": ({"name": "mnist"}, "is a data set that robbench knows; choose another name"),
    "bad name": ({"name": "my data"}, "key name"),
    "like nothing": ({"like": "cifar"}, "'cifar' is no known data set"),
    "images and arrays": (
        {"image_folder": {"size": [6, 6]}},
        "`image_folder` (size, channels) belongs to splits",
    ),
}


@pytest.mark.parametrize("case", BAD_CARDS)
def test_malformed_cards(case: str, tmp_path: Path) -> None:
    changes, message = BAD_CARDS[case]
    refused(array_folder(tmp_path, **changes), "card.yaml", message)


def test_places_without_a_card(tmp_path: Path) -> None:
    refused(tmp_path, "holds no card.yaml")
    refused(tmp_path / "nowhere", "is not a folder")
    (tmp_path / "card.yaml").write_text("", encoding="utf-8")
    refused(tmp_path, "card.yaml", "is empty")


def test_the_card_file_itself_may_be_named(tmp_path: Path) -> None:
    assert len(load_folder(array_folder(tmp_path) / "card.yaml").test) == 20


def test_a_folder_answers_to_its_name_and_to_what_it_is_like(tmp_path: Path) -> None:
    array_folder(tmp_path, like="cifar10")
    assert load_dataset("insects", data=tmp_path).name == "insects"
    assert load_dataset("cifar10", data=tmp_path).name == "insects"
    with pytest.raises(
        UserError, match=r"is the data set 'insects', like cifar10, and 'mnist' is needed here"
    ):
        load_dataset("mnist", data=tmp_path)


# ----------------------------------------------------------------------------------------------------- images
def image_folder(folder: Path, suffix: str = ".png", per_class: int = 4, **card: Any) -> Path:
    """test/CLASS/NUMBER.png in grey levels that say which image it is."""
    for label, name in enumerate(CLASSES):
        (folder / "test" / name).mkdir(parents=True)
        for number in range(per_class):
            pixels = np.full((5, 7, 3), [label, number, 200], np.uint8)
            Image.fromarray(pixels).save(folder / "test" / name / f"{number:02}{suffix}")
    return image_card(folder, **card)


def image_card(folder: Path, **changes: Any) -> Path:
    split = {"folder": "test", "sha256": tree_sha256(folder / "test")}
    fields = {"layout": None, "image_folder": {"size": [5, 7], "channels": 3}, **changes}
    return write_card(folder, {"test": split}, **fields)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".tif"])
def test_lossless_images_are_read_exactly_and_numbered_by_path(suffix: str, tmp_path: Path) -> None:
    data = load_folder(image_folder(tmp_path, suffix))
    assert data.shape == (3, 5, 7)
    assert data.test.ids.tolist() == list(range(12))
    assert data.test.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    expected = [[label, number, 200] for label in range(3) for number in range(4)]
    assert data.test.images[:, :, 2, 3].tolist() == expected
    assert data.card.note == "random pixels"


def test_classes_are_numbered_by_the_card_not_by_the_alphabet(tmp_path: Path) -> None:
    data = load_folder(image_folder(tmp_path, class_names=["cat", "ant", "bee"]))
    assert data.test.labels.tolist() == [1] * 4 + [2] * 4 + [0] * 4
    assert data.test.images[:, 0, 0, 0].tolist() == [0] * 4 + [1] * 4 + [2] * 4, (
        "ids go by path whatever the labels"
    )


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="coreutils' sha256sum is absent")
def test_the_checksum_is_what_sha256sum_prints(tmp_path: Path) -> None:
    image_folder(tmp_path)
    shell = "cd test && LC_ALL=C sh -c 'sha256sum */* | sha256sum'"
    printed = subprocess.run(["sh", "-c", shell], cwd=tmp_path, capture_output=True, check=True, text=True)
    image_card(tmp_path, splits={"test": {"folder": "test", "sha256": printed.stdout.split()[0]}})
    assert len(load_folder(tmp_path).test) == 12
    (tmp_path / "test" / "ant" / "00.png").rename(tmp_path / "test" / "ant" / "99.png")
    refused(tmp_path, "has sha256", "restore the data")


def test_lossy_images_are_noted(tmp_path: Path) -> None:
    data = load_folder(image_folder(tmp_path, ".jpg"))
    assert (
        data.note
        == "random pixels; 12 of 12 images are lossy (JPEG, WebP): pixels may differ between decoders"
    )


def test_grey_images_and_palettes(tmp_path: Path) -> None:
    image_folder(tmp_path)
    grey = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7))
    grey.save(tmp_path / "test" / "ant" / "00.png")
    Image.fromarray(np.full((5, 7, 3), [9, 8, 7], np.uint8)).quantize(4).save(
        tmp_path / "test" / "ant" / "01.png"
    )
    data = load_folder(image_card(tmp_path))
    assert data.test.images[0].tolist() == [np.asarray(grey).tolist()] * 3
    assert data.test.images[1, :, 0, 0].tolist() == [9, 8, 7]


def damaged(tmp_path: Path, image: Image.Image, name: str = "00.png") -> Path:
    image_folder(tmp_path)
    image.save(tmp_path / "test" / "ant" / name)
    return image_card(tmp_path)


def test_images_of_another_size(tmp_path: Path) -> None:
    refused(
        damaged(tmp_path, Image.new("RGB", (5, 7))), "00.png: is 7 x 5 (height x width), not 5 x 7; resize"
    )


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "LA"])
def test_images_of_another_mode(mode: str, tmp_path: Path) -> None:
    refused(damaged(tmp_path, Image.new(mode, (7, 5))), f"has mode {mode}", "not RGB (channels: 3)")


def test_a_colour_image_is_no_grey_one(tmp_path: Path) -> None:
    image_folder(tmp_path)
    refused(
        image_card(tmp_path, image_folder={"size": [5, 7], "channels": 1}),
        "has mode RGB, not L (channels: 1)",
    )


def test_broken_and_foreign_files(tmp_path: Path) -> None:
    image_folder(tmp_path)
    path = tmp_path / "test" / "bee" / "01.png"
    path.write_bytes(path.read_bytes()[:40])
    refused(image_card(tmp_path), "01.png: cannot be decoded")
    path.write_bytes(b"text")
    refused(image_card(tmp_path), "01.png: cannot be decoded")
    header = b"IHDR" + struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    )
    refused(image_card(tmp_path), "01.png: cannot be decoded")
    path.rename(path.with_suffix(".txt"))
    refused(image_card(tmp_path), "01.txt: .txt is no image format read here; use .bmp")


def test_class_folders_are_those_of_the_card(tmp_path: Path) -> None:
    image_folder(tmp_path)
    (tmp_path / "test" / "dog").mkdir()
    refused(tmp_path, "holds 'dog', which class_names does not have (ant, bee, cat)")
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / ".dog")
    shutil.copy(next((tmp_path / "test" / "ant").iterdir()), tmp_path / "test" / ".dog")
    assert len(load_folder(tmp_path).test) == 12, "hidden folders are passed over"
    shutil.rmtree(tmp_path / "test")
    refused(tmp_path, "is no folder")


def test_an_empty_class_folder(tmp_path: Path) -> None:
    image_folder(tmp_path)
    for path in (tmp_path / "test" / "ant").iterdir():
        path.unlink()
    refused(tmp_path, "give every class folder an image")
