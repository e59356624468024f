"""Verdicts on a reference table, and what it takes to be one."""

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
from publish_runs import cell, make_run
from rich.console import Console

from robbench.compare.comparison import Comparison
from robbench.compare.policy import Policy, PolicyName
from robbench.compare.tables import check, has_passed, without_reference
from robbench.core.errors import UserError
from robbench.report.check_text import check_table, print_results
from robbench.report.writers import tidy_csv
from robbench.results.tables import TableRow, leaderboard
from robbench.statistics.accuracy import wilson
from robbench.store.records import Run

MODEL = "digits-ijsat"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "reference.csv"


def measured(run: Run, label: str = "pgd20", metric: str = "accuracy") -> TableRow:
    return next(r for r in leaderboard(run) if (r.model, r.attack, r.metric) == (MODEL, label, metric))


def write(table: Path, **cells: object) -> Path:
    table.write_text(",".join(cells) + "\n" + ",".join(str(v) for v in cells.values()) + "\n")
    return table


def verdict(run: Run, table: Path, **changes: object) -> Comparison:
    """The result for one reference row: the run's own pgd20 accuracy with cells changed or added."""
    own = {"dataset": "digits", "model": MODEL, "attack": "pgd20", "metric": "accuracy"}
    own["value"] = str(measured(run).value)
    (result,) = check(leaderboard(run), write(table, **{**own, **changes}))
    return result


def test_a_run_passes_against_its_own_tables(run: Run, table: Path) -> None:
    table.write_text(tidy_csv(leaderboard(run)))
    results = check(run, table)
    assert {result.verdict for result in results} == {"pass"}
    assert len(results) == len(leaderboard(run))
    assert has_passed(results)


SAME = {"n": 120, "seed": 3}


@pytest.mark.parametrize(("samples", "expected"), [(1, "pass"), (-1, "pass"), (2, "fail"), (-2, "fail")])
def test_attacked_accuracies_of_the_same_samples_may_differ_by_one_sample(
    run: Run, table: Path, samples: int, expected: str
) -> None:
    """At n = 120 one sample is more than half a point; a near tie, as the fixture's pgd20 has one, is one more."""
    for attack, ties in (("aa", 0), ("pgd20", 1)):
        value = measured(run, attack).value + 100 * (samples + math.copysign(ties, samples)) / 120
        result = verdict(run, table, attack=attack, value=value, **SAME)
        assert result.tolerance == pytest.approx(100 * (1 + ties) / 120)
        assert result.verdict == expected


@pytest.mark.parametrize("policy", ["default", "exact", "interval"])
def test_a_leaderboard_that_is_read_back_gives_the_verdicts_of_its_numbers(
    run: Run, table: Path, policy: PolicyName
) -> None:
    """As written now, and as written before with every digit: one sample of 10,000 off is off, although 57.1 has one
    decimal."""
    row = replace(measured(run, "clean"), value=100 * 0.571, n=10_000, near_ties=0)
    for digits in (12, 17):
        reference = replace(row, value=float(f"{row.value:.{digits}g}"))
        table.write_text(tidy_csv([reference]))
        for samples in (0, 1, -1, 300):
            now = replace(row, value=100 * ((5710 + samples) / 10_000))
            (result,) = check([now], table, policy=Policy(policy))
            expected = abs(samples) < 100 if policy == "interval" else samples == 0
            assert (result.verdict == "pass") == expected, (digits, samples)


def test_half_a_point_of_many_samples(run: Run, table: Path) -> None:
    row = replace(measured(run), n=10_000, near_ties=0)
    own = {
        "dataset": "digits",
        "model": MODEL,
        "attack": "pgd20",
        "metric": "accuracy",
        "n": 10_000,
        "seed": 3,
    }
    for shift, expected in ((0.49, "pass"), (0.51, "fail")):
        (result,) = check([row], write(table, **own, value=row.value + shift))
        assert (result.verdict, result.tolerance) == (expected, 0.5)


@pytest.mark.parametrize(
    ("shift", "ties", "expected"), [(0, 0, "pass"), (1, 0, "fail"), (1, 1, "pass"), (2, 1, "fail")]
)
def test_clean_accuracy_of_the_same_samples_is_exact_up_to_near_ties(
    run: Run, table: Path, shift: int, ties: int, expected: str
) -> None:
    row = next(r for r in leaderboard(run) if (r.model, r.attack, r.metric) == (MODEL, "clean", "accuracy"))
    row = replace(row, near_ties=ties)
    own = {"dataset": "digits", "model": MODEL, "attack": "clean", "metric": "accuracy", **SAME}
    assert check([row], write(table, **own, value=row.value + 100 * shift / 120))[0].verdict == expected


