"""Attacks of other people: what a search returns, counts, changes or leaves behind gives no number without a word."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from processes import started
from torch import nn

from robbench.attacks import ATTACKS, Attack, Cost, Victim
from robbench.attacks.base import Candidates
from robbench.attacks.trust.context import full_precision
from robbench.cli.app import main
from robbench.core.errors import AttackViolation, UserError
from robbench.core.registry import Registry
from robbench.specs import ResolvedAttack
from robbench.store.ledger import load_run

SPEC = {
    "name": "evil",
    "label": "evil",
    "threat_model": "linf",
    "space": "image",
    "norm": "linf",
    "eta": None,
}
THREAT_MODEL = """
name: evil-linf
space: image
norm: linf
description: of the tests
budgets: {digits: {epsilon: 0.2}}
attacks: {evil: {algorithm: evil, description: of the tests}}
"""


def fgsm(attack, victim, task):
    epsilon, n = attack.spec.epsilon, len(task.x)
    moved = (task.x + epsilon * victim.loss_gradient(task.x, task.y).sign()).clamp(0, 1)
    ones = torch.ones(n, dtype=torch.int64)
    return Candidates(moved, ones.clone(), ones.clone(), ones.clone(), ["evil"] * n)


def evil(change=lambda attack, victim, task, found: None, before=False, **members):
    """An attack class: FGSM, with `change(attack, victim, task, found)` after its search, or before it."""

    def search(self, victim, task):
        if before:
            change(self, victim, task, None)
        found = fgsm(self, victim, task)
        return found if before else (change(self, victim, task, found) or found)

    return type("Evil", (Attack,), {"search": search, "cost": Cost(3, 1), **members})


def evaluated(kind, classifier, images):
    attack = kind(ResolvedAttack(**SPEC, epsilon=0.2, algorithm="evil", parameters={}))
    ids, x, y = images
    return attack.evaluate(Victim(classifier), ids, x, y, 0, 48)


def sets(name, value):
    return lambda attack, victim, task, found: setattr(found, name, value(found, task))


RETURNED = {
    "no candidates": (
        lambda a, v, t, found: [found.adversarial],
        "returned list; return robbench.attacks.Candidates",
    ),
    "NaN": (sets("adversarial", lambda f, t: torch.full_like(t.x, torch.nan)), "NaN or infinite pixels"),
    "another sample's image": (sets("adversarial", lambda f, t: t.x.roll(1, 0)), "outside the linf ball"),
    "off the box": (sets("adversarial", lambda f, t: t.x + 0.2), r"outside the box \[0,1\]"),
    "other type": (sets("adversarial", lambda f, t: t.x.double()), "instead of float32"),
    "other shape": (sets("adversarial", lambda f, t: t.x[:1]), "instead of float32"),
    "all claimed": (sets("claimed", lambda f, t: torch.ones(len(t.x)).bool()), "correctly that it misclass"),
    "claims of some": (sets("claimed", lambda f, t: torch.ones(1).bool()), "wrong `claimed`"),
    "one step for all": (sets("step", lambda f, t: torch.tensor([1])), "wrong `step`"),
    "steps that are no integers": (sets("step", lambda f, t: f.step + 0.5), "wrong `step`"),
    "steps beyond all calls": (sets("step", lambda f, t: f.step + 10**9), "wrong `step`"),
    "negative calls": (sets("forwards", lambda f, t: f.forwards - 5), "wrong `forwards`"),
    "no backwards": (sets("backwards", lambda f, t: None), "wrong `backwards`"),
    "few names": (sets("component", lambda f, t: ["evil"]), "wrong `component`.*names out of evil"),
    "no names": (sets("component", lambda f, t: [None] * len(t.x)), "wrong `component`"),
    "a reserved name": (sets("component", lambda f, t: ["clean"] * len(t.x)), "wrong `component`"),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_a_search_may_not_return_is_refused(name, classifier, images):
    change, text = RETURNED[name]
    with pytest.raises((AttackViolation, UserError), match=text) as caught:
        evaluated(evil(change), classifier, images)
    assert "\n" not in str(caught.value)


class Lying(torch.Tensor):
    """A tensor that says it is finite."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.isfinite:
            return torch.ones(args[0].shape, dtype=torch.bool)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_tensors_of_any_kind_are_read_as_plain_ones(classifier, images):
    plain = evaluated(evil(), classifier, images)
    for change in (
        lambda found: found.adversarial.as_subclass(Lying),
        lambda found: found.adversarial.requires_grad_(True) * 1.0,
        lambda found: found.adversarial.contiguous(memory_format=torch.channels_last),
    ):
        outcome = evaluated(evil(sets("adversarial", lambda f, t, c=change: c(f))), classifier, images)
        assert type(outcome.adversarial) is torch.Tensor
        assert not outcome.adversarial.requires_grad
        assert torch.equal(outcome.robust, plain.robust)
    spoiled = sets("adversarial", lambda f, t: torch.full_like(t.x, torch.nan).as_subclass(Lying))
    with pytest.raises(AttackViolation):
        evaluated(evil(spoiled), classifier, images)


