"""A worst case or average over fewer attacks than the rest of its table is "partial" wherever it is shown, and never
stands above a complete one."""

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from publish_runs import JSA, attack, cell, frame, make_run
from rich.console import Console

from robbench.compare.comparison import Comparison
from robbench.compare.reference import read_reference
from robbench.compare.tables import check
from robbench.core.spreadsheet import csv_text
from robbench.experiments.comparison import Known, compare, measured_rows
from robbench.experiments.published import published_index, published_table, table_rows
from robbench.report.badge import badge_json, badge_of, badge_svg
from robbench.report.mlflow_export import model_exports
from robbench.report.site.boards import boards
from robbench.report.site.build import run_page
from robbench.report.site.compare_page import _Comparison
from robbench.report.site.downloads import tables_by_page
from robbench.report.site.groups import Group
from robbench.report.writers import TerminalLeaderboard, markdown, tidy_csv, wide_csv
from robbench.results.rows import COLUMNS, TableRow
from robbench.results.tables import leaderboard, wide
from robbench.store.records import Run

FGSM, PGD = attack("fgsm"), attack("pgd20")
COMBINED = ("worst case", "average")


def run_of(attacks: dict[str, tuple[object, ...]], n: int = 60) -> Run:
    """A run in which each model was run under its own attacks; the first letters sort first, and hold best."""
    cells = [
        cell(name, spec, frame(n, 1.0, 0.95 if name.startswith("a") else 0.4, k))  # type: ignore[arg-type]
        for name, specs in attacks.items()
        for k, spec in enumerate(specs)
    ]
    return make_run(cells, n)


@pytest.fixture
def mixed() -> Run:
    """ "a-part", run first and under one easy attack, and two models under all three."""
    return run_of({"a-part": (FGSM,), "b-whole": (FGSM, PGD, JSA), "c-whole": (FGSM, PGD, JSA)})


def combined_rows(run: Run, model: str) -> list[TableRow]:
    return [row for row in leaderboard(run) if row.model == model and row.combined]


# ------------------------------------------------------------------------------------------------------ rows
def test_partial_numbers_say_what_they_lack(mixed: Run) -> None:
    found = {(row.attack, row.threat_model): row for row in combined_rows(mixed, "a-part")}
    assert {key: row.status for key, row in found.items()} == {
        ("worst-case", "linf"): "partial",
        ("worst-case", "all"): "partial",
        ("average", "all"): "partial",
    }
    worst, average = found["worst-case", "all"], found["average", "all"]
    assert worst.missing == average.missing == ("pgd20", "jsa50")
    assert found["worst-case", "linf"].missing == ("pgd20",)
    assert (worst.combined, average.combined) == (("fgsm",), ("clean", "fgsm"))
    assert worst.note == "over fgsm; not run: pgd20, jsa50"
    assert {row.status for row in combined_rows(mixed, "b-whole")} == {"ok"}


@settings(max_examples=40)
@given(
    st.lists(st.sets(st.sampled_from([FGSM.label, PGD.label, JSA.label]), min_size=1), min_size=1, max_size=4)
)
def test_partial_is_exactly_what_lacks_an_attack_of_another_model(chosen: list[set[str]]) -> None:
    specs = {spec.label: spec for spec in (FGSM, PGD, JSA)}
    run = run_of(
        {f"m{k}": tuple(specs[label] for label in sorted(some)) for k, some in enumerate(chosen)}, 12
    )
    everything = set().union(*chosen)
    for k, some in enumerate(chosen):
        of_all = [row for row in combined_rows(run, f"m{k}") if row.threat_model == "all"]
        assert {row.status for row in of_all} == {"ok" if some == everything else "partial"}
        assert {frozenset(row.missing) for row in of_all} == {frozenset(everything - some)}
    order = [name for name, _ in wide(leaderboard(run)).models]
    whole = [chosen[int(name[1:])] == everything for name in order]
    assert whole == sorted(whole, reverse=True), "partial models stand below complete ones"


