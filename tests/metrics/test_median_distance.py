"""Medians of distances against the definition; what a failure, a wrong clean image and a budget do to the numbers."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robbench.metrics.minimal_norm import MEDIAN_DISTANCE, SMALLEST_DISTANCE, accuracy_at, distances
from robbench.results.tables import leaderboard
from robbench.specs import ResolvedAttack
from robbench.statistics.distances import median
from robbench.store.records import CellRecord, CellResult, Run

SPEC = {"threat_model": "minimal-l2", "space": "minimal", "norm": "l2", "epsilon": 0.5, "eta": None,
        "algorithm": "fmn", "parameters": {}}  # fmt: skip


def cell(name: str, clean: list[float], margin: list[float], l2: list[float]) -> CellResult:
    clean_margin, attacked, size = (np.asarray(part) for part in (clean, margin, l2))
    robust = (clean_margin > 0) & ((attacked > 0) | (size > 0.5))
    rows = pd.DataFrame(
        {"sample_id": range(len(clean)), "label": 0, "clean_margin": clean_margin, "margin": attacked, "robust": robust,
         "broken_at": 1, "backwards": 9, "counts_exact": True, "l2": size, "linf": size / 2, "l1": size * 2, "l0": 1.0}
    )  # fmt: skip
    record = CellRecord(
        hash=("a" if name == "fmn-l2" else "b") * 64, model="m", defense="at", dataset="digits",
        dataset_revision="b" * 64, seed=0, attack=ResolvedAttack.model_validate({**SPEC, "name": name, "label": name}),
        model_sha256="c" * 64, attack_flow=None, engine="e", status="ok",
    )  # fmt: skip
    return CellResult(record, rows)


ONE = cell("fmn-l2", [1.0, 1.0, -1.0, 1.0], [-1.0, 2.0, -1.0, 0.0], [0.4, 0.0, 0.0, 0.9])
OTHER = cell("ddn-l2", [1.0, 1.0, -1.0, 1.0], [-1.0, -0.1, -1.0, -2.0], [0.3, 2.0, 0.0, 1.5])


def test_a_failure_is_infinite_and_a_wrong_clean_image_is_at_0() -> None:
    assert distances(ONE).tolist() == [0.4, math.inf, 0.0, 0.9]


def test_accuracies_at_any_budget_come_from_one_run() -> None:
    values = [accuracy_at(distances(ONE), budget).value for budget in (0.0, 0.4, 0.5, 0.9, 100.0)]
    assert values == [75.0, 50.0, 50.0, 25.0, 25.0]
    at_budget = 100 * ONE.rows["robust"].mean()
    assert accuracy_at(distances(ONE), 0.5).value == at_budget, "that of the table"


def test_rows_of_a_run(tmp_path: Path) -> None:
    run = Run(
        tmp_path, "digits", "b" * 64, 0, 4, (1, 8, 8), ("0", "1"), tuple(range(4)), [ONE, OTHER], {}, {}
    )
    rows = {(row.attack, row.metric): row for row in leaderboard(run)}
    assert rows["fmn-l2", MEDIAN_DISTANCE.name].value == pytest.approx(0.65)
    assert "1 of them without an adversarial image" in rows["fmn-l2", MEDIAN_DISTANCE.name].note
    smallest = rows["worst-case", SMALLEST_DISTANCE.name]
    assert smallest.value == pytest.approx((0.3 + 0.9) / 2)
    assert smallest.combined == ("fmn-l2", "ddn-l2")
    assert rows["fmn-l2", "accuracy"].value == 50.0


@given(st.lists(st.floats(0, 10) | st.just(math.inf), min_size=1, max_size=40))
def test_the_median_and_its_bounds(values: list[float]) -> None:
    found = median(np.asarray(values))
    assert found.value == np.median(values) or math.isinf(found.value)
    assert found.lower <= found.value <= found.upper
    assert (found.lower, found.upper) == (0.0, math.inf) or len(values) > 5


def test_the_bounds_are_order_statistics() -> None:
    found = median(np.arange(1.0, 41.0))
    assert (found.lower, found.upper) == (14.0, 27.0), "table of the sign test for n = 40"
    with pytest.raises(ValueError, match="NaN"):
        median(np.array([1.0, math.nan]))
