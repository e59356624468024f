"""Markdown, CSV, JUnit XML and GitHub annotations: what others wrote into names and notes stays plain text in them."""

import csv
import io
import re
from dataclasses import MISSING, fields
from pathlib import Path
from xml.etree import ElementTree

import hostile
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from robbench.compare.comparison import Comparison
from robbench.compare.documents import annotations, as_json, as_junit
from robbench.compare.reference import read_csv, read_reference
from robbench.compare.update import update_tables
from robbench.core.markdown import bullets, escaped, markdown_table, paragraph
from robbench.core.resources import write_text_atomically
from robbench.core.schema import Strict
from robbench.core.spreadsheet import csv_text, plain_cell
from robbench.experiments.published import read_rows
from robbench.experiments.table import Line, Value, write_comparison
from robbench.report.writers import tidy_csv
from robbench.results.rows import TableRow

ANY = st.text(st.characters(exclude_categories=()), max_size=60)
# Texts of what means something somewhere, which random characters seldom hit.
TAGS = ["&lt;", "&#60;", "http://e", "javascript:", "<img src=x>", "<!--", "](http://e)"]
SYNTAX = st.lists(
    st.sampled_from([*"[]()!<>|`*_~#-+=a :$\\\n\t", "```", "1.", "2)", "    ", "\n\n", *TAGS]),
    max_size=14,
).map("".join)
PLAIN = {"inline", "text", "paragraph_open", "paragraph_close", "text_special"}
TABLE = {
    f"{part}_{end}" for part in ("table", "thead", "tbody", "tr", "th", "td") for end in ("open", "close")
}
LIST = {"bullet_list_open", "bullet_list_close", "list_item_open", "list_item_close"}


def tokens(text: str) -> list[Token]:
    """Tokens as a CommonMark parser that is not robbench's finds them, raw HTML and tables on."""
    found = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(text)
    return [part for token in found for part in (token, *(token.children or ()))]


def kinds(text: str) -> set[str]:
    return {token.type for token in tokens(text)}


def shown(text: str) -> str:
    """The text that a reader sees."""
    return "".join(token.content for token in tokens(text) if token.type in ("text", "text_special"))


# ------------------------------------------------------------------------------------------------------ Markdown
@given(ANY | SYNTAX)
def test_a_paragraph_is_plain_text(text: str) -> None:
    assert kinds(paragraph(text)) <= PLAIN
    if text.isprintable() and text.strip():
        assert shown(paragraph(text)) == " ".join(text.split())


@given(st.lists(ANY | SYNTAX, min_size=1, max_size=3))
def test_a_list_is_a_list_of_plain_texts(texts: list[str]) -> None:
    text = bullets(texts)
    assert kinds(text) <= PLAIN | LIST
    assert sum(token.type == "list_item_open" for token in tokens(text)) == len(texts)


@given(st.lists(st.tuples(ANY | SYNTAX, ANY | SYNTAX), min_size=1, max_size=3))
def test_a_table_keeps_its_cells(lines: list[tuple[str, str]]) -> None:
    text = markdown_table(["model", "note"], lines)
    assert kinds(text) <= PLAIN | TABLE
    assert sum(token.type == "td_open" for token in tokens(text)) == 2 * len(lines)


@given(ANY | SYNTAX)
def test_two_texts_make_nothing_together(text: str) -> None:
    """A definition in one place would make links of brackets in another."""
    document = (
        f"# {escaped(text)}\n\n{paragraph(text)} (see [52.0, 62.3] and [a])\n\n{bullets([text, text])}\n"
    )
    assert not kinds(document) & {
        "link_open",
        "image",
        "html_inline",
        "html_block",
        "fence",
        "code_block",
        "hr",
    }


@pytest.mark.parametrize(
    "text", ["57.2 [52.0, 62.3]", "-0.5", "digits-at", "8/255 (linf)", "a + b", "n = 360"]
)
def test_what_tables_say_stays_as_it_is(text: str) -> None:
    assert escaped(text) == text


def test_the_comparison_of_an_experiment(tmp_path: Path) -> None:
    line = Line(
        row=hostile.ALL,
        column=hostile.HTML,
        published=-0.5,
        measured=Value(-1.25, n=3),
        verdict="not compared",
        unit="%",
        note=hostile.ALL,
        printed="-0.5",
        differs=False,
    )
    table, text = write_comparison(tmp_path, hostile.ALL, [hostile.ALL], [line])
    document = text.read_text(encoding="utf-8")
    assert kinds(document) <= PLAIN | TABLE | LIST | {"heading_open", "heading_close"}
    assert not hostile.steering(document)
    [row] = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"), newline=""))
    assert (row["published"], row["measured"]) == ("-0.5", "-1.25")


# ----------------------------------------------------------------------------------------------------------- CSV
FORMULAS = [
    "=1+1",
    "+1+1",
    "-1+1",
    "@SUM(A1)",
    "\t=1+1",
    "\r=1+1",
    "\n=1+1",
    hostile.FORMULA,
    "=cmd|' /C calc'!A0",
    "'=1+1",
    "''=1+1",
    "-",
]
NUMBERS = ["-0.5", "+3", "-1e-05", "-inf", "-.5", "0"]


