"""Data sets: fixed stratified splits, seeded subsets, real files through torchvision's own classes."""

import gzip
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robbench.data import Dataset, load_dataset, sample_ids
from robbench.data.names import BUILT_IN
from robbench.errors import UserError


def test_digits_are_scikit_learns_scans_split_once_and_stratified(digits: Dataset):
    from sklearn.datasets import load_digits

    source = load_digits()
    assert digits.shape == (1, 8, 8)
    assert (digits.grey_levels, digits.classes) == (17, 10)
    parts = (digits.train, digits.validation, digits.test)
    assert [len(part) for part in parts] == [1257, 180, 360]
    ids = torch.cat([part.ids for part in parts])
    assert sorted(ids.tolist()) == list(range(1797)), "every scan is in exactly one split"
    for part in parts:
        counts = torch.bincount(part.labels, minlength=10).float() / len(part)
        assert (counts - torch.bincount(torch.tensor(source.target)).float() / 1797).abs().max() < 0.01
        rows = torch.arange(len(part))
        np.testing.assert_allclose(part.x(rows)[:, 0].numpy(), source.images[part.ids] / 16.0, atol=1e-7)
        assert torch.equal(part.labels, torch.tensor(source.target)[part.ids])
    assert digits.revision == load_dataset("digits").revision


@given(n=st.integers(1, 360), more=st.integers(0, 100), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_a_larger_subset_extends_a_smaller_one(n: int, more: int, seed: int):
    split = load_dataset("digits").test
    small, large = sample_ids(split, n, seed), sample_ids(split, min(n + more, 360), seed)
    assert large[:n] == small
    assert len(set(large)) == len(large)
    assert set(large) <= set(split.ids.tolist())


def test_subsets_are_random_and_seeded(digits: Dataset):
    first = sample_ids(digits.test, 50, 0)
    assert first == sample_ids(digits.test, 50, 0)
    assert first != sample_ids(digits.test, 50, 1)
    assert first != digits.test.ids[:50].tolist(), "never the first n"


def test_by_ids_returns_the_samples_in_the_order_asked(digits: Dataset):
    ids = sample_ids(digits.test, 20, 3)
    x, y = digits.test.by_ids(ids)
    for row, wanted in enumerate(ids):
        position = int((digits.test.ids == wanted).nonzero())
        assert torch.equal(x[row], digits.test.x(torch.tensor([position]))[0])
        assert y[row] == digits.test.labels[position]
    with pytest.raises(KeyError):
        digits.test.by_ids([int(digits.train.ids[0])])


@pytest.mark.parametrize("n", [0, -3, 361])
def test_impossible_sizes_name_what_is_accepted(n: int, digits: Dataset):
    with pytest.raises(UserError, match=rf"--n {n} .*360 samples; give 1 to 360"):
        sample_ids(digits.test, n, 0)


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    with gzip.open(path.with_suffix(".gz"), "wb") if path.suffix == ".gz" else path.open("wb") as stream:
        stream.write(header + values.astype(np.uint8).tobytes())


def test_mnist_is_read_from_torchvisions_layout(tmp_path: Path):
    """Files made here in the idx format; torchvision's class reads them, no download is tried."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for prefix, count in (("train", 200), ("t10k", 50)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", generator.integers(0, 256, (count, 28, 28)))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(count) % 10)
    mnist = load_dataset("mnist", tmp_path)
    assert mnist.shape == (1, 28, 28)
    assert (len(mnist.train), len(mnist.validation), len(mnist.test)) == (160, 40, 50)
    assert mnist.test.ids.tolist() == list(range(50))
    assert mnist.test.labels.tolist() == [i % 10 for i in range(50)]
    assert float(mnist.test.x(torch.arange(50)).min()) >= 0.0
    assert float(mnist.test.x(torch.arange(50)).max()) <= 1.0


def test_sizes_other_than_the_published_ones_are_noted(tmp_path: Path):
    """CIFAR-10 as arrays: a part of the test set is never mistaken for all of it."""
    folder = tmp_path / "cifar10"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 60), ("test", 30)):
        pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        np.savez(folder / f"{split}.npz", x=pixels, y=np.arange(count) % 10)
    data = load_dataset("cifar10", tmp_path)
    assert data.card.note == (
        "test set: only 30 images, the first of the 10,000 published ones; "
        "training set: only 60 images, the first of the 50,000 published ones"
    )
    assert (data.shape, data.classes, len(data.train), len(data.validation)) == ((3, 32, 32), 10, 48, 12)
    with np.load(folder / "test.npz") as file:
        np.testing.assert_array_equal(data.test.images.numpy(), np.moveaxis(file["x"], 3, 1))
    np.savez(folder / "test.npz", x=np.zeros((3, 32, 32, 3), np.float32), y=np.arange(3))
    with pytest.raises(UserError, match=r"test\.npz: x is float32"):
        load_dataset("cifar10", tmp_path)


def test_the_first_1000_test_images_of_cifar10(shared: Path):
    if not (shared / "data" / "cifar10").is_dir():
        pytest.skip("../shared/data/cifar10 is absent")
    card = load_dataset("cifar10", shared / "data").card
    assert card.note == "test set: only 1,000 images, the first of the 10,000 published ones"
    assert {name: split.n for name, split in card.splits.items()} == {
        "train": 45000,
        "validation": 5000,
        "test": 1000,
    }


def test_every_built_in_data_set_has_a_card(digits: Dataset):
    assert digits.card.license == "CC BY 4.0"
    assert digits.card.note == ""
    assert digits.card.splits["test"].sha256 == digits.revision
    assert len({split.sha256 for split in digits.card.splits.values()}) == 3
    for name in ("mnist", "cifar10", "svhn"):
        assert BUILT_IN[name].source
        assert BUILT_IN[name].license


def test_the_lists_need_no_torch():
    """`robbench list` reads names and cards alone."""
    code = "import sys, robbench.data.names, robbench.data.card, robbench.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_absent_data_say_where_to_put_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import torchvision.datasets

    def no_network(self: object) -> None:
        raise OSError("network is unreachable")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_network)
    with pytest.raises(
        UserError, match=r"'mnist' is not in .*network is unreachable.*--data-dir or ROBBENCH_DATA"
    ):
        load_dataset("mnist", tmp_path)


def test_unknown_data_sets_and_folders(tmp_path: Path):
    with pytest.raises(UserError, match="did you mean 'fashionmnist'"):
        load_dataset("fashion-mnist")
    with pytest.raises(UserError, match=r"--data-dir .* is not a folder"):
        load_dataset("mnist", tmp_path / "nowhere")


@pytest.mark.parametrize(("name", "first"), [("mnist", 7), ("fashionmnist", 9)])
def test_real_files(name: str, first: int, shared: Path):
    data = load_dataset(name, shared / "data")
    assert (len(data.train), len(data.validation), len(data.test)) == (55000, 5000, 10000)
    assert int(data.test.labels[0]) == first
