"""Rows that the engine writes contradict nothing; every column that a forger changes alone contradicts another."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from zoo_runs import attacked

from robbench.attacks import ATTACKS
from robbench.bundle.consistency import consistency_findings, duplicate_labels, incomplete
from robbench.bundle.identity import address_findings, settings_findings
from robbench.models.zoo import zoo_entries
from robbench.specs import ThreatModel, resolve_attack, threat_models
from robbench.store.ledger import load_run
from robbench.store.records import CellResult, Run

Change = Callable[[pd.DataFrame], Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """fgsm and R-LA on a classifier, noise on a flow."""
    folder = tmp_path_factory.mktemp("rows") / "run"
    return load_run(attacked(folder, ["digits-at", "digits-glow"], ["fgsm", "r-la", "noise"]))


@pytest.fixture(scope="module")
def known() -> dict[str, ThreatModel]:
    return threat_models()


def problems(run: Run) -> str:
    return " | ".join(f.reason for f in consistency_findings(run) if f.verdict == "differs")


def edited(run: Run, cell: int, change: Change) -> Run:
    rows = run.cells[cell].rows.copy()
    change(rows)
    cells = [*run.cells[:cell], CellResult(run.cells[cell].cell, rows), *run.cells[cell + 1 :]]
    return replace(run, cells=cells)


def setting(
    column: str, value: Any, where: Callable[[pd.DataFrame], Any] = lambda rows: rows.index[0]
) -> Change:
    def change(rows: pd.DataFrame) -> None:
        rows.loc[where(rows), column] = value(rows.loc[where(rows), column]) if callable(value) else value

    return change


def held(rows: pd.DataFrame) -> Any:
    return rows.index[rows["robust"]][0]


def broken(rows: pd.DataFrame) -> Any:
    return rows.index[rows["broken_by"] == "fgsm"][0]


def test_what_the_engine_writes(run: Run) -> None:
    assert problems(run) == ""
    assert incomplete(run) == []
    assert len(list(consistency_findings(run))) == 3


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (setting("robust", lambda v: not v), "robust contradicts the margins"),
        (setting("prediction", lambda v: (v + 1) % 10, held), "prediction contradicts margin"),
        (
            setting("clean_prediction", lambda v: (v + 1) % 10, held),
            "clean_prediction contradicts clean_margin",
        ),
        (setting("margin", lambda v: -v), "prediction contradicts margin"),
        (setting("margin", np.nan), "margin is not finite"),
        (setting("clean_margin", np.inf), "clean_margin is not finite"),
        (setting("clean_margin", lambda v: v + 1), "another clean margin in another cell"),
        (setting("cross_entropy", lambda v: v + 5), "cross_entropy is impossible"),
        (setting("cross_entropy", np.nan), "cross_entropy is impossible"),
        (setting("broken_by", "fgsm", held), "broken_by contradicts robust"),
        (
            setting("broken_by", "nobody", lambda rows: rows.index[rows["broken_by"] == "fgsm"][0]),
            "broken_by names no part of the attack",
        ),
        (setting("broken_at", 3, held), "broken_at contradicts robust"),
        (setting("broken_at", -1, broken), "broken_at contradicts robust"),
        (setting("broken_at", 2, broken), "broken_at is beyond the steps of the attack"),  # FGSM has one
        (setting("linf", lambda v: 2.5 * v + 0.1, held), "linf is beyond the budget"),
        (setting("linf", np.inf), "a distance is not finite"),
        (setting("l2", lambda v: 0.01 * v, held), "distances contradict"),
        (setting("l1", lambda v: 100 * v + 1, held), "distances contradict"),
        (setting("label", -1), "label is no class"),
        (setting("forwards", -1), "forwards is negative"),
    ],
)
def test_a_changed_classifier_row(run: Run, change: Change, why: str) -> None:
    assert why in problems(edited(run, 0, change))


@pytest.mark.parametrize(
    ("name", "component", "last"),
    [
        ("pgd20", "pgd20", 20),
        ("jsa50-r5", "jsa50-r5", 50),
        ("aa", "fab-t", 100),
        ("aa", "square", 5000),
        ("square", "square", 5000),
        ("aa-l1", "apgd-ce", 102),
        ("r-la", "r-la", None),
    ],
)
def test_the_last_step_of_an_attack(
    name: str, component: str, last: int | None, known: dict[str, ThreatModel]
) -> None:
    """That of the component that broke the sample; APGD outside its ball has two iterates more than iterations."""
    spec = resolve_attack(name, "digits", known)
    built = ATTACKS.get(spec.algorithm).Parameters.model_validate(spec.parameters).model_dump(mode="json")
    found = spec.model_copy(update={"parameters": built}).last_step(component)
    assert found == last if last is not None else np.isnan(found)


def test_samples_broken_at_a_step_that_the_forwards_do_not_reach(run: Run) -> None:
    """R-LA has no number of steps; every step takes a forward."""
    rows = run.cells[1].rows
    at = rows.index[rows["clean_margin"] > 0][0]

    def change(rows: pd.DataFrame) -> None:
        rows.loc[at, ["robust", "broken_by", "broken_at"]] = [
            False,
            "r-la",
            int(rows.loc[at, "forwards"]) + 1,
        ]

    assert "broken_at is beyond the steps of the attack" in problems(edited(run, 1, change))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (setting("linf", 0.9), "linf is beyond the budget"),
        (setting("label", 99), "label is no class"),
        (setting("l2", np.nan), "not finite"),
    ],
)
def test_a_changed_flow_row(run: Run, change: Change, why: str) -> None:
    assert why in problems(edited(run, 2, change))


def test_rows_that_are_missing(run: Run) -> None:
    cell = run.cells[0]
    short = replace(run, cells=[CellResult(cell.cell, cell.rows.iloc[1:]), *run.cells[1:]])
    assert "status is ok with 9 of 10 rows" in problems(short)
    failed = CellResult(cell.cell.model_copy(update={"status": "failed", "error": "no"}), cell.rows.iloc[:0])
    assert incomplete(replace(run, cells=[failed])) == ["digits-at x fgsm failed: no"]


def test_one_attack_under_two_names(run: Run) -> None:
    cell = run.cells[0]
    alias = cell.cell.model_copy(update={"attack": cell.cell.attack.model_copy(update={"label": "fgsm@0.2"})})
    assert duplicate_labels(run) == []
    twice = replace(run, cells=[*run.cells, CellResult(alias, cell.rows)])
    assert duplicate_labels(twice) == ["digits-at: fgsm, fgsm@0.2 are one attack; averages count it 2 times"]


@settings(max_examples=60)
@given(
    logits=arrays.arrays(
        np.float32, st.tuples(st.integers(1, 8), st.integers(2, 12)), elements=st.floats(-80, 80, width=32)
    ),
    shift=st.floats(-50, 50),
)
def test_true_margins_are_never_refused(run: Run, logits: np.ndarray, shift: float) -> None:
    """Margin and cross-entropy of any logits, as torch gives them in float32, fit together."""
    from robbench.attacks.victim import margins
    from robbench.bundle.consistency import _margin_rules

    values = torch.from_numpy(logits) + shift
    labels = torch.arange(len(values)) % values.shape[1]
    margin, prediction = margins(values, labels).numpy(), values.argmax(1).numpy()
    entropy = torch.nn.functional.cross_entropy(values, labels, reduction="none").numpy()
    rows = pd.DataFrame({"label": labels.numpy(), "cross_entropy": entropy})
    for part in ("", "clean_"):
        rows[f"{part}margin"], rows[f"{part}prediction"] = margin, prediction
    assert not [text for text, mask in _margin_rules(rows, values.shape[1]) if mask.any()]


# ------------------------------------------------------------------------------------------- addresses and settings
def test_addresses_follow_from_cards(run: Run) -> None:
    cards = {e.card.weights.sha256: e.card for e in zoo_entries().values() if e.card.kind == "flow"}
    assert {f.verdict for f in address_findings(run, cards)} == {"agrees"}
    other = {key: card.model_copy(update={"grey_levels": 99}) for key, card in cards.items()}
    verdicts = {f.attack: f.verdict for f in address_findings(run, other)}
    assert verdicts["fgsm"] == verdicts["r-la"] == "differs"
    assert {f.verdict for f in address_findings(run, {}) if f.attack in ("fgsm", "r-la")} == {"unchecked"}


def test_changes_that_a_label_spells_out(run: Run, known: dict[str, ThreatModel]) -> None:
    """Labels of experiments: "fgsm@momentum=0.5" may have that momentum, and nothing else of its own."""
    cell = run.cells[0]
    for label, changes, verdict in (
        ("momentum=0.5", {"momentum": 0.5}, "agrees"),
        ("momentum=0.5", {"momentum": 0.5, "steps": 2}, "differs"),
        ("momentum=0.5,steps=20", {"momentum": 0.5, "steps": 20}, "agrees"),
        ("restarts=20", {"restarts": 2}, "differs"),  # "restarts=2" is in it
        ("restarts=20,restarts=2", {"restarts": 2}, "differs"),
        ("steps=1,nothing=2", {}, "differs"),
        ("restarts=[1, 2]", {"restarts": [1, 2]}, "agrees"),
    ):
        parameters = {**cell.cell.attack.parameters, **changes}
        spec = cell.cell.attack.model_copy(update={"parameters": parameters, "label": f"fgsm@{label}"})
        record = cell.cell.model_copy(update={"attack": spec})
        found = list(settings_findings(replace(run, cells=[CellResult(record, cell.rows)]), known))
        assert [f.verdict for f in found] == [verdict]


@pytest.mark.parametrize(
    ("changes", "verdict", "why"),
    [
        ({}, "agrees", ""),
        ({"epsilon": 0.3}, "differs", "epsilon is 0.3, here it is 0.2"),
        ({"epsilon": 0.3, "label": "fgsm@0.3"}, "agrees", ""),
        ({"epsilon": 0.3, "label": "fgsm@0.25"}, "differs", "with these settings is called fgsm@0.3"),
        ({"epsilon": 0.3, "label": "fgsm@epsilon=0.3"}, "differs", "epsilon is 0.3"),
        ({"label": "pgd20"}, "differs", "with these settings is called fgsm"),
        ({"label": "fgsm@momentum=None"}, "agrees", ""),
        ({"label": "fgsm@momentum=0.0"}, "differs", "momentum is None, here it is 0.0"),
        ({"parameters": {"steps": [1, 2]}}, "differs", "steps is [1, 2]"),
        ({"algorithm": "apgd"}, "differs", "algorithm is apgd, here it is pgd"),
        ({"norm": "l2"}, "differs", "norm is l2, here it is linf"),
        ({"name": "mine", "label": "mine"}, "unchecked", "no threat model here defines it"),
    ],
)
def test_settings_are_what_names_promise(
    run: Run, known: dict[str, ThreatModel], changes: dict[str, Any], verdict: str, why: str
) -> None:
    cell = run.cells[0]
    record = cell.cell.model_copy(update={"attack": cell.cell.attack.model_copy(update=changes)})
    found = list(settings_findings(replace(run, cells=[CellResult(record, cell.rows)]), known))
    assert [f.verdict for f in found] == [verdict]
    assert why in found[0].reason
    assert found[0].attack == record.attack.label
