"""Downloads are the ledger's numbers, read back by other libraries."""

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from flow_runs import three_flows
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from publish_runs import attack, cell, frame, make_run
from site_pages import Reader, only

from robbench.report.site import board_page, downloads, home, model_page
from robbench.report.site.downloads import ALL, CALLED, EXACT, READABLE, Table, files, latex
from robbench.report.site.groups import site_of
from robbench.results.rows import COLUMNS, WORST_CASE
from robbench.results.tables import leaderboard
from robbench.store.records import Run

pytestmark = pytest.mark.usefixtures("few_tables")


def written(run: Run) -> dict[str, bytes]:
    """The files of a run's group by their names."""
    (group,) = site_of([run]).groups
    return {
        part.path.rpartition("/")[2]: part.content for t in downloads.group_tables(group) for part in files(t)
    }


@pytest.mark.parametrize("ending", EXACT)
def test_the_tidy_leaderboard_is_the_ledger_s(damaged: Run, ending: str) -> None:
    content = written(damaged)[f"leaderboard.{ending}"]
    rows = [[row.cell(name) for name in COLUMNS] for row in leaderboard(damaged)]
    assert read_back(content, ending) == [dict(zip(COLUMNS, row, strict=True)) for row in rows]


def read_back(content: bytes, ending: str) -> list[dict[str, object]]:
    if ending == "parquet":
        return pq.read_table(io.BytesIO(content)).to_pylist()
    if ending == "json":
        return json.loads(content)
    frame = pd.read_csv(io.BytesIO(content), keep_default_na=False, dtype=str)
    floats, counts = ("epsilon", "eta", "value", "lower", "upper"), ("n", "seed", "near_ties")
    return [
        {
            name: (float(text) if text else None) if name in floats else int(text) if name in counts else text
            for name, text in row.items()
        }
        for row in frame.to_dict("records")
    ]


def test_the_wide_leaderboard_has_the_same_numbers(damaged: Run) -> None:
    rows = {(r.model, r.attack): r for r in leaderboard(damaged) if r.metric == "accuracy"}
    for line in csv.DictReader(io.StringIO(written(damaged)["leaderboard-wide.csv"].decode())):
        for label in ("clean", "pgd20", "aa", "jsa50"):
            row = rows[line["model"], label]
            assert line[f"{label}_status"] == row.status
            for name, key in (("value", label), ("lower", f"{label}_lower"), ("upper", f"{label}_upper")):
                number = getattr(row, name)
                assert line[key] == ("" if number is None else repr(number))


def test_a_threat_model_s_worst_case_is_brute_force(run: Run) -> None:
    found = written(run)
    table = pq.read_table(io.BytesIO(found["leaderboard-linf-0.2.parquet"])).to_pylist()
    for line in table:
        cells = [
            r for r in run.cells if r.cell.model == line["model"] and r.cell.attack.threat_model == "linf"
        ]
        held = np.logical_and.reduce([r.rows["robust"].to_numpy() for r in cells])
        assert line["worst case"] == pytest.approx(100 * held.mean(), abs=1e-12)
        assert line["worst case_status"] == "ok"
        assert "jsa50" not in line


def test_a_model_s_table_is_its_part_of_the_leaderboard(run: Run) -> None:
    found = written(run)
    mine = [r for r in leaderboard(run) if r.model == "digits-ijsat"]
    table = pq.read_table(io.BytesIO(found["model-digits-ijsat.parquet"])).to_pylist()
    assert [line["value"] for line in table] == [row.value for row in mine]
    assert any(row.attack == WORST_CASE for row in mine)


def test_likelihoods_are_those_of_the_run() -> None:
    run = three_flows()
    found = written(run)
    table = pq.read_table(io.BytesIO(found["likelihood.parquet"])).to_pylist()
    assert table
    rows = {
        (r.model, r.attack.partition("@")[0], r.epsilon): r
        for r in leaderboard(run)
        if r.metric == "bits_per_dim"
    }
    seen = 0
    for line in table:
        for (model, label, epsilon), row in rows.items():
            mine = (label, epsilon) == (line["attack"], line["epsilon"])
            searched = line["steps"] is not None or not epsilon
            if mine and searched and line[f"{model}_status"] == "ok":
                assert line[model] == row.value
                seen += 1
    assert seen > 3


def test_infinite_numbers_survive() -> None:
    table = Table("x", "x", ("a",), tuple((value,) for value in (math.inf, -math.inf, math.nan, None, 1.5)))
    back = pq.read_table(io.BytesIO(downloads._parquet(table)))["a"].to_pylist()
    assert back[0] == math.inf
    assert back[1] == -math.inf
    assert math.isnan(back[2])
    assert back[3:] == [None, 1.5]
    assert [line["a"] for line in json.loads(downloads._json(table))] == ["inf", "-inf", "nan", None, 1.5]


@pytest.mark.parametrize("ending", ALL)
def test_the_same_table_gives_the_same_bytes(damaged: Run, ending: str) -> None:
    assert written(damaged)[f"leaderboard.{ending}"] == written(damaged)[f"leaderboard.{ending}"]


def markdown_cells(content: bytes) -> list[list[str]]:
    tokens = MarkdownIt("commonmark").enable("table").parse(content.decode())
    lines: list[list[str]] = []
    for position, token in enumerate(tokens):
        if token.type == "tr_open":
            lines.append([])
        elif token.type in ("th_open", "td_open"):
            lines[-1].append("".join(child.content for child in tokens[position + 1].children or []))
    return lines


