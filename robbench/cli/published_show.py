"""What `robbench list published` and `robbench show "IJSAT Table 1"` print."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from robbench.cli.base import echo_cells, echo_line
from robbench.core.terminal import Terminal
from robbench.experiments.layout import PrintedTable, printed_table
from robbench.experiments.published import (
    Index,
    PublishedRow,
    Table,
    published_index,
    table_rows,
    table_settings,
)

LIST_HEADER = ("table", "printed as", "rows", "gated", "paper", "what")


def listed() -> Iterator[tuple[str, ...]]:
    """One tuple a table, as in `LIST_HEADER`; rows: numbers, of them gated: those that a check may fail on."""
    index = published_index()
    for table in index.tables:
        paper = index.paper_of(table)
        rows = table_rows(table)
        count = len(rows) if table.has_numbers else len(table_settings(table))
        gated = sum(row.gate for row in rows)
        yield table.name, table.source, str(count), str(gated), paper.title if paper else "", table.what


def show_table(table: Table, index: Index) -> None:
    """Print a table as it stands in print, with recomputed numbers beside it and doubts below."""
    paper = index.paper_of(table)
    echo_line(f"{table.source}: {table.what}")
    if paper:
        echo_line(paper.citation)
    if not table.has_numbers:
        for setting in table_settings(table):
            echo_cells("" if value is None else str(value) for value in setting.model_dump().values())
        return
    rows = table_rows(table)
    echo_line(_measured(rows))
    _print(printed_table(rows))


def _measured(rows: Sequence[PublishedRow]) -> str:
    """ "cifar10, resnet18; accuracy in %; 28 of 63 numbers gate"."""
    about = [
        ", ".join(dict.fromkeys(filter(None, (getattr(row, key) for row in rows)))) for key in ("dataset",)
    ]
    about += [", ".join(dict.fromkeys(row.architecture for row in rows if row.architecture))]
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