@pytest.mark.parametrize("rounded", ["92.5", "92.50", "93"])
def test_a_value_is_as_exact_as_it_was_written(run: Run, table: Path, rounded: str) -> None:
    row = next(r for r in leaderboard(run) if (r.model, r.attack, r.metric) == (MODEL, "clean", "accuracy"))
    row = replace(row, value=92.504, near_ties=0)
    own = {"dataset": "digits", "model": MODEL, "attack": "clean", "metric": "accuracy", **SAME}
    assert check([row], write(table, **own, value=rounded), policy=Policy("exact"))[0].verdict == "pass"
    assert check([row], write(table, **own, value=float(rounded) + 0.51))[0].verdict == "fail"


@pytest.mark.parametrize("reference_n", ["", 400, 10_000])
@pytest.mark.parametrize("direction", [-1, 1])
def test_accuracies_of_other_samples_get_the_interval_of_the_difference(
    run: Run, table: Path, reference_n: object, direction: int
) -> None:
    """Newcombe's interval, found here by walking away from the measurement until 0 leaves it."""
    row = measured(run)
    own = {"dataset": "digits", "model": MODEL, "attack": "pgd20", "metric": "accuracy", "n": reference_n}
    ours = wilson(round(row.value * 1.2), 120)
    for tenth in range(1, 300, 4):
        value = row.value + direction * tenth / 10
        theirs = wilson(round(value / 100 * reference_n), reference_n) if reference_n else None
        low, high = (theirs.lower, theirs.upper) if theirs else (value, value)
        centre = theirs.value if theirs else value
        difference = ours.value - centre
        below = difference - math.hypot(ours.value - ours.lower, high - centre)
        above = difference + math.hypot(ours.upper - ours.value, centre - low)
        (result,) = check([row], write(table, **own, value=f"{centre!r}"))
        assert (result.verdict == "pass") == (below <= 0 <= above), (value, result)
        if result.verdict == "fail":
            break
    assert result.verdict == "fail"
    assert "95 % interval" in result.basis


def test_policies(run: Run, table: Path) -> None:
    """A shift of four of 120 samples: noise between different samples, a change on the same ones."""
    value = measured(run).value + 400 / 120
    verdict(run, table, value=value, **SAME)
    found = {
        name: check(run, table, policy=Policy(name))[0].verdict for name in ("default", "exact", "interval")
    }
    assert found == {"default": "fail", "exact": "fail", "interval": "pass"}
    assert check(run, table, tolerance=3.4)[0].verdict == "pass"


def test_rows_that_do_not_gate_are_shown_and_never_fail(run: Run, table: Path) -> None:
    result = verdict(run, table, value=1, gate="false", **SAME)
    assert (result.verdict, result.regression) == ("fail", False)
    console = Console(width=200, file=io.StringIO())
    assert print_results([result], console)
    assert "differs" in console.file.getvalue()  # type: ignore[attr-defined]
    assert verdict(run, table, value=1, gate="True", **SAME).regression
    with pytest.raises(UserError, match="gate 'maybe' is neither true nor false"):
        verdict(run, table, value=1, gate="maybe")


def test_a_folder_of_tables(run: Run, tmp_path: Path) -> None:
    rows = leaderboard(run)
    for number, part in enumerate((rows[:5], rows[5:])):
        (tmp_path / f"part-{number}.csv").write_text(tidy_csv(part))
    results = check(run, tmp_path)
    assert len(results) == len(rows)
    assert {result.verdict for result in results} == {"pass"}
    assert {result.path.name for result in results} == {"part-0.csv", "part-1.csv"}


def test_default_tolerance_of_other_units_is_one_percent(run: Run, table: Path) -> None:
    value = measured(run, metric="l2").value
    assert verdict(run, table, metric="l2", value=value * 1.009).verdict == "pass"
    assert verdict(run, table, metric="l2", value=value * 1.02).verdict == "fail"


def test_tolerance_column_beats_option_beats_policy(run: Run, table: Path) -> None:
    value = measured(run).value + 2
    assert verdict(run, table, value=value, **SAME).verdict == "fail"
    assert check(run, table, tolerance=3)[0].verdict == "pass"
    assert verdict(run, table, value=value, tolerance=2.5, **SAME).verdict == "pass"
    assert check(run, table, tolerance=0)[0].verdict == "pass"


