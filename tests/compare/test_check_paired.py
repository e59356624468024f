"""Comparison sample by sample: what is allowed, what is found, and the file that holds a reference run."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from flow_runs import flow_attack, flow_cell, flow_frame, flow_run
from hypothesis import given
from hypothesis import strategies as st
from publish_runs import attack, cell, frame, make_run
from scipy import stats

from robbench.compare.comparison import Comparison
from robbench.compare.paired import (
    ALL_MODELS,
    IDENTITY,
    compare_samples,
    largest_count,
)
from robbench.compare.samples import KEY, Samples, of_run, read_samples, write_reference
from robbench.core.errors import UserError
from robbench.statistics.paired import sign_test
from robbench.store.records import Run

ENSEMBLE = attack("aa", algorithm="autoattack", parameters={"components": ["apgd-ce", "apgd-t", "square"]})
Change = Callable[[pd.DataFrame], object]


def ensemble(seed: int = 5) -> pd.DataFrame:
    """120 rows whose breaks are shared by two components."""
    rows = frame(120, 0.95, 0.5, seed, "apgd-ce")
    rows["margin"] = np.where(rows["robust"], 0.7, -0.3).astype(np.float32) + rows.index.to_numpy() / 1000
    broken = rows.index[rows["broken_by"] == "apgd-ce"]
    rows.loc[broken[::3], "broken_by"] = "apgd-t"
    return rows


def run_of(
    rows: pd.DataFrame, model: str = "digits-ijsat", spec: object = ENSEMBLE, **changes: object
) -> Run:
    return make_run([cell(model, spec, rows, **changes)], 120)  # type: ignore[arg-type]


def compared(change: Change | None = None, **options: object) -> dict[str, Comparison]:
    """Results by component of the ensemble against itself with rows changed."""
    rows = ensemble()
    if change is not None:
        change(rows)
    results = compare_samples(of_run(run_of(ensemble())), of_run(run_of(rows)), **options)  # type: ignore[arg-type]
    return {result.component: result for result in results}


def test_a_run_repeats_itself() -> None:
    results = compared(policy="exact")
    assert list(results) == [IDENTITY, *sorted(results.keys() - {IDENTITY}, key=list(results).index)]
    assert results.keys() == {IDENTITY, "held", "apgd-ce", "apgd-t"}
    assert {result.verdict for result in results.values()} == {"pass"}
    rows = ensemble()
    assert results["apgd-t"].shift.n == (rows["broken_by"] == "apgd-t").sum()
    assert results["held"].shift.n == rows["robust"].sum()
    assert (
        sum(r.shift.n for r in results.values() if r.component != IDENTITY)
        == (rows["broken_by"] != "clean").sum()
    )


def test_order_of_samples_does_not_matter() -> None:
    shuffled = ensemble().sample(frac=1, random_state=0)
    results = compare_samples(of_run(run_of(ensemble())), of_run(run_of(shuffled)), "exact")
    assert {result.verdict for result in results} == {"pass"}


def by(component: str | None, count: int) -> Callable[[pd.DataFrame], list[int]]:
    """Rows of the first `count` samples of a component (None: held ones)."""

    def rows(found: pd.DataFrame) -> list[int]:
        mask = found["robust"] if component is None else found["broken_by"] == component
        return list(found.index[mask][:count])

    return rows


def flip(component: str, count: int) -> Change:
    def change(found: pd.DataFrame) -> None:
        rows = by(component, count)(found)
        found.loc[rows, "robust"] = True
        found.loc[rows, "broken_by"] = None
        found.loc[rows, "margin"] = np.float32(0.4)

    return change


def test_flips_are_counted_where_they_happened() -> None:
    few, many = compared(flip("apgd-t", 1)), compared(flip("apgd-t", 9))
    assert few["apgd-t"].verdict == "pass"
    assert (few["apgd-t"].shift.gained, few["apgd-t"].shift.lost) == (1, 0)
    assert many["apgd-t"].verdict == "fail"
    assert "aa, component apgd-t: 9 of " in many["apgd-t"].reason
    assert "9 robust now" in many["apgd-t"].reason
    assert many["apgd-ce"].verdict == many["held"].verdict == "pass"
    assert compared(flip("apgd-t", 1), policy="exact")["apgd-t"].verdict == "fail"


def test_near_ties_are_no_flips() -> None:
    def change(found: pd.DataFrame) -> None:
        flip("apgd-ce", 12)(found)
        found.loc[by(None, 200)(found), "margin"] = np.float32(1e-4)

    def ties(found: pd.DataFrame) -> None:
        found.loc[by("apgd-ce", 12)(found), "margin"] = np.float32(-1e-4)

    before, now = ensemble(), ensemble()
    ties(before)
    change(now)
    found = compare_samples(of_run(run_of(before)), of_run(run_of(now)))
    (shift,) = (result.shift for result in found if result.component == "apgd-ce")
    assert (shift.gained, shift.near_ties) == (0, 12)
    # FAB stops at the boundary: what it breaks has a tiny margin, and what it no longer breaks is a flip.
    shift = compared(change)["apgd-ce"].shift
    assert (shift.gained, shift.near_ties) == (12, 0)


@pytest.mark.parametrize(("count", "verdict"), [(1, "pass"), (12, "fail")])
def test_another_component_or_step_is_another_way(count: int, verdict: str) -> None:
    def handed(found: pd.DataFrame) -> None:
        found.loc[by("apgd-ce", count)(found), "broken_by"] = "square"

    def later(found: pd.DataFrame) -> None:
        found.loc[by("apgd-ce", count)(found), "broken_at"] += 5

    for change, name in ((handed, "handed"), (later, "later")):
        result = compared(change)["apgd-ce"]
        assert result.verdict == verdict
        assert getattr(result.shift, name) == result.shift.moved == count


@pytest.mark.parametrize(("relative", "verdict"), [(1e-4, "pass"), (1e-2, "fail")])
def test_margins_and_sizes_may_differ_by_rounding(relative: float, verdict: str) -> None:
    def margins(found: pd.DataFrame) -> None:
        found["margin"] += np.float32(relative)

    def sizes(found: pd.DataFrame) -> None:
        found["linf"] *= np.float32(1 - relative)

    for change in (margins, sizes):
        assert compared(change)["held"].verdict == verdict


def test_what_leans_to_one_side_fails_also_where_every_search_may_differ() -> None:
    """Policy interval, for other random numbers: noise passes, a shift of all margins does not."""
    rng = np.random.default_rng(0)

    def noise(found: pd.DataFrame) -> None:
        found["margin"] += rng.normal(0, 0.05, len(found)).astype(np.float32)

    def weaker(found: pd.DataFrame) -> None:
        found.loc[by(None, 200)(found), "margin"] += np.float32(0.05)

    assert {result.verdict for result in compared(noise, policy="interval").values()} == {"pass"}
    result = compared(weaker, policy="interval")["held"]
    assert result.verdict == "fail"
    assert "of the changed scores are higher, 0 lower, median change +0.05" in result.reason


@pytest.mark.parametrize("column", ["forwards", "backwards"])
def test_fewer_calls_on_samples_that_hold_fail(column: str) -> None:
    def change(found: pd.DataFrame) -> None:
        found[column] //= 10

    result = compared(change)["held"]
    assert result.verdict == "fail"
    assert f"{column} on samples that hold, in the reference" in result.reason


def test_inputs_must_be_the_same() -> None:
    def labels(found: pd.DataFrame) -> None:
        found.loc[0, "label"] += 1

    def scores(found: pd.DataFrame) -> None:
        found.loc[0, "clean_margin"] += np.float32(0.01)

    for change, text in (
        (labels, "1 of 120 labels differ"),
        (scores, "1 of 120 scores before the attack differ"),
    ):
        result = compared(change)[IDENTITY]
        assert result.verdict == "fail"
        assert text in result.reason


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"attack": ENSEMBLE.model_copy(update={"epsilon": 0.1})}, "attack spec epsilon 0.1, reference 0.2"),
        (
            {"attack": ENSEMBLE.model_copy(update={"parameters": {"components": ["apgd-ce"]}})},
            "attack spec parameters.components ['apgd-ce'], reference",
        ),
        ({"search_precision": "bf16"}, "search precision bf16, reference fp32"),
        ({"status": "failed", "error": "left its set"}, "failed: left its set"),
    ],
)
def test_a_cell_of_something_else_fails(changes: dict[str, object], text: str) -> None:
    spec = changes.pop("attack", ENSEMBLE)
    results = compare_samples(of_run(run_of(ensemble())), of_run(run_of(ensemble(), spec=spec, **changes)))
    assert results[0].verdict == "fail"
    assert text in results[0].reason


def test_a_renamed_label_or_engine_is_no_change() -> None:
    other = run_of(ensemble(), engine="robbench engine 7")
    results = compare_samples(of_run(run_of(ensemble())), of_run(other), "exact")
    assert {result.verdict for result in results} == {"pass"}


def test_missing_samples_and_cells() -> None:
    whole = of_run(run_of(ensemble()))
    half = of_run(make_run([cell("digits-ijsat", ENSEMBLE, ensemble().iloc[:60])], 60))
    assert "lacks 60 of the reference's 120 samples" in compare_samples(whole, half)[0].reason
    assert compare_samples(half, whole)[0].verdict == "pass"
    other = of_run(run_of(ensemble(), model="digits-at"))
    (result,) = compare_samples(whole, other)
    assert (result.verdict, result.reason) == ("not run", "not in the run")


def test_models_are_judged_together_too() -> None:
    """Two flips are few in each of four models, and eight too many in all of them."""

    def runs(count: int) -> Samples:
        cells = []
        for number in range(4):
            rows = ensemble()
            flip("apgd-ce", count)(rows)
            cells.append(cell(f"digits-{number}", ENSEMBLE, rows))
        return of_run(make_run(cells, 120))

    results = compare_samples(runs(0), runs(2))
    verdicts = {(r.model, r.component): r.verdict for r in results}
    assert all(verdict == "pass" for (model, _), verdict in verdicts.items() if model != ALL_MODELS)
    assert verdicts[ALL_MODELS, "apgd-ce"] == "fail"
    assert verdicts[ALL_MODELS, "apgd-t"] == "pass"


def test_likelihoods() -> None:
    def run(change: Change | None = None) -> Samples:
        rows = flow_frame(1)
        if change is not None:
            change(rows)
        return of_run(flow_run([flow_cell("toy-glow", flow_attack("nll-in"), rows)]))

    def weaker(rows: pd.DataFrame) -> None:
        rows["nll_after"] -= 0.5

    def infinite(rows: pd.DataFrame) -> None:
        rows.loc[3, "nll_after"] = math.inf

    def nan(rows: pd.DataFrame) -> None:
        rows.loc[3, "nll_after"] = math.nan

    assert "1 of 40 scores are NaN now" in compare_samples(run(), run(nan))[1].reason
    assert {result.verdict for result in compare_samples(run(), run(), "exact")} == {"pass"}
    assert {result.verdict for result in compare_samples(run(infinite), run(infinite), "exact")} == {"pass"}
    assert compare_samples(run(), run(infinite))[1].shift.moved == 1
    result = compare_samples(run(), run(weaker))[1]
    assert (result.component, result.verdict) == ("nll-in", "fail")
    assert "0 of the changed scores are higher, 40 lower, median change -0.5" in result.reason


# -------------------------------------------------------------------------------------------------- statistics
@given(n=st.integers(1, 400), rate=st.floats(0.001, 0.2), alpha=st.sampled_from([1e-2, 1e-4]))
def test_largest_count_is_the_binomial_quantile(n: int, rate: float, alpha: float) -> None:
    """By summing the probabilities of the counts beyond it."""
    count = largest_count(n, rate, alpha)

    def beyond(k: int) -> float:
        return math.fsum(math.comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(k + 1, n + 1))

    assert beyond(count) <= alpha * (1 + 1e-9)
    assert count == 0 or beyond(count - 1) > alpha * (1 - 1e-9)


@given(a=st.integers(0, 200), b=st.integers(0, 200))
def test_sign_test_is_the_exact_binomial_test(a: int, b: int) -> None:
    expected = stats.binomtest(a, a + b, 0.5).pvalue if a + b else 1.0
    assert sign_test(a, b) == pytest.approx(expected, rel=1e-9)


# -------------------------------------------------------------------------------------------------------- file
def test_a_reference_file_comes_back_as_written(tmp_path: Path) -> None:
    path, samples = tmp_path / "reference.parquet", of_run(run_of(ensemble()))
    write_reference(samples, path, "first")
    found = read_samples(path)
    assert found.identity.cells == samples.identity.cells
    assert found.cells.keys() == samples.cells.keys()
    for key, written in samples.cells.items():
        pd.testing.assert_frame_equal(found.cells[key].rows, written.rows)
    results = compare_samples(found, samples, "exact")
    assert {result.verdict for result in results} == {"pass"}


def test_the_history_of_a_reference_file_grows(tmp_path: Path) -> None:
    path = tmp_path / "reference.parquet"
    changed = ensemble()
    flip("apgd-t", 2)(changed)
    for rows, reason in ((ensemble(), "first"), (ensemble(), "again"), (changed, "faster engine")):
        write_reference(of_run(run_of(rows)), path, reason)
    history = read_samples(path).identity.history
    assert [entry.reason for entry in history] == ["first", "again", "faster engine"]
    assert [entry.changes for entry in history] == ["1 cells, n = 120", "the same rows", "1 cells changed"]


def test_an_incomplete_run_is_no_reference(damaged: Run, tmp_path: Path) -> None:
    path = tmp_path / "reference.parquet"
    with pytest.raises(UserError, match=r"2 cells are incomplete, first .* complete the run"):
        write_reference(of_run(damaged), path, "x")
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 2}, "schema_version"),
        ({"surprise": 1}, "surprise"),
        ({"cells": []}, "other cells than its metadata says"),
    ],
)
def test_a_reference_with_other_metadata_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "reference.parquet"
    write_reference(of_run(run_of(ensemble())), path, "first")
    table = pq.read_table(path)
    identity = json.loads(table.schema.metadata[KEY]) | change
    pq.write_table(table.replace_schema_metadata({KEY: json.dumps(identity)}), path)
    with pytest.raises(UserError, match=message):
        read_samples(path)


def test_a_damaged_reference_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.parquet"
    write_reference(of_run(run_of(ensemble())), path, "first")
    table = pq.read_table(path)
    for content in (b"{no json", b"\xff\xfe"):
        pq.write_table(table.replace_schema_metadata({KEY: content}), path)
        with pytest.raises(UserError, match="has damaged metadata"):
            read_samples(path)
    pq.write_table(pa.concat_tables([table, table]), path)
    with pytest.raises(UserError, match="has samples twice"):
        read_samples(path)
