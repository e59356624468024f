"""A real package, installed beside robbench, adds an attack, a defense, a detector, a model, a data set, a metric."""

import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from processes import finished

PACKAGE = Path(__file__).parents[1] / "plugin_package"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package installed by pip, metadata and all."""
    target = tmp_path_factory.mktemp("site")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
    ]
    subprocess.run(
        [*pip, "--target", str(target), str(PACKAGE)], check=True, capture_output=True, timeout=300
    )
    return target


def robbench(site: Path, folder: Path, *arguments: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command in `folder` that finds what is installed in `site`."""
    return finished(*arguments, cwd=folder, paths=[site])


def test_listed(site: Path, tmp_path: Path) -> None:
    for arguments, name in (
        (["defenses"], "label-smoothing"),
        (["datasets"], "digits-inverted"),
        (["attacks", "--threat-models", PACKAGE / "specs"], "corner5"),
    ):
        code, printed, errors = robbench(site, tmp_path, "list", *arguments)
        assert code == 0, errors
        assert any(line.startswith(f"{name}\t") for line in printed.splitlines())


def test_train_by_its_defense_and_attack_by_its_attack(site: Path, tmp_path: Path) -> None:
    """Its data set, architecture, defense and attack; robbench's own attack beside it is stronger."""
    code, _, errors = robbench(
        site, tmp_path, "train", "--defense", "label-smoothing", "--dataset", "digits-inverted",
        "--recipe", "digits", "--architecture", "softmax-regression", "--epochs", 5, "--name", "smooth",
        "--set", "smoothing=0.2",
    )  # fmt: skip
    assert code == 0, errors
    card = tmp_path / "robbench-training" / "smooth" / "card.yaml"
    assert "smoothing: 0.2" in card.read_text()
    code, _, errors = robbench(
        site, tmp_path, "run", "--defense", "label-smoothing", "--dataset", "digits-inverted",
        "--attacks", "corner5,pgd20", "--epsilon", "0.1", "--n", 100, "--zoo", "robbench-training",
        "--threat-models", PACKAGE / "specs", "--out", "run",
    )  # fmt: skip
    assert code == 0, errors
    table = pd.read_csv(tmp_path / "run" / "leaderboard.csv")
    value = table[table["metric"] == "accuracy"].set_index("attack")["value"]
    assert value["clean"] > 60
    assert value["clean"] >= value["corner5@0.1"] > value["pgd20@0.1"]
    assert set(table["dataset"]) == {"digits-inverted"}
    _its_metric_is_in_every_output(site, tmp_path, table)


def _its_metric_is_in_every_output(site: Path, folder: Path, table: pd.DataFrame) -> None:
    """Its only file is robbench_example/metric.py."""
    rows = table[table["metric"] == "l1"].set_index("attack")
    assert rows.loc["pgd20@0.1", "value"] > 0
    assert rows.loc["pgd20@0.1", "scope"].startswith("over ")
    assert "Mean L1 distance, in pixel range." in (folder / "run" / "leaderboard.md").read_text()
    code, printed, _ = robbench(site, folder, "check", "run", "--against", "run/leaderboard.csv")
    assert code == 0, printed
    wrong = (
        (folder / "run" / "leaderboard.csv").read_text().replace(str(rows.loc["pgd20@0.1", "value"]), "9.5")
    )
    (folder / "wrong.csv").write_text(wrong)
    assert robbench(site, folder, "check", "run", "--against", "wrong.csv")[0] == 1
    code, _, errors = robbench(site, folder, "diff", "run", "run")
    assert code == 0, errors
    code, _, errors = robbench(site, folder, "report", "run", "--out", "site")
    assert code == 0, errors
    assert any("L1 pgd20@0.1" in page.read_text() for page in (folder / "site").glob("digits*/*.html"))
    code, _, errors = robbench(folder, folder, "report", "run", "--out", "plain")  # without the package
    assert code == 0, errors
    assert not any("L1 pgd20@0.1" in page.read_text() for page in (folder / "plain").glob("digits*/*.html"))


def test_its_detector_guards_a_model(site: Path, tmp_path: Path) -> None:
    options = ("train", "--detector", "feature-norm", "--model", "digits-standard", "--attacks", "fgsm")
    code, printed, errors = robbench(site, tmp_path, *options, "--n", 30)
    assert code == 0, errors
    folder = tmp_path / "robbench-training" / "digits-standard-feature-norm"
    assert f"DETECTOR {folder}" in printed
    assert "detector: feature-norm" in (folder / "card.yaml").read_text()
    code, _, errors = robbench(tmp_path, tmp_path, *options)
    assert (code, errors.count("\n")) == (2, 1)
    assert "unknown detector 'feature-norm'" in errors


def test_without_the_package_its_names_are_unknown(tmp_path: Path) -> None:
    """The third-party YAML alone is refused with a line that names the algorithm."""
    code, _, errors = robbench(tmp_path, tmp_path, "show", "corner5", "--threat-models", PACKAGE / "specs")
    assert code == 2
    assert "unknown attack algorithm 'corner'" in errors
    assert errors.count("\n") == 1


def test_a_broken_package_is_named(site: Path, tmp_path: Path) -> None:
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[robbench.defenses]\nlost = no_such_module:Defense\n")
    code, _, errors = robbench(tmp_path, tmp_path, "list", "defenses")
    assert code == 2
    assert "'lost'" in errors
    assert "no_such_module" in errors