@pytest.mark.parametrize("changes", [{"n": 100}, {"seed": 4}, {"n": 100, "seed": 4}])
def test_of_other_samples_only_accuracies_and_likelihoods_can_be_compared(
    run: Run, table: Path, changes: dict[str, int]
) -> None:
    result = verdict(run, table, metric="l2", value=measured(run, metric="l2").value, **changes)
    assert result.verdict == "fail"
    assert all(f"reference {value}" in result.reason for value in changes.values())
    accuracy = verdict(run, table, **changes)
    assert (accuracy.verdict, accuracy.reason) == ("pass", result.reason)
    assert check(run, table, tolerance=50)[0].verdict == "fail"  # points are for the same samples
    assert check(run, table, policy=Policy("exact"))[0].verdict == "fail"
    stated = verdict(run, table, tolerance=0.1, **changes)
    assert (stated.verdict, stated.reason) == ("pass", result.reason)
    assert verdict(run, table, tolerance=0.1, **SAME).reason == ""


@pytest.mark.parametrize("value", ["nan", "NaN", "inf", "-inf"])
def test_a_reference_that_is_not_finite_never_passes(run: Run, table: Path, value: str) -> None:
    assert verdict(run, table, value=value).verdict == "fail"


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_a_measurement_that_is_not_finite_never_passes(run: Run, table: Path, value: float | None) -> None:
    table.write_text(f"dataset,model,attack,metric,value,tolerance\ndigits,{MODEL},pgd20,accuracy,50,1000\n")
    (result,) = check([replace(measured(run), value=value)], table)
    assert result.verdict == "fail"


def test_what_a_small_run_leaves_out_of_a_large_reference_is_counted(run: Run, table: Path) -> None:
    """Thousands of "not run" lines would hide the one that failed."""
    text = tidy_csv(leaderboard(run)).splitlines()
    others = [
        line.replace("digits-ijsat", f"model-{k}")
        for k in range(5)
        for line in text
        if "digits-ijsat" in line
    ]
    table.write_text("\n".join([*text, *others]) + "\n")
    console = Console(width=200, record=True, file=io.StringIO())
    assert print_results(check(run, table), console)
    printed = console.export_text()
    assert f"not in this run: {len(others)} numbers of the reference (model-0 {len(others) // 5}" in printed
    assert "model-3 aa" not in printed
    assert "digits-standard" in printed


def test_accuracies_without_a_reference_are_named(run: Run, table: Path) -> None:
    """After a renamed attack everything that is left may still pass: `check --complete` fails instead."""
    rows = leaderboard(run)
    table.write_text(tidy_csv([row for row in rows if row.attack != "aa"]))
    results = check(rows, table)
    assert has_passed(results)
    assert without_reference(rows, results) == ["digits-standard x aa", "digits-ijsat x aa"]
    table.write_text(tidy_csv(rows))
    assert without_reference(rows, check(rows, table)) == []


def test_a_failed_cell_fails_and_a_missing_or_empty_one_is_not_run(damaged: Run, table: Path) -> None:
    assert verdict(damaged, table, attack="aa", value=70).verdict == "fail"
    assert verdict(damaged, table, attack="jsa50", model="digits-standard").verdict == "not run"
    assert verdict(damaged, table, attack="fgsm").reason == "not in the run"
    assert verdict(damaged, table, value="").verdict == "not run"
    assert verdict(damaged, table, value=1, status="failed").verdict == "not run"
    assert not has_passed([verdict(damaged, table, attack="fgsm")])
    rows = leaderboard(damaged)
    accuracies = [row for row in rows if row.metric == "accuracy"]
    unfinished = [f"{row.model} x {row.attack}" for row in accuracies if row.status != "ok"]
    table.write_text(tidy_csv(rows))
    assert unfinished
    assert without_reference(rows, check(rows, table)) == unfinished, (
        "a reference that was not compared is none"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epsilon": 0.2}, "pass"),
        ({"epsilon": 0.20000001}, "pass"),
        ({"epsilon": 0.1}, "not run"),
        ({"epsilon": ""}, "not run"),
        ({"epsilon": 0.2, "eta": ""}, "pass"),
        ({"eta": 0.35}, "not run"),
        ({"threat_model": "linf"}, "pass"),
        ({"threat_model": "l2"}, "not run"),
        ({"dataset": "mnist"}, "not run"),
    ],
)
def test_the_key(run: Run, table: Path, changes: dict[str, object], expected: str) -> None:
    assert verdict(run, table, **changes).verdict == expected


