"""What a run prints while it works."""

import io
import re

import pytest
from rich.console import Console

from robbench.run.progress import LiveProgress, PlainProgress, run_progress
from robbench.specs import resolve_attack, threat_models
from robbench.store.records import CellRecord


def records(count: int) -> list[CellRecord]:
    attack = resolve_attack("pgd20", "digits", threat_models())
    return [
        CellRecord(
            hash="a" * 64,
            model=f"model-{number}",
            defense="d",
            dataset="digits",
            dataset_revision="b" * 64,
            seed=0,
            attack=attack,
            model_sha256="c" * 64,
            engine="robbench engine 1",
        )
        for number in range(count)
    ]


def screen(terminal: bool, height: int = 40) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=120, height=height), stream


def test_plain_lines_away_from_a_terminal() -> None:
    console, stream = screen(terminal=False)
    cells = records(2)
    with run_progress(console, cells, 200) as progress:
        assert isinstance(progress, PlainProgress)
        progress.started(0, cells[0], 0)
        progress.advanced(0, 120, "accuracy 25.00 %")
        progress.ended(0, cells[0], 200, "accuracy 25.00 %")
        progress.started(1, cells[1], 120)
        failed = cells[1].model_copy(update={"status": "failed", "error": "it [broke]"})
        progress.ended(1, failed, 120, "accuracy 41.67 %")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[1/2] model-0 x pgd20: 200 samples"
    assert lines[1].startswith("[1/2] model-0 x pgd20: accuracy 25.00 % of 200, ")
    assert lines[2] == "[2/2] model-1 x pgd20: 200 samples, 120 of them in the ledger"
    assert lines[3].startswith("[2/2] model-1 x pgd20: failed (it [broke]), ")
    assert len(lines) == 4


def test_live_rows_on_a_terminal() -> None:
    console, stream = screen(terminal=True)
    cells = records(2)
    with run_progress(console, cells, 200) as progress:
        assert isinstance(progress, LiveProgress)
        progress.started(0, cells[0], 0)
        progress.ended(0, cells[0], 200, "accuracy 25.00 %")
        progress.started(1, cells[1], 0)
        progress.advanced(1, 120, "accuracy 25.00 %")
    text = stream.getvalue().rsplit("model-0", 1)[1]
    assert "200/200" in text
    assert "25.00 %" in text
    assert "120/200" in text


@pytest.mark.parametrize("running", [0, 49, 99])
def test_the_running_row_is_visible_on_a_small_terminal(running: int) -> None:
    console, stream = screen(terminal=True, height=12)
    cells = records(100)
    with LiveProgress(console, cells, 10) as progress:
        progress.started(running, cells[running], 3)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    shown = [line for line in text.splitlines() if f"model-{running} " in line]
    assert any("3/10" in line for line in shown)
    window = 12 - 2
    assert window <= sum(f"model-{number} " in text for number in range(100)) <= 2 * window


def test_overlapping_cells_have_their_own_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 15.0, 22.0])
    monkeypatch.setattr("robbench.run.progress.time.monotonic", lambda: next(clock))
    console, stream = screen(terminal=False)
    cells = records(2)
    progress = PlainProgress(console, cells, 10)
    for number in (0, 1):
        progress.started(number, cells[number], 0)
    for number in (0, 1):
        progress.ended(number, cells[number], 10, "accuracy 50.00 %")
    lines = stream.getvalue().splitlines()
    assert [line.split(", ")[-1] for line in lines[2:]] == ["5.0 s", "10.0 s"]
