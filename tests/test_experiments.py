"""The papers' experiments as files: complete against the published tables, and honest about what cannot be run."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from robbench.core.errors import UserError
from robbench.core.schema import validate
from robbench.detectors import DETECTORS
from robbench.experiments.published import published_index, published_table, table_rows
from robbench.experiments.schema import (
    LEAST_TRAINING,
    AttackUse,
    Experiment,
    Scale,
    experiments,
    find_experiment,
)
from robbench.recipes import recipes
from robbench.specs import threat_models

ALL, RECIPES, THREATS = experiments(), recipes(), threat_models()
ASKED = (
    [f"ijsat-table{n}" for n in range(1, 8)]
    + [f"flow-lp-table{n}" for n in (1, 2, 3, 4, 5, 6, 9, 10, 11, 12)]
    + ["flow-lp-figure5"]
    + [f"flow-robustness-table{n}" for n in (1, 2, 3)]
    + [f"er-table{n}" for n in range(1, 7)]
    + [f"er-table{n}-cifar10" for n in range(3, 7)]
    + [f"er-figure{n}" for n in range(1, 4)]
)
PLOTS = ("flow-lp-figure5", "er-figure1", "er-figure2", "er-figure3")  # of which no numbers are printed
# Attacks that a table names without a budget, and what the experiments take.
PRINTED_ATTACKS = {"cw": "cw-l2", "pgd": "pgd20"}
MINIMAL = {
    "name": "one",
    "title": "t",
    "source": "s",
    "published": None,
    "dataset": "digits",
    "doubts": ["d"],
    "models": {"m": {"defense": "standard"}},
    "rows": [{"title": "r", "model": "m"}],
    "columns": [{"title": "c", "metric": "accuracy"}],
}


def test_every_table_asked_for_is_an_experiment() -> None:
    assert sorted(ALL) == sorted(ASKED)


@pytest.mark.parametrize("name", ASKED)
def test_an_experiment_has_a_cell_for_every_number_printed(name: str) -> None:
    """Against the transcribed tables; plots have no numbers. A table of two data sets is two experiments."""
    experiment = ALL[name]
    if experiment.published is None:
        assert name in PLOTS
        return
    printed = {
        (row.row, row.column): row
        for row in table_rows(published_table(experiment.published, published_index()))
        if row.origin != "recomputed"
    }
    of_table = [other for other in ALL.values() if other.published == experiment.published]
    cells = {(r.title, c.title) for each in of_table for r in each.rows for c in each.columns}
    assert set(printed) <= cells
    computed = {(row.title, column.title): column.metric for row, column in experiment.runnable}
    for place in set(printed) & set(computed):
        assert printed[place].metric == computed[place], place
        row = next(row for row in experiment.rows if row.title == place[0])
        model = experiment.models.get(row.model_of(place[1]) or "")
        dataset = (model.dataset if model else None) or experiment.dataset
        assert printed[place].dataset in (dataset, f"{dataset}-c"), place


@pytest.mark.parametrize("name", ASKED)
def test_budgets_and_subsets_are_those_of_the_published_rows(name: str) -> None:
    """Attack, radius, steps and number of training images as the transcription has them."""
    experiment = ALL[name]
    if experiment.published is None:
        return
    table = published_table(experiment.published, published_index())
    printed = {(r.row, r.column): r for r in table_rows(table)}
    for row, column in experiment.runnable:
        found = printed.get((row.title, column.title))
        use = experiment.attack_of(row, column)
        if found is None:
            continue
        if use is not None and found.attack not in ("clean", "average"):
            stated = found.threat_model != "unforeseen"  # of which no budget is printed
            budget = (found.epsilon, found.eta) if stated else (use.epsilon, None)
            attack = PRINTED_ATTACKS.get(found.attack, found.attack)
            assert (use.name, use.epsilon, use.eta) == (attack, *budget)
        member = row.model_of(column.title) or ""
        guarded = experiment.detectors[member].model if member in experiment.detectors else member
        samples = experiment.models[guarded].train_samples
        assert samples is None or samples == found.train_samples


def test_what_is_needed_is_really_absent() -> None:
    """The day a method is there its experiments must use it."""
    from robbench.data.names import dataset_names
    from robbench.defenses import DEFENSES, FLOW_DEFENSES

    known = {attack for model in THREATS.values() for attack in (*model.attacks, *model.groups)}
    known |= {*DEFENSES, *FLOW_DEFENSES, *dataset_names()}
    needs = {need for e in ALL.values() for part in (*e.rows, *e.columns) for need in part.needs}
    assert {"DMAT", "VAE-GAN"} <= needs
    plain = {"".join(c for c in need.lower() if c.isalnum()) for need in needs}
    assert not plain & {"".join(c for c in name.lower() if c.isalnum()) for name in known}


@pytest.mark.parametrize("name", ASKED)
def test_what_is_named_exists(name: str) -> None:
    experiment = ALL[name]
    known = {attack for model in THREATS.values() for attack in model.attacks}
    for row, column in experiment.runnable:
        use = experiment.attack_of(row, column)
        assert use is None or use.name in known
    for detector in experiment.detectors.values():
        assert detector.detector in DETECTORS
        assert known >= set(detector.attacks)
    for model in experiment.models.values():
        assert model.recipe in RECIPES
        assert model.flow is None or model.flow in experiment.models
    assert set(experiment.needed_models) == set(experiment.models)


def test_flows_come_before_what_trains_with_them() -> None:
    for experiment in ALL.values():
        order = experiment.needed_models
        for name in order:
            flow = experiment.models[name].flow
            assert flow is None or order.index(flow) < order.index(name)


def test_models_of_one_name_are_the_same_in_every_table() -> None:
    """So that a model trained for one table serves the others (--zoo)."""
    seen: dict[str, dict[str, object]] = {}
    for experiment in ALL.values():
        for name, model in experiment.models.items():
            settings = model.model_dump() | {"dataset": model.dataset or experiment.dataset}
            assert seen.setdefault(name, settings) == settings, (experiment.name, name)
        for name, detector in experiment.detectors.items():
            settings = detector.model_dump()
            assert seen.setdefault(name, settings) == settings, (experiment.name, name)


# ------------------------------------------------------------------------------------------------------- schema
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": [{"title": "r"}]}, "give one of model, difference and needs"),
        ({"rows": [{"title": "r", "model": "m", "needs": ["x"]}]}, "give one of model"),
        ({"rows": [{"title": "r", "model": "other"}]}, "models that `models` lacks: other"),
        ({"rows": [{"title": "r", "model": "m"}] * 2}, "share the title 'r'"),
        ({"columns": [{"title": "c", "metric": "fid"}]}, "is of an attack"),
        ({"columns": [{"title": "c", "metric": "acuracy"}]}, "'acuracy' is none of"),
        (
            {"columns": [{"title": "c", "metric": "accuracy", "attack": {"name": "a", "epsilon": "8/0"}}]},
            "8/255",
        ),
        ({"columns": [{"title": "c", "metric": "accuracy", "atack": "pgd20"}]}, "atack"),
        ({"doubts": []}, "doubts"),
    ],
)
def test_a_malformed_experiment_is_one_line(changes: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        validate({**MINIMAL, **changes}, Experiment, "one.yaml")
    assert str(caught.value).startswith("one.yaml: ")
    assert "\n" not in str(caught.value)


def test_budgets_may_be_fractions_and_attacks_names() -> None:
    assert validate("pgd20", AttackUse, "x") == AttackUse(name="pgd20")
    assert validate({"name": "pgd20", "epsilon": "8/255"}, AttackUse, "x").epsilon == 8 / 255


def test_an_unknown_experiment_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'ijsat-table1'"):
        find_experiment("ijsat-tabel1")


def test_an_experiment_of_one_s_own_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(json.dumps(MINIMAL))
    assert find_experiment(str(path)).name == "one"


# -------------------------------------------------------------------------------------------------------- scale
@given(st.floats(1e-6, 1.0), st.integers(1, 10**6), st.integers(1, 100))
def test_a_scaled_count_is_between_its_floor_and_the_whole(factor: float, full: int, least: int) -> None:
    count = Scale(factor).count(full, least)
    assert min(least, full) <= count <= full
    assert count == pytest.approx(max(full * factor, min(least, full)), abs=1)


@pytest.mark.parametrize("factor", [0.0, -1.0, 1.5, float("nan")])
def test_a_scale_is_over_zero_to_one(factor: float) -> None:
    with pytest.raises(UserError, match=r"--scale .* is not in \(0, 1\]"):
        Scale(factor)


def test_the_full_scale_changes_nothing() -> None:
    for recipe in RECIPES.values():
        assert Scale(1.0).schedule(recipe, 45000, 45000) == {}
    assert Scale(1.0).flow_size({"steps": 32, "width": 512}) == {}


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("factor", [0.5, 0.1, 0.01])
def test_a_scaled_schedule_keeps_its_shape(name: str, factor: float) -> None:
    """The learning rate of a scaled training at a part of its way is that of the full one at the same part."""
    from robbench.defenses.schedule import learning_rate

    recipe, scale, full = RECIPES[name], Scale(factor), 45000
    samples = scale.count(full, LEAST_TRAINING)
    changes = {
        key.removeprefix("recipe."): value for key, value in scale.schedule(recipe, full, samples).items()
    }
    smaller = type(recipe).model_validate({**recipe.model_dump(), **changes})
    assert smaller.epochs == max(1, round(recipe.epochs * factor))
    if smaller.epochs < 10:
        return  # too few epochs to compare points of a way
    for part in (0.05, 0.3, 0.55, 0.8, 0.97):
        rates = []
        for schedule, images in ((recipe, full), (smaller, samples)):
            steps = max(1, images // schedule.batch_size)
            step = int(part * schedule.epochs * steps)
            rates.append(learning_rate(schedule, step // steps, step, steps))
        assert rates[1] == pytest.approx(rates[0], rel=0.35), (part, rates)


def test_flows_shrink_by_the_root() -> None:
    arguments = {"levels": 3, "steps": 32, "width": 512, "prior": "standard"}
    assert Scale(0.01).flow_size(arguments) == {"architecture.steps": 4, "architecture.width": 52}
    assert Scale(1e-6).flow_size(arguments) == {"architecture.steps": 1, "architecture.width": 8}
