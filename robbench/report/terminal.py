"""The NLL of flows and the perturbation sizes on a terminal: renderables that adapt to the console's width."""

import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from robbench.results.corruptions import HEADER, corruption_tables
from robbench.results.detection import CAPTION, TITLES, DetectionLine, detection_table
from robbench.results.likelihood import Nll, NllTable, caption, mean_text, median_text, nll_tables
from robbench.results.perturbation import SIZE_CAPTION, size_table
from robbench.results.tables import leaderboard
from robbench.store.records import Run

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

TITLE_WIDTH, ATTACK_WIDTH = 30, 21  # of a metric, and of an attack's column in a detection table
NAME_WIDTH = 19  # of the widest number, "2.00e+06 ± 1.2e+05*": three flows fit in 80 columns


class TerminalLikelihood:
    """One table per attack on flows: budgets down, flows across, spread over several tables where they do not fit."""

    def __init__(self, run: Run) -> None:
        self.tables = nll_tables(run)
        self.heading = f"Likelihood of flows on {run.dataset}. {caption(run)}"

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        yield Text(self.heading)
        yield Text("Median: shown where it differs from the mean by more than 10 %.")
        for table in self.tables:
            yield Text()
            yield Text(table.title, style="italic")
            for columns in _fitting(table, console, options):
                yield _nll_table(table, columns)
            for note in table.footnotes:
                yield Text(f"* {note}", style="yellow")


def terminal_likelihood(run: Run) -> TerminalLikelihood:
    """The NLL tables of a run with flows as a rich renderable."""
    return TerminalLikelihood(run)


def _fitting(table: NllTable, console: "Console", options: "ConsoleOptions") -> list[list[int]]:
    """The flows, by position, in runs that fit beside the budgets; a run has at least one."""
    parts: list[list[int]] = [[]]
    for position in range(len(table.models)):
        attempt = _nll_table(table, [*parts[-1], position])
        if (
            parts[-1]
            and console.measure(attempt, options=options.update_width(10_000)).maximum > options.max_width
        ):
            parts.append([])
        parts[-1].append(position)
    return parts


def _nll_table(nll: NllTable, columns: Sequence[int]) -> "Table":
    from rich.text import Text

    table = _blank_table()
    for name in ("epsilon", *(("steps",) if nll.sweeps_steps else ())):
        table.add_column(name, justify="right")
    for position in columns:
        name, defense = nll.models[position]
        header = "\n".join([*textwrap.wrap(name, NAME_WIDTH), defense])
        table.add_column(Text(header), justify="right", overflow="fold")
    for line in nll.lines:
        steps = [Text("" if line.steps is None else str(line.steps))] if nll.sweeps_steps else []
        table.add_row(Text(f"{line.epsilon:g}"), *steps, *(_nll_text(line.cells[i]) for i in columns))
    return table


def _nll_text(cell: Nll | None) -> "Text":
    """The mean, and where it says something else the median below."""
    from rich.text import Text

    text = mean_text(cell) + (f"\nmedian {median_text(cell)}" if cell and cell.skewed else "")
    return Text(text, style="dim" if cell is None or cell.status == "not run" else _style_failed(cell.status))


def _style_failed(text: str) -> str:
    return "red" if text == "failed" else ""


class TerminalSizes:
    """Distances of adversarial images, with their FID where `robbench fid` has run."""

    def __init__(self, run: Run) -> None:
        self.sizes = size_table(run)
        self.heading = f"Perturbation sizes on {run.dataset}, n = {run.n}, seed {run.seed}"

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        yield Text(self.heading, style="italic")
        for model in dict.fromkeys(line[0] for line in self.sizes.lines):
            yield Text()
            yield Text(model or "clean images", style="bold")
            yield self._of_model(model)
        yield Text(SIZE_CAPTION, style="dim")
        for note in self.sizes.footnotes:
            yield Text(note, style="yellow")

    def _of_model(self, model: str) -> "Table":
        from rich.text import Text

        table = _blank_table()
        for position, name in enumerate(self.sizes.header[1:]):
            table.add_column(Text(name), justify="right" if position else "left", overflow="fold")
        for line in self.sizes.lines:
            if line[0] == model:
                table.add_row(*(Text(text, style=_style_failed(text)) for text in line[1:]))
        return table


def terminal_sizes(run: Run) -> TerminalSizes:
    """The perturbation sizes of a run as a rich renderable."""
    return TerminalSizes(run)


class TerminalCorruptions:
    """Accuracy by corruption and severity, one table per model."""

    def __init__(self, run: Run) -> None:
        self.tables = corruption_tables(run)

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        for found in self.tables:
            table = _blank_table()
            for position, name in enumerate(HEADER):
                table.add_column(name.removeprefix("severity "), justify="right" if position else "left")
            for line in found.lines:
                table.add_row(*(Text(text, style=_style_failed(text)) for text in line))
            yield Text(f"\n{found.title}: accuracy by corruption and severity", style="italic")
            yield table


def terminal_corruptions(run: Run) -> TerminalCorruptions:
    """The corruption tables of a run as a rich renderable; nothing where there are none."""
    return TerminalCorruptions(run)


class TerminalDetection:
    """What detectors make of the attacks: tables per guarded model, a column per attack."""

    def __init__(self, run: Run) -> None:
        self.table = detection_table(run, leaderboard(run))
        self.heading = f"\nDetection on {run.dataset} in percent, n = {run.n}, seed {run.seed}"

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.text import Text

        yield Text(self.heading, style="italic")
        for model in dict.fromkeys(line.model for line in self.table.lines):
            yield Text(model, style="bold")
            lines = [line for line in self.table.lines if line.model == model]
            size = max(1, (options.max_width - TITLE_WIDTH) // ATTACK_WIDTH)
            for start in range(0, len(lines), size):
                yield self._across(lines[start : start + size])
        yield Text(CAPTION, style="dim")
        for note in self.table.notes:
            yield Text(f"* {note}", style="yellow")

    def _across(self, lines: Sequence[DetectionLine]) -> "Table":
        from rich.text import Text

        table = _blank_table()
        table.add_column("", overflow="fold")
        for line in lines:
            table.add_column(Text("\n".join(line.names[1:])), justify="right", overflow="fold")
        for place, title in enumerate(TITLES):
            texts = [line.text(place) for line in lines]
            table.add_row(Text(title), *(Text(text, style=_style_failed(text)) for text in texts))
        return table


def terminal_detection(run: Run) -> TerminalDetection:
    """The detection table of a run as a rich renderable."""
    return TerminalDetection(run)


def _blank_table() -> "Table":
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