def test_a_file_says_what_is_combined(mixed: Run, tmp_path: Path) -> None:
    rows = leaderboard(mixed)
    (tmp_path / "table.csv").write_text(tidy_csv(rows))
    read = read_reference(tmp_path / "table.csv")
    assert [reference.combined for reference in read] == [frozenset(row.combined) for row in rows]
    assert any(reference.combined for reference in read)


def test_combined_numbers_of_a_table_without_the_column_are_not_compared(mixed: Run, tmp_path: Path) -> None:
    """Tables of before the column: what a number combines stood in its note, in words."""
    (tmp_path / "table.csv").write_text(tidy_csv(leaderboard(mixed)))
    lines = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    for line in lines:
        del line["combined"]
    (tmp_path / "table.csv").write_text(csv_text([list(lines[0]), *(list(line.values()) for line in lines)]))
    for result in check(mixed, tmp_path / "table.csv"):
        if result.a.attack in ("worst-case", "average") and result.a.value is not None:
            assert (result.verdict, "does not say which attacks" in result.reason) == ("not run", True)


# --------------------------------------------------------------------------------------------------- outputs
def status_of(text: str, column: str) -> dict[str, str]:
    return {line["model"]: line[f"{column}_status"] for line in csv.DictReader(io.StringIO(text))}


def test_csv_files_have_the_status_and_the_order(mixed: Run) -> None:
    rows = leaderboard(mixed)
    text = wide_csv(wide(rows))
    for column in COMBINED:
        assert status_of(text, column) == {"b-whole": "ok", "c-whole": "ok", "a-part": "partial"}
    assert list(status_of(text, "average")) == ["b-whole", "c-whole", "a-part"]
    tidy = [line for line in csv.DictReader(io.StringIO(tidy_csv(rows))) if line["status"] == "partial"]
    assert {(line["model"], line["attack"]) for line in tidy} == {
        ("a-part", "worst-case"),
        ("a-part", "average"),
    }
    assert all(float(line["value"]) > 0 and line["note"].startswith("over ") for line in tidy)
    assert list(csv.DictReader(io.StringIO(tidy_csv(rows))).fieldnames or ()) == list(COLUMNS)


def test_markdown_and_terminal_mark_it(mixed: Run) -> None:
    lines = markdown(mixed, leaderboard(mixed)).splitlines()
    names = [
        line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith(("| a-", "| b-", "| c-"))
    ]
    assert names[:3] == ["b-whole", "c-whole", "a-part"]
    (part,) = [line for line in lines if line.startswith("| a-part | standard")]
    assert part.count("partial: ") == 3, "worst case of linf, of all, average"
    note = "* a-part, worst case and average: partial, over 1 of 3 attacks; not run: pgd20, jsa50"
    assert note in lines
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(TerminalLeaderboard(mixed))
    shown = console.export_text()
    assert "partial: " in shown
    assert "a-part, worst case and average: partial, over 1 of 3 attacks" in shown


def test_the_page_of_a_run_marks_it_and_sorts_it_below(mixed: Run) -> None:
    page = run_page(mixed)
    board = re.findall(r'<table class="sortable board".*?</table>', page, re.DOTALL)[0]
    headers = re.findall(r"<th scope=\"col\"[^>]*>(.*?)</th>", board)
    lines = re.findall(r'<tr><th scope="row"><a href="#/([^"]*)">(.*?)</a>(.*?)</tr>', board, re.DOTALL)
    assert [name for _, name, _ in lines] == ["b-whole", "c-whole", "a-part"]
    assert all(f'<template data-path="{path}" data-title="{name}" ' in page for path, name, _ in lines)
    cells = {name: re.findall(r"<td.*?</td>", rest, re.DOTALL) for _, name, rest in lines}
    for column in COMBINED:
        place = headers.index(column) - 1
        orders = {name: re.findall('data-order="(.*?)"', found[place])[0] for name, found in cells.items()}
        assert orders.pop("a-part") == "", "sorts below every number"
        assert all(float(order) >= 0 for order in orders.values())
        assert "partial:" in cells["a-part"][place]


