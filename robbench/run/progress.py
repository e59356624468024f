"""Progress of a run: a live table on a terminal, plain lines elsewhere."""

import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from robbench.core.terminal import print_line
from robbench.store.records import CellRecord

FAILED = "failed"
LINE_EVERY = 30.0  # seconds


class RunProgress(Protocol):
    """Receives the events of a run. cell: index in the plan, from 0; score: the cell's score so far, as text."""

    def on_start(self, cell: int, record: CellRecord, done: int) -> None:
        """A cell starts with `done` samples already in the ledger."""

    def on_advance(self, cell: int, done: int, score: str) -> None:
        """So many samples of the cell are done, by the model calls made for those that are not in the ledger yet."""

    def on_end(self, cell: int, record: CellRecord, done: int, score: str) -> None:
        """The cell is complete or failed (`record.status`)."""

    def message(self, line: str) -> None:
        """One line the user should see."""


@dataclass
class _Begun:
    """A cell that is being computed: when it began, with how many samples, and when a line last spoke of it."""

    record: CellRecord
    at: float
    done: int
    said: float


class PlainProgress(AbstractContextManager["PlainProgress"]):
    """One line when a cell starts, one when it ends, and one every `LINE_EVERY` seconds between."""

    def __init__(self, console: Console, records: list[CellRecord], total: int) -> None:
        self._console, self._count, self._total = console, len(records), total
        self._begun: dict[int, _Begun] = {}  # cells overlap where several workers compute

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def message(self, line: str) -> None:
        print_line(self._console, line)

    def on_start(self, cell: int, record: CellRecord, done: int) -> None:
        now = time.monotonic()
        self._begun[cell] = _Begun(record, now, done, now)
        already = f", {done} of them in the ledger" if done else ""
        self.message(f"{self._where(cell, record)}: {self._total} samples{already}")

    def on_advance(self, cell: int, done: int, score: str) -> None:
        begun, now = self._begun[cell], time.monotonic()
        if now - begun.said < LINE_EVERY or done >= self._total:
            return
        begun.said = now
        rate = (done - begun.done) / (now - begun.at)
        where = self._where(cell, begun.record)
        self.message(f"{where}: {done} of {self._total} samples{speed_text(rate, self._total - done)}")

    def on_end(self, cell: int, record: CellRecord, done: int, score: str) -> None:
        seconds = time.monotonic() - self._begun.pop(cell).at
        outcome = f"{score} of {done}"
        if record.status == "failed":
            outcome = f"failed ({record.error})"
        self.message(f"{self._where(cell, record)}: {outcome}, {seconds:.1f} s")

    def _where(self, cell: int, record: CellRecord) -> str:
        return f"[{cell + 1}/{self._count}] {record.model} x {record.attack.label}"


def speed_text(rate: float, left: int) -> str:
    """ ", 1.9 per second, 2.7 min remaining" for samples per second and samples left; "" for no speed yet."""
    if rate <= 0:
        return ""
    per = f"{rate:.2g} per second" if rate >= 0.1 else f"{60 * rate:.2g} per minute"
    seconds = left / rate
    size, unit = next(one for one in ((3600, "h"), (60, "min"), (0, "s")) if seconds >= one[0])
    return f", {per}, {seconds / (size or 1):.1f} {unit} remaining"


class _Score(ProgressColumn):
    """The score of a cell so far; "failed" in red."""

    def render(self, task: Task) -> Text:
        score: str = task.fields["score"]
        return Text(score, style="red" if score == FAILED else "")


class LiveProgress(AbstractContextManager["LiveProgress"]):
    """One row per cell: model, attack, done/total, elapsed, remaining, score so far.

    Where the terminal has fewer lines than the run has cells, those around the running one are shown.
    """

    def __init__(self, console: Console, records: list[CellRecord], total: int) -> None:
        self._console, self._total = console, total
        # A narrow terminal gets fewer columns, since rich would otherwise cut all of them.
        bar = [BarColumn(bar_width=20)] if console.width >= 100 else []
        times = [TimeElapsedColumn(), TimeRemainingColumn()] if console.width >= 65 else []
        self._progress = Progress(
            TextColumn("{task.fields[model]}", style="bold", markup=False),
            TextColumn("{task.fields[attack]}", markup=False),
            *bar,
            MofNCompleteColumn(),
            *times,
            _Score(table_column=Column(justify="right", no_wrap=True)),
            console=console,
        )
        self._tasks: list[TaskID] = [
            self._progress.add_task(
                "", total=total, start=False, model=r.model, attack=r.attack.label, score=""
            )
            for r in records
        ]
        self._show_around(0)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def message(self, line: str) -> None:
        print_line(self._console, line)

    def on_start(self, cell: int, record: CellRecord, done: int) -> None:
        self._show_around(cell)
        # `reset` rather than `update`, so that samples of an earlier run do not count as speed.
        self._progress.reset(self._tasks[cell], start=True, completed=done)

    def on_advance(self, cell: int, done: int, score: str) -> None:
        self._progress.update(self._tasks[cell], completed=done, score=score)

    def on_end(self, cell: int, record: CellRecord, done: int, score: str) -> None:
        text = FAILED if record.status == "failed" else score
        self._progress.update(self._tasks[cell], completed=done, score=text)
        self._progress.stop_task(self._tasks[cell])
        if record.status == "failed":
            self.message(f"{record.model} x {record.attack.label} failed: {record.error}")

    def _show_around(self, cell: int) -> None:
        rows = max(self._console.height - 2, 1)
        first = max(min(cell - rows // 2, len(self._tasks) - rows), 0)
        for number, task in enumerate(self._tasks):
            self._progress.update(task, visible=first <= number < first + rows)


def run_progress(console: Console, records: list[CellRecord], total: int) -> PlainProgress | LiveProgress:
    """The live table on a terminal, plain lines otherwise."""
    return (
        LiveProgress(console, records, total)
        if console.is_terminal
        else PlainProgress(console, records, total)
    )