def test_a_part_of_the_matrix_checks_against_all_of_it(run: Run, table: Path) -> None:
    table.write_text(tidy_csv(leaderboard(run)))
    part = make_run([cell(r.cell.model, r.cell.attack, r.rows) for r in run.cells[:2]], run.n)
    results = check(part, table)
    assert has_passed(results)
    average = next(r for r in results if r.attack == "average")
    assert (average.verdict, average.reason) == ("not run", "the run's number is over clean, pgd20, aa")


def test_an_ambiguous_reference_is_an_error(run: Run, table: Path) -> None:
    with pytest.raises(UserError, match=r"line 2.*matches 3 numbers.*add the columns"):
        verdict(run, table, attack="worst-case", metric="worst_case_accuracy")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "lacks the columns dataset, model, attack, metric, value"),
        (b"dataset,model,attack,metric\n", "lacks the columns value"),
        (b"dataset,model,attack,metric,value\n", "has no rows"),
        (b"<html><body>", "lacks the columns"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "is not CSV text"),
        (b'dataset,model,attack,metric,value\nd,m,a,"x"y,1\n', "is not CSV text"),
        (
            b"dataset,model,attack,metric,value\nd,m,a,accuracy,about 5\n",
            "line 2: value 'about 5' is not a number",
        ),
        (b"dataset,model,attack,metric,value\nd,m,a\n", "line 2: 3 cells for 5 columns"),
        (b"dataset,model,attack,metric,value,n\nd,m,a,accuracy,5,1.5\n", "n 1.5 is not a whole number"),
        (b"dataset,model,attack,metric,value,tolerance\nd,m,a,accuracy,5,-1\n", "tolerance -1.0"),
        (b"dataset,model,attack,metric,value,epsilon\nd,m,a,accuracy,5,nan\n", "epsilon nan is no budget"),
    ],
)
def test_malformed_references_are_user_errors(run: Run, table: Path, content: bytes, message: str) -> None:
    table.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        check(run, table)
    assert str(table) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["absent.csv", "."])
def test_unreadable_references_are_user_errors(run: Run, tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"cannot be read|folder without CSV"):
        check(run, tmp_path / name)


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_impossible_tolerances_are_user_errors(run: Run, table: Path, tolerance: float) -> None:
    with pytest.raises(UserError, match="no tolerance"):
        check(run, table, tolerance)


def test_the_printed_table_counts(run: Run, table: Path) -> None:
    row = measured(run)
    table.write_text(
        "dataset,model,attack,metric,value\n"
        f"digits,{MODEL},pgd20,accuracy,{row.value}\n"
        f"digits,{MODEL},aa,accuracy,1\n"
        f"digits,{MODEL},fgsm,accuracy,1\n"
    )
    results = check(run, table)
    console = Console(width=160, file=io.StringIO())
    assert not print_results(results, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "1 pass, 1 fail, 1 not run" in text
    assert check_table(results).row_count == 3


@pytest.mark.parametrize("width", [80, 160, 300])
def test_verdicts_are_readable_at_any_width(run: Run, table: Path, width: int) -> None:
    """No name is broken in the middle, in nine columns or in four."""
    table.write_text(tidy_csv(leaderboard(run)))
    console = Console(width=width, file=io.StringIO())
    print_results(check(run, table), console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "…" not in text
    assert "reference" in text
    for line in (line for line in text.splitlines() if line.split()[:1] == ["pass"]):
        assert any(word in line for word in ("digits-", "accuracy")), line


def test_a_column_given_twice(run: Run, table: Path) -> None:
    table.write_text("dataset,model,attack,metric,value,value\ndigits,m,a,accuracy,1,2\n")
    with pytest.raises(UserError, match="two columns 'value'"):
        check(run, table)


def test_a_check_that_compared_nothing_says_so(run: Run, table: Path) -> None:
    table.write_text("dataset,model,attack,metric,value\nmnist,x,y,accuracy,1\n")
    console = Console(width=160, file=io.StringIO())
    assert not print_results(check(run, table), console)
    assert "nothing was checked" in console.file.getvalue()  # type: ignore[attr-defined]
