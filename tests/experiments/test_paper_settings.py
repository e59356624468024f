"""Tables of settings: read from recipes and images, without a training; what is absent is named by cell."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.data import load_dataset
from robbench.experiments import settings
from robbench.experiments.request import ExperimentRequest
from robbench.experiments.runs import plan_experiment
from robbench.experiments.schema import experiments, find_experiment
from robbench.experiments.settings import measure_settings


def test_table_1_is_what_the_recipes_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(main, ["run", "--experiment", "er-table1", "--out", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    assert "8 within" in result.output
    found = measure_settings(ExperimentRequest(find_experiment("er-table1")))
    values = {key: value.value for key, value in found.items()}
    assert values["er-mnist-er-at", "adv_training_epsilon"] == 0.3
    assert values["er-cifar10-er-at", "adv_training_iterations"] == 20
    assert values["er-tiny-imagenet-er-at", "adv_training_epsilon"] == 0.01
    assert not (tmp_path / "out" / "models").exists()


def test_table_2_says_of_each_cell_which_images_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """With digits in place of MNIST and CIFAR-10, and without STL-10."""
    digits = load_dataset("digits")

    def load(name: str, *places: object) -> object:
        if name == "stl10":
            raise UserError("data set 'stl10' is not in 'data'; put its files there")
        return digits

    monkeypatch.setattr(settings, "load_dataset", load)
    found = measure_settings(ExperimentRequest(find_experiment("er-table2")))
    assert {found[f"er-{name}-er", "embedding_dim"].value for name in ("mnist", "cifar10")} == {4, 16}
    assert found["er-tiny-imagenet-er", "embedding_dim"].value == 20
    dimension = found["er-mnist-er", "estimated_intrinsic_dim"]
    assert dimension.value == pytest.approx(5.97, abs=0.01)
    assert "levina 7.35" in dimension.reason
    assert dimension.lower is None
    size = found["er-cifar10-er", "data_dim"]
    assert (size.value, size.reason) == (64, "1x8x8")
    for metric in ("data_dim", "estimated_intrinsic_dim"):
        assert found["er-stl10-er", metric].needs == ("data set stl10 (data set 'stl10' is not in 'data')",)
        assert found["er-tiny-imagenet-er", metric].needs == ("data set tiny-imagenet",)


def test_settings_train_nothing_and_load_no_images(tmp_path: Path) -> None:
    for name in ("er-table1", "er-table2"):
        plan = plan_experiment(ExperimentRequest(find_experiment(name)), tmp_path / name)
        assert (plan.jobs, plan.attacks, plan.absent) == ((), (), "")


def test_nothing_of_the_er_tables_is_left_undone() -> None:
    for name, experiment in experiments().items():
        if name.startswith("er-"):
            assert not any(part.needs for part in (*experiment.rows, *experiment.columns)), name
