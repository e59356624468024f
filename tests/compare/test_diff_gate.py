"""`robbench diff` as a gate of a repository: minimums, exit codes, JUnit, annotations and the summary of a job."""

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from publish_runs import attack, cell, frame, make_run
from site_runs import written
from test_diff import broken, compare, edited

from robbench.cli.app import main
from robbench.compare.comparison import Comparison, Side
from robbench.compare.documents import as_junit
from robbench.compare.minimums import hold_to_minimums, parse_minimums
from robbench.core.errors import UserError
from robbench.report.diff_text import diff_markdown
from robbench.results.tables import leaderboard
from robbench.store.records import Run

MODEL = "digits-ijsat"


def accuracy(run: Run, name: str = "pgd20", model: str = MODEL) -> float:
    (row,) = (r for r in leaderboard(run) if (r.model, r.attack, r.metric) == (model, name, "accuracy"))
    assert row.value is not None
    return row.value


def invoke(*arguments: object, **environment: str) -> Result:
    return CliRunner().invoke(main, ["diff", *map(str, arguments)], env={"COLUMNS": "80", **environment})


@pytest.fixture
def folders(run: Run, tmp_path: Path) -> tuple[Path, Path]:
    return written(run, tmp_path / "a"), written(edited(run, 3, broken(20)), tmp_path / "b")


# ----------------------------------------------------------------------------------------------------- minimums
def test_every_classifier_is_held_to_every_minimum(run: Run) -> None:
    own = accuracy(run)
    found = hold_to_minimums({"pgd20": own, "clean": 0}, leaderboard(run), "after")
    assert {(c.model, c.attack) for c in found} == {
        (m, a) for m in ("digits-standard", MODEL) for a in ("pgd20", "clean")
    }
    (held,) = (c for c in found if (c.model, c.attack) == (MODEL, "pgd20"))
    assert held.verdict == "pass"
    (missed,) = (
        c for c in hold_to_minimums({"pgd20": own + 0.01}, leaderboard(run), "after") if c.model == MODEL
    )
    assert (missed.verdict, missed.regression) == ("fail", True)
    assert missed.reason == f"{own:.4g} is below the minimum of {own + 0.01:g}"


@pytest.mark.parametrize("name", ["worst-case", "average"])
def test_combined_accuracies_have_minimums_too(run: Run, name: str) -> None:
    (row,) = (r for r in leaderboard(run) if (r.model, r.attack) == (MODEL, name) and r.threat_model == "all")
    for value, verdict in ((row.value, "pass"), (row.value + 1, "fail")):
        found = {c.model: c.verdict for c in hold_to_minimums({name: value}, leaderboard(run), "after")}
        assert found[MODEL] == verdict


@given(n=st.integers(1, 5000), share=st.floats(0, 1))
def test_a_minimum_that_is_written_as_the_accuracy_is_reached(n: int, share: float) -> None:
    """571 of 1000 are 57.099999999999994 % in binary, and 57.1 as anyone writes it."""
    k = round(share * n)
    row = replace(ROW, value=100 * (k / n))
    written_value = float(f"{100 * k / n:.12g}")
    assert hold_to_minimums({"pgd20": written_value}, [row], "r")[0].verdict == "pass"
    if k < n:
        assert hold_to_minimums({"pgd20": 100 * (k + 1) / n}, [row], "r")[0].verdict == "fail"


ROW = leaderboard(make_run([cell("m", attack(), frame(30, 0.9, 0.5, 1))], 30))[1]


def test_what_is_not_whole_misses_its_minimum(damaged: Run) -> None:
    found = {
        (c.model, c.attack): c
        for c in hold_to_minimums({"aa": 0, "jsa50": 0, "worst-case": 0}, leaderboard(damaged), "after")
    }
    assert found[MODEL, "aa"].verdict == "fail"
    assert "failed" in found[MODEL, "aa"].reason
    assert found["digits-standard", "jsa50"].verdict == "fail"
    assert "50 of 120 samples done" in found["digits-standard", "jsa50"].reason
    assert found[MODEL, "worst-case"].verdict == "fail"
    assert found["digits-standard", "aa"].verdict == "pass"


def test_a_model_without_the_attack_of_a_minimum_is_an_error(run: Run) -> None:
    part = replace(run, cells=run.cells[:4])
    with pytest.raises(UserError, match="--min aa: after has no aa of digits-ijsat"):
        hold_to_minimums({"aa": 0}, leaderboard(part), "after")
    with pytest.raises(UserError, match="unknown attack of --min in after: 'pdg20'; did you mean 'pgd20'"):
        hold_to_minimums({"pdg20": 0}, leaderboard(run), "after")


@pytest.mark.parametrize("text", ["aa", "aa=", "=4", "aa=x", "aa=-1", "aa=100.1", "aa=nan", "aa=inf", ""])
def test_what_is_no_minimum_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no minimum; give an attack and a percentage"):
        parse_minimums([text])
    with pytest.raises(UserError, match="--min gives aa twice"):
        parse_minimums(["aa=4", "aa=5"])
    assert parse_minimums(["nll-in@8=4", "aa = 5", "aa=5.0"]) == {"nll-in@8": 4.0, "aa": 5.0}


