"""The leaderboard against the ledger's rows, recomputed in plain Python."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from publish_runs import JSA, attack, cell, frame, make_run

from robbench.results.tables import TableRow, leaderboard, wide
from robbench.store.records import CellResult, Run


def find(
    rows: list[TableRow], model: str, label: str, metric: str = "accuracy", threat: str | None = None
) -> TableRow:
    found = [r for r in rows if (r.model, r.attack, r.metric) == (model, label, metric)]
    found = [r for r in found if threat in (None, r.threat_model)]
    assert len(found) == 1
    return found[0]


def records(result: CellResult) -> list[dict[str, object]]:
    return result.rows.to_dict("records")


def share(verdicts: list[bool]) -> float:
    return 100 * sum(verdicts) / len(verdicts)


def test_accuracies_are_the_ledgers(run: Run) -> None:
    rows = leaderboard(run)
    for result in run.cells:
        robust = [bool(r["robust"]) for r in records(result)]
        assert find(rows, result.cell.model, result.cell.attack.label).value == pytest.approx(share(robust))
    for model in ("digits-standard", "digits-ijsat"):
        mine = [result for result in run.cells if result.cell.model == model]
        clean = [r["clean_prediction"] == r["label"] for r in records(mine[0])]
        per_attack = [[bool(r["robust"]) for r in records(result)] for result in mine]
        assert find(rows, model, "clean").value == pytest.approx(share(clean))
        every = [all(column) for column in zip(*per_attack, strict=True)]
        linf = [all(column) for column in zip(*per_attack[:2], strict=True)]
        assert find(rows, model, "worst-case", "worst_case_accuracy", "all").value == pytest.approx(
            share(every)
        )
        assert find(rows, model, "worst-case", "worst_case_accuracy", "linf").value == pytest.approx(
            share(linf)
        )
        mean = statistics.fmean([share(clean), *(share(column) for column in per_attack)])
        average = find(rows, model, "average", "average_accuracy")
        assert average.value == pytest.approx(mean)
        assert average.lower is not None
        assert average.upper is not None
        assert average.lower < mean < average.upper


def test_likelihood_and_distance_are_the_ledgers(run: Run) -> None:
    rows = leaderboard(run)
    broken = [r for r in records(run.cells[0]) if r["clean_prediction"] == r["label"] and not r["robust"]]
    assert 0 < len(broken) < len(run.cells[0].rows)
    l2 = [float(r["l2"]) for r in broken]  # type: ignore[arg-type]
    assert find(rows, "digits-standard", "pgd20", "l2").value == pytest.approx(statistics.fmean(l2))
    assert find(rows, "digits-standard", "pgd20", "l2_std").value == pytest.approx(statistics.pstdev(l2))
    finite = [float(r["nll_after"]) for r in broken if math.isfinite(r["nll_after"])]  # type: ignore[arg-type]
    after = find(rows, "digits-standard", "pgd20", "bits_per_dim_after")
    assert after.value == pytest.approx(statistics.fmean(finite))
    assert "1 infinite" in after.note
    assert after.flow == "digits-glow"


def test_no_flow_means_no_likelihood_rows(run: Run) -> None:
    bare = [CellResult(r.cell.model_copy(update={"nll_flow": None}), r.rows) for r in run.cells]
    assert not any(row.metric.startswith("bits") for row in leaderboard(replace(run, cells=bare)))


def test_order_is_plan_order(run: Run) -> None:
    rows = leaderboard(run)
    assert rows == leaderboard(run)
    labels = [row.attack for row in rows if row.model == "digits-ijsat" and row.metric.endswith("accuracy")]
    assert labels == ["clean", "pgd20", "aa", "jsa50", "worst-case", "worst-case", "worst-case", "average"]
    assert list(dict.fromkeys(row.model for row in rows)) == ["digits-standard", "digits-ijsat"]


def test_failed_and_half_done_cells_have_no_value_and_take_the_combined_ones_along(damaged: Run) -> None:
    rows = leaderboard(damaged)
    failed, half = find(rows, "digits-ijsat", "aa"), find(rows, "digits-standard", "jsa50")
    assert (failed.status, failed.value, failed.lower) == ("failed", None, None)
    assert "left its set" in failed.note
    assert (half.status, half.value, half.note) == ("not run", None, "50 of 120 samples done")
    for model, status in (("digits-ijsat", "failed"), ("digits-standard", "not run")):
        for label, metric in (("worst-case", "worst_case_accuracy"), ("average", "average_accuracy")):
            row = find(rows, model, label, metric, "all")
            assert (row.status, row.value) == (status, None)
    assert find(rows, "digits-standard", "worst-case", "worst_case_accuracy", "linf").status == "ok"
    assert find(rows, "digits-ijsat", "clean").status == "ok"


def test_a_model_without_any_finished_cell_has_no_clean_accuracy() -> None:
    result = cell("m", attack(), frame(20, 0.9, 0.5, 1).iloc[:0], status="failed", error="model returned NaN")
    rows = leaderboard(make_run([result], 20))
    assert {row.status for row in rows} == {"failed"}
    assert all(row.value is None for row in rows)


def test_near_ties_are_counted(run: Run) -> None:
    assert find(leaderboard(run), "digits-ijsat", "pgd20").note == "1 of 120 samples with |margin| < 0.0001"


def test_clean_verdicts_that_differ_between_cells_are_named(run: Run) -> None:
    run.cells[1].rows.loc[7, ["clean_prediction", "clean_margin"]] = 99, -1.0
    assert "differ between cells on 1 samples" in find(leaderboard(run), "digits-standard", "clean").note


def test_other_samples_in_one_cell_are_refused(run: Run) -> None:
    run.cells[1].rows.loc[0, "sample_id"] = 100_000
    with pytest.raises(ValueError, match="other sample ids"):
        leaderboard(run)


def test_budgets_of_one_threat_model_are_separate_worst_cases() -> None:
    specs = [
        attack("pgd20@0.1", epsilon=0.1),
        attack("pgd20@0.2"),
        attack("aa@0.1", epsilon=0.1),
        attack("aa@0.2"),
    ]
    run = make_run([cell("m", spec, frame(30, 0.9, 0.5, i)) for i, spec in enumerate(specs)], 30)
    rows = leaderboard(run)
    groups = [(row.threat_model, row.epsilon) for row in rows if row.attack == "worst-case"]
    assert groups == [("linf", 0.1), ("linf", 0.2), ("all", None)]
    columns = wide(rows).columns
    assert columns[1:5] == ("pgd20@0.1", "pgd20@0.2", "aa@0.1", "aa@0.2")
    assert columns[5:] == ("worst linf@0.1", "worst linf@0.2", "worst case", "average")


def test_a_worst_case_over_one_attack_or_over_all_has_no_column(run: Run) -> None:
    assert wide(leaderboard(run)).columns == (
        "clean",
        "pgd20",
        "aa",
        "jsa50",
        "worst linf",
        "worst case",
        "average",
    )
    one = make_run([cell("m", JSA, frame(30, 0.9, 0.5, 1))], 30)
    assert wide(leaderboard(one)).columns == ("clean", "jsa50", "worst case", "average")


def test_a_note_is_written_from_the_facts(run: Run) -> None:
    row = find(leaderboard(run), "digits-ijsat", "average", "average_accuracy")
    assert row.combined == ("clean", "pgd20", "aa", "jsa50")
    assert row.note == "over clean, pgd20, aa, jsa50"
    noted = replace(row, missing=("fgsm",), near_ties=2, suspicions=("it is odd",), remarks=("a", "b"))
    expected = "over clean, pgd20, aa, jsa50; not run: fgsm; a; b; 2 of 120 samples with |margin| < 0.0001"
    assert noted.note == f"{expected}; suspicious: it is odd"


def test_values_are_plain_floats(run: Run) -> None:
    numbers = [v for row in leaderboard(run) for v in (row.value, row.lower, row.upper) if v is not None]
    assert {type(v) for v in numbers} == {float}
    assert not any(np.isnan(numbers))
