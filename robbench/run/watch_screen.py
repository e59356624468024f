"""`robbench watch` on a terminal, as lines, and as JSON."""

import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from rich import box
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from robbench.core.counting import count_noun
from robbench.core.terminal import Terminal, print_line
from robbench.run.watch import CellView, Snapshot, Watcher

STYLES = {"done": "green", "running": "cyan", "failed": "red", "missing": "dim"}
FAILURES = 3  # reasons shown below the live table
FIRST_LINES = 8  # largest number of lines of the live view that are not cells
NAMES_WIDTH = 22  # least characters for model and attack together, before other columns are dropped


def watch_run(watcher: Watcher, interval: float, console: Terminal) -> Snapshot:
    """Show a run every `interval` seconds until it has ended; returns its last state."""
    before, now = None, watcher.look()
    with Live(console=console, auto_refresh=False) if console.is_terminal else nullcontext() as live:
        while True:
            if live is not None:
                live.update(screen(now, console.height, console.width), refresh=True)
            else:
                _print_changes(before, now, console)
            if now.ended:
                return now
            time.sleep(interval)
            before, now = now, watcher.look()


def _print_changes(before: Snapshot | None, now: Snapshot, console: Terminal) -> None:
    for line in changes(before, now):
        print_line(console, line)


def show_once(now: Snapshot, console: Terminal) -> None:
    """Print the state of a run once, as the live view on a terminal, as lines elsewhere."""
    if console.is_terminal:
        console.print(screen(now, height=len(now.cells) + FIRST_LINES, width=console.width))
        return
    _print_changes(None, now, console)


def changes(before: Snapshot | None, now: Snapshot) -> Iterator[str]:
    """Lines that describe the changes since `before`; the whole state where that is None."""
    if not now.begun:
        if before is None or before.begun:
            yield waiting_text(now)
        return
    if before is None or not before.begun:
        yield summary_text(now)
        yield from (
            _cell_line(now, number) for number, cell in enumerate(now.cells) if cell.state != "missing"
        )
        yield f"{speed_text(now, time.time())}."
    else:
        yield from _cell_changes(before, now)
    if before is None or before.writing != now.writing or before.begun != now.begun:
        yield f"{writer_text(now)}."
    if now.damaged and (before is None or before.damaged != now.damaged):
        yield damaged_text(now)
    if now.ended:
        yield end_text(now)


def _cell_changes(before: Snapshot, now: Snapshot) -> Iterator[str]:
    known = {cell.name: cell for cell in before.cells}
    if [*known] != [cell.name for cell in now.cells]:
        yield f"Another plan: {summary_text(now)}"
    for number, cell in enumerate(now.cells):
        old = known.get(cell.name)
        if old is None or (old.state, old.done, old.score) != (cell.state, cell.done, cell.score):
            left = f", about {duration(now.remaining)} to go" if _is_moving(now) else ""
            yield _cell_line(now, number) + left


def _cell_line(now: Snapshot, number: int) -> str:
    cell = now.cells[number]
    text = f"[{number + 1}/{len(now.cells)}] {cell.name}: {cell.state}, {cell.done} of {cell.n}"
    parts = [text, score_text(cell)]
    return ", ".join(part for part in parts if part) + (f" ({one_line(cell.error)})" if cell.error else "")


def _is_moving(now: Snapshot) -> bool:
    return now.remaining is not None and not now.settled and now.writing is not False


def waiting_text(now: Snapshot) -> str:
    """The line for a folder without a run."""
    held = ", but a process holds the lock: a run is about to begin" if now.writing else ""
    return f"Waiting for a run: no run.yaml in {now.folder.absolute()} yet{held}."


def summary_text(now: Snapshot) -> str:
    """ "digits, n = 360: 8 cells, 3 done, 1 running, 0 failed, 4 missing; 1,320 of 2,880 samples"."""
    states = ", ".join(f"{now.count(state)} {state}" for state in ("done", "running", "failed", "missing"))
    samples = f"{sum(c.done for c in now.cells):,} of {sum(c.n for c in now.cells):,} samples"
    return f"{now.dataset}, n = {now.n}: {count_noun(len(now.cells), 'cell')}, {states}; {samples}"


def writer_text(now: Snapshot) -> str:
    """Whether a process is writing, as far as this machine knows."""
    if now.writing:
        return "A run is writing"
    if now.writing is None:
        return "This system does not tell whether a run is writing; the age of the last shard does"
    if now.settled:
        return "Nobody is writing"
    return "Nobody on this machine is writing; run the same `robbench run` again to resume, unless it goes on elsewhere"


def speed_text(now: Snapshot, at: float) -> str:
    """Rate, time to go and age of the last shard."""
    parts = []
    if now.rate is not None and not now.settled:
        parts.append(f"{now.rate:.3g} samples/s in the latest session")
    if now.remaining is not None and _is_moving(now):
        left_out = (
            f", without {count_noun(now.unknown, 'cell')} no shard tells the speed of" if now.unknown else ""
        )
        parts.append(f"about {duration(now.remaining)} to go{left_out}")
    age = (
        "no shard yet"
        if now.last_shard is None
        else f"last shard {duration(max(at - now.last_shard, 0))} ago"
    )
    return "; ".join([*parts, age])


def damaged_text(now: Snapshot) -> str:
    """The line on damaged shards."""
    return f"{count_noun(now.damaged, 'damaged shard')}; the next run quarantines what is damaged and computes it again"


