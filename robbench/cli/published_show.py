"""What `robbench show "IJSAT Table 1"` prints."""

from collections.abc import Sequence

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from robbench.cli.base import echo_cells, echo_line
from robbench.core.terminal import Terminal
from robbench.experiments.layout import PrintedTable, printed_table
from robbench.experiments.published import (
    PublishedRow,
    published_index,
    published_table,
    table_rows,
    table_settings,
)


def show_table(name: str) -> None:
    """Print a table as it stands in print, with recomputed numbers beside it and doubts below."""
    index = published_index()
    table = published_table(name, index)
    paper = index.paper_of(table)
    echo_line(f"{table.source}: {table.what}")
    if paper:
        echo_line(paper.citation)
    if not table.has_numbers:
        for setting in table_settings(table):
            echo_cells("" if value is None else str(value) for value in setting.model_dump().values())
        return
    rows = table_rows(table)
    echo_line(_summarise(rows))
    _print(printed_table(rows))


_WHERE = ("dataset", "architecture")


def _summarise(rows: Sequence[PublishedRow]) -> str:
    """ "cifar10, resnet18; accuracy in %; 28 of 63 numbers gate"."""
    about = [
        ", ".join(dict.fromkeys(getattr(row, key) for row in rows if getattr(row, key))) for key in _WHERE
    ]
    units = dict.fromkeys(f"{row.metric.replace('_', ' ')} in {row.unit or 'no unit'}" for row in rows)
    sizes = ", ".join(f"{n:,}" for n in sorted({row.n for row in rows if row.n}))
    parts = [", ".join(filter(None, about)), ", ".join(units), f"n {sizes}" if sizes else "n not stated"]
    return "; ".join([*filter(None, parts), f"{sum(row.gate for row in rows)} of {len(rows)} numbers gate"])


def _print(printed: PrintedTable) -> None:
    table = RichTable(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", overflow="fold")
    for column in printed.columns:
        table.add_column(Text(column), justify="right", overflow="fold")
    for row in printed.rows:
        cells = [printed.cells.get((row, column)) for column in printed.columns]
        table.add_row(
            Text(row), *(Text(c.marked, style="red" if c.wrong else "") if c else Text("") for c in cells)
        )
    console = Terminal()
    if not console.is_terminal:  # for files and pipes: nothing wrapped
        wide = console.measure(table, options=console.options.update_width(10_000)).maximum
        console = Terminal(width=max(wide, 80))
    console.print(table)
    for number, doubt in enumerate(printed.doubts, 1):
        console.print(Text(f"[{number}] {doubt}"), soft_wrap=not console.is_terminal)
    for remark in printed.remarks:
        console.print(Text(f"* {remark}"), soft_wrap=not console.is_terminal)
