"""Estimates of trainings with several optimisers: passes of the encoder, and the time of a whole step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from clocks import Clock

from robbench.defenses.plan import TrainRequest
from robbench.defenses.training import train
from robbench.experiments.cost import ExperimentCosts
from robbench.experiments.request import ExperimentRequest
from robbench.experiments.runs import plan_experiment
from robbench.experiments.schema import Experiment
from robbench.experiments.training_cost import step_cost
from robbench.models import classifiers
from robbench.run import rates
from robbench.run.rates import measure_steps
from robbench.specs import threat_models


@pytest.mark.parametrize(
    ("constant", "each", "largest"), [(0.02, 1e-4, 64), (0.01, 0.05, 500), (1e-3, 1e-4, 2)]
)
def test_the_time_of_a_step_is_that_of_its_batch(
    constant: float, each: float, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the batch is too large to be measured: optimisers take as long for any batch."""
    clock, tried = Clock(), []
    monkeypatch.setattr(rates, "now", clock)

    def step(x: torch.Tensor, y: torch.Tensor, generator: torch.Generator, rate: float, epoch: int) -> float:
        assert rate == 0
        tried.append(len(x))
        clock.time += constant + len(x) * each
        return 0.0

    found = measure_steps(step, (1, 2, 2), largest, torch.device("cpu"))
    assert found == pytest.approx(constant / largest + each)
    assert min(tried) == 2
    assert clock.time < 30


@pytest.mark.parametrize("defense", ["er", "er-at"])
def test_encoder_passes_are_those_of_a_real_training(
    defense: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One epoch without the validation at its end; inner attacks of three steps."""
    from robbench.defenses import selection

    seen = 0
    build: Callable[..., Any] = classifiers.ARCHITECTURES.get("er-digits")

    def counted(*arguments: Any, **named: Any) -> Any:
        model = build(*arguments, **named)

        def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            nonlocal seen
            seen += len(out)

        model.encoder.register_forward_hook(count)
        return model

    monkeypatch.setattr(
        "robbench.defenses.training.build_architecture", lambda *a: counted(a[1], a[2], width=0.05)
    )
    monkeypatch.setattr(selection, "classifier_measurements", lambda *a: ())
    inner = {"steps": 3} if defense == "er-at" else {}
    settings = {"recipe.selection": "last", **inner}
    request = TrainRequest(
        defense, "digits", "er-digits", epochs=1, train_samples=64, out=tmp_path, overrides=settings
    )
    train(request)
    golden = 4  # images whose outputs the folder records
    expected = step_cost(defense, "classifier", inner, "digits", threat_models())
    assert expected.further_networks
    assert seen - golden == expected.forwards * 64


def test_a_regulariser_costs_more_than_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hours come from a step of the defense itself, critic included."""
    steps: list[str] = []

    def measure(step: Callable[..., float], shape: Any, largest: int, device: torch.device) -> float:
        defense = step.__self__.defense.name  # type: ignore[attr-defined]
        steps.append(defense)
        return {"er": 3600.0, "er-minus": 7200.0}[defense]

    monkeypatch.setattr("robbench.experiments.cost.measure_steps", measure)
    models = {
        name: {"defense": name, "recipe": "er-digits", "train_samples": 50} for name in ("er", "er-minus")
    }
    content = {
        "name": "costs", "title": "t", "source": "s", "published": None, "dataset": "digits", "doubts": ["d"],
        "models": models,
        "rows": [{"title": name, "model": name} for name in models],
        "columns": [{"title": "clean", "metric": "accuracy"}],
    }  # fmt: skip
    plan = plan_experiment(ExperimentRequest(Experiment.model_validate(content), device="cpu"), tmp_path)
    found = {cost.job.member: cost for cost in ExperimentCosts(plan).trainings()}
    assert steps == ["er", "er-minus"]
    assert {name: cost.hours for name, cost in found.items()} == {"er": 20 * 50, "er-minus": 2 * 20 * 50}
    assert (found["er"].forwards, found["er"].backwards) == (3 * 20 * 50, 2 * 20 * 50)
