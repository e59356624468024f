"""Corrupted images as attacks: which image belongs to which sample and severity, verdicts, files that do not fit."""

import pickle
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robbench.attacks import Victim, build_attack
from robbench.core.errors import UserError
from robbench.data import Dataset, Split
from robbench.data.corruption_names import Corruption, Headline
from robbench.data.corruptions import located
from robbench.specs import ResolvedAttack, expand_groups, resolve_attack, threat_models

MODELS = threat_models()
N, SIDE, CLASSES = 20, 4, 3


class Brightest(nn.Module):
    """Says which channel of the first pixel is brightest: what it answers can be read off the file."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0, 0]


def written(folder: Path, block: int = N, names: tuple[str, ...] = ("fog", "snow")) -> dict[str, np.ndarray]:
    """CORRUPTION.npy [5 block,SIDE,SIDE,3] and labels.npy; labels repeat 0, 1, 2."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(7)
    arrays = {name: rng.integers(0, 256, (5 * block, SIDE, SIDE, 3), dtype=np.uint8) for name in names}
    arrays["labels"] = np.tile(np.arange(block) % CLASSES, 5)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return arrays


def dataset(folder: Path | None, n: int = N) -> Dataset:
    """A test set of n random images called cifar10, whose corrupted images are in `folder`."""
    images = torch.randint(0, 256, (n, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(1)).to(
        torch.uint8
    )
    test = Split(torch.arange(n), torch.arange(n) % CLASSES, images, 256)
    nothing = test.subset(torch.arange(0))
    return Dataset("cifar10", ("a", "b", "c"), 256, nothing, nothing, test, corruptions=folder)


def spec(name: str) -> ResolvedAttack:
    return resolve_attack(name, "cifar10", MODELS)


def test_the_groups_are_the_published_corruptions() -> None:
    grid = [f"c-{name}-{severity}" for name in get_args(Headline) for severity in range(1, 6)]
    assert expand_groups(["corruptions"], MODELS) == grid
    assert len(grid) == 75
    assert len(expand_groups(["corruptions-extra", "corruptions", "c-fog-1", "pgd20"], MODELS)) == 96
    for name in expand_groups(["corruptions", "corruptions-extra"], MODELS):
        corruption, _, severity = name.removeprefix("c-").rpartition("-")
        assert spec(name).parameters == {"corruption": corruption, "severity": int(severity)}
    assert len(get_args(Corruption)) == 19


@pytest.mark.parametrize(("n", "block"), [(N, N), (8, N)])
def test_image_i_of_severity_s_is_row_i_of_block_s(n: int, block: int, tmp_path: Path) -> None:
    """Also where the test set at hand is only the first n images of what was corrupted."""
    arrays, data = written(tmp_path / "C", block), dataset(tmp_path / "C", n)
    ids = torch.tensor([5, 0, 7])
    x, y = data.test.by_ids(ids)
    for severity in range(1, 6):
        (found,) = located([spec(f"c-fog-{severity}")], data)
        attack = build_attack(found)
        outcome = attack.evaluate(Victim(Brightest()), ids, x, y, 0, 2)
        rows = (severity - 1) * block + ids.numpy()
        expected = arrays["fog"][rows]
        np.testing.assert_array_equal(
            (outcome.adversarial * 255).round().numpy(), np.moveaxis(expected, 3, 1)
        )
        right = expected[:, 0, 0].argmax(1) == y.numpy()
        ties = np.sort(expected[:, 0, 0], 1)[:, -1] == np.sort(expected[:, 0, 0], 1)[:, -2]
        assert outcome.under_attack[~torch.tensor(ties)].tolist() == right[~ties].tolist()
        assert outcome.forwards.tolist() == [attack.cost.forwards] * 3
        assert attack.spec.parameters["sha256"] is not None
        assert "folder" not in attack.spec.parameters, "a folder's place is no part of a cell's address"


def test_accuracy_is_plain_also_where_the_clean_image_is_misclassified(tmp_path: Path) -> None:
    """All corrupted images say class 1, all clean ones class 0: right are exactly the samples of class 1."""
    written(tmp_path / "C")
    stored = np.zeros((5 * N, SIDE, SIDE, 3), np.uint8)
    stored[..., 1] = 255
    np.save(tmp_path / "C" / "fog.npy", stored)
    data = dataset(tmp_path / "C")
    x = torch.zeros(N, 3, SIDE, SIDE)
    x[:, 0] = 1.0
    (found,) = located([spec("c-fog-2")], data)
    outcome = build_attack(found).evaluate(Victim(Brightest()), data.test.ids, x, data.test.labels, 0, 256)
    assert outcome.under_attack.tolist() == [int(label) == 1 for label in data.test.labels]
    assert not outcome.robust.any(), "right on the clean image and under attack is none"
    assert [by is None for by in outcome.broken_by] == outcome.robust.tolist()
    assert outcome.broken_at[outcome.robust].tolist() == [-1] * int(outcome.robust.sum())


def test_a_cell_can_be_sent_to_a_worker(tmp_path: Path) -> None:
    """Ray pickles attacks: the path travels, not the images."""
    written(tmp_path / "C")
    data = dataset(tmp_path / "C")
    sent = pickle.dumps(build_attack(located([spec("c-fog-3")], data)[0]))
    assert len(sent) < 5_000
    x, y = data.test.by_ids([3, 4])
    found = pickle.loads(sent).evaluate(Victim(Brightest()), torch.tensor([3, 4]), x, y, 0, 2)
    assert not torch.equal(found.adversarial, x)


def test_another_file_is_another_address(tmp_path: Path) -> None:
    arrays, data = written(tmp_path / "C"), dataset(tmp_path / "C")
    before = located([spec("c-fog-1")], data)[0].parameters["sha256"]
    assert located([spec("c-fog-5")], data)[0].parameters["sha256"] == before, "one file holds all severities"
    np.save(tmp_path / "C" / "fog.npy", 255 - arrays["fog"])
    assert located([spec("c-fog-1")], data)[0].parameters["sha256"] != before
    assert located([spec("pgd10")], dataset(None)) == [spec("pgd10")]


def refused(data: Dataset, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        located([spec("c-fog-1"), spec("c-frost-2"), spec("pgd10")], data)
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_absent_files_say_where_to_get_them(tmp_path: Path) -> None:
    folder = tmp_path / "CIFAR-10-C"
    get = f"unpack CIFAR-10-C.tar of https://zenodo.org/records/2535967 in {tmp_path}"
    refused(dataset(folder), f"attack 'c-fog-1': {folder} lacks fog.npy, frost.npy, labels.npy (3 of 3", get)
    written(folder)
    refused(dataset(folder), "lacks frost.npy (1 of 3 files are missing)", "--data-dir")
    refused(
        dataset(None),
        "'cifar10' has none; use --dataset cifar10 or cifar100, or name their folder",
    )


def stored(folder: Path, name: str, array: np.ndarray) -> Dataset:
    """Good files but one."""
    written(folder, names=("fog", "frost"))
    np.save(folder / f"{name}.npy", array, allow_pickle=True)
    return dataset(folder)


IMAGES = np.zeros((5 * N, SIDE, SIDE, 3), np.uint8)
BAD_FILES = {
    "float": ("fog", IMAGES.astype(np.float32), "holds float32"),
    "other size": ("fog", IMAGES[:, 1:], "not uint8 (5 N, 4, 4, 3)"),
    "channels first": ("fog", np.moveaxis(IMAGES, 3, 1), "not uint8 (5 N, 4, 4, 3)"),
    "no five blocks": ("fog", IMAGES[:-1], "severities 1 to 5 in blocks of N"),
    "too short": (
        "fog",
        IMAGES[: 5 * (N - 1)],
        "has 19 images a severity, and test images of 'cifar10' have ids up",
    ),
    "pickled": ("fog", np.array([{}], object), "pickled objects"),
    "other order": (
        "labels",
        np.tile(np.arange(N)[::-1] % CLASSES, 5),
        "labels differ from those of the test set",
    ),
    "float labels": ("labels", np.zeros(5 * N), "not (5 N,) labels"),
    "few labels": ("labels", np.zeros(5, np.int64), "has 1 images a severity"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_files_that_do_not_fit(case: str, tmp_path: Path) -> None:
    name, array, message = BAD_FILES[case]
    refused(stored(tmp_path / "C", name, array), f"{name}.npy", message)


def test_a_file_that_is_no_array(tmp_path: Path) -> None:
    written(tmp_path / "C", names=("fog", "frost"))
    (tmp_path / "C" / "frost.npy").write_bytes(b"<html>not found</html>")
    refused(dataset(tmp_path / "C"), "frost.npy: cannot be read as an npy array", "download the file again")


def test_without_files_it_says_how_to_run_it() -> None:
    with pytest.raises(UserError, match="robbench run --dataset cifar10 --attacks c-fog-3"):
        build_attack(spec("c-fog-3"))


def test_budgets_change_no_corruption() -> None:
    assert resolve_attack("c-fog-3", "cifar10", MODELS, epsilon=0.1, eta=2.0, steps=9) == spec("c-fog-3")
    with pytest.raises(
        UserError, match=r"unknown attack 'c-fog-6'; did you mean .*'c-fog-1'.*robbench list attacks"
    ) as caught:
        resolve_attack("c-fog-6", "cifar10", MODELS)
    assert "c-snow-1" not in str(caught.value), "groups stand for their members in lists"
