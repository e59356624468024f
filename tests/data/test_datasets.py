"""Data sets: fixed stratified splits, seeded subsets, real files through torchvision's own classes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robbench.core.errors import UserError
from robbench.data import Dataset, load_dataset, sample_ids
from robbench.data.names import BUILT_IN


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
@settings(max_examples=25)
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
    code = "import sys, robbench.data.names, robbench.data.card, robbench.cli.catalog; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


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


def test_an_empty_folder_of_a_failed_download_is_no_data_set(tmp_path):
    from robbench.data.checksums import FILES
    from robbench.data.names import BUILT_IN, place

    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    assert place("mnist", tmp_path) is None
    (tmp_path / "MNIST" / "raw" / "t10k-labels-idx1-ubyte").write_bytes(b"x")
    assert place("mnist", tmp_path) is None, "one file of four"
    for file in FILES["mnist"]:
        (tmp_path / file).write_bytes(b"x")
    assert place("mnist", tmp_path) == tmp_path / BUILT_IN["mnist"].files
