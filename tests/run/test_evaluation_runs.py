"""The result of `robbench.evaluate`, its run folder, and `robbench.attack`."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from tiny_models import trained_classifier
from torch import Tensor, nn

import robbench
from robbench.cli.app import main
from robbench.data import load_dataset
from robbench.statistics.accuracy import wilson
from robbench.store.ledger import load_run

ATTACKS, N = "fgsm,pgd10-l2", 130  # two shards


@pytest.fixture(scope="module")
def model() -> nn.Module:
    found: nn.Module = trained_classifier(0, epochs=2)
    return found


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    test = load_dataset("digits").test
    return test.x(torch.arange(N)), test.labels[:N]


@pytest.fixture(scope="module")
def result(model: nn.Module, data: tuple[Tensor, Tensor]) -> Any:
    options: dict[str, Any] = {"dataset": "digits", "device": "cpu", "keep_images": True}
    return robbench.evaluate(model, *data, ATTACKS, progress=False, **options)


def test_numbers_samples_and_images_say_the_same(
    result: Any, model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    x, y = data
    samples = result.samples
    assert samples["id"].tolist() == list(range(N))
    assert samples["label"].tolist() == y.tolist()
    with torch.no_grad():
        clean = model.eval()(x).argmax(1)
        right = clean == y
        assert samples["clean_prediction"].tolist() == clean.tolist()
        assert result.clean == wilson(int(right.sum()), N)
        worst = right.clone()
        for label, norm in (("fgsm", float("inf")), ("pgd10-l2", 2)):
            images = result.adversarial[label]
            predicted = model(images).argmax(1)
            assert samples[f"prediction_{label}"].tolist() == predicted.tolist()
            assert result.accuracy[label] == wilson(int((right & (predicted == y)).sum()), N)
            distances = (images - x).flatten(1).norm(norm, 1)
            np.testing.assert_allclose(samples[f"distance_{label}"], distances, atol=1e-6)
            worst &= predicted == y
    assert samples["robust"].tolist() == worst.tolist()
    assert result.worst_case == wilson(int(worst.sum()), N)


def test_the_texts_are_a_table_and_escaped(
    result: Any, model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    assert repr(result) == str(result)
    assert [line.split()[0] for line in str(result).split("\n")] == [
        "Sequential", "attack", "clean", "fgsm", "pgd10-l2", "worst-case",
    ]  # fmt: skip
    assert "<td>fgsm</td>" in result._repr_html_()

    class Evil(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"logits": model(x)}

    Evil.__name__ = "<script>alert(1)</script>"
    html = robbench.evaluate(Evil(), *data, "fgsm", n=10, epsilon=0.1, progress=False)._repr_html_()
    assert "<script>" not in html


def test_images_that_were_not_kept_are_an_error_that_says_how(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    found = robbench.evaluate(model, *data, "fgsm", n=10, epsilon=0.1, progress=False)
    with pytest.raises(robbench.UserError, match="keep_images=True"):
        _ = found.adversarial


def test_progress_goes_to_stderr_or_nowhere(
    model: nn.Module, data: tuple[Tensor, Tensor], capfd: pytest.CaptureFixture[str]
) -> None:
    small = (data[0][:8], data[1][:8])
    robbench.evaluate(model, *small, "fgsm", epsilon=0.1)
    said = capfd.readouterr()
    assert said.out == ""
    assert "Sequential x fgsm@0.1: 8 samples" in said.err
    robbench.evaluate(model, *small, "fgsm", epsilon=0.1, progress=False)
    assert capfd.readouterr() == ("", "")


# -------------------------------------------------------------------------------------------------- run folders
def _evaluate(model: Any, data: tuple[Tensor, Tensor], out: Path, **options: Any) -> Any:
    return robbench.evaluate(
        model, *data, ATTACKS, dataset="digits", device="cpu", progress=False, out=out, name="mine", **options
    )


def test_a_run_folder_is_that_of_the_command_line_and_is_resumed(
    result: Any,
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "run"
    first = _evaluate(model, data, folder)
    shown = ["attack", "accuracy", "lower", "upper", "n", "epsilon"]
    pd.testing.assert_frame_equal(first.to_dataframe()[shown], result.to_dataframe()[shown])
    for name in ("leaderboard.html", "leaderboard.csv", "run.yaml"):
        assert (folder / name).is_file()
    run = load_run(folder)
    assert (run.dataset, run.n, list(run.cards)) == ("digits-arrays", N, ["mine"])
    assert "float32 numbers" in run.notes[0]

    exported = CliRunner().invoke(main, ["export", str(folder), "--out", str(tmp_path / "run.zip")])
    assert exported.exit_code == 0, exported.output

    def computed(*_: object) -> None:
        raise AssertionError("the second call computes nothing")

    monkeypatch.setattr("robbench.attacks.pgd.GradientAttack.search", computed)
    again = _evaluate(model, data, folder)
    assert again.samples.equals(first.samples)
    with pytest.raises(robbench.UserError, match="fresh=True"):
        _ = _evaluate(model, data, folder, keep_images=True).adversarial


def test_other_data_another_model_and_another_function_are_not_mixed_up(
    model: nn.Module, data: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    small = (data[0][:20], data[1][:20])
    scale = 1.0

    class Hidden:
        """State that no fingerprint sees."""

        __slots__ = ("scale",)

    hidden = Hidden()
    hidden.scale = 1.0  # type: ignore[attr-defined]

    def scaled(x: Tensor) -> Any:
        return model(x * scale) * hidden.scale  # type: ignore[attr-defined]

    first = _evaluate(scaled, small, tmp_path)
    with pytest.raises(
        robbench.UserError, match=r"out=.* holds another run.*give another out=, or fresh=True"
    ):
        _evaluate(scaled, (small[0].flip(3), small[1]), tmp_path)
    scale = 0.5
    second = _evaluate(scaled, small, tmp_path)
    assert not second.samples.equals(first.samples)
    hidden.scale = -1.0  # type: ignore[attr-defined]
    with pytest.raises(robbench.UserError, match="looks the same and gives other logits now"):
        _evaluate(scaled, small, tmp_path)
    with pytest.warns(robbench.RobbenchWarning, match="clean accuracy"):
        third = _evaluate(scaled, small, tmp_path, fresh=True)
    assert third.clean.value < first.clean.value


def test_grey_levels_are_kept_as_such(model: nn.Module, data: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    grey = (data[0][:20] * 255).round().byte()
    _evaluate(model, (grey, data[1][:20]), tmp_path)
    card = load_run(tmp_path).data
    assert card is not None
    assert (card.grey_levels, card.note, card.like) == (256, "images given from Python", "digits")


def test_a_failed_attack_is_an_error_and_the_others_stay(
    model: nn.Module, data: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robbench.attacks.named import ATTACKS as REGISTRY

    def failing(*_: object) -> None:
        raise RuntimeError("no luck")

    small = (data[0][:8], data[1][:8])
    monkeypatch.setattr(REGISTRY.get("autoattack"), "search", failing)
    with pytest.raises(robbench.UserError, match=r"square@0\.1 failed: RuntimeError: no luck; the run is in"):
        robbench.evaluate(model, *small, "fgsm,square", epsilon=0.1, out=tmp_path, progress=False)
    assert [one.cell.status for one in load_run(tmp_path).cells] == ["ok", "failed"]


# ------------------------------------------------------------------------------------------------------- attack
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["pgd10", "pgd10-l2"])
def test_attack_returns_images_in_their_set_and_in_the_callers_type(
    name: str, dtype: torch.dtype, model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    x, y, epsilon = data[0][:40].to(dtype), data[1][:40], 0.1 if name == "pgd10" else 0.5
    one = robbench.attack(name, epsilon=epsilon)
    images, success, distances = one.run(model, x, y)
    assert torch.equal(images, one(model, x, y))
    assert (images.dtype, images.shape) == (dtype, x.shape)
    moved = images.double() - x.double()
    norm = moved.flatten(1).norm(float("inf") if one.norm == "linf" else 2, 1)
    assert float(norm.max()) <= epsilon * (1 + 1e-6)
    assert 0 <= float(images.min()) <= float(images.max()) <= 1
    torch.testing.assert_close(distances.double(), norm, atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        assert success.tolist() == (model.eval()(images.float()).argmax(1) != y).tolist()
    assert int(success.sum()) > 0


def test_attack_takes_a_flow_and_refuses_without_one(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    from robbench.models.flows.glow import Glow

    with torch.random.fork_rng():
        torch.manual_seed(0)
        flow = Glow((1, 8, 8), 17, levels=1, steps=1, width=8)
    one = robbench.attack("jsa10", dataset="digits", flow=flow)
    assert one(model, data[0][:4], data[1][:4]).shape == (4, 1, 8, 8)
    assert one.norm == "linf"
    with pytest.raises(robbench.UserError, match="name one with flow=, or train one"):
        robbench.attack("jsa10", epsilon=0.1, eta=0.1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"name": 3}, "name=3 is no name of an attack"),
        ({"name": "fgsm,pgd10", "epsilon": 0.1}, "takes one attack and one budget"),
        ({"name": "fgsm"}, "needs an epsilon; give epsilon=VALUE"),
        ({"name": "fgsm", "epsilon": "8"}, "epsilon=8: "),
    ],
)
def test_attack_refuses_in_one_line(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(robbench.UserError, match=text):
        robbench.attack(**arguments)


def test_adversarial_images_need_a_type_that_holds_them(
    model: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    with pytest.raises(robbench.UserError, match="x is uint8, which cannot hold adversarial images"):
        robbench.attack("fgsm", epsilon=0.1)(model, data[0].byte(), data[1])
