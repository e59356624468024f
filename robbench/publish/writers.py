"""Tables as files and on the terminal. Files are written atomically; the same run gives the same bytes."""

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from robbench.matrix.records import Run
from robbench.publish.html import write_html
from robbench.publish.tables import COLUMNS, TableRow, Wide, leaderboard, wide
from robbench.publish.wording import INTERVALS, number_text, problems, summary, versions
from robbench.resources import write_text_atomically

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table


def write_tables(
    run: Run, folder: Path, originals: "Callable[[Sequence[int]], np.ndarray] | None" = None
) -> dict[str, Path]:
    """Write every table of `run` into `folder`; returns the paths by kind: csv, wide, markdown, html.

    originals: clean images by sample id for the gallery of the HTML page, see `html.write_html`.
    """
    rows = leaderboard(run)
    paths = {
        "csv": folder / "leaderboard.csv",
        "wide": folder / "leaderboard-wide.csv",
        "markdown": folder / "leaderboard.md",
        "html": folder / "leaderboard.html",
    }
    write_text_atomically(paths["csv"], tidy_csv(rows))
    write_text_atomically(paths["wide"], wide_csv(wide(rows)))
    write_text_atomically(paths["markdown"], markdown(run, rows))
    write_html(run, paths["html"], originals)
    return paths


# -------------------------------------------------------------------------------------------------------- CSV
def tidy_csv(rows: Sequence[TableRow]) -> str:
    """One row a number. Floats keep every digit, so that reading them back gives the same numbers."""
    return _csv([list(COLUMNS), *([getattr(row, name) for name in COLUMNS] for row in rows)])


def wide_csv(table: Wide) -> str:
    """One row a model; a column has a value, its interval and its status."""
    header = ["dataset", "model", "defense", "n", "seed"]
    header += [f"{column}{part}" for column in table.columns for part in ("", "_lower", "_upper", "_status")]
    lines: list[list[object]] = [list(header)]
    for model, defense in table.models:
        cells = [table.cells.get((model, column)) for column in table.columns]
        first = next(cell for cell in cells if cell)
        line: list[object] = [first.dataset, model, defense, first.n, first.seed]
        for cell in cells:
            line += (
                [cell.value, cell.lower, cell.upper, cell.status] if cell else [None, None, None, "not run"]
            )
        lines.append(line)
    return _csv(lines)


def _csv(lines: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


# --------------------------------------------------------------------------------------------------- Markdown
def markdown(run: Run, rows: Sequence[TableRow]) -> str:
    """The accuracy matrix, the likelihoods and distances, and what went wrong, as GitHub tables."""
    table = wide(rows)
    parts = [
        f"# Robustness on {_escaped(run.dataset)}",
        f"{summary(run)} Data revision `{run.dataset_revision[:12]}`. Versions: {versions(run)}.",
        "Accuracy in percent [95 % interval].",
        _markdown_table(
            ["model", "defense", *table.columns],
            [
                [model, defense, *(cell_text(table.cells.get((model, column))) for column in table.columns)]
                for model, defense in table.models
            ],
        ),
        INTERVALS,
    ]
    details = _detail_lines(rows)
    if details:
        parts.append(
            "Bits per dimension (mean) under the named flow and distances (mean over attacked samples)."
        )
        parts.append(_markdown_table(DETAIL_HEADER, details))
    notes = problems(rows)
    if notes:
        parts.append("\n".join(f"* {_escaped(note)}" for note in notes))
    return "\n\n".join(parts) + "\n"


DETAIL_HEADER = ["model", "attack", "flow", "bits/dim before", "bits/dim after", "L2", "Linf"]
_DETAIL_METRICS = ("bits_per_dim_before", "bits_per_dim_after", "l2", "linf")


def _detail_lines(rows: Sequence[TableRow]) -> list[list[str]]:
    by_key = {(row.model, row.attack, row.metric): row for row in rows if row.metric in _DETAIL_METRICS}
    lines: list[list[str]] = []
    for model, attack in dict.fromkeys((model, attack) for model, attack, _ in by_key):
        cells = [by_key.get((model, attack, metric)) for metric in _DETAIL_METRICS]
        flow = next((cell.flow for cell in cells[:2] if cell), "")
        lines.append([model, attack, flow, *(number_text(cell) for cell in cells)])
    return lines


def _markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    text = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in text)


def _escaped(text: str) -> str:
    """Text that stays one table cell and plain text in Markdown."""
    flat = " ".join(text.split())
    for character in "\\|`*_<>":
        flat = flat.replace(character, "\\" + character)
    return flat if text != "---" else text


# ------------------------------------------------------------------------------------------------------ texts
def cell_text(row: TableRow | None) -> str:
    """ "57.2 [52.0, 62.3]", or "failed" / "not run"."""
    if row is None:
        return "not run"
    if row.status != "ok" or row.value is None or row.lower is None or row.upper is None:
        return row.status
    return f"{row.value:.1f} [{row.lower:.1f}, {row.upper:.1f}]"


# --------------------------------------------------------------------------------------------------- terminal
class TerminalLeaderboard:
    """The accuracy matrix for a rich console: one line a model where it fits, else intervals below the
    values, else columns spread over several tables."""

    def __init__(self, run: Run) -> None:
        rows = leaderboard(run)
        self.table, self.problems = wide(rows, per_threat_model=False), problems(rows)
        self.title = f"Accuracy on {run.dataset} in percent, 95 % interval"
        self.caption = summary(run)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        one_line = self._table(self.table.columns, cell_text, gap=1)
        if console.measure(one_line, options=options.update_width(10_000)).maximum <= options.max_width:
            tables = [one_line]
        else:
            parts = self._fitting(console, options)
            tables = [self._table(part, _two_lines) for part in parts]
        tables[0].title, tables[-1].caption = Text(self.title), Text(self.caption)
        yield from tables
        for problem in self.problems:
            yield Text(f"* {problem}", style="yellow")

    def _fitting(self, console: "Console", options: "ConsoleOptions") -> list[list[str]]:
        """The columns in runs that fit beside the model names; a run has at least one column."""
        parts: list[list[str]] = [[]]
        for column in self.table.columns:
            attempt = self._table([*parts[-1], column], _two_lines)
            needed = console.measure(attempt, options=options.update_width(10_000)).maximum
            if parts[-1] and needed > options.max_width:
                parts.append([])
            parts[-1].append(column)
        return parts

    def _table(self, columns: Sequence[str], text: Callable[[TableRow | None], str], gap: int = 0) -> "Table":
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), show_edge=False)
        table.add_column("model", overflow="fold")
        for column in columns:
            table.add_column(Text(column), justify="right", overflow="fold")
        for model, _ in self.table.models:
            cells = [self.table.cells.get((model, column)) for column in columns]
            table.add_row(Text(model), *(Text(text(cell), style=_style(cell)) for cell in cells))
        return table


def terminal_table(run: Run) -> TerminalLeaderboard:
    """The leaderboard as a rich renderable that adapts to the console's width."""
    return TerminalLeaderboard(run)


def _two_lines(row: TableRow | None) -> str:
    return cell_text(row).replace(" [", "\n").replace(", ", "-").replace("]", "")


def _style(row: TableRow | None) -> str:
    return (
        "" if row is not None and row.status == "ok" else "red" if row and row.status == "failed" else "dim"
    )
