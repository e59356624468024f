"""Tables of a run as CSV, as Markdown and on the terminal; the same run gives the same text."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from robbench.compare.reference import round_number, write_cell
from robbench.core.markdown import bullets, escaped, markdown_table, paragraph
from robbench.core.spreadsheet import csv_text
from robbench.metrics import all_metrics
from robbench.results import corruptions
from robbench.results.detection import CAPTION, KEYS, METRIC_NAMES, DetectionTable, detection_table
from robbench.results.likelihood import NllTable, caption, mean_text, median_text, nll_tables
from robbench.results.perturbation import SIZE_CAPTION, size_table
from robbench.results.rows import COLUMNS, TableRow, rows_of
from robbench.results.tables import Wide, leaderboard, wide
from robbench.results.wording import INTERVALS, measures, number_text, problems, summary, versions
from robbench.store.records import Run

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table


def tidy_csv(rows: Sequence[TableRow]) -> str:
    """One row per number (`write_cell`): `check` gives a table that is read back the verdicts of the numbers."""
    return csv_text([list(COLUMNS), *([write_cell(row, name) for name in COLUMNS] for row in rows)])


def wide_csv(table: Wide) -> str:
    """One row per model; a column has a value, its interval, its status, and what accuracy it shows. Models whose worst
    case or average is "partial" come last."""
    header = ["dataset", "model", "defense", "n", "seed"]
    parts = ("", "_lower", "_upper", "_status", "_measure")
    header += [f"{column}{part}" for column in table.columns for part in parts]
    lines: list[list[object]] = [list(header)]
    for model, defense in table.models:
        cells = [table.cells.get((model, column)) for column in table.columns]
        first = next(cell for cell in cells if cell)
        line: list[object] = [first.dataset, model, defense, first.n, first.seed]
        for cell in cells:
            if cell:
                line += [cell.value, cell.lower, cell.upper, cell.status, cell.measure]
            else:
                line += [None, None, None, "not run", None]
        lines.append(line)
    return _round_csv(lines)


def likelihood_csv(tables: Sequence[NllTable]) -> str:
    """One row per attack and budget, in units of the attack; six columns per flow. Line epsilon 0 has no steps: nothing
    was searched."""
    return _round_csv(likelihood_lines(tables))


def _round_csv(lines: Sequence[Sequence[object]]) -> str:
    return csv_text(
        [[round_number(cell) if isinstance(cell, float) else cell for cell in line] for line in lines]
    )


def likelihood_lines(tables: Sequence[NllTable]) -> list[list[object]]:
    """Header and lines of `likelihood_csv`."""
    models = list(dict.fromkeys(name for table in tables for name, _ in table.models))
    parts = ("", "_lower", "_upper", "_median", "_nonfinite", "_status")
    lines: list[list[object]] = [
        ["attack", "epsilon", "steps", *(f"{name}{part}" for name in models for part in parts)]
    ]
    for table in tables:
        names = [name for name, _ in table.models]
        for row in table.lines:
            cells = dict(zip(names, row.cells, strict=True))
            line: list[object] = [table.attack, row.epsilon, row.steps]
            for cell in map(cells.get, models):
                done = cell is not None and cell.status == "ok"
                numbers = [cell.mean, cell.lower, cell.upper, cell.median] if cell else [None] * 4
                line += [
                    *numbers,
                    cell.nonfinite if cell and done else None,
                    cell.status if cell else "not run",
                ]
            lines.append(line)
    return lines


def markdown(run: Run, rows: Sequence[TableRow]) -> str:
    """The accuracy matrix, the NLL of flows, likelihoods and distances, and what went wrong, as GitHub tables."""
    parts = [
        f"# Robustness on {escaped(run.dataset)}",
        f"{paragraph(summary(run))} Data revision {escaped(run.dataset_revision[:12])}. "
        f"Versions: {escaped(versions(run))}.",
        *_accuracy_parts(rows_of(run, rows, "classifier")),
        *_detection_parts(run, rows),
        *_corruption_parts(run),
        *_nll_parts(run),
        *_detail_parts(rows_of(run, rows, "classifier")),
        *_column_parts(rows),
        *_size_parts(run),
    ]
    notes = problems(rows_of(run, rows, "classifier"))
    return "\n\n".join([*parts, *([bullets(notes)] if notes else [])]) + "\n"


def _accuracy_parts(rows: Sequence[TableRow]) -> list[str]:
    table = wide(rows)
    if not table.models:
        return []
    lines = [
        [model, defense, *(cell_text(table.cells.get((model, column))) for column in table.columns)]
        for model, defense in table.models
    ]
    board = markdown_table(["model", "defense", *table.columns], lines)
    return [f"Accuracy in percent [95 % interval]. {measures(rows)}".strip(), board, INTERVALS]


def _detection_parts(run: Run, rows: Sequence[TableRow]) -> list[str]:
    """What detectors make of the attacks, those that ignore them beside those that know them."""
    table = detection_table(run, rows)
    lines = [[*line.names, *map(line.text, range(len(line.cells)))] for line in table.lines]
    notes = [bullets(table.notes)] if table.notes else []
    return [f"Detection. {CAPTION}", markdown_table(table.header, lines), *notes] if lines else []


def detection_csv(table: DetectionTable) -> str:
    """One row per guarded model and attack; a number has its value and interval. adaptive_run: whether any adaptive
    attack on the model was finished."""
    header = [*KEYS, "knows_detector", "adaptive_run", "status"]
    header += [f"{name}{part}" for name in METRIC_NAMES for part in ("", "_lower", "_upper")]
    lines: list[list[object]] = [list(header)]
    for line in table.lines:
        keys = [line.model, line.detector, line.attack, str(line.adaptive).lower()]
        numbers = [
            value
            for cell in line.cells
            for value in ((cell.value, cell.lower, cell.upper) if cell else (None, None, None))
        ]
        lines.append([*keys, str(not line.oblivious).lower(), line.status, *numbers])
    return _round_csv(lines)


def _corruption_parts(run: Run) -> list[str]:
    """Accuracies by corruption and severity, one table per model."""
    parts = [f"Corruptions. {corruptions.CAPTION}"] if (tables := corruptions.corruption_tables(run)) else []
    for table in tables:
        parts += [paragraph(table.title), markdown_table(corruptions.HEADER, table.lines)]
    return parts


def _nll_parts(run: Run) -> list[str]:
    """One table per attack: budgets down, flows with their defenses across, means with medians behind them."""
    tables = nll_tables(run)
    parts = [f"{paragraph(caption(run))} In brackets: the median."] if tables else []
    for table in tables:
        header = ["epsilon", *(["steps"] if table.sweeps_steps else [])]
        header += [f"{name} ({defense})" for name, defense in table.models]
        lines = []
        for row in table.lines:
            steps = ["" if row.steps is None else str(row.steps)] if table.sweeps_steps else []
            medians = [f" [{median_text(cell)}]" if median_text(cell) else "" for cell in row.cells]
            means = [mean_text(cell) + median for cell, median in zip(row.cells, medians, strict=True)]
            lines.append([f"{row.epsilon:g}", *steps, *means])
        parts += [paragraph(table.title), markdown_table(header, lines)]
        parts += [bullets(table.footnotes)] if table.footnotes else []
    return parts


DETAIL_HEADER = ["model", "attack", "flow", "bits/dim before", "bits/dim after"]
_DETAIL_METRICS = ("bits_per_dim_before", "bits_per_dim_after")


def _detail_parts(rows: Sequence[TableRow]) -> list[str]:
    """Likelihoods of adversarial images of classifiers under the run's flow."""
    lines = _detail_lines(rows)
    text = (
        "Bits per dimension under the named flow, from one draw of the dequantisation noise per image: mean [95 % "
        "interval, normal over images] of all images before the attack, of those it broke after."
    )
    return [text, markdown_table(DETAIL_HEADER, lines)] if lines else []