def test_a_step_that_a_search_does_not_know_is_all_its_calls(classifier, images):
    outcome = evaluated(evil(sets("step", lambda f, t: f.step * 0 - 1)), classifier, images)
    broken = (outcome.clean_predictions == outcome.labels) & ~outcome.robust
    assert broken.any()
    assert torch.equal(outcome.broken_at[broken], outcome.forwards[broken])
    assert (outcome.broken_at[outcome.robust] == -1).all()


def test_calls_that_are_not_reported_are_counted(classifier, images):
    def searches_more(attack, victim, task, found):
        for _ in range(20):
            victim.logits(task.x)

    with pytest.raises(AttackViolation, match=r"reports \d+ forwards of images and made \d+"):
        evaluated(evil(searches_more), classifier, images)


def wider(attack, victim, task, found):
    attack.spec = attack.spec.model_copy(update={"epsilon": 0.9})


HELD = {
    "its budget": (wider, "changed spec"),
    "its parameters": (lambda a, v, t, f: a.spec.parameters.update(steps=3), "changed spec"),
    "the model": (lambda a, v, t, f: setattr(v, "module", nn.Sequential(v.module)), "changed victim.module"),
    "the judge": (lambda a, v, t, f: setattr(v, "score", lambda x, size=None: None), "changed victim.score"),
    "the draws": (lambda a, v, t, f: setattr(v, "draws", 50), "changed victim.draws"),
    "the audit": (lambda a, v, t, f: setattr(v, "_listener", None), "changed victim._listener"),
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", HELD)
def test_by_what_an_attack_is_judged_it_may_not_change(name, before, classifier, images):
    change, text = HELD[name]
    with pytest.raises(AttackViolation, match=text):
        evaluated(evil(change, before and name == "its budget"), classifier, images)


MODES = {
    "gradients": (lambda: torch.set_grad_enabled(False), "set_grad_enabled"),
    "dtype": (lambda: torch.set_default_dtype(torch.float64), "set_default_dtype"),
    "autocast": (lambda: torch.autocast("cpu", torch.bfloat16).__enter__(), "autocast"),
    "precision": (lambda: torch.set_float32_matmul_precision("medium"), "set_float32_matmul_precision"),
}


@pytest.mark.parametrize("name", MODES)
def test_modes_that_a_search_leaves_are_refused_and_restored(name, classifier, images):
    change, text = MODES[name]
    before = torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_float32_matmul_precision()
    try:
        with pytest.raises(
            UserError, match=f"the search of attack 'evil' leaves torch in another mode .*{text}"
        ):
            evaluated(evil(lambda *_: change() and None), classifier, images)
    finally:
        torch.set_autocast_enabled("cpu", False)
    assert before == (
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize("name", ["evaluate", "_verify", "_outcome", "check_witness"])
def test_no_attack_judges_itself(name):
    with pytest.raises(TypeError, match=f"attack Evil overrides {name}"):
        evil(**{name: lambda self, *_: None})


def test_parameters_are_a_schema():
    with pytest.raises(TypeError, match="make them a pydantic model"):
        evil(Parameters=dict)


# ------------------------------------------------------------------------------------------- through the command line
@pytest.fixture
def registered(monkeypatch):
    return lambda kind: monkeypatch.setitem(ATTACKS._entries, "evil", kind)


@pytest.fixture
def run(tiny_zoo: Path, tmp_path: Path):
    """`robbench run` of the evil attack and PGD on one model, in a folder of its own."""
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "evil.yaml").write_text(THREAT_MODEL)

    def invoked(attacks: str = "evil,pgd10"):
        words = [
            "run",
            "--model",
            "tiny-a",
            "--zoo",
            tiny_zoo,
            "--attacks",
            attacks,
            "--n",
            20,
            "--device",
            "cpu",
        ]
        words += ["--threat-models", tmp_path / "specs", "--out", tmp_path / "out"]
        return CliRunner().invoke(main, [str(word) for word in words])

    return invoked


def cells(folder: Path):
    return {result.cell.attack.label: result.cell for result in load_run(folder).cells}


def raising(error):
    def raised(*_, **__):
        raise error

    return raised


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt()])
@pytest.mark.parametrize("member", ["cost", "verdict_forwards", "attacks_misclassified"])
def test_a_property_that_raises_is_one_line_before_the_run(member, error, registered, run):
    registered(evil(**{member: property(raising(error))}))
    result = run("evil")
    assert result.exit_code == 2, result.output
    assert "attack 'evil' failed" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("cost", [None, Cost(-1, 0), Cost(2.5, 1)])
