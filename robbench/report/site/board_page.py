"""Leaderboard pages: models by attacks, for each group and each of its threat models."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from markupsafe import Markup

from robbench.report.attack_lines import budget_text
from robbench.report.data_card import data_card
from robbench.report.site import downloads
from robbench.report.site.boards import Board, Cell, Table, boards
from robbench.report.site.frame import body
from robbench.report.site.groups import Group, Site
from robbench.report.site.page import Page, Part
from robbench.report.site.provenance import provenance
from robbench.report.site.ranks import EXPLANATION
from robbench.report.templating import environment
from robbench.results import corruptions
from robbench.results.wording import summary

PLAIN_ROWS, PLAIN_CELLS = 400, 40_000  # a table beyond either is paged, its rows in a JSON island
PAGE_SIZE = 50
NOTES = 200  # notes on single numbers that a page prints; all are in leaderboard.csv


@dataclass(frozen=True)
class Rendered:
    """A table as HTML.

    Attributes:
        number: of the table on its page, from 1.
        table: what is shown.
        rows: cells of the rows in the document.
        island: all rows as JSON, "" where these are all.
        notes: on single numbers, as far as the page prints them.
        more_notes: how many it leaves out.
    """

    number: int
    table: Table
    rows: tuple[tuple[Markup, ...], ...]
    island: Markup
    notes: tuple[str, ...]
    more_notes: int

    @property
    def hidden(self) -> list[tuple[int, int]]:
        spans: list[tuple[int, int]] = []
        for place, column in enumerate(self.table.columns, 1):
            if not column.shown:
                grows = spans and spans[-1][1] == place - 1
                spans[-1:] = [(spans[-1][0], place)] if grows else [*spans[-1:], (place, place)]
        return spans

    @property
    def ranked(self) -> bool:
        return any(cell.kind == "rank" for line in self.table.lines for cell in line)


def parts(site: Site) -> Iterator[Part]:
    """The leaderboards of all groups."""
    for group in site.groups:
        files = downloads.tables_by_page(group)
        found = boards(group)
        for board in found:
            yield page(group, board, found, downloads.section(files.get(board.path, [])))


def page(group: Group, board: Board, boards: Sequence[Board], files: str = "") -> Page:
    """The page of one of the `boards` of a group. files: what it says of its downloads."""
    is_first = board is boards[0]
    run = group.run
    content = body(
        "board.html.j2",
        group=group,
        board=board,
        boards=boards,
        run=run,
        summary=summary(run),
        tables=[rendered(table, number) for number, table in enumerate(board.tables, 1)],
        ranks=EXPLANATION,
        page_size=PAGE_SIZE,
        budget_text=budget_text,
        downloads=files,
        data_card=data_card(run.data) if run.data else None,
        corruption_header=corruptions.HEADER,
        corruption_caption=corruptions.CAPTION,
    )
    return Page(
        path=board.path,
        title=f"Robustness on {group.title}" if is_first else f"{board.title}: {group.title}",
        kind="board",
        body=content,
        crumbs=() if is_first else ((group.title, boards[0].path),),
        provenance=provenance(group, board.results),
    )


# ----------------------------------------------------------------------------------------------------- tables
def rendered(table: Table, number: int = 1) -> Rendered:
    """A table's rows as HTML; of one that is too large the first `PAGE_SIZE`, and all as JSON."""
    large = len(table.lines) > PLAIN_ROWS or len(table.lines) * len(table.columns) > PLAIN_CELLS
    shown = table.lines[:PAGE_SIZE] if large else table.lines
    return Rendered(
        number=number,
        table=table,
        rows=tuple(tuple(map(_html, line)) for line in shown),
        island=_island(table.lines) if large else Markup(""),
        notes=table.notes[:NOTES],
        more_notes=max(0, len(table.notes) - NOTES),
    )


@lru_cache(maxsize=100_000)
def _html(cell: Cell) -> Markup:
    macros = environment().get_template("site/board_cells.html.j2").module
    return Markup(macros.cell(cell).strip())  # type: ignore[attr-defined]


def _island(lines: Sequence[tuple[Cell, ...]]) -> Markup:
    """Rows as indexes into the distinct cells: of 300,000 accuracies over 1,000 samples at most 1,001 differ."""
    places: dict[Cell, int] = {}
    rows = [[places.setdefault(cell, len(places)) for cell in line] for line in lines]
    cells = [[_html(cell), cell.place, cell.text if cell.place is None else None] for cell in places]
    text = json.dumps({"cells": cells, "rows": rows}, ensure_ascii=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c"))
