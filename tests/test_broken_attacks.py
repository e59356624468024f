"""Attacks broken on purpose, held to a reference run as `.ci/regression` holds the digits zoo: none gets through.

The engine is broken in this process, its spec left as it is, so that no hash gives it away; a changed spec is a test of
its own. The slow test breaks the engine under the script itself.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import robbench.attacks.autoattack.apgd as apgd
import robbench.attacks.autoattack.ensemble as autoattack
import robbench.attacks.base as base
import robbench.attacks.likelihood as likelihood
import robbench.attacks.search.engine as engine
import robbench.attacks.search.spaces as spaces
import robbench.specs.schema as specs
from robbench.cli.app import main
from robbench.core.resources import data_root

MODEL, N = "digits-ijsat", 30
CLASSIFIERS, QUICK = "pgd20,apgd-ce,apgd-t,fab-t,square", "pgd20,apgd-ce"
Break = Callable[[pytest.MonkeyPatch], None]


def invoked(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def run(out: Path, attacks: str, *options: object, model: str = MODEL, n: int = N) -> Path:
    result = invoked("run", "--model", model, "--attacks", attacks, "--n", n, "--out", out, *options)
    assert result.exit_code == 0, result.output
    return out


def held(folder: Path, reference: Path) -> Result:
    return invoked("check", folder, "--against", reference)


@pytest.fixture(scope="module")
def reference_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The unbroken engine on this machine: a reference run that holds the attacks asked for."""

    @cache
    def made(attacks: str) -> Path:
        folder = tmp_path_factory.mktemp("unbroken")
        path = folder / "reference.parquet"
        found = run(folder / "run", attacks)
        assert invoked("check", found, "--write-reference", path, "--reason", "made by a test").exit_code == 0
        return path

    return lambda attacks: made(QUICK if set(attacks.split(",")) <= set(QUICK.split(",")) else CLASSIFIERS)


# -------------------------------------------------------------------------------------------- what may happen
@pytest.mark.slow
def test_an_unbroken_engine_passes_also_with_another_batch_size(
    reference_of: Callable[[str], Path], tmp_path: Path
) -> None:
    attacks = "pgd20,apgd-ce,apgd-t"
    result = held(run(tmp_path / "run", attacks, "--batch-size", 11), reference_of(attacks))
    assert result.exit_code == 0, result.output
    assert "0 fail" in result.output


def test_the_committed_reference_holds_on_a_part_of_the_gate(tmp_path: Path) -> None:
    """On this machine, whatever it is: rounding is allowed for."""
    committed = data_root() / "reports" / "reference" / "digits-attacks.parquet"
    result = held(run(tmp_path / "run", "fgsm,pgd20-l2,apgd-ce,jsa10", n=60), committed)
    assert result.exit_code == 0, result.output