def end_text(now: Snapshot) -> str:
    """The last line: whether cells failed."""
    failed = now.count("failed")
    if not failed:
        return f"Done: {count_noun(len(now.cells), 'cell')}."
    return f"Ended: {failed} of {count_noun(len(now.cells), 'cell')} failed; the others are done."


def one_line(text: str) -> str:
    """`text` with single spaces for all white space."""
    return " ".join(text.split())


def score_text(cell: CellView) -> str:
    """ "robust accuracy 57.2 [52.0, 62.3] %", with "so far" over a part of the samples; "" without any."""
    what = (cell.measure or "accuracy") if cell.target != "flow" else "mean"
    return _number_text(cell) if cell.score is None else f"{what} {_number_text(cell)}"


def _number_text(cell: CellView, with_interval: bool = True) -> str:
    """The score without its name; without the interval also without "so far" and the unit of a flow."""
    if cell.score is None:
        return "no finite NLL" if cell.done else ""
    digits, unit = (".1f", " %") if cell.target != "flow" else (".4g", " bits/dim")
    if not with_interval:
        return f"{cell.score:{digits}}" + (unit if cell.target != "flow" else "")
    known = cell.lower is not None and cell.upper is not None
    interval = f" [{cell.lower:{digits}}, {cell.upper:{digits}}]" if known else ""
    return f"{cell.score:{digits}}{interval}{unit}" + (" so far" if cell.partial else "")


def duration(seconds: float | None) -> str:
    """ "8 s", "12 min", "3 h 05 min"."""
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def screen(now: Snapshot, height: int = 40, width: int = 120, at: float | None = None) -> Group:
    """The live view: totals, one line per cell around the running ones where not all fit, failures, the end."""
    if not now.begun:
        return Group(Text(waiting_text(now)))
    rows = max(height - FIRST_LINES, 1)
    first = _first_row(now.cells, rows)
    shown = now.cells[first : first + rows]
    lines: list[Text | Table] = [
        Text(summary_text(now), style="bold"),
        Text(writer_text(now), style="" if now.writing or now.settled else "yellow"),
        Text(speed_text(now, time.time() if at is None else at)),
        _cell_table(shown, width),
    ]
    if len(shown) < len(now.cells):
        lines.append(Text(f"cells {first + 1} to {first + len(shown)} of {len(now.cells)}", style="dim"))
    lines += [Text(damaged_text(now), style="yellow")] if now.damaged else []
    failures = [f"{cell.name}: {one_line(cell.error)}" for cell in now.cells if cell.error]
    lines += [Text(line, style="red", overflow="ellipsis", no_wrap=True) for line in failures[:FAILURES]]
    lines += [Text(end_text(now), style="bold")] if now.ended else []
    return Group(*lines)


def _first_row(cells: Sequence[CellView], rows: int) -> int:
    """Index of the first shown cell, so that the first unsettled one is in the middle."""
    position = next((k for k, cell in enumerate(cells) if cell.state in ("running", "missing")), 0)
    return max(min(position - rows // 2, len(cells) - rows), 0)


def _cell_table(cells: Sequence[CellView], width: int) -> Table:
    """One line per cell. Narrow terminals lose seconds first, then intervals, then samples; names are cut, scores
    never, since a part of a score would be another number."""
    columns: dict[str, list[str]] = {"state": [cell.state for cell in cells]}
    columns["samples"] = [f"{cell.done}/{cell.n}" for cell in cells]
    columns["seconds"] = [f"{cell.seconds:.1f}" for cell in cells]
    columns["score"] = [_number_text(cell) for cell in cells]
    without = [_number_text(cell, with_interval=False) for cell in cells]
    if width < 100:
        del columns["seconds"]
    if _names_width(columns, width) < NAMES_WIDTH:
        columns["score"] = without
    if _names_width(columns, width) < NAMES_WIDTH:
        del columns["samples"]
    attack = min(max((len(cell.attack) for cell in cells), default=0), _names_width(columns, width) // 3)
    attack = max(attack, len("attack"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    most = {"model": max(_names_width(columns, width) - attack, len("model")), "attack": attack}
    for title, wide in most.items():
        table.add_column(title, overflow="ellipsis", no_wrap=True, max_width=wide)
    for title, texts in columns.items():
        table.add_column(title, justify="right", no_wrap=True, min_width=_width(title, texts))
    for cell, *rest in zip(cells, *columns.values(), strict=True):
        values = [Text(text, style=STYLES[cell.state] if k == 0 else "") for k, text in enumerate(rest)]
        table.add_row(Text(cell.model), Text(cell.attack), *values)
    return table


def _names_width(columns: dict[str, list[str]], width: int) -> int:
    """Width that `columns` leave for model and attack; two spaces follow each column."""
    return width - sum(_width(title, texts) + 2 for title, texts in columns.items()) - 2


def _width(title: str, texts: list[str]) -> int:
    return max(7, *map(len, [title, *texts]))


def snapshot_json(now: Snapshot) -> dict[str, Any]:
    """The state as the object that docs/living.md describes, every number in full."""
    fields = asdict(now)
    cells = [{**asdict(cell), "partial": cell.partial} for cell in now.cells]
    ended = {"begun": now.begun, "settled": now.settled, "ended": now.ended}
    return {**fields, "folder": str(now.folder), "cells": cells, **ended}