def test_a_cost_is_numbers_of_calls(cost, registered, run):
    registered(evil(cost=cost))
    result = run("evil")
    assert result.exit_code == 2, result.output
    assert "return a robbench.attacks.Cost" in result.stderr


def test_semantics_that_mean_nothing_are_refused_before_the_run(registered, run, tmp_path):
    registered(evil(declared_semantics=classmethod(lambda cls, parameters: "best-case")))
    result = run("evil")
    assert result.exit_code == 2, result.output
    assert "declared_semantics returned 'best-case'; return one of: worst-case, perturbation" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("objective", [raising(SystemExit(0)), lambda *_: None])
def test_an_objective_that_fails_costs_no_run_its_pages(objective, registered, run, tmp_path):
    registered(evil(objective=classmethod(objective)))
    result = run("evil")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "leaderboard.html").is_file()


def weights(attack, victim, task, found):
    with torch.no_grad():
        next(victim.module.parameters()).add_(1e-3)


def damaged_then_failed(attack, victim, task, found):
    weights(attack, victim, task, found)
    raise ZeroDivisionError


@pytest.mark.parametrize("change", [weights, damaged_then_failed])
def test_a_model_that_one_attack_has_changed_gives_no_number_of_another(change, registered, run, tmp_path):
    registered(evil(change))
    result = run()
    assert result.exit_code == 3, result.output
    found = cells(tmp_path / "out")
    assert {cell.status for cell in found.values()} == {"failed"}
    assert "no longer the one that was loaded: the values of" in found["pgd10"].error
    assert [cell.clean for cell in found.values()] == [None, None]
    registered(evil())
    assert run().exit_code == 0, "loaded again, everything is as it was"
    assert {cell.status for cell in cells(tmp_path / "out").values()} == {"ok"}


def test_a_forward_patched_on_its_class_is_seen(registered, run, tmp_path, monkeypatch):
    def patch(attack, victim, task, found):
        plain = nn.Conv2d.forward
        monkeypatch.setattr(nn.Conv2d, "forward", lambda self, x: plain(self, x) + 0.0)

    registered(evil(patch))
    assert run().exit_code == 3
    assert {cell.status for cell in cells(tmp_path / "out").values()} == {"failed"}


def test_an_edited_attack_is_another_cell(registered, run, tmp_path, monkeypatch):
    """The same name and version: what its older code found is not shown as its own."""
    import importlib
    import sys

    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "evil_package.py"
    code = "from test_hostile_attacks import Attack, Cost, fgsm\n\n\nclass Evil(Attack):\n    cost = Cost(3, 1)\n\n"
    monkeypatch.syspath_prepend(Path(__file__).parent)
    for body in (
        "        return fgsm(self, victim, task)\n",
        "        return fgsm(self, victim, task)  # edited\n",
    ):
        path.write_text(f"{code}    def search(self, victim, task):\n{body}")
        importlib.invalidate_caches()
        sys.modules.pop("evil_package", None)
        registered(importlib.import_module("evil_package").Evil)
        assert run("evil").exit_code == 0
    sys.modules.pop("evil_package", None)
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 2


def test_entries_of_the_wrong_kind_are_named(monkeypatch):
    class Point:
        group, name, value = "robbench.attacks", "odd", "package:odd"

        def load(self):
            return torch.nn

    registry = Registry[type]("attack", "robbench.attacks", ATTACKS._accepts, "an attack")
    monkeypatch.setattr("robbench.core.registry.entry_points", lambda group: [Point()])
    with pytest.raises(UserError, match=r"the attack 'odd' .* is a module; let it name an attack"):
        registry.get("odd")


# ---------------------------------------------------------------------------------------------- the caller's settings
def _newer_precisions() -> None:
    """In a process of its own: torch refuses to read the older settings beside some of these."""
    backends = torch.backends
    for owner in (backends, backends.mkldnn, backends.cuda.matmul, backends.mkldnn.matmul):
        owner.fp32_precision = "tf32"
        asked = backends.mkldnn.matmul.fp32_precision, backends.cudnn.conv.fp32_precision
        with full_precision():
            for operation in (backends.mkldnn.matmul, backends.cuda.matmul, backends.cudnn.conv):
                assert operation.fp32_precision == "ieee"
        assert asked == (backends.mkldnn.matmul.fp32_precision, backends.cudnn.conv.fp32_precision)
        assert owner.fp32_precision == "tf32"


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch before 2.9")
def test_precisions_of_the_newer_kind_are_put_aside_and_back():
    paths = [Path(__file__).parent]
    with started(target=_newer_precisions, paths=paths) as process:
        assert process.wait() == 0, process.stderr


@pytest.mark.parametrize("asked", ["medium", "high", "highest"])
def test_precisions_of_the_older_kind_are_put_aside_and_back(asked):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(asked)
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == asked
    finally:
        torch.set_float32_matmul_precision(before)
