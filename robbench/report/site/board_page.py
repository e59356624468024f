"""Leaderboard pages: models by attacks, for each group and each of its threat models."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from markupsafe import Markup

from robbench.core.counting import count_noun
from robbench.report.attack_lines import budget_text
from robbench.report.data_card import data_card
from robbench.report.site import downloads
from robbench.report.site.boards import boards
from robbench.report.site.frame import body
from robbench.report.site.groups import Group, Site
from robbench.report.site.page import Page, Part
from robbench.report.site.provenance import provenance
from robbench.report.site.ranks import EXPLANATION
from robbench.report.site.tables import Board, Cell, Table, lead
from robbench.report.templating import environment
from robbench.results import corruptions
from robbench.results.wording import summary
from robbench.specs import ResolvedAttack

# A table beyond either is paged, its rows in a JSON island: 200 models x 30 attacks open in half a second.
PLAIN_ROWS, PLAIN_CELLS = 400, 5_000
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
    def rules(self) -> list[tuple[str, list[tuple[int, int]]]]:
        """(condition, spans of columns) that style hides until a reader chooses: at a desk and on a phone."""
        desk, phone = (
            _spans(not c.shown for c in self.table.columns),
            _spans(not c.narrow for c in self.table.columns),
        )
        return [(" and (min-width: 40.01rem)", desk), (" and (max-width: 40rem)", phone)]

    @property
    def failed(self) -> bool:
        """Whether a cell failed: its reason is not to be looked for."""
        return any(cell.kind == "failed" for line in self.table.lines for cell in line)

    @property
    def ranked(self) -> bool:
        return any(cell.kind == "rank" for line in self.table.lines for cell in line)


def _spans(hidden: Iterable[bool]) -> list[tuple[int, int]]:
    """(first, last) positions, from 1, of neighbours that are hidden."""
    spans: list[tuple[int, int]] = []
    for place, is_hidden in enumerate(hidden, 1):
        if is_hidden:
            grows = spans and spans[-1][1] == place - 1
            spans[-1:] = [(spans[-1][0], place)] if grows else [*spans[-1:], (place, place)]
    return spans


def parts(site: Site) -> Iterator[Part]:
    """The leaderboards of all groups."""
    for group in site.groups:
        files = downloads.tables_by_page(group)
        siblings = [g for g in site.groups if g.run.dataset == group.run.dataset and g is not group]
        for board in boards(group):
            yield page(group, board, boards(group), downloads.section(files.get(board.path, [])), siblings)


def page(
    group: Group, board: Board, boards: Sequence[Board], files: str = "", siblings: Sequence[Group] = ()
) -> Page:
    """The page of one of the `boards` of a group. files: what it says of its downloads; siblings: other groups on the
    same data set."""
    run = group.run
    content = body(
        "board.html.j2",
        group=group,
        board=board,
        boards=boards,
        siblings=siblings,
        run=run,
        summary=_summary(group, board),
        lead=lead(board.accuracies) if board.accuracies and not board.is_union else None,
        comparable=len(group.classifiers) > 1,
        tables=[render(table, number) for number, table in enumerate(board.tables, 1)],
        attacks=_by_strength(group, board),
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
        title=f"{group.name}: {board.title}",
        kind="board",
        body=content,
        provenance=provenance(group, board.results),
        description=_description(group, board),
    )


def _by_strength(group: Group, board: Board) -> list[tuple[ResolvedAttack, float | None]]:
    """The attacks of a board with the mean accuracy that they left, the strongest first."""
    order = {label: place for place, label in enumerate(group.by_strength)}
    attacks = sorted(board.attacks, key=lambda attack: order[attack.label])
    return [(attack, group.strength(attack.label)[0]) for attack in attacks]


def _summary(group: Group, board: Board) -> str:
    return summary(replace(group.run, cells=list(board.results)))


def _description(group: Group, board: Board) -> str:
    models = count_noun(len({result.cell.model for result in board.results}), "model")
    attacks = count_noun(len(board.attacks), "attack")
    return f"{models} under {attacks}: {board.title} on {group.title}."


def render(table: Table, number: int = 1) -> Rendered:
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