def is_formula(cell: str) -> bool:
    """Whether a spreadsheet computes a cell (OWASP, "CSV Injection"); a number is none."""
    try:
        float(cell)
    except ValueError:
        return cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    return False


def cells(text: str, delimiter: str = ",") -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter))


@pytest.mark.parametrize("text", FORMULAS)
def test_a_formula_is_text(text: str) -> None:
    [[cell]] = cells(csv_text([[text]]))
    assert not is_formula(cell)
    assert cell == "'" + text
    assert plain_cell(cell) == text


@pytest.mark.parametrize("text", NUMBERS)
def test_a_number_stays_a_number(text: str) -> None:
    assert csv_text([[text, float(text)]]) == f"{text},{float(text)!r}\n"


@given(
    st.lists(
        st.lists(ANY | SYNTAX | st.sampled_from(FORMULAS), min_size=1, max_size=4), min_size=1, max_size=3
    )
)
def test_what_was_written_comes_back(lines: list[list[str]]) -> None:
    read = cells(csv_text(lines))
    assert [[plain_cell(cell) for cell in line] for line in read] == lines
    assert not any(is_formula(cell) for line in read for cell in line)


@given(st.lists(ANY | st.sampled_from([f"note; {text}" for text in FORMULAS]), min_size=2, max_size=4))
def test_another_list_separator_finds_no_formula(line: list[str]) -> None:
    """Where the decimal sign is a comma, spreadsheets split at semicolons."""
    cell = csv_text([line]).split(";")
    assert '"' in csv_text([line]) or not any(is_formula(part.strip()) for part in cell[1:])


def row(**changes: object) -> TableRow:
    values = {f.name: "" for f in fields(TableRow) if f.default is MISSING} | {
        "n": 100,
        "seed": 0,
        "epsilon": 0.1,
        "eta": None,
        "status": "ok",
    }
    values |= {"dataset": "digits", "model": "m", "attack": "pgd20", "metric": "bits_per_dim_after"}
    return TableRow(**values | {"value": -0.5, "lower": -1.0, "upper": 0.25} | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["=1+1", "@SUM(A1)", "-x", "+x", "'=1", hostile.ALL.replace("\r", "")])
def test_a_table_that_check_reads_says_what_was_measured(text: str, tmp_path: Path) -> None:
    written = row(dataset=text, model=text, defense=text, scope=text)
    write_text_atomically(tmp_path / "table.csv", tidy_csv([written]))
    [read] = read_reference(tmp_path / "table.csv")
    assert (read.dataset, read.model, read.scope) == (text.strip(), text.strip(), text.strip())
    assert (read.value, read.lower, read.upper, read.n) == (-0.5, -1.0, 0.25, 100)
    header, lines = read_csv(tmp_path / "table.csv")
    write_text_atomically(tmp_path / "again.csv", csv_text([header, *(cells for _, cells in lines)]))
    assert read_csv(tmp_path / "again.csv") == (header, lines)
    assert update_tables([], "no change") == []


def test_published_tables_are_read_the_same_way(tmp_path: Path) -> None:
    class Row(Strict):
        name: str
        value: float

    write_text_atomically(tmp_path / "table.csv", csv_text([["name", "value"], ["=x", -0.5], ["-y", "-1"]]))
    assert read_rows(tmp_path / "table.csv", Row) == [Row(name="=x", value=-0.5), Row(name="-y", value=-1)]


def test_half_a_character_is_written_escaped(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "table.csv", csv_text([[hostile.HALF]]))
    assert (tmp_path / "table.csv").read_text(encoding="utf-8") == "\\ud800 \\udcff\n"


# ------------------------------------------------------------------------------------------- annotations, JUnit
def finding(text: str) -> Comparison:
    path = Path(text.replace("\0", ""))
    path = Path("x") if path == Path() else path
    return Comparison(text, text, text, verdict="fail", reason=text, threat_model=text, path=path, line=3)


@given(ANY | st.sampled_from([hostile.ALL, "%0A::error::x", "a\n::stop-commands::x", "x,line=1::y"]))
def test_an_annotation_is_one_command(text: str) -> None:
    """As GitHub's runner reads it: "::NAME KEY=VALUE,...::MESSAGE", a line each, with %25, %0A, %0D, %3A, %2C."""
    [line, problem] = annotations(text, [finding(text)], [text])
    for command in (line, problem):
        assert "\n" not in command
        assert "\r" not in command
    found = re.fullmatch(r"::error file=([^:,]*),line=3,title=([^:,]*)::(.*)", line, re.DOTALL)
    assert found is not None
    plain = found[3].replace("%0A", "\n").replace("%0D", "\r").replace("%25", "%")
    assert plain == f"{text} {text} {text}: {text}"


@given(ANY)
def test_junit_is_xml_whatever_is_in_it(text: str) -> None:
    document = as_junit(f"robbench check {text}", [finding(text)], [text])
    write = document.encode("utf-8", errors="backslashreplace")
    suites = ElementTree.fromstring(write)
    assert len(suites.findall(".//failure")) == 2
    assert "passed" in as_json([finding(text)], False, {})
