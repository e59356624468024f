"""`robbench fid`: Fréchet distances of a run's images. Only click is imported before the command runs."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robbench.cli.base import (
    FolderOrFile,
    Text,
    WholeNumber,
    data_dir_option,
    data_option,
    device_option,
    echo_line,
    zoo_option,
)
from robbench.core.counting import count_noun

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from robbench.store.frechet_records import FrechetRecord

CELLS_MISSING = 3


@click.command()
@click.argument("run_folder", metavar="RUN", type=FolderOrFile())
@click.option(
    "--features",
    type=Text(),
    metavar="inception|MODEL",
    help="What turns images into features.  [default: inception; a zoo classifier for small grey images]",
)
@click.option(
    "--fid-weights", type=FolderOrFile(), help="Weights file of inception.  [default: downloaded once]"
)
@zoo_option
@data_option
@data_dir_option
@device_option
@click.option("--batch-size", type=WholeNumber(1), default=64, show_default=True, help="Images at once.")
@click.pass_context
def fid(context: click.Context, /, run_folder: Path, **options: Any) -> None:
    """FID of a run's adversarial images against the training images of its data set.

    The run must have kept them all: robbench run --keep-examples all. Features of another network than FID's give a
    Fréchet distance that is named after the network, and no FID.

    Example: robbench fid robbench-runs/cifar10-seed0
    """
    from robbench.core.terminal import Terminal, print_line
    from robbench.run.frechet import FrechetRequest, score_run
    from robbench.store.frechet_records import FRECHET_FOLDER

    console = Terminal()
    with _Progress(console) as progress:
        records = score_run(run_folder, FrechetRequest(**options), progress)
    first = records[0]
    title = (
        f"{first.extractor} to the {first.reference_n:,} {first.reference_split} images of {first.dataset}"
    )
    print_line(console, title, "bold")
    table, notes = _table(records)
    console.print(table)
    for line in notes:
        print_line(console, line)
    echo_line(f"JSON {(run_folder / FRECHET_FOLDER).absolute()}")
    echo_line(f"Into the tables: robbench report {shlex.quote(str(run_folder))} --sizes")
    context.exit(CELLS_MISSING if any(record.status != "ok" for record in records) else 0)


def _table(records: "Sequence[FrechetRecord]") -> "tuple[Table, list[str]]":
    """The table, and its numbered notes: each once, however many rows it concerns."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("model", "attack"):
        table.add_column(name, overflow="fold")
    for name in ("value", "n", "n\nreference", "note"):
        table.add_column(name, justify="right", overflow="fold")
    numbers: dict[str, int] = {}
    for record in records:
        own = (*record.notes, *((record.reason,) if record.reason else ()))
        marks = [numbers.setdefault(note, len(numbers) + 1) for note in own]
        value = "not run" if record.value is None else f"{record.value:.4f}"
        counts = (f"{record.n:,}", f"{record.reference_n:,}", ",".join(f"{mark}" for mark in marks))
        table.add_row(record.model or "-", record.attack, value, *counts)
    return table, [f"{number}: {note}" for note, number in numbers.items()]


class _Progress:
    """A bar per set of images on a terminal; elsewhere one line when a set is done."""

    def __init__(self, console: Any) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        text = TextColumn("{task.description}", style="bold", markup=False)
        self._console, self._tasks = console, dict[str, Any]()
        self._bars = Progress(text, *columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> "_Progress":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def message(self, line: str) -> None:
        from robbench.core.terminal import print_line

        print_line(self._console, line)

    def advanced(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total)
        self._bars.update(self._tasks[what], completed=done)
        if done == total and not self._console.is_terminal:
            self.message(f"{what}: features of {count_noun(total, 'image')}")