def test_boards_and_downloads_of_a_site(mixed: Run) -> None:
    group = Group("g", "digits", mixed, (mixed,))
    for board in boards(group):
        if "joint" in board.title or board.accuracies is None:
            continue  # the model was not run under it at all; likelihoods are not combined
        (table,) = board.tables
        keys = [column.key for column in table.columns]
        last = table.lines[-1]
        assert last[0].text == "a-part"
        for name in COMBINED:
            assert (last[keys.index(name)].kind, last[keys.index(name)].place) == ("partial", None)
    for tables in tables_by_page(group).values():
        for table in tables:
            if not table.path.endswith(("leaderboard-wide", "leaderboard-linf-0-2", "leaderboard-linf-0.2")):
                continue
            place = table.columns.index("worst case_status")
            assert {line[0]: line[place] for line in table.lines}["a-part"] == "partial"
            assert table.lines[-1][0] == "a-part"
            assert table.read is not None
            assert any(text.startswith("partial: ") for text in table.read[1][-1])


def test_two_models_are_not_compared_on_worst_cases_over_other_attacks(mixed: Run) -> None:
    group = Group("g", "digits", mixed, (mixed,))
    entries = {entry.name: entry.verdicts for entry in _Comparison(group, [group]).models}
    assert "worst case" in entries["b-whole"]
    assert {key for key in entries["a-part"] if key.startswith("worst")} == set()
    assert {"clean", "fgsm"} <= set(entries["a-part"])


def test_mlflow_has_no_metric_that_would_be_ranked(mixed: Run) -> None:
    exports = {export.name: export for export in model_exports(mixed)}
    part, whole = exports["a-part"], exports["b-whole"]
    assert not [name for name in part.metrics if name.startswith(("worst_case_accuracy", "average_accuracy"))]
    assert "worst_case_accuracy/all" in whole.metrics
    value = next(row.value for row in combined_rows(mixed, "a-part") if row.threat_model == "all")
    assert f"all: {value:.1f} %: over fgsm; not run: pgd20, jsa50" in part.tags["robbench.partial"]
    assert whole.tags["robbench.partial"] == ""


def test_a_badge_says_it(mixed: Run) -> None:
    for name in ("worst-case", "average"):
        badge = badge_of(mixed, "a-part", name)
        assert badge.message.endswith("% (partial)")
        assert "partial, over 1 of 3 attacks; not run: pgd20, jsa50" in badge.title
        assert badge_json(badge)["message"] == badge.message
        assert "(partial)" in "".join(ElementTree.fromstring(badge_svg(badge)).itertext())
    assert "partial" not in badge_of(mixed, "b-whole", "worst-case").message


# ------------------------------------------------------------------------------------------- comparing partial ones
def is_combined(result: Comparison) -> bool:
    return result.a.attack in ("worst-case", "average")


def test_check_compares_a_partial_number_with_one_over_the_same_attacks_only(
    mixed: Run, tmp_path: Path
) -> None:
    alone = run_of({"a-part": (FGSM,)})
    reference = tmp_path / "reference.csv"
    reference.write_text(tidy_csv(leaderboard(alone)), encoding="utf-8")
    found = {(r.a.attack, r.a.threat_model): r for r in check(mixed, reference) if r.a.combined}
    assert {r.verdict for r in found.values()} == {"pass"}
    reference.write_text(tidy_csv(leaderboard(mixed)), encoding="utf-8")
    again = [r for r in check(mixed, reference) if is_combined(r)]
    assert {r.verdict for r in again} == {"pass"}
    assert all(r.a.value is not None for r in again), "a partial row of a reference holds a number"
    more = run_of({"a-part": (FGSM, PGD)})
    judged = [r for r in check(more, reference) if is_combined(r) and r.a.model == "a-part"]
    assert {r.verdict for r in judged} == {"not run"}, "over other attacks it is another quantity"


