"""Rows of rendered attacks: worst cases over budgets in units of their own, and UAR."""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from robbench.cli.app import main
from robbench.results import unforeseen
from robbench.results.rows import TableRow, models
from robbench.results.tables import ALL_THREATS, leaderboard
from robbench.specs import BestTrained, resolve_attack, threat_models
from robbench.store.ledger import load_run
from robbench.store.records import Run

GRID = [f"uar-linf-{k}" for k in range(1, 7)]
N = 24


@pytest.fixture(scope="module")
def run(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("unforeseen") / "run"
    attacks = ",".join(["elastic", "fog", "fgsm", *GRID])
    command = [
        "run",
        "--zoo",
        str(tiny_zoo),
        "--model",
        "tiny-a",
        "--attacks",
        attacks,
        "--n",
        str(N),
        "--out",
        str(out),
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return load_run(out)


def rows_of(run: Run, metric: str) -> list[TableRow]:
    return [row for row in leaderboard(run) if row.metric == metric]


def verdicts(run: Run, label: str, column: str) -> np.ndarray:
    result = next(r for r in run.cells if r.cell.attack.label == label)
    values = result.rows[column].to_numpy()
    return values > 0 if column.endswith("margin") else values.astype(bool)


def test_a_worst_case_is_over_the_attacks_at_the_budgets_of_their_threat_model(run: Run) -> None:
    """Fog counts: the attacker may leave the image alone, so that only images right without it can hold."""
    rows = {row.threat_model: row for row in rows_of(run, "worst_case_accuracy")}
    assert set(rows) == {"unforeseen", "linf", ALL_THREATS}
    row = rows["unforeseen"]
    assert (row.combined, row.epsilon, row.eta) == (("elastic", "fog"), None, None)
    both = verdicts(run, "elastic", "robust") & verdicts(run, "fog", "robust")
    assert row.value == pytest.approx(100 * both.mean())
    everything = functools.reduce(
        np.logical_and, (verdicts(run, r.cell.attack.label, "robust") for r in run.cells)
    )
    assert rows[ALL_THREATS].value == pytest.approx(100 * everything.mean())


def test_fog_shows_both_numbers(run: Run) -> None:
    found = {
        (row.attack, row.measure): row.value
        for row in leaderboard(run)
        if row.attack == "fog" and row.kind.accuracy
    }
    right, under = verdicts(run, "fog", "clean_margin"), verdicts(run, "fog", "margin")
    assert found["fog", "accuracy under attack"] == pytest.approx(100 * under.mean())
    assert found["fog", "robust accuracy"] == pytest.approx(100 * (right & under).mean())


def test_the_calibrated_budgets_are_marked() -> None:
    known = threat_models()
    assert resolve_attack("elastic-3", "digits", known).of_grid
    assert not resolve_attack("elastic", "digits", known).of_grid
    assert not resolve_attack("jpeg-l2", "digits", known).of_grid
    assert resolve_attack("elastic-3", "digits", known).threat is None
    assert resolve_attack("elastic", "digits", known, epsilon=0.5).threat is None
    assert resolve_attack("elastic", "digits", known, steps=50).threat == ("unforeseen", None, None)
    assert resolve_attack("pgd20", "digits", known, epsilon=0.1).threat == ("linf", 0.1, None)


def test_uar_is_the_sum_of_accuracies_over_that_of_the_best_trained(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    best = BestTrained(accuracies=(90.0, 80.0, 70.0, 60.0, 50.0, 40.0), source="made up here")
    monkeypatch.setattr(
        unforeseen, "_calibrated", lambda: {("unforeseen", "uar-linf"): (6, {"digits": best})}
    )
    (row,) = unforeseen.uar_rows(run, models(run)[0])
    share = sum(verdicts(run, label, "margin").mean() for label in GRID)
    assert row.value == pytest.approx(100 * 100 * share / 390)
    assert row.attack == "uar-linf"
    assert row.lower <= row.value <= row.upper
    assert "made up here" in row.note


def test_uar_without_the_best_trained_is_no_number(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unforeseen, "_calibrated", lambda: {("unforeseen", "uar-linf"): (6, {})})
    (row,) = unforeseen.uar_rows(run, models(run)[0])
    assert (row.value, row.status) == (None, "not run")
    assert "ATA not available for digits" in row.reason


def test_uar_needs_all_budgets(run: Run) -> None:
    fewer = dataclasses.replace(run, cells=[r for r in run.cells if r.cell.attack.label != GRID[2]])
    assert not unforeseen.uar_rows(fewer, models(fewer)[0])
