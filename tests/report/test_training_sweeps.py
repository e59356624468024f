"""Accuracy against a setting of the training: which models are joined, and the numbers of the figure."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from publish_runs import attack, cell, frame, make_run
from scipy import stats
from site_runs import written

from robbench.cli.app import main
from robbench.metrics.verdicts import shown_verdicts
from robbench.report.site.build import parts
from robbench.report.site.groups import Group, site_of
from robbench.report.site.page import Download, Page
from robbench.report.site.training_sweeps import families, training_sweeps
from robbench.store.records import Run

N = 60


def run_of(settings: dict[str, dict[str, object]], budgets: tuple[float, ...] = (0.1, 0.2)) -> Run:
    """Models by name with the settings of their training: "embedding" and "seed", others of the defense."""
    cells = [
        cell(name, attack(f"pgd20@{epsilon}", "linf", epsilon), frame(N, 0.95, 0.7 - epsilon, 10 * k + j))
        for k, name in enumerate(settings)
        for j, epsilon in enumerate(budgets)
    ]
    run = make_run(cells, N)
    return replace(run, cards={name: _with(card, settings[name]) for name, card in run.cards.items()})


def _with(card, settings):  # type: ignore[no-untyped-def]
    own = dict(settings)
    training = card.training.model_copy(update={"seed": own.pop("seed", 0)})
    arguments = {"embedding": own.pop("embedding")} if "embedding" in own else {}
    training = training.model_copy(update={"parameters": {"defense": own, "recipe": {"epochs": 10}}})
    architecture = card.architecture.model_copy(update={"arguments": arguments})
    return card.model_copy(update={"training": training, "architecture": architecture})


def group_of(settings: dict[str, dict[str, object]], **changes: object) -> Group:
    return site_of([run_of(settings, **changes)]).groups[0]  # type: ignore[arg-type]


DIMENSIONS = {
    f"nz{d}-seed{s}": {"embedding": d, "seed": s, "prior": "gaussian"} for d in (8, 2, 4) for s in (0, 1, 2)
}


def test_the_points_are_means_over_seeds_with_student_s_interval() -> None:
    group = group_of(DIMENSIONS)
    (sweep,) = training_sweeps(group, "nz4-seed1")
    assert sweep.title == "Accuracy against embedding of the architecture"
    found = {(line[1], line[2]): line for line in sweep.lines}
    assert list(dict.fromkeys(line[1] for line in sweep.lines)) == ["2", "4", "8"]
    accuracies = {
        (r.cell.model_name, r.cell.attack.label): 100 * shown_verdicts(r).mean() for r in group.run.cells
    }
    for d in (2, 4, 8):
        values = [accuracies[f"nz{d}-seed{s}", "pgd20@0.1"] for s in (0, 1, 2)]
        *_, epsilon, trainings, n, mean, lower, upper = found[str(d), "pgd20@0.1"]
        assert (epsilon, trainings, n) == (0.1, 3, N)
        low, up = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        assert (mean, lower, upper) == pytest.approx((np.mean(values), max(low, 0), min(up, 100)))


def test_the_page_and_the_file_have_the_numbers_of_the_figure() -> None:
    group = group_of(DIMENSIONS)
    found = list(parts(site_of([run_of(DIMENSIONS)])))
    page = next(p for p in found if isinstance(p, Page) and p.path == group.model_path("nz2-seed0"))
    (sweep,) = training_sweeps(group, "nz2-seed0")
    assert sweep.figure.svg in page.body
    assert "Trainings a point: 3; n = 60" in page.body
    (file,) = [p for p in found if isinstance(p, Download) and p.path.endswith("nz2-seed0-training-1.csv")]
    rows = [line.split(",") for line in file.content.decode().splitlines()[1:]]
    assert [[str(value) for value in line] for line in sweep.lines] == rows
    for line in sweep.lines:
        assert f"{line[6]:.1f} [{line[7]:.1f}, {line[8]:.1f}] at {line[1]}" in sweep.figure.svg


def test_a_setting_in_words_is_drawn_against_the_budget() -> None:
    settings = {name: {"embedding": 8, "prior": name, "seed": 0} for name in ("gaussian", "uniform")}
    (sweep,) = training_sweeps(group_of(settings), "uniform")
    assert [name for _, name in sweep.figure.legend] == ["gaussian, pgd20", "uniform, pgd20"]
    assert "Wilson" in sweep.note
    assert re.search(
        r"uniform, pgd20: [\d.]+ \[[\d., ]+\] at 0, [\d.]+ \[[\d., ]+\] at 0.1", sweep.figure.svg
    )


def test_the_step_of_an_inner_attack_follows_its_budget() -> None:
    settings = {f"at{e}": {"epsilon": e, "step_size": e / 4, "steps": 10} for e in (0.05, 0.1, 0.2)}
    (family,) = families(group_of(settings))
    assert (family.setting, list(family.values)) == ("epsilon of the defense", [0.05, 0.1, 0.2])
    other = {**settings, "at0.2": {"epsilon": 0.2, "step_size": 0.01, "steps": 10}}
    (family,) = families(group_of(other))
    assert list(family.values) == [0.05, 0.1]


def test_models_that_differ_in_two_settings_or_in_the_seed_alone_are_not_joined() -> None:
    assert (
        families(group_of({"a": {"embedding": 2, "sigma": 1.0}, "b": {"embedding": 4, "sigma": 2.0}})) == []
    )
    assert families(group_of({"a": {"sigma": 1.0, "seed": 0}, "b": {"sigma": 1.0, "seed": 1}})) == []


def test_the_same_weights_count_once() -> None:
    run = run_of(DIMENSIONS)
    weights = run.cards["nz4-seed0"].weights
    cards = {**run.cards, "nz4-seed1": run.cards["nz4-seed1"].model_copy(update={"weights": weights})}
    (family,) = families(site_of([replace(run, cards=cards)]).groups[0])
    assert [len(names) for names in family.values.values()] == [3, 2, 3]


def test_cards_without_a_training_are_left_out() -> None:
    run = run_of(DIMENSIONS)
    cards = {name: card.model_copy(update={"training": None}) for name, card in run.cards.items()}
    assert families(site_of([replace(run, cards=cards)]).groups[0]) == []


def test_the_command_writes_the_numbers_and_a_picture_with_names(tmp_path: Path) -> None:
    folder = written(run_of(DIMENSIONS), tmp_path / "run")
    result = CliRunner().invoke(main, ["figure", "training", str(folder)])
    assert result.exit_code == 0, result.output
    (sweep,) = training_sweeps(group_of(DIMENSIONS), "nz2-seed0")
    table = folder / "figures" / "training-embedding-of-the-architecture.csv"
    assert len(table.read_text().splitlines()) == 1 + len(sweep.lines)
    assert str(sweep.lines[0][6]) in table.read_text()
    picture = table.with_suffix(".svg").read_text()
    assert "var(" not in picture
    assert "currentColor" not in picture
    one = written(run_of({"alone": {"embedding": 2}}), tmp_path / "one")
    result = CliRunner().invoke(main, ["figure", "training", str(one)])
    assert (result.exit_code, "no two classifiers" in result.output) == (2, True)