# ------------------------------------------------------------------------------------------- what must not
def fewer(name: str, argument: str) -> Break:
    """A tenth of the budget a search of AutoAttack is given."""
    original = getattr(autoattack, name)

    def broken(patch: pytest.MonkeyPatch) -> None:
        def made(*positions: Any, **named: Any) -> Any:
            if argument in named:
                return original(*positions, **{**named, argument: named[argument] // 10})
            return original(*positions[:3], positions[3] // 10)

        patch.setattr(autoattack, name, made)

    return broken


def fewer_steps(patch: pytest.MonkeyPatch) -> None:
    original = engine.GradientSearch.__init__

    def made(self: Any, plan: Any, *rest: Any) -> None:
        original(self, plan, *rest)
        self.iterations = plan.steps // 10

    patch.setattr(engine.GradientSearch, "__init__", made)


def smaller_epsilon(patch: pytest.MonkeyPatch) -> None:
    """7/8 of the radius, as 7/255 for 8/255: inside the ball, so that the base class has nothing to object."""
    original = base.Attack._search_rows

    def searched(self: Any, *rest: Any) -> Any:
        sound = self.spec
        self.spec = sound.model_copy(update={"epsilon": 7 / 8 * sound.epsilon})
        try:
            return original(self, *rest)
        finally:
            self.spec = sound

    patch.setattr(base.Attack, "_search_rows", searched)


def no_random_start(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(spaces, "random_start", lambda kind, norm, epsilon, shape, noise: torch.zeros(()))
    patch.setattr(apgd.APGD, "_noise", lambda self, batch: torch.zeros_like(batch.x))


def wrong_labels(patch: pytest.MonkeyPatch) -> None:
    """The search believes in the class after the right one; the judge does not."""
    original = base.Attack._search_rows

    def searched(self: Any, victim: Any, samples: Any, *rest: Any) -> Any:
        return original(self, victim, replace(samples, y=(samples.y + 1) % 10), *rest)

    patch.setattr(base.Attack, "_search_rows", searched)


def predicted_labels(patch: pytest.MonkeyPatch) -> None:
    """Everything, the verdict too, goes by what the model says; the ledger shows the true labels all the same."""
    original = base.Attack.evaluate

    def evaluate(self: Any, victim: Any, ids: Any, x: Any, y: Any, seed: int, batch_size: int) -> Any:
        outcome = original(self, victim, ids, x, victim.clean_logits(x).argmax(1), seed, batch_size)
        outcome.labels = y
        return outcome

    patch.setattr(base.Attack, "evaluate", evaluate)


def leaning_judge(patch: pytest.MonkeyPatch) -> None:
    """The true label leaks into verdicts after the attack: its logit is a little larger than the model's."""
    original = base.Attack._outcome

    def outcome(self: Any, samples: Any, clean: Any, logits: Any, *rest: Any) -> Any:
        y = samples.y[:, None]
        return original(self, samples, clean, logits.scatter_add(1, y, torch.full(y.shape, 0.2)), *rest)

    patch.setattr(base.Attack, "_outcome", outcome)


BREAKS: dict[str, tuple[Break, str, list[str]]] = {
    "10 of APGD's 100 iterations": (fewer("APGD", "budget"), "apgd-ce", ["apgd-ce", "backwards"]),
    "10 of targeted APGD's 100 iterations": (fewer("APGD", "budget"), "apgd-t", ["apgd-t", "backwards"]),
    "10 of FAB's 100 iterations": (fewer("TargetedFab", "budget"), "fab-t", ["fab-t", "backwards"]),
    "500 of Square's 5000 queries": (fewer("Square", "iterations"), "square", ["square", "forwards"]),
    "2 of PGD's 20 steps": (fewer_steps, "pgd20", ["pgd20", "backwards"]),
    "epsilon 7/8 of what it says": (
        smaller_epsilon,
        "pgd20,apgd-ce",
        ["pgd20", "apgd-ce", "perturbations reach 0.175, in the reference 0.2"],
    ),
    "no random start": (no_random_start, "pgd20,apgd-ce", ["pgd20", "apgd-ce", "went another way"]),
    "wrong labels in the search": (wrong_labels, "pgd20,apgd-ce", ["pgd20", "apgd-ce", "robust now"]),
    "predicted labels everywhere": (
        predicted_labels,
        "pgd20,apgd-ce",
        [f"{MODEL} x pgd20: ", f"{MODEL} x apgd-ce: ", "scores before the attack differ"],
    ),
    "labels in the verdict": (leaning_judge, "pgd20,apgd-ce", ["pgd20", "apgd-ce", "scores are higher"]),
}


def _slow_unless_quick(name: str) -> Any:
    quick = set(BREAKS[name][1].split(",")) <= set(QUICK.split(","))
    return name if quick else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [_slow_unless_quick(name) for name in BREAKS])
def test_a_broken_engine_fails_and_the_component_is_named(
    name: str, reference_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks, attacks, texts = BREAKS[name]
    reference = reference_of(attacks)
    breaks(monkeypatch)
    if (
        name == "wrong labels in the search"
    ):  # what such a search claims is contradicted by the verdicts at once
        options = ("--model", MODEL, "--attacks", attacks, "--n", N, "--out", tmp_path / "run")
        result = invoked("run", *options)
        assert result.exit_code == 3, result.output
        assert "correctly that it misclassified when the attack found them" in result.output
        return
    result = held(run(tmp_path / "run", attacks), reference)
    assert result.exit_code == 1, result.output
    failed = [line for line in result.output.splitlines() if line.startswith("fail: ")]
    for attack in attacks.split(","):
        assert any(f" x {attack}: " in line for line in failed), result.output
    for text in texts:
        assert any(text in line for line in failed), (text, failed)


def test_a_search_on_a_likelihood_with_a_tenth_of_its_steps_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flow, attacks, n = "digits-glow", "nll-in", 6
    sound = run(tmp_path / "sound", attacks, model=flow, n=n)
    assert held(run(tmp_path / "again", attacks, "--batch-size", 4, model=flow, n=n), sound).exit_code == 0
    original = likelihood.ascend
    monkeypatch.setattr(
        likelihood, "ascend", lambda space, loss, state, steps: original(space, loss, state, steps // 10)
    )
    result = held(run(tmp_path / "broken", attacks, model=flow, n=n), sound)
    assert result.exit_code == 1
    assert f"{flow} x nll-in: nll-in, component nll-in" in result.output


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (
            "components: [apgd-ce]",
            "components: [apgd-ce], iterations: 10",
            "parameters.iterations 10, reference 100",
        ),
        ("digits: {epsilon: 0.2,", "digits: {epsilon: 0.175,", "attack spec epsilon 0.175, reference 0.2"),
    ],
)
def test_a_changed_spec_is_found_by_its_hash_and_named(
    old: str,
    new: str,
    text: str,
    reference_of: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = reference_of("apgd-ce")
    folder = tmp_path / "data" / "threat_models"
    folder.mkdir(parents=True)
    for path in (data_root() / "threat_models").glob("*.yaml"):
        content = path.read_text()
        assert path.stem != "linf" or old in content
        (folder / path.name).write_text(content.replace(old, new, 1) if path.stem == "linf" else content)
    monkeypatch.setattr(specs, "data_root", lambda: tmp_path / "data")
    result = held(run(tmp_path / "run", "apgd-ce"), reference)
    assert result.exit_code == 1
    assert f"{MODEL} x apgd-ce: " in result.output
    assert text in result.output


def test_other_weights_are_found(reference_of: Callable[[str], Path], tmp_path: Path) -> None:
    """The same name, another model."""
    folder = tmp_path / "digits-at"
    folder.mkdir()
    for path in (data_root() / "zoo" / "digits-at").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    card = folder / "card.yaml"
    card.write_text(card.read_text().replace("name: digits-at", f"name: {MODEL}", 1))
    result = held(run(tmp_path / "run", "pgd20", model=str(folder)), reference_of("pgd20"))
    assert result.exit_code == 1
    assert "weights or architecture" in result.output
    assert "scores before the attack differ" in result.output


# ---------------------------------------------------------------------------------------- under the script itself
WRAPPER = """
import sys
sys.path.insert(0, {tests!r})
import pytest, test_broken_attacks as broken
from robbench.cli.app import main
if len(sys.argv) > 1 and sys.argv[1] == "run":
    broken.BREAKS[{name!r}][0](pytest.MonkeyPatch())
main()
"""


@pytest.fixture
def script() -> Path:
    path = Path(__file__).resolve().parents[1] / ".ci" / "regression"
    if not path.is_file():
        pytest.skip(".ci/regression is not here: this is no checkout")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("name", [None, "10 of FAB's 100 iterations"])
def test_the_gate_of_ci(name: str | None, script: Path, tmp_path: Path) -> None:
    """About three minutes each on two cores."""
    command = f"{sys.executable} -m robbench"
    if name is not None:
        wrapper = tmp_path / "broken.py"
        wrapper.write_text(WRAPPER.format(tests=str(Path(__file__).parent), name=name))
        command = f"{sys.executable} {wrapper}"
    done = subprocess.run(
        [str(script)], env={**os.environ, "ROBBENCH": command}, capture_output=True, text=True, check=False
    )
    assert done.returncode == (0 if name is None else 1), done.stdout + done.stderr
    assert name is None or "fab-t, component fab-t" in done.stdout
