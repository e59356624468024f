"""What a leaderboard is made of: boards of tables, tables of columns and cells."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from robbench.report.site.scatter import Scatter
from robbench.results import corruptions, wording
from robbench.results.rows import TableRow
from robbench.specs import ResolvedAttack
from robbench.store.records import CellResult

Kind = Literal["name", "text", "count", "rank", "score", "partial", "number", "failed", "absent"]
CLEAN_KEY, WORST, AVERAGE, RANK = "clean", "worst case", "average", "rank"
SUMMARY, BY_THREAT, ABOUT = "Summary", "Worst case by threat model", "About the model"


@dataclass(frozen=True)
class Cell:
    """What a cell shows and sorts by.

    Attributes:
        kind: "partial" is a worst case or average that leaves out attacks of its board; it sorts below every complete
            one.
        text: what it shows.
        order: what it sorts by; None where there is no number: always last.
        lower, upper: of its 95 % interval.
        note: what a reader must know.
        marked: whether the note is about this number in particular.
        file: path of the page that a name links to.
        url: address that a text links to.
    """

    kind: Kind
    text: str
    order: float | str | None = None
    lower: float | None = None
    upper: float | None = None
    note: str = ""
    marked: bool = False
    file: str = ""
    url: str = ""

    @property
    def place(self) -> float | str | None:
        """What a page sorts it by, None for last."""
        return None if self.kind == "partial" else self.order


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        key: its name in a permalink.
        label: its heading.
        part: its part of the column chooser.
        number: whether it holds numbers.
        first: what the first click on its heading does.
        shown: before a reader chooses.
        narrow: whether it is shown on a phone too.
        fixed: whether it cannot be hidden.
        facet: whether a menu of its values filters.
        attack: of a column of numbers other than accuracies.
    """

    key: str
    label: str
    part: str = SUMMARY
    number: bool = True
    first: Literal["asc", "desc"] = "desc"
    shown: bool = True
    narrow: bool = False
    fixed: bool = False
    facet: bool = False
    attack: str = ""


@dataclass(frozen=True)
class Table:
    """Lines of cells, one a column.

    Attributes:
        key: of its names in the permalink.
        title: its heading.
        about: what it is, above it.
        caption: below it.
        explanation: behind "How to read it".
        columns: from left to right.
        lines: from top to bottom.
        sort: order of the lines, "worst case.desc".
        notes: on single numbers.
        scatter: clean against robust accuracy; None where the table is not of one threat model.
    """

    key: str
    title: str
    about: str
    caption: str
    explanation: str
    columns: tuple[Column, ...]
    lines: tuple[tuple[Cell, ...], ...]
    sort: str = ""
    notes: tuple[str, ...] = ()
    scatter: Scatter | None = None

    def column(self, key: str) -> int | None:
        """Position of the column of that key."""
        return next((k for k, column in enumerate(self.columns) if column.key == key), None)


@dataclass(frozen=True)
class Board:
    """A page of tables.

    Attributes:
        path: of the page in the site.
        title: "linf, ε = 0.2".
        tables: in the order shown.
        results: the cells that it is about.
        corruption_tables: error by corruption and severity; empty without corrupted images.
        is_union: whether it is of several threat models.
    """

    path: str
    title: str
    tables: tuple[Table, ...]
    results: tuple[CellResult, ...]
    corruption_tables: tuple[corruptions.CorruptionTable, ...] = ()
    is_union: bool = False

    @property
    def attacks(self) -> list[ResolvedAttack]:
        """Its attacks, each once, in plan order."""
        return list({r.cell.attack.label: r.cell.attack for r in self.results}.values())

    @property
    def accuracies(self) -> Table | None:
        """The table of models by attacks; None on a board of likelihoods."""
        return next((table for table in self.tables if not table.key), None)


NAME = Column("model", "model", number=False, first="asc", narrow=True, fixed=True)
DEFENSE = Column("defense", "defense", number=False, first="asc", facet=True)


def score_cell(row: TableRow | None) -> Cell:
    """An accuracy."""
    if row is None:
        return Cell("absent", "not run")
    if not row.measured or row.value is None:
        return status_cell(row)
    note, marked = row.note, wording.has_problem(row)
    if row.combined:  # a list of all attacks in every cell would only fill the page
        note, marked = wording.partial_note(row), row.status == "partial"
    kind: Kind = "partial" if row.status == "partial" else "score"
    return Cell(kind, f"{row.value:.1f}", row.value, row.lower, row.upper, note, marked)


def status_cell(row: TableRow) -> Cell:
    """Why there is no number."""
    return Cell("failed" if row.status == "failed" else "absent", row.status, note=row.note)


def number_cell(row: TableRow | None, accuracy: TableRow | None) -> Cell:
    """A likelihood or distance. Without one the accuracy of the same attack says why."""
    if row is None:
        if accuracy is not None and accuracy.status != "ok":
            return status_cell(accuracy)
        if accuracy is None:
            return Cell("absent", "not run")
        return Cell("absent", "none", note="the attack broke no sample, or its images were not scored")
    if row.status != "ok":
        return status_cell(row)
    finite = row.value is not None and math.isfinite(row.value)
    return Cell("number", wording.number_text(row), row.value if finite else None, note=row.note)


def best_first(
    lines: Sequence[tuple[Cell, ...]], columns: Sequence[Column], main: str
) -> Iterator[tuple[Cell, ...]]:
    """By rank where there are some; models that were attacked by all first; then by the number of the board, then by
    the average."""
    keys = [column.key for column in columns]
    rank = keys.index(RANK) if RANK in keys else None
    place = keys.index(main)
    average = keys.index(AVERAGE) if AVERAGE in keys else place

    def position(line: tuple[Cell, ...]) -> tuple[float, ...]:
        first = 0.0 if rank is None else _sort_value(line[rank], 1)
        return (
            first,
            line[place].kind == "partial",
            _sort_value(line[place], -1),
            _sort_value(line[average], -1),
        )

    yield from sorted(lines, key=position)


def _sort_value(cell: Cell, sign: int) -> float:
    return math.inf if not isinstance(cell.order, float) else sign * cell.order


@dataclass(frozen=True)
class Lead:
    """The model that leads a leaderboard. name, worst, clean: its cells; ties: those not told apart from it."""

    name: Cell
    worst: Cell
    clean: Cell
    ties: tuple[Cell, ...]


def lead(table: Table) -> Lead | None:
    """Who leads by worst case; None where no model may be called first. A model alone on its leaderboard leads it."""
    worst, clean, rank = table.column(WORST), table.column(CLEAN_KEY), table.column(RANK)
    if worst is None or clean is None or not table.lines:
        return None
    first, *others = table.lines
    ranked = rank is not None and first[rank].kind == "rank"
    if first[worst].kind != "score" or (others and not ranked):
        return None
    ties = [line[0] for line in others if rank is not None and line[rank].text.split("-")[0] == "1"]
    return Lead(first[0], first[worst], first[clean], tuple(ties))
