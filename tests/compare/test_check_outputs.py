"""What a check leaves behind: JSON, JUnit XML, annotations, updated tables; and the command's refusals."""

import csv
import json
from dataclasses import replace
from datetime import date
from pathlib import Path
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from robbench.cli.app import main
from robbench.compare.comparison import Comparison, Side
from robbench.compare.documents import annotations, as_json, as_junit
from robbench.compare.tables import check
from robbench.compare.update import update_tables
from robbench.core.errors import UserError
from robbench.core.terminal import Terminal, print_line
from robbench.report.writers import tidy_csv
from robbench.results.tables import TableRow, leaderboard
from robbench.store.ledger import load_run
from robbench.store.records import Run

MODEL = "digits-ijsat"
ANY_TEXT = st.text(max_size=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of two attacks, with its tables."""
    out = tmp_path_factory.mktemp("run") / "run"
    result = invoked("run", "--model", "digits-at", "--attacks", "fgsm,pgd10", "--n", 20, "--out", out)
    assert result.exit_code == 0, result.output
    return out


def invoked(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def table(path: Path, rows: list[TableRow], **columns: dict[int, str]) -> Path:
    """leaderboard.csv of `rows`; columns: cells by row, the other rows' are empty or stay."""
    lines = list(csv.DictReader(tidy_csv(rows).splitlines()))
    for name, cells in columns.items():
        for number, line in enumerate(lines):
            line[name] = cells.get(number, line.get(name, ""))
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    return path


def stored(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def rows(run: Run) -> list[TableRow]:
    """clean, pgd20, aa and jsa50 of the second model."""
    return [r for r in leaderboard(run) if (r.model, r.metric) == (MODEL, "accuracy")]


@pytest.fixture
def mixed(rows: list[TableRow], tmp_path: Path) -> list[Comparison]:
    """One of each: a pass, a regression, a number that differs without gating, one that is not in the run."""
    reference = table(
        tmp_path / "published.csv",
        [*rows, replace(rows[1], attack="fgsm")],
        value={1: "10", 2: "20"},
        gate={2: "false"},
    )
    return check(rows, reference)


# ------------------------------------------------------------------------------------------------------- JSON
def test_json_says_everything(mixed: list[Comparison]) -> None:
    document = json.loads(as_json(mixed, False, {"run": "r"}))
    assert document["passed"] is False
    assert document["counts"] == {"pass": 2, "fail": 2, "not run": 1, "regressions": 1}
    failed = document["findings"][1]
    assert (failed["group"], failed["name"], failed["gate"], failed["line"]) == (
        MODEL,
        "pgd20 accuracy",
        True,
        3,
    )
    values = failed["values"]
    assert values["difference"] == pytest.approx(values["measured"] - 10)
    assert values["tolerance"] < values["difference"]
    assert values["n"] == values["reference_n"] == 120


def test_json_has_no_nan(mixed: list[Comparison]) -> None:
    broken = replace(mixed[0], a=Side("ok", float("inf")), b=Side("ok", float("nan")))
    (finding,) = json.loads(as_json([broken], True, {}))["findings"]
    assert (finding["values"]["measured"], finding["values"]["reference"]) == (None, None)


# ------------------------------------------------------------------------------------------------------ JUnit
def assert_junit(text: str) -> ElementTree.Element:
    """The structure of the common JUnit schema: counts that add up, and at most one child a case."""
    suites = ElementTree.fromstring(text)
    assert suites.tag == "testsuites"
    for suite in suites:
        assert suite.tag == "testsuite"
        assert suite.attrib.keys() >= {"name", "tests", "failures", "errors", "skipped", "time"}
        cases = list(suite)
        assert {case.tag for case in cases} <= {"testcase"}
        for case in cases:
            assert case.attrib.keys() == {"classname", "name", "time"}
            assert [child.tag for child in case] in ([], ["failure"], ["skipped"])
            assert all("message" in child.attrib for child in case)
        for node in (suites, suite):
            assert int(node.get("tests", "")) == len(cases)
            assert int(node.get("failures", "")) == len(suite.findall("testcase/failure"))
            assert int(node.get("skipped", "")) == len(suite.findall("testcase/skipped"))
            assert int(node.get("errors", "")) == 0
    return suites


def test_junit(mixed: list[Comparison]) -> None:
    suites = assert_junit(as_junit("robbench check run", mixed, ["2 numbers have no reference"]))
    failures = suites.findall(".//failure")
    assert [failure.get("type") for failure in failures] == ["regression", "incomplete"]
    assert "measured" in (failures[0].text or "")
    skipped = [case.get("message", "") for case in suites.findall(".//skipped")]
    assert skipped[0].startswith("differs, does not gate: measured")
    assert skipped[1] == "not in the run"


@given(group=ANY_TEXT, name=ANY_TEXT, reason=ANY_TEXT)
def test_junit_survives_any_text(group: str, name: str, reason: str) -> None:
    reason = reason.encode("utf-8", "replace").decode()  # a lone surrogate has no bytes at all
    found = Comparison(group.encode("utf-8", "replace").decode(), name, "x", verdict="fail", reason=reason)
    assert_junit(as_junit("robbench check run", [found]))


# ----------------------------------------------------------------------------------------------------- GitHub
def test_annotations(mixed: list[Comparison], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error, notice = annotations("robbench check", mixed)
    assert error.startswith(
        f"::error file=published.csv,line=3,title={MODEL} pgd20 accuracy::{MODEL} pgd20 accuracy: "
    )
    assert notice.startswith("::notice file=published.csv,line=4,")
    assert annotations("robbench check", [], ["a\nb"]) == ["::error title=robbench check::a%0Ab"]


def failing(attack: str, reason: str) -> Comparison:
    return Comparison("m", attack, "x", verdict="fail", reason=reason, path=Path("a,b:c.csv"), line=7)


@given(reason=ANY_TEXT, name=ANY_TEXT)
def test_an_annotation_is_one_line_whatever_it_says(reason: str, name: str) -> None:
    (line,) = annotations("robbench check", [failing(name, reason)])
    assert "\n" not in line
    assert "\r" not in line
    properties, _, message = line.removeprefix("::error ").partition("::")
    assert properties.startswith("file=a%2Cb%3Ac.csv,line=7,title=")
    assert properties.count(",") == 2
    decoded = message.replace("%0A", "\n").replace("%0D", "\r").replace("%25", "%")
    assert decoded == f"m {name} x: {reason}"


# ----------------------------------------------------------------------------------------------------- update
def test_update_writes_what_failed_with_its_reason_and_nothing_else(
    rows: list[TableRow], tmp_path: Path
) -> None:
    path = table(
        tmp_path / "own.csv", rows, value={1: "10", 2: "20"}, gate={2: "false"}, tolerance={1: "0.25"}
    )
    before = stored(path)
    changes = update_tables(check(rows, path), "a faster engine, parity in reports/autoattack")
    assert [(change.old.line, change.old.value) for change in changes] == [(3, 10.0)]
    after = stored(path)
    new = float(f"{rows[1].value:.12g}")
    line = f"{date.today().isoformat()}: 10 -> {new}, a faster engine, parity in reports/autoattack"
    assert after[1] == {**before[1], "value": str(new), "history": line}
    assert [{k: v for k, v in row.items() if k != "history"} for row in after[2:]] == before[2:]
    assert check(rows, path)[1].verdict == "pass"
    again = check([replace(row, value=50.0) for row in rows[1:2]], path)
    update_tables(again, "second")
    history = stored(path)[1]["history"]
    assert history == f"{line}; {date.today().isoformat()}: {new} -> 50.0, second"


def test_published_numbers_are_not_updated(rows: list[TableRow], tmp_path: Path) -> None:
    path = table(tmp_path / "paper.csv", rows, value={1: "10", 3: "10"}, source={3: "Table 1"})
    text = path.read_text()
    with pytest.raises(UserError, match=r"line 5: .* is published \(Table 1\) and is not updated"):
        update_tables(check(rows, path), "because")
    assert path.read_text() == text


def test_what_is_not_finite_is_no_new_value(rows: list[TableRow], tmp_path: Path) -> None:
    path = table(tmp_path / "own.csv", rows, tolerance={1: "0.25"})
    text = path.read_text()
    results = check([replace(row, value=float("nan")) for row in rows[1:2]], path)
    assert results[1].verdict == "fail"
    assert update_tables(results, "because") == []
    assert path.read_text() == text


# ---------------------------------------------------------------------------------------------------- command
def test_a_check_that_cannot_be_done_leaves_references_alone(folder: Path, tmp_path: Path) -> None:
    """Neither a sample file nor the first of two tables is written when the second is missing or published."""
    kept, own, paper = tmp_path / "kept.parquet", tmp_path / "own.csv", tmp_path / "paper.csv"
    assert invoked("check", folder, "--write-reference", kept, "--reason", "first").exit_code == 0
    numbers = [row for row in leaderboard(load_run(folder)) if row.metric == "accuracy"]
    table(own, numbers, value={0: "1.5"})
    table(paper, numbers, value={0: "1.5"}, source={0: "Table 1"})
    before = kept.read_bytes(), own.read_text()
    for options in (
        ("--against", tmp_path / "absent.csv", "--write-reference", kept),
        ("--against", own, "--against", paper, "--update"),
        ("--against", own, "--against", kept, "--update"),
    ):
        result = invoked("check", folder, *options, "--reason", "because")
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
        assert (kept.read_bytes(), own.read_text()) == before


def test_machines_learn_that_nothing_was_compared(folder: Path, tmp_path: Path) -> None:
    path, junit = tmp_path / "other.csv", tmp_path / "check.xml"
    path.write_text("dataset,model,attack,metric,value\ndigits,other,pgd20,accuracy,1\n")
    result = invoked("check", folder, "--against", path, "--junit", junit, "--format", "github")
    assert result.exit_code == 1, result.output
    assert "::error title=robbench check::nothing of" in result.output
    assert len(assert_junit(junit.read_text()).findall(".//failure")) == 1


def test_a_line_number_is_no_picture(tmp_path: Path) -> None:
    with (tmp_path / "out.txt").open("w", encoding="utf-8") as stream:
        print_line(Terminal(file=stream), "updated own.csv:100: pgd20")
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == "updated own.csv:100: pgd20\n"


def test_the_command_writes_all_it_was_asked_for(folder: Path, tmp_path: Path) -> None:
    reference = tmp_path / "tables"
    reference.mkdir()
    lines = (folder / "leaderboard.csv").read_text().splitlines()
    column, row = lines[0].split(",").index("value"), lines[1].split(",")
    row[column] = "1.5"
    (reference / "own.csv").write_text("\n".join([lines[0], ",".join(row), *lines[2:]]) + "\n")
    report, junit = tmp_path / "check.json", tmp_path / "check.xml"
    options = ("--against", reference, "--json", report, "--junit", junit, "--format", "github")
    result = invoked("check", folder, *options)
    assert result.exit_code == 1, result.output
    assert "::error file=" in result.output
    assert json.loads(report.read_text())["counts"]["regressions"] == 1
    assert len(assert_junit(junit.read_text()).findall(".//failure")) == 1
    updated = invoked("check", folder, "--against", reference, "--update", "--reason", "measured again")
    assert updated.exit_code == 0, updated.output
    assert "updated" in updated.output
    assert "1.5 -> " in (reference / "own.csv").read_text()
    result = invoked("check", folder, *options, "--tolerance-policy", "exact", "--complete")
    assert result.exit_code == 0, result.output
    assert json.loads(report.read_text())["passed"] is True


def test_the_command_writes_and_reads_reference_runs(folder: Path, tmp_path: Path) -> None:
    path, report = tmp_path / "digits.parquet", tmp_path / "check.json"
    written = invoked("check", folder, "--write-reference", path, "--reason", "first")
    assert written.exit_code == 0, written.output
    assert f"wrote {path}: 2 cells, n = 20" in written.output.replace("\n", "")
    for against in (path, folder):
        result = invoked("check", folder, "--against", against, "--tolerance-policy", "exact", "--complete")
        assert result.exit_code == 0, result.output
        assert "0 fail" in result.output
    both = invoked(
        "check", folder, "--against", path, "--against", folder / "leaderboard.csv", "--json", report
    )
    assert both.exit_code == 0
    assert {finding["path"] for finding in json.loads(report.read_text())["findings"]} == {
        str(path),
        str(folder / "leaderboard.csv"),
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "name one with --against"),
        (["--against", "TABLE", "--update"], 'say why with --reason "TEXT"'),
        (["--write-reference", "x.parquet"], 'say why with --reason "TEXT"'),
        (["--against", "TABLE", "--reason", "none"], "--reason goes with --update or --write-reference"),
        (["--against", "TABLE", "--update", "--reason", "x", "--json", "y"], "run the check again"),
        (["--against", "RUN", "--update", "--reason", "x"], "--update changes tables"),
        (["--write-reference", "x.csv", "--reason", "x"], "a reference run is a Parquet file"),
        (["--against", "GARBAGE"], "cannot be read as Parquet"),
        (["--against", "absent.parquet"], "cannot be read as Parquet"),
        (["--against", "SHARD"], "is Parquet, but no reference run"),
        (["--against", "EMPTY"], "a folder without CSV files"),
        (["--against", "TABLE", "--tolerance", "-1"], "no tolerance"),
        (["--against", "RUN", "--tolerance", "1"], "--tolerance is for tables"),
        (["--write-reference", "x.parquet", "--reason", "x", "--json", "y"], "--json is about a comparison"),
        (
            ["--write-reference", "x.parquet", "--reason", "x", "--complete"],
            "--complete is about a comparison",
        ),
        (["--against", "NO-SAMPLES"], "n -5 is no number of samples"),
        (["--against", "TABLE", "--tolerance-policy", "loose"], "loose"),
    ],
)
def test_wrong_use_is_one_line(
    options: list[str], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "garbage.parquet").write_bytes(b"PAR1 no")
    (tmp_path / "empty").mkdir()
    (tmp_path / "n.csv").write_text("dataset,model,attack,metric,value,n\ndigits,m,a,accuracy,1,-5\n")
    places = {
        "TABLE": folder / "leaderboard.csv",
        "RUN": folder,
        "GARBAGE": tmp_path / "garbage.parquet",
        "SHARD": next(folder.glob("cells/*/shard-*.parquet")),
        "EMPTY": tmp_path / "empty",
        "NO-SAMPLES": tmp_path / "n.csv",
    }
    result = invoked("check", folder, *(places.get(option, option) for option in options))
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert not (tmp_path / "x.parquet").exists()