def _column_parts(rows: Sequence[TableRow]) -> list[str]:
    """A table for every other metric that has columns of its own: models down, attacks across."""
    parts: list[str] = []
    for metric in all_metrics():
        if not metric.part or metric.compute is None or metric.name in _DETAIL_METRICS:
            continue
        found = {(row.model, row.attack): row for row in rows if row.metric == metric.name}
        attacks = list(dict.fromkeys(attack for _, attack in found))
        lines = [
            [model, *(_interval_text(found.get((model, attack))) for attack in attacks)]
            for model in dict.fromkeys(model for model, _ in found)
        ]
        title = paragraph(f"{metric.title[0].upper()}{metric.title[1:]}, in {metric.unit}.")
        parts += [title, markdown_table(["model", *attacks], lines)] if lines else []
    return parts


def _detail_lines(rows: Sequence[TableRow]) -> list[list[str]]:
    by_key = {(row.model, row.attack, row.metric): row for row in rows if row.metric in _DETAIL_METRICS}
    lines: list[list[str]] = []
    for model, attack in dict.fromkeys((model, attack) for model, attack, _ in by_key):
        cells = [by_key.get((model, attack, metric)) for metric in _DETAIL_METRICS]
        flow = next((cell.flow for cell in cells if cell), "")
        lines.append([model, attack, flow, *(_interval_text(cell) for cell in cells)])
    return lines


def _interval_text(row: TableRow | None) -> str:
    """ "2.535 [2.510, 2.560]", without brackets where there is no interval."""
    if row is None or row.lower is None or row.upper is None:
        return number_text(row)
    return f"{number_text(row)} [{row.lower:.3f}, {row.upper:.3f}]"


def _size_parts(run: Run) -> list[str]:
    sizes = size_table(run)
    notes = [paragraph(note) for note in sizes.footnotes]
    return [f"Perturbation sizes. {SIZE_CAPTION}", markdown_table(sizes.header, sizes.lines), *notes]


def cell_text(row: TableRow | None) -> str:
    """ "57.2 [52.0, 62.3]", "partial: 57.2 [52.0, 62.3]", or "failed" / "not run"."""
    if row is None:
        return "not run"
    if not row.measured or row.value is None or row.lower is None or row.upper is None:
        return row.status
    mark = "partial: " if row.status == "partial" else ""
    return f"{mark}{row.value:.1f} [{row.lower:.1f}, {row.upper:.1f}]"


class TerminalLeaderboard:
    """The accuracy matrix for a rich console: one line per model where it fits, else intervals below the
    values, else columns spread over several tables."""

    def __init__(self, run: Run) -> None:
        rows = rows_of(run, leaderboard(run), "classifier")
        self.table, self.problems = wide(rows, per_threat_model=False), problems(rows)
        self.title = f"Accuracy on {run.dataset} in percent, 95 % interval"
        self.caption = " ".join(filter(None, [measures(rows), summary(run, "classifier")]))

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

        table = Table(box=box.SIMPLE_HEAD, padding=(0, gap, 0, 0), show_edge=False, caption_justify="left")
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
    styles = {"ok": "", "partial": "yellow", "failed": "red"}
    return "dim" if row is None else styles.get(row.status, "dim")
