"""An experiment's number stands beside print only where data set, architecture and budgets are those of the print."""

from pathlib import Path

import pytest

from robbench.experiments.schema import SETTINGS, Experiment, experiments
from robbench.experiments.table import (
    Line,
    Measurements,
    Value,
    comparison,
    printed_cells,
    texts,
)
from robbench.experiments.verdicts import Setting, sentence

CELL = ("AT [PGD-5]", "PGD-20")
PAPER = Setting("cifar10", "resnet18", epsilon=8 / 255)
OTHERS = {
    "data set digits, published cifar10": Setting("digits", "resnet18", epsilon=8 / 255),
    "architecture digits-cnn, published resnet18": Setting("cifar10", "digits-cnn", epsilon=8 / 255),
    "epsilon 0.1, published 0.03137": Setting("cifar10", "resnet18", epsilon=0.1),
}


class Measured(Measurements):
    """Every cell is 50 +- 1."""

    def of(self, model: str, attack: str, metric: str) -> Value:
        return Value(50.0, 49.0, 51.0, n=10_000)


def line_of(setting: Setting | None, differs: str = "") -> Line:
    experiment = next(e for e in experiments().values() if e.name == "ijsat-table1")
    measured = Measured(None, {name: (name,) for name in experiment.models}, {}, {})
    settings = {} if setting is None else {CELL: setting}
    lines = comparison(experiment, measured, {}, differs, printed_cells("ijsat-table1"), settings)
    return next(line for line in lines if (line.row, line.column) == CELL)


def test_the_papers_setting_is_compared() -> None:
    line = line_of(PAPER)
    assert (line.published, line.verdict) == (49.85, "within")
    assert line.difference == pytest.approx(0.15)


@pytest.mark.parametrize("words", OTHERS)
def test_another_data_set_model_or_budget_hides_the_print(words: str) -> None:
    line = line_of(OTHERS[words])
    assert (line.published, line.printed, line.difference) == (None, "-", None)
    assert line.verdict == "not comparable"
    assert f"not comparable: {words}" in line.note
    assert texts(line)[0] == "-"
    assert "49.85" not in " ".join(texts(line))


def test_a_smaller_experiment_has_no_difference_either() -> None:
    line = line_of(PAPER, "scale 0.01")
    assert (line.verdict, line.difference) == ("not comparable", None)


@pytest.mark.slow
def test_every_shipped_experiment_runs_in_the_settings_that_are_printed(tmp_path: Path) -> None:
    """Architectures, budgets and data sets of the experiments are those of the published rows, where both say one."""
    from robbench.defenses.plan import TrainRequest, outline
    from robbench.experiments.runs import resolve_use
    from robbench.specs import threat_models

    known = threat_models(None)
    apart = []
    for experiment in experiments().values():
        printed = printed_cells(experiment.published) if experiment.published else {}
        for row, column in experiment.runnable:
            found = printed.get((row.title, column.title))
            if found is None or column.metric in SETTINGS:
                continue
            member = row.model_of(column.title) or ""
            member = experiment.detectors[member].model if member in experiment.detectors else member
            setting = setting_of(experiment, member, tmp_path, outline, TrainRequest)
            if use := experiment.attack_of(row, column):
                attack = resolve_use(use, experiment.dataset, known)
                setting = Setting(setting.dataset, setting.architecture, attack.epsilon, attack.eta)
            if text := sentence(setting.apart_from(found)):
                apart.append(f"{experiment.name}, {row.title}, {column.title}: {text}")
    assert apart == []


def setting_of(experiment: Experiment, name: str, out: Path, outline: object, request: object) -> Setting:
    model = experiment.models[name]
    asked = request(  # type: ignore[operator]
        defense=model.defense,
        dataset=model.dataset or experiment.dataset,
        recipe=model.recipe,
        architecture=model.architecture,
        name=name,
        out=out,
        overrides=model.settings,
    )
    return Setting(experiment.dataset, outline(asked).architecture.name)  # type: ignore[operator]
