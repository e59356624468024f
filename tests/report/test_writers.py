"""Files and terminal: what they say is the leaderboard, whatever the names and the width."""

import csv
import io
import re
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from publish_runs import attack, cell, frame, make_run
from rich.console import Console

from robbench.compare.reference import round_number
from robbench.report.files import write_tables
from robbench.report.writers import markdown, terminal_table, tidy_csv, wide_csv
from robbench.results.tables import COLUMNS, leaderboard, wide
from robbench.store.records import Run

EVIL = 'm|x" <b>*a*</b>, \\ `q`'


@pytest.fixture
def evil() -> Run:
    return make_run([cell(EVIL, attack(), frame(30, 0.9, 0.5, 1))], 30)


def test_tidy_csv_reads_back(damaged: Run) -> None:
    rows = leaderboard(damaged)
    back = pd.read_csv(io.StringIO(tidy_csv(rows)), keep_default_na=False, na_values=[""])
    assert tuple(back.columns) == COLUMNS
    assert len(back) == len(rows)
    for name in ("value", "lower", "upper", "epsilon", "eta"):
        expected = np.array([getattr(row, name) for row in rows], dtype=float)
        exact = name in ("epsilon", "eta")
        np.testing.assert_allclose(back[name].to_numpy(dtype=float), expected, rtol=1e-15 if exact else 1e-11)
    for name in ("model", "attack", "metric", "status", "model_sha256", "note"):
        assert back[name].fillna("").tolist() == [getattr(row, name) for row in rows]
    assert back.loc[back["status"] != "ok", "value"].isna().all()


@given(n=st.integers(1, 10_000), share=st.floats(0, 1))
def test_a_share_is_written_as_anyone_writes_it(n: int, share: float) -> None:
    """571 of 1000 are 57.1, not 57.099999999999994."""
    right = round(share * n)
    row = replace(ROW, value=100 * (right / n), lower=None, upper=None)
    (line,) = csv.DictReader(io.StringIO(tidy_csv([row])))
    decimal = Decimal(100 * right) / n
    assert abs(Decimal(line["value"]) - decimal) <= abs(decimal) * Decimal("5e-12")
    if n in (10, 100, 1000, 10_000):
        assert Decimal(line["value"]) == decimal
        assert len(line["value"]) <= 6


ROW = leaderboard(make_run([cell("m", attack(), frame(30, 0.9, 0.5, 1))], 30))[0]


def test_wide_csv_has_the_tidy_numbers(damaged: Run) -> None:
    rows = leaderboard(damaged)
    lines = list(csv.DictReader(io.StringIO(wide_csv(wide(rows)))))
    assert [line["model"] for line in lines] == ["digits-standard", "digits-ijsat"]
    for row in rows:
        if row.metric != "accuracy":
            continue
        line = next(line for line in lines if line["model"] == row.model)
        assert line[f"{row.attack}_status"] == row.status
        assert line[row.attack] == ("" if row.value is None else repr(round_number(row.value)))
        assert line[f"{row.attack}_upper"] == ("" if row.upper is None else repr(round_number(row.upper)))


def parsed_tables(text: str) -> list[list[list[str]]]:
    """Tables of a Markdown text as rows of cells' plain texts, by an independent parser."""
    tables: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    for position, token in enumerate(tokens):
        if token.type == "table_open":
            tables.append([])
        elif token.type == "tr_open":
            tables[-1].append([])
        elif token.type in ("th_open", "td_open"):
            children = tokens[position + 1].children or []
            assert {child.type for child in children} <= {"text", "text_special"}
            tables[-1][-1].append("".join(child.content for child in children))
    return tables


def test_markdown_is_tables_with_the_numbers(damaged: Run) -> None:
    board, details, sizes = parsed_tables(markdown(damaged, leaderboard(damaged)))
    header = ["model", "defense", "clean", "pgd20", "aa", "jsa50", "worst linf", "worst case", "average"]
    assert board[0] == header
    assert {len(line) for line in board} == {len(header)}
    row = next(r for r in leaderboard(damaged) if (r.model, r.attack) == ("digits-ijsat", "pgd20"))
    assert board[2][3] == f"{row.value:.1f} [{row.lower:.1f}, {row.upper:.1f}]"
    assert board[2][4] == "failed"
    assert board[1][5] == "not run"
    done = [
        ("digits-standard", "pgd20"),
        ("digits-standard", "aa"),
        ("digits-ijsat", "pgd20"),
        ("digits-ijsat", "jsa50"),
    ]
    assert [(line[0], line[1]) for line in details[1:]] == done
    assert details[1][4].split(" [")[0].endswith("*")
    assert [line[2].split()[0] for line in sizes[1:5]] == ["attacked", "broken", "attacked", "broken"]
    assert {line[5] for line in sizes[1:] if line[2].startswith("attacked")} == {"not run [1]"}


def test_markdown_keeps_names_in_their_cells(evil: Run) -> None:
    board, _, _ = parsed_tables(markdown(evil, leaderboard(evil)))
    assert board[1][0] == EVIL


def test_same_run_same_bytes(run: Run, tmp_path: Path) -> None:
    first = write_tables(run, tmp_path / "a")
    second = write_tables(run, tmp_path / "b")
    assert list(first) == ["csv", "wide", "markdown", "html"]
    for kind in first:
        assert first[kind].read_bytes() == second[kind].read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in first.values())


def printed(run: Run, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), legacy_windows=False)
    console.print(terminal_table(run))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_terminal_shows_values_with_intervals_on_one_line_where_it_fits(run: Run) -> None:
    text = printed(run, 160)
    row = next(r for r in leaderboard(run) if (r.model, r.attack) == ("digits-ijsat", "aa"))
    line = next(line for line in text.splitlines() if line.startswith("digits-ijsat"))
    assert f"{row.value:.1f} [{row.lower:.1f}, {row.upper:.1f}]" in line
    assert len(re.findall(r"\[[\d.]+, [\d.]+\]", line)) == 6
    assert "n = 120" in text


@pytest.mark.parametrize("width", [1, 5, 12, 40, 80, 100, 160])
def test_terminal_never_exceeds_its_width(damaged: Run, width: int) -> None:
    assert max(len(line) for line in printed(damaged, width).splitlines()) <= width


def test_terminal_of_80_columns_holds_one_table_with_all_numbers(run: Run) -> None:
    text = printed(run, 80)
    assert text.count("model ") == 1
    for row in leaderboard(run):
        if row.metric == "accuracy":
            assert f"{row.value:.1f}" in text
            assert f"{row.lower:.1f}-{row.upper:.1f}" in text


def test_terminal_takes_names_as_text() -> None:
    run = make_run([cell("[red]x[/red]", attack(), frame(30, 0.9, 0.5, 1))], 30)
    assert "[red]x[/red]" in printed(run, 160)


def test_terminal_says_why_a_cell_failed(damaged: Run) -> None:
    assert "digits-ijsat, aa, accuracy: failed (attack 'aa' left its set" in printed(damaged, 160)