def test_a_published_average_over_fewer_attacks_is_that_average(mixed: Run) -> None:
    (row,) = [
        r
        for r in table_rows(published_table("ijsat-table1", published_index()))
        if r.row == "AT [PGD-5]" and r.column == "PGD-20"
    ]
    average = {"attack": "average", "metric": "average_accuracy", "epsilon": None, "steps": None}
    setting = {
        "dataset": "digits",
        "architecture": "small-cnn",
        "defense": "standard",
        "defense_parameters": "",
    }
    unknown = {"train_samples": None, "epochs": None, "combines": ("clean", "fgsm")}
    row = row.model_copy(update={**average, **setting, **unknown})
    known = Known({"fgsm", "pgd20", "jsa50"}, {"standard"}, {"digits"})
    parts = [
        row.model_copy(update={"attack": name, "metric": "accuracy", "combines": ()})
        for name in ("clean", "fgsm", "pgd20")
    ]
    found = compare([row, *parts], measured_rows(mixed), known)[0]
    assert found.measured is not None
    assert (found.measured.row.model, found.measured.row.status) == ("a-part", "partial")
    other = compare(
        [row.model_copy(update={"combines": ("clean", "pgd20")}), *parts], measured_rows(mixed), known
    )[0]
    assert other.verdict == "not run"


def test_json_downloads_carry_the_status(mixed: Run) -> None:
    from robbench.report.site.downloads import files

    group = Group("g", "digits", mixed, (mixed,))
    wanted = [
        t for tables in tables_by_page(group).values() for t in tables if t.path.endswith("leaderboard")
    ]
    (text,) = [f.content for table in wanted for f in files(table) if f.path.endswith("leaderboard.json")]
    rows = [row for row in json.loads(text) if row["model"] == "a-part" and row["attack"] == "average"]
    assert [row["status"] for row in rows] == ["partial"]
    assert np.isfinite(rows[0]["value"])


def test_a_failed_attack_is_no_partial_number(mixed: Run) -> None:
    broken = [
        replace(r, cell=r.cell.model_copy(update={"status": "failed", "error": "boom"}))
        if (r.cell.model, r.cell.attack.label) == ("b-whole", "jsa50")
        else r
        for r in mixed.cells
    ]
    rows = combined_rows(replace(mixed, cells=broken), "b-whole")
    assert {(row.attack, row.threat_model) for row in rows} == {("worst-case", "linf")}
    found = [
        r for r in leaderboard(replace(mixed, cells=broken)) if r.model == "b-whole" and r.attack == "average"
    ]
    assert [(row.status, row.value) for row in found] == [("failed", None)]


def test_a_perturbation_is_missing_from_averages_only() -> None:
    """No worst case is over it, so none lacks it; an average shows its column."""
    random_latent = attack("r-la", "latent", semantics="perturbation")
    rows = leaderboard(run_of({"a-part": (FGSM,), "b-whole": (FGSM, random_latent)}))
    found = {(row.model, row.attack, row.threat_model): row for row in rows if row.combined}
    assert found["a-part", "worst-case", "all"].status == "ok"
    assert found["a-part", "worst-case", "all"].combined == ("fgsm",)
    assert found["b-whole", "worst-case", "all"].combined == ("fgsm",)
    average = found["a-part", "average", "all"]
    assert (average.status, average.missing) == ("partial", ("r-la",))
    assert found["b-whole", "average", "all"].combined == ("clean", "fgsm", "r-la")


def test_check_compares_a_mean_with_one_over_as_many_samples_only(tmp_path: Path) -> None:
    run = run_of({"a-part": (FGSM,)})
    text, reference = tidy_csv(leaderboard(run)), tmp_path / "reference.csv"
    (broken,) = {r.scope for r in leaderboard(run) if "attack broke" in r.scope}

    def verdicts(scope: str) -> set[str]:
        reference.write_text(text.replace(broken, scope), encoding="utf-8")
        return {r.verdict for r in check(run, reference) if "attack broke" in r.a.scope}

    assert verdicts(broken) == {"pass"}
    assert verdicts("over the 59 samples that the attack broke") == {"not run"}
