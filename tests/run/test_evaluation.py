"""`robbench.evaluate` against the attacks called directly."""

import pytest
import torch
from tiny_models import trained_classifier

import robbench
from robbench.attacks import build_attack
from robbench.core.errors import UserError
from robbench.data import load_dataset
from robbench.specs import resolve_attack, threat_models
from robbench.statistics.accuracy import wilson


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return trained_classifier(0).train()


@pytest.fixture(scope="module")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    test = load_dataset("digits").test
    return test.x(torch.arange(60)), test.labels[:60]


def test_rows_are_clean_attacks_worst_case(
    model: torch.nn.Module, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    x, y = images
    result = robbench.evaluate(model, x, y, ["fgsm", "pgd20-l2"], dataset="digits", device="cpu", seed=3)
    table = result.to_dataframe()
    assert table["attack"].tolist() == ["clean", "fgsm", "pgd20-l2", "worst-case"]
    assert model.training
    right = []
    for name in ("fgsm", "pgd20-l2"):
        adversarial = build_attack(resolve_attack(name, "digits", threat_models()))(model, x, y, seed=3)
        with torch.no_grad():
            right.append((model(adversarial).argmax(1) == y) & (model(x).argmax(1) == y))
    with torch.no_grad():
        clean = model(x).argmax(1) == y
    verdicts = [clean, *right, right[0] & right[1]]
    assert 0 < int(right[0].sum()) < 60
    for row, verdict in zip(table.to_dict("records"), verdicts, strict=True):
        estimate = wilson(int(verdict.sum()), 60)
        assert (row["accuracy"], row["lower"], row["upper"]) == (
            estimate.value,
            estimate.lower,
            estimate.upper,
        )
        assert row["n"] == 60
    assert table["forwards"].iloc[-1] == table["forwards"].iloc[1:3].sum()
    assert table["epsilon"].tolist()[1] == 0.2


def test_several_budgets(model: torch.nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    table = robbench.evaluate(
        model, *images, ["pgd10"], epsilon=[0.0, 0.05, 0.3], device="cpu"
    ).to_dataframe()
    accuracies = table["accuracy"].tolist()
    assert table["attack"].tolist()[1:4] == ["pgd10@0", "pgd10@0.05", "pgd10@0.3"]
    assert accuracies[0] == accuracies[1] >= accuracies[2] > accuracies[3]


def test_a_latent_attack_with_a_flow(
    model: torch.nn.Module, images: tuple[torch.Tensor, torch.Tensor]
) -> None:
    from robbench.models.flows.glow import Glow

    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Glow((1, 8, 8), 17, levels=1, steps=1, width=8)
    table = robbench.evaluate(
        model, *images, ["jsa10"], dataset="digits", flow=flow, device="cpu"
    ).to_dataframe()
    assert table["accuracy"].iloc[1] < table["accuracy"].iloc[0]
    assert table["eta"].iloc[1] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attacks": 3}, "give names"),
        ({"attacks": []}, "give names"),
        ({"attacks": ["pgd2"]}, "did you mean 'pgd20'"),
        ({"attacks": ["pgd20"]}, "needs an epsilon; give epsilon=VALUE, or dataset=NAME"),
        ({"attacks": ["pgd20"], "epsilon": -1.0}, "not a budget"),
        ({"attacks": ["jsa10"], "epsilon": 0.1, "eta": 0.1}, "flow="),
        ({"attacks": ["pgd20"], "epsilon": 0.1, "device": "gpu"}, "not a device"),
    ],
)
def test_bad_arguments(
    model: torch.nn.Module,
    images: tuple[torch.Tensor, torch.Tensor],
    arguments: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(UserError, match=message):
        robbench.evaluate(model, *images, **arguments)  # type: ignore[arg-type]


def test_images_outside_the_box(model: torch.nn.Module, images: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(UserError, match=r"\[0,1\]"):
        robbench.evaluate(model, images[0] * 2, images[1], ["pgd20"], epsilon=0.1, device="cpu")
