"""A run under fog and snow: two numbers in every output, budget 0 no clean image, and witnesses that a verifier renders
again."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from zoo_runs import KEPT, Forgery, attacked, bundled, checked, differing, reason

from robbench.attacks.witness import Witness
from robbench.cli.app import main
from robbench.report.site import write_site
from robbench.specs import ThreatModel, threat_models
from robbench.store.ledger import load_run

MODEL, FOG, NO_SNOW = "digits-standard", "fog@50@3steps", "snow@0@3steps"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fog") / "run"
    return attacked(folder, [MODEL], ["fog", "snow"], "--epsilon", "50,0", "--steps", "3")


@pytest.fixture
def forgery(run: Path, tmp_path: Path) -> Forgery:
    return Forgery(run, tmp_path)


def test_a_verifier_renders_every_example_again(run: Path) -> None:
    result = checked(bundled(run, run.parent / "honest.zip"), share=1.0)
    assert result.exit_code == 0
    counts = {(f.attack, f.check): f.count for f in result.findings}
    assert [counts[f"{name}@{size}@3steps", "witness"] for name in ("fog", "snow") for size in (50, 0)] == [
        KEPT
    ] * 4


def with_variables(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[pd.DataFrame], None]:
    def edit(rows: pd.DataFrame) -> None:
        at = rows["witness"].notna().idxmax()
        own = Witness.from_bytes(rows.loc[at, "witness"])
        moved = {"variables": change(own.perturbations["variables"])}
        rows.at[at, "witness"] = Witness(own.flow, own.condition, moved).to_bytes()

    return edit


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda v: v + np.float32(1.5), r"range [0, 1] of fog variables"),
        (lambda v: 1 - v, "image rendered from its witness"),
        (lambda v: v[:63], "has a variables of shape (63,)"),
        (lambda v: v * np.float32(np.nan), "not finite"),
    ],
)
def test_other_variables_are_refused(
    forgery: Forgery, change: Callable[[np.ndarray], np.ndarray], why: str
) -> None:
    result = checked(forgery.edit(MODEL, FOG, with_variables(change)).bundle())
    assert (result.exit_code, differing(result)) == (1, {"witness"})
    assert why in reason(result, "witness")


def test_both_numbers_are_in_every_output(run: Path, tmp_path: Path) -> None:
    cells = {result.cell.attack.label: result.rows for result in load_run(run).cells}
    assert len(cells) == 4
    assert (cells[NO_SNOW]["linf"] > 0.1).all()
    with (run / "leaderboard-wide.csv").open() as file:
        (line,) = csv.DictReader(file)
    for label, rows in cells.items():
        assert (line[f"{label}_measure"], line[f"{label} (robust)_measure"]) == (
            "accuracy under attack",
            "robust accuracy",
        )
        assert float(line[label]) == pytest.approx(100 * (rows["margin"] > 0).mean())
        assert float(line[f"{label} (robust)"]) == pytest.approx(100 * rows["robust"].mean())
    assert f"{FOG} (robust)" in (run / "leaderboard.md").read_text()
    write_site([load_run(run)], tmp_path / "site")
    paths = list((tmp_path / "site").rglob("*.html"))
    assert any("(robust)" in text and FOG in text for text in (path.read_text() for path in paths))
    pages = {path.name: path.read_text() for path in paths}
    page = pages["attack-fog-50-3steps.html"]
    assert "R: the renderer of the attack" in page
    assert "right on the perturbed image" in page
    assert "corruption" not in page.split("<main")[1]


def test_images_that_an_attack_cannot_take_are_refused_before_the_run(tmp_path: Path) -> None:
    asked = [
        "run",
        "--model",
        MODEL,
        "--attacks",
        "fgsm,gabor",
        "--epsilon",
        "1",
        "--out",
        str(tmp_path / "run"),
    ]
    result = CliRunner().invoke(main, asked)
    assert result.exit_code == 2
    assert "8 x 8 pixels are too small for the gabor attack's kernel of 23" in result.output
    assert not (tmp_path / "run").exists()


def test_a_threat_model_with_calibrated_budgets_is_read_as_it_was_written() -> None:
    model = threat_models()["unforeseen"]
    written = model.model_dump(mode="json")
    assert ThreatModel.model_validate(written) == model
    written["attacks"]["fog-2"]["budgets"]["imagenet"]["epsilon"] = 255
    with pytest.raises(ValueError, match="'fog' has calibrated budgets and 'fog-2' exists already"):
        ThreatModel.model_validate(written)