# --------------------------------------------------------------------------------------------------- exit codes
def test_exit_codes(folders: tuple[Path, Path], run: Run, tmp_path: Path) -> None:
    a, b = folders
    own = accuracy(run)
    assert invoke(a, b).exit_code == 1
    assert invoke(b, a).exit_code == 0, "what became better never fails"
    missed = invoke(b, a, "--min", f"clean=0,pgd20={own + 1}")
    assert missed.exit_code == 1
    assert f"digits-ijsat pgd20: {own:.4g} is below the minimum" in missed.output
    assert invoke(b, a, "--min", f"pgd20={own}", "--model", MODEL).exit_code == 0
    for bad in ("pgd21=4", "pgd20=101", "pgd20", ","):
        refused = invoke(a, a, "--min", bad)
        assert (refused.exit_code, refused.output.count("\n")) == (2, 1), refused.output
    assert invoke(a, a, "--attacks", "aa", "--min", "pgd20=0").exit_code == 0, "a minimum is of the whole run"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda run: edited(run, 3, lambda rows: None, hash="1" * 64, engine="robbench engine 99"), "engine"),
        (
            lambda run: edited(
                run, 3, lambda rows: None, hash="1" * 64, attack=attack().model_copy(update={"epsilon": 0.1})
            ),
            "attack spec epsilon 0.2 -> 0.1",
        ),
        (lambda run: replace(run, cells=run.cells[:5]), "digits-ijsat x jsa50: not in B"),
        (lambda run: edited(run, 0, lambda rows: rows.__setitem__("label", 0)), "with another label"),
    ],
)
def test_what_is_not_compared_like_for_like_does_not_pass_silently(
    run: Run, change: object, text: str, tmp_path: Path
) -> None:
    other = change(run)  # type: ignore[operator]
    gaps = compare(run, other).gaps
    assert any(text in gap for gap in gaps), gaps
    a, b = written(run, tmp_path / "a"), written(other, tmp_path / "b")
    found = invoke(a, b)
    assert found.exit_code == 3, found.output
    assert "Not compared like for like" in found.output
    assert invoke(a, b, "--accept-differences").exit_code == 0
    assert compare(run, run).gaps == []


def test_fewer_samples_are_said(run: Run) -> None:
    kept = run.cells[0].rows["sample_id"].iloc[:60].tolist()
    cells = [replace(r, rows=r.rows[r.rows["sample_id"].isin(kept)]) for r in run.cells]
    smaller = replace(run, cells=cells, n=60, sample_ids=tuple(kept))
    assert compare(run, smaller).gaps == ["samples (compared: the 60 of both) 120 -> 60"]


def test_another_seed_model_or_library_is_no_gap(run: Run) -> None:
    cards = {
        name: card.model_copy(update={"weights": card.weights.model_copy(update={"sha256": "9" * 64})})
        for name, card in run.cards.items()
    }
    other = replace(run, seed=4, cards=cards, versions={**run.versions, "torch": "9"})
    diff = compare(run, other)
    assert diff.differences
    assert diff.gaps == []


# ---------------------------------------------------------------------------------------------------- documents
def test_a_job_gets_annotations_of_failures_one_summary_and_junit(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    summary, junit = tmp_path / "summary.md", tmp_path / "diff.xml"
    summary.write_text("before\n")
    found = invoke(
        *folders,
        "--format",
        "github",
        "--junit",
        junit,
        "--min",
        "clean=100",
        GITHUB_STEP_SUMMARY=str(summary),
    )
    assert found.exit_code == 1
    commands = [line for line in found.output.splitlines() if line.startswith("::")]
    assert commands
    assert all(line.startswith("::error title=") for line in commands), "no notice of what does not fail"
    assert any(
        "digits-ijsat pgd20 accuracy: " in line and "20 samples fell, 0 rose" in line for line in commands
    )
    assert sum("minimum accuracy" in line for line in commands) == 2
    text = summary.read_text()
    assert text.startswith("before\n###")
    assert text.count("| verdict | what |") == 1
    assert "| worse | digits-ijsat pgd20 |" in text
    suites = ElementTree.fromstring(junit.read_text())
    failed = {case.get("name") for case in suites.iter("testcase") if case.find("failure") is not None}
    assert {"pgd20 accuracy", "clean minimum accuracy"} <= failed
    assert int(suites.get("failures", "")) == len(suites.findall(".//failure"))
    invoke(*folders, GITHUB_STEP_SUMMARY=str(summary))
    assert summary.read_text() == text, "only of --format github"


def test_markdown_and_json_are_printed_alone(folders: tuple[Path, Path]) -> None:
    printed = invoke(*folders, "--format", "markdown", "--min", "aa=0").output
    kinds = [token.type for token in MarkdownIt("commonmark").enable("table").parse(printed)]
    assert kinds.count("table_open") == 1
    assert kinds[0] == "heading_open"
    content = json.loads(invoke(*folders, "--format", "json", "--min", "aa=0").output)
    assert (content["fell"], content["missed"], len(content["minimums"])) == (True, False, 2)


def test_hostile_names_stay_text(run: Run) -> None:
    name = "m|x]]>\x07<b>`q`"
    rows = frame(60, 0.9, 0.5, 1)
    before, now = (make_run([cell(name, attack(), r)], 60) for r in (rows, rows.assign(robust=False)))
    diff = compare(before, now)
    suites = ElementTree.fromstring(as_junit(f"robbench diff {name}", diff.changes))
    assert suites.findall(".//failure")
    assert "]]>" in suites.find(".//testcase").get("classname")  # type: ignore[union-attr,operator]
    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(diff_markdown(diff))
    inner = {child.type for token in tokens for child in token.children or ()}
    assert inner <= {"text", "text_special"}


def test_only_accuracies_and_bits_gate() -> None:
    """A distance moves, a number without pairs is nobody's fall."""
    moved = Comparison(
        "m", "aa", "l2", Side("ok", 1.0), Side("ok", 9.0), difference=8.0, lower_is_better=True
    )
    from robbench.compare.comparison import judge

    assert [c.verdict for c in judge([moved])] == ["not judged"]
