"""Data sets of one's own and corruptions through the commands: run, train, report, fid, samples, list and show."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from data_folders import array_split, write_card

from robbench.cli.app import main
from robbench.data import load_dataset
from robbench.store.ledger import load_run

NOTE = "scans in another order"
TEST = 30


def invoked(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def done(*arguments: object) -> str:
    result = invoked(*arguments)
    assert result.exit_code == 0, (result.output, result.stderr, result.exception)
    return result.output


def assert_one_line(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.count("\n") == 1
    for part in parts:
        assert part in result.stderr


def scans(folder: Path, factor: int = 1, train: bool = True, **card: object) -> Path:
    """scikit-learn's digits in another split, grey levels times `factor`, as a folder of one's own."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = (factor * bunch.images).astype(np.uint8), bunch.target
    splits = {"train": array_split(folder, "train", x[:400], y[:400])} if train else {}
    splits["test"] = array_split(folder, "test", x[-TEST:], y[-TEST:])
    names = [str(digit) for digit in range(10)]
    levels = 256 if factor > 1 else 17
    fields = {
        "name": "scans",
        "class_names": names,
        "layout": "NHW",
        "grey_levels": levels,
        "note": NOTE,
        **card,
    }
    return write_card(folder, splits, **fields)


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_test_images_alone_are_enough_to_attack_the_models_they_are_like(in_tmp: Path) -> None:
    scans(Path("mine"), train=False, like="digits")
    out = done("run", "--data", "mine", "--model", "digits-standard", "--attacks", "fgsm", "--n", 20)
    assert f"Data: {NOTE}; " in " ".join(out.split())
    folder = Path("robbench-runs/scans-seed0")
    run = load_run(folder)
    assert run.dataset == "scans"
    assert run.data is not None
    assert (run.data.like, run.data.folder, list(run.data.splits)) == ("digits", "mine", ["test"])
    digits = load_dataset("digits")
    trained_on = {*digits.train.ids.tolist(), *digits.validation.ids.tolist()}
    seen = len(trained_on & {*range(1797 - TEST, 1797)})
    assert run.data.note == (
        f"{NOTE}; {seen} of {TEST} test images are training or validation images of digits (the same pixels): "
        f"accuracies on them are not those on new images"
    )
    assert run.cells[0].cell.attack.epsilon == 0.2, "the budget of the data set it is like"
    page = (folder / "leaderboard.html").read_text(encoding="utf-8")
    for text in ("Data card", NOTE, run.dataset_revision, "robbench run --data mine --model digits-standard"):
        assert text in page
    assert NOTE in (folder / "leaderboard.md").read_text(encoding="utf-8")

    assert_one_line(
        invoked("train", "--data", "mine", "--defense", "standard"), "'scans' has only test images"
    )
    assert_one_line(
        invoked("fid", folder, "--data", "mine"), "'scans' has only test images and a Frechet distance"
    )
    assert_one_line(
        invoked("fid", folder), "'scans', a data set of a folder; name that folder, as in --data mine"
    )
    scored = done(
        "samples",
        "--model",
        "digits-glow",
        "--under",
        "digits-glow",
        "--data",
        "mine",
        "--n",
        4,
        "--temperature",
        1,
    )
    assert "test images" in scored

    shutil.rmtree("mine")
    assert NOTE in " ".join(done("report", folder).split()), "a report needs no data"
    content = yaml.safe_load((folder / "run.yaml").read_text(encoding="utf-8"))
    del content["data"], content["sha256"]
    content["schema_version"] = 1
    (folder / "run.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    assert load_run(folder).data is None, "run folders of before there were cards"
    assert "Data:" not in done("report", folder)


def corrupted(folder: Path, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The test images of `scans` under ever more noise, as CIFAR-10-C is laid out, for four images more than it has."""
    with np.load(folder / "test.npz") as file:
        x, y = file["x"], file["y"]
    rng = np.random.default_rng(0)
    padded = np.concatenate([x, x[:4]])
    arrays = {}
    for number, name in enumerate(names):
        blocks = [padded + rng.normal(0, 12.0 * severity + number, padded.shape) for severity in range(1, 6)]
        arrays[name] = np.clip(np.concatenate(blocks), 0, 255).astype(np.uint8)
    arrays["labels"] = np.tile(np.concatenate([y, y[:4]]), 5)
    (folder / "noisy").mkdir()
    for name, array in arrays.items():
        np.save(folder / "noisy" / f"{name}.npy", array)
    return arrays


def test_train_on_a_folder_and_measure_corruptions(in_tmp: Path) -> None:
    scans(Path("mine"), factor=15, corruptions="noisy")
    arrays = corrupted(Path("mine"), ("fog",))
    train = ("train", "--data", "mine", "--defense", "standard", "--recipe", "digits", "--epochs", 1)
    trained = done(*train, "--set", "architecture.width=4")
    model = "robbench-training/scans-standard"
    assert f"robbench run --data mine --model {model}" in trained
    card = yaml.safe_load(Path(model, "card.yaml").read_text(encoding="utf-8"))
    assert "--data mine" in card["training"]["command"]
    assert (card["dataset"], card["training"]["train_samples"]) == ("scans", 320)

    run = ("--model", model, "--attacks", "c-fog-3,c-fog-5", "--n", TEST, "--keep-examples", 0)
    assert "accuracy by corruption and severity" in done("run", "--data", "mine", *run)
    folder = Path("robbench-runs/scans-seed0")
    rows = load_run(folder).cells[0].rows
    ids = rows["sample_id"].to_list()
    x, _ = load_dataset("scans", data=Path("mine")).test.by_ids(ids)
    distance = np.abs(arrays["fog"][2 * (TEST + 4) + np.array(ids)] / 255 - x.numpy()[:, 0]).reshape(
        len(ids), -1
    )
    np.testing.assert_allclose(rows["linf"], distance.max(1), atol=1e-6)
    assert load_run(folder).cells[0].cell.nll_flow is None

    before = sorted(path.stat().st_mtime_ns for path in folder.glob("cells/*/shard-*.parquet"))
    Path("mine").rename("moved")
    done("run", "--data", "moved", *run)
    after = sorted(path.stat().st_mtime_ns for path in folder.glob("cells/*/shard-*.parquet"))
    assert before == after, "where the files lie is no part of a cell's address"
    np.save(Path("moved/noisy/fog.npy"), arrays["fog"][::-1])
    done("run", "--data", "moved", *run)
    assert len(list(folder.glob("cells/*/shard-*.parquet"))) == 4, "another file is another benchmark"
    fewer = len(arrays["fog"]) - 5
    np.save(Path("moved/noisy/fog.npy"), arrays["fog"][:fewer])
    assert_one_line(invoked("run", "--data", "moved", *run), f"{fewer} images", f"{fewer + 5} labels")


def test_a_data_set_is_named_once_and_must_fit_the_model(in_tmp: Path) -> None:
    scans(Path("mine"))
    both = invoked(
        "run", "--data", "mine", "--dataset", "digits", "--model", "digits-at", "--attacks", "fgsm"
    )
    assert_one_line(both, "--dataset digits and --data 'mine' name two data sets; leave one out")
    unlike = invoked("run", "--data", "mine", "--model", "digits-at", "--attacks", "fgsm", "--epsilon", "0.1")
    assert_one_line(unlike, "'digits-at' classifies digits, not scans; if the model fits, give --like digits")
    assert_one_line(
        invoked("train", "--data", "nowhere", "--defense", "at"), "--data 'nowhere' is not a folder"
    )
    assert_one_line(
        invoked("bench", "aa", "--data", "mine", "--model", "digits-at"),
        "'scans', and 'digits' is needed here",
    )
    corrupt = invoked(
        "run", "--dataset", "digits", "--model", "digits-at", "--attacks", "corruptions", "--n", 5
    )
    assert_one_line(
        corrupt, "attack 'c-gaussian_noise-1' reads corrupted test images, and data set 'digits' has none"
    )
    assert_one_line(
        invoked("run", "--dataset", "", "--model", "digits-at", "--attacks", "fgsm"), "unknown data set ''"
    )


def test_a_flow_of_other_grey_levels_is_not_used(in_tmp: Path) -> None:
    scans(Path("mine"), factor=15, like="digits")
    run = ("run", "--data", "mine", "--model", "digits-at", "--n", 5, "--attacks")
    assert "no bits/dim and no latent attacks: flow 'digits-glow' is for images" in done(*run, "fgsm")
    assert load_run(Path("robbench-runs/scans-seed0")).cells[0].cell.nll_flow is None
    assert_one_line(invoked(*run, "jsa50"), "jsa50", "flow")
    result = invoked(*run, "fgsm", "--flow", "digits-glow")
    assert_one_line(result, "flow 'digits-glow' models 17 grey levels and 'scans' has 256", "correct `like`")


def test_list_and_show(in_tmp: Path) -> None:
    scans(Path("mine"), like="digits")
    shown = done("show", "mine")
    for text in (
        "scans",
        NOTE,
        "1 x 8 x 8",
        "17 grey levels",
        "320 images",
        "80 images",
        f"{TEST} images, sha256 ",
    ):
        assert text in shown
    Path("data").mkdir()
    listed = done("list", "datasets", "--data-dir", "data")
    assert "digits\t1,437\t360\tCC BY 4.0\tembedded" in listed
    assert "cifar10\t50,000\t10,000\tnone stated by its authors\tnot here; torchvision downloads it" in listed
    absent = done("show", "svhn", "--data-dir", "data")
    assert "73,257 training and 26,032 test images as published" in absent
    assert list(Path("data").iterdir()) == [], "nothing is downloaded"
    assert "Split test:        360 images, sha256 " in done("show", "digits")
    group = done("show", "corruptions").partition("== threat model")[0]
    assert "unweighted mean of the 75" in group
    assert group.count("\n  c-") == 75
    attacks = done("list", "attacks").splitlines()
    assert [line.split("\t")[0] for line in attacks if line.startswith("corr")] == [
        "corruptions-generated",
        "corruptions",
        "corruptions-extra",
    ]