def test_markdown_and_latex_are_rounded_as_the_page(damaged: Run) -> None:
    found = written(damaged)
    row = next(r for r in leaderboard(damaged) if (r.model, r.attack) == ("digits-ijsat", "pgd20"))
    shown = f"{row.value:.1f} [{row.lower:.1f}, {row.upper:.1f}]"
    header, *lines = markdown_cells(found["leaderboard-wide.md"])
    line = dict(zip(header, next(line for line in lines if line[0] == "digits-ijsat"), strict=True))
    assert line["pgd20"] == shown
    assert line["aa"] == "failed"
    table = latex_cells(found["leaderboard-wide.tex"])
    assert table == [header, *lines]


# ----------------------------------------------------------------------------------------------------------- LaTeX
PRINTED = {
    r"\textbackslash{}": "\\",
    r"\textasciicircum{}": "^",
    r"\textasciitilde{}": "~",
    r"\textless{}": "<",
    r"\textgreater{}": ">",
    r"\textbar{}": "|",
    r"\textquotedbl{}": '"',
    r"\textquotesingle{}": "'",
    r"\textasciigrave{}": "`",
    r"$\varepsilon$": "ε",
    r"$\eta$": "η",
    r"$\pm$": "±",
    r"$\times$": "\u00d7",
    r"\'e": "é",
    "{-}": "-",
    "{}": "",
    **{f"\\{c}": c for c in "&%$#_{}"},
}
TOKEN = re.compile("|".join(map(re.escape, PRINTED)) + r"|[^\\^~<>|\"'`&%$#_{}]", re.DOTALL)


def printed(text: str) -> str:
    """What LaTeX prints for a cell; AssertionError where a character would be a command."""
    parts = TOKEN.findall(text)
    assert "".join(parts) == text
    return "".join(PRINTED.get(part, part) for part in parts)


def latex_cells(content: bytes) -> list[list[str]]:
    lines = [line for line in content.decode().splitlines() if line.endswith(r" \\")]
    return [[printed(part) for part in re.split(r"(?<!\\) & ", line.removesuffix(r" \\"))] for line in lines]


@given(st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp"))))
def test_latex_prints_every_text_as_it_is(text: str) -> None:
    assert printed(latex(text)) == " ".join(text.split())
    assert not latex(text).startswith(("[", "*"))


def test_latex_is_a_table_of_its_own(run: Run) -> None:
    text = written(run)["leaderboard-wide.tex"].decode()
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1
    columns = re.search(r"\\begin\{tabular\}\{([lr]+)\}", text)
    assert columns is not None
    assert {len(line) for line in latex_cells(text.encode())} == {len(columns[1])}
    rules = [line for line in text.splitlines() if re.fullmatch(r"\\(top|mid|bottom)rule", line)]
    assert rules == [r"\toprule", r"\midrule", r"\bottomrule"]


def test_a_long_table_is_one_that_breaks_over_pages(run: Run) -> None:
    assert r"\begin{longtable}" in written(run)["leaderboard.tex"].decode()


# ----------------------------------------------------------------------------------------------------------- counts
def named(models: int, attacks: int = 1) -> Run:
    rows = frame(10, 0.9, 0.5, 1)
    specs = [attack(f"pgd{k}") for k in range(1, attacks + 1)]
    return make_run([cell(f"m{k}", spec, rows) for k in range(models) for spec in specs], 10)


def endings(names: Sequence[str], stem: str) -> set[str]:
    return {name.rpartition(".")[2] for name in names if name.rpartition(".")[0] == stem}


def test_many_models_have_fewer_files() -> None:
    few, many = list(written(named(3))), list(written(named(40)))
    assert endings(few, "model-m1") == set(ALL)
    assert endings(many, "model-m1") == {"csv"}
    assert len(many) < 60


def test_a_table_nobody_can_read_is_no_latex() -> None:
    found = written(named(20, 15))
    assert len(found["leaderboard.csv"].splitlines()) > READABLE
    assert endings(list(found), "leaderboard") == set(EXACT)
    assert endings(list(found), "leaderboard-wide") == set(ALL)


def test_links_of_a_page_lead_to_the_ledger_s_numbers(site: Reader, run: Run) -> None:
    site.build(run, pages=only(board_page, model_page, downloads))
    (group,) = site_of([run]).groups
    expected = written(run)
    for path in (group.board_path(), group.model_path("digits-ijsat")):
        page = site.open(path, downloads=True)
        links = page.eval_on_selector_all("section.downloads a", "links => links.map(link => link.href)")
        assert len(links) >= len(ALL)
        for link in links:
            place = Path(url2pathname(urlsplit(link).path))
            assert place.read_bytes() == expected[place.name]
    with page.expect_download() as caught:
        page.click('section.downloads a[href$="model-digits-ijsat.parquet"]')
    assert Path(caught.value.path()).read_bytes() == expected["model-digits-ijsat.parquet"]


def test_the_single_file_holds_its_downloads(site: Reader, run: Run) -> None:
    site.build(run, single=True, pages=only(home, board_page, downloads))
    (group,) = site_of([run]).groups
    page = site.open(group.board_path(), downloads=True)
    for ending in ("csv", "parquet"):
        with page.expect_download() as caught:
            page.click(f'section.downloads a[aria-label="Every number, one per line, {CALLED[ending]}"]')
        assert Path(caught.value.path()).read_bytes() == written(run)[f"leaderboard.{ending}"]
