"""A published table as in print: rows x columns, recomputed numbers beside printed ones, doubts as footnotes.

Neither torch nor pandas: `robbench show` stays fast.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from robbench.experiments.arithmetic import arithmetic
from robbench.experiments.published import PublishedRow


@dataclass(frozen=True)
class PrintedCell:
    """text: as printed. marks: footnotes, from 1. wrong: whether it contradicts the numbers it follows from."""

    text: str
    marks: tuple[int, ...] = ()
    wrong: bool = False

    @property
    def marked(self) -> str:
        """ "49.76 [1] [3]"."""
        return " ".join([self.text, *(f"[{mark}]" for mark in self.marks)])


@dataclass(frozen=True)
class PrintedTable:
    """A table in the order of print.

    Attributes:
        rows, columns: labels.
        cells: by (row, column); pairs that the paper leaves empty are absent.
        doubts: the footnotes, in order.
        remarks: further remarks of the transcription.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], PrintedCell]
    doubts: tuple[str, ...]
    remarks: tuple[str, ...]


def printed_table(rows: Sequence[PublishedRow]) -> PrintedTable:
    """The rows of one table, in the order of the file, with a column of recomputed numbers after averages and where
    print and arithmetic disagree."""
    wrong = {id(found.row) for found in arithmetic(rows) if not found.agrees}
    recomputed = {row.column for row in rows if id(row) in wrong or row.metric == "average_accuracy"}
    columns = [
        name
        for column in dict.fromkeys(row.column for row in rows)
        for name in (column, *([_beside(column)] if column in recomputed else []))
    ]
    numbers: dict[str, int] = {}
    cells = {}
    for row in rows:
        if row.origin == "recomputed":
            if row.column in recomputed:
                cells[row.row, _beside(row.column)] = PrintedCell(value_text(row))
            continue
        marks = (numbers.setdefault(row.doubt, len(numbers) + 1),) if row.doubt else ()
        cells[row.row, row.column] = PrintedCell(value_text(row), marks, id(row) in wrong)
    return PrintedTable(
        tuple(dict.fromkeys(row.row for row in rows)), tuple(columns), cells, tuple(numbers), _remarks(rows)
    )


def _remarks(rows: Sequence[PublishedRow]) -> tuple[str, ...]:
    """The remarks on numbers that do not follow from others, each once."""
    stated = (row for row in rows if not row.derived and row.origin != "recomputed")
    return tuple(dict.fromkeys(remark for row in stated for remark in row.note))


def _beside(column: str) -> str:
    return f"{column}, recomputed"


def value_text(row: PublishedRow) -> str:
    """The number with its printed digits ("48.80", "2.0e6"), or a printed text ("10-25")."""
    return row.printed_as if row.value is None else str(row.value).lower().replace("e+", "e")
