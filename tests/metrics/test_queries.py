"""The median number of queries against the standard library, and its way into a table without another file."""

import statistics
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robbench.metrics.queries import median_queries
from robbench.results.tables import leaderboard
from robbench.specs import ResolvedAttack
from robbench.store.records import CellRecord, CellResult, Run

SQUARE = {"name": "square", "label": "square", "threat_model": "linf", "space": "image", "norm": "linf", "epsilon": 0.2,
          "eta": None, "algorithm": "autoattack", "parameters": {"components": ["square"]}}  # fmt: skip


def cell(broken_at: list[int], robust: int = 0, backwards: int = 0, exact: bool = True) -> CellResult:
    """A cell with one broken sample per entry of `broken_at`, and `robust` others."""
    n = len(broken_at) + robust
    held = [False] * len(broken_at) + [True] * robust
    rows = pd.DataFrame(
        {
            "sample_id": range(n),
            "label": 0,
            "clean_margin": 1.0,
            "margin": [1.0 if right else -1.0 for right in held],
            "robust": held,
            "broken_at": [*broken_at, *[5000] * robust],
            "backwards": backwards,
            "counts_exact": exact,
            "l2": 0.5,
            "linf": 0.2,
        }
    )
    record = CellRecord(
        hash="a" * 64, model="m", defense="at", dataset="digits", dataset_revision="b" * 64, seed=0,
        attack=ResolvedAttack.model_validate(SQUARE), model_sha256="c" * 64, attack_flow=None, engine="e", status="ok",
    )  # fmt: skip
    return CellResult(record, rows)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=30), st.integers(0, 5))
def test_it_is_the_median_over_what_was_broken(broken_at: list[int], robust: int) -> None:
    found = median_queries(cell(broken_at, robust))
    assert found is not None
    assert found.value == statistics.median(broken_at)
    assert found.scope == f"over the {len(broken_at)} samples that the attack broke"


@pytest.mark.parametrize(
    "result",
    [cell([], robust=3), cell([4, 5], backwards=1), cell([4, 5], exact=False)],
    ids=["nothing broken", "gradients", "not counted"],
)
def test_nothing_is_said_where_there_are_no_queries_to_count(result: CellResult) -> None:
    assert median_queries(result) is None


def test_a_table_has_it(tmp_path: Path) -> None:
    result = cell([10, 20, 400], robust=2)
    run = Run(
        tmp_path, "digits", "b" * 64, 0, 5, (1, 8, 8), tuple("0123456789"), tuple(range(5)), [result], {}, {}
    )
    (row,) = [row for row in leaderboard(run) if row.metric == "median_queries"]
    assert (row.value, row.unit, row.attack) == (20.0, "queries", "square")
    assert row.note == "over the 3 samples that the attack broke"
