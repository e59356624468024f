"""Targeted attacks: the chosen classes, when they count as reached, and what the ledger keeps."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import robbench
from robbench.attacks import Victim, build_attack
from robbench.attacks.search.goals import choose_targets, goal_margins
from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.metrics import metric_of
from robbench.specs import resolve_attack, threat_models
from robbench.store.ledger import load_run

MODELS = threat_models()
SMALL_CW = {"steps": 60, "binary_search_steps": 4, "step_size": 0.05}
FAST = {
    "pgd20": {}, "pgd20-l2": {}, "apgd-ce": {"iterations": 10}, "apgd-t": {"iterations": 10}, "cw-l2": SMALL_CW,
}  # fmt: skip


def build(name, target):
    spec = resolve_attack(name, "digits", MODELS, target=target)
    return build_attack(spec.model_copy(update={"parameters": {**spec.parameters, **FAST[name]}}))


@settings(max_examples=40)
@given(st.integers(2, 12), st.integers(1, 40), st.integers(0, 99))
def test_random_targets_are_wrong_classes_keyed_by_sample(classes, n, seed):
    labels = torch.arange(n) % classes
    ids = torch.arange(n) * 7 + 3
    found = choose_targets("random", torch.zeros(n, classes), labels, ids, seed)
    assert ((found >= 0) & (found < classes) & (found != labels)).all()
    order = torch.randperm(n)
    again = choose_targets("random", torch.zeros(n, classes), labels[order], ids[order], seed)
    assert torch.equal(again, found[order])


def test_every_wrong_class_is_drawn():
    found = choose_targets("random", torch.zeros(3000, 4), torch.ones(3000).long(), torch.arange(3000), 0)
    share = np.bincount(found.numpy(), minlength=4) / 3000
    np.testing.assert_allclose(share, [1 / 3, 0, 1 / 3, 1 / 3], atol=0.04)


def test_the_least_likely_wrong_class():
    logits = torch.tensor([[3.0, 1.0, 2.0], [-5.0, 0.0, 1.0]])
    labels = torch.tensor([0, 0])
    assert choose_targets("least-likely", logits, labels, torch.arange(2), 0).tolist() == [1, 1]


def test_a_class_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="none of the model's 3 classes"):
        choose_targets(3, torch.zeros(2, 3), torch.zeros(2).long(), torch.arange(2), 0)


def test_a_tie_and_logits_that_are_not_finite_do_not_reach_the_target():
    logits = torch.tensor([[1.0, 1.0], [1.0, 2.0], [float("nan"), 9.0], [2.0, 1.0]])
    assert (goal_margins(logits, torch.ones(4).long()) <= 0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("name", FAST)
def test_reached_is_what_a_clean_forward_says_and_more_than_by_chance(name, classifier, images):
    ids, x, y = images
    attack = build(name, "random")
    outcome = attack.evaluate(Victim(classifier), ids, x, y, 0, 48)
    with torch.no_grad():
        seen = classifier(outcome.adversarial).argmax(1)
    assert torch.equal(outcome.reached, seen == outcome.targets)
    untargeted = build_attack(resolve_attack("fgsm", "digits", MODELS))
    weak = untargeted.evaluate(Victim(classifier), ids, x, y, 0, 48)
    assert outcome.reached.sum() > (weak.predictions == outcome.targets).sum()


def test_samples_of_the_target_class_are_left_alone(classifier, images):
    ids, x, y = images
    outcome = build("pgd20", 3).evaluate(Victim(classifier), ids, x, y, 0, 48)
    own = y == 3
    assert own.any()
    assert torch.equal(outcome.adversarial[own], x[own])
    assert not outcome.reached[own].any()


@pytest.mark.parametrize("name", ["aa", "square", "r-la", "fab-t"])
def test_attacks_without_a_targeted_version_say_so(name, flow):
    with pytest.raises(UserError, match="no targeted version"):
        build_attack(resolve_attack(name, "digits", MODELS, target="random"), flow)


def test_untargeted_cells_keep_their_address():
    for name in FAST:
        assert "target" not in build_attack(resolve_attack(name, "digits", MODELS)).spec.parameters


def test_the_success_of_the_python_api_is_the_target(classifier, images):
    _, x, y = images
    found = robbench.attack("pgd20", epsilon=0.3, target=1).run(classifier, x, y)
    with torch.no_grad():
        seen = classifier(found.images).argmax(1)
    assert torch.equal(found.success, (seen == 1) & (y != 1))


def test_the_command_keeps_target_and_reached_per_sample(tmp_path):
    out = tmp_path / "run"
    arguments = ["run", "--model", "digits-standard", "--attacks", "pgd10,fgsm", "--target", "least-likely"]
    result = CliRunner().invoke(main, [*arguments, "--n", "12", "--out", str(out)])
    assert result.exit_code == 0, result.output
    cell = next(r for r in load_run(out).cells if r.cell.attack.label == "pgd10@to-least-likely")
    rows = cell.rows
    assert (rows["target"] != rows["label"]).all()
    assert ((rows["prediction"] == rows["target"]) == rows["reached"].astype(bool)).all()
    success = metric_of("target_success").compute(cell)
    assert success.value == pytest.approx(100 * rows["reached"].astype(bool).mean())
    assert "target_success" in (out / "leaderboard.csv").read_text()


@pytest.mark.parametrize("given", ["nearest", "-1", "1.5", ""])
def test_a_target_that_is_none_is_refused(given, tmp_path):
    arguments = ["run", "--model", "digits-standard", "--attacks", "pgd10", "--target", given]
    result = CliRunner().invoke(main, [*arguments, "--n", "5", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "--target" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["fog", "snow", "jpeg-linf"])
def test_no_image_of_a_perturbation_is_left_alone(name):
    """A class cannot be reached from itself: its clean images would count as right under attack."""
    spec = resolve_attack(name, "digits", MODELS, epsilon=2.0, target=3)
    with pytest.raises(UserError, match=r"target.*3.* give random or least-likely"):
        build_attack(spec)
    assert build_attack(
        resolve_attack(name, "digits", MODELS, epsilon=2.0, target="random")
    ).parameters.target


def test_a_class_that_no_model_has_is_refused_before_the_run(tmp_path):
    arguments = ["run", "--model", "digits-standard", "--attacks", "elastic", "--target", "12"]
    result = CliRunner().invoke(main, [*arguments, "--n", "4", "--out", str(tmp_path / "run")])
    assert result.exit_code == 2
    assert "--target 12 is none of the model's 10 classes; give 0 to 9" in result.output
    assert not (tmp_path / "run").exists()
