"""What a run prints while it works."""

import io
import re
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from robbench.cli.run import run_matrix
from robbench.run import executor
from robbench.run import progress as progress_module
from robbench.run.progress import LiveProgress, PlainProgress, run_progress, speed_text
from robbench.run.request import RunRequest
from robbench.specs import resolve_attack, threat_models
from robbench.store.ledger import load_run
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
        progress.on_start(0, cells[0], 0)
        progress.on_advance(0, 120, "accuracy 25.00 %")
        progress.on_end(0, cells[0], 200, "accuracy 25.00 %")
        progress.on_start(1, cells[1], 120)
        failed = cells[1].model_copy(update={"status": "failed", "error": "it [broke]"})
        progress.on_end(1, failed, 120, "accuracy 41.67 %")
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
        progress.on_start(0, cells[0], 0)
        progress.on_end(0, cells[0], 200, "accuracy 25.00 %")
        progress.on_start(1, cells[1], 0)
        progress.on_advance(1, 120, "accuracy 25.00 %")
    text = stream.getvalue().rsplit("model-0", 1)[1]
    assert "200/200" in text
    assert "25.00 %" in text
    assert "120/200" in text


@pytest.mark.parametrize("running", [0, 49, 99])
def test_the_running_row_is_visible_on_a_small_terminal(running: int) -> None:
    console, stream = screen(terminal=True, height=12)
    cells = records(100)
    with LiveProgress(console, cells, 10) as progress:
        progress.on_start(running, cells[running], 3)
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
        progress.on_start(number, cells[number], 0)
    for number in (0, 1):
        progress.on_end(number, cells[number], 10, "accuracy 50.00 %")
    lines = stream.getvalue().splitlines()
    assert [line.split(", ")[-1] for line in lines[2:]] == ["5.0 s", "10.0 s"]


def test_a_line_every_thirty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 10.0, 29.9, 40.0, 60.0, 75.0, 80.0])
    monkeypatch.setattr("robbench.run.progress.time.monotonic", lambda: next(clock))
    console, stream = screen(terminal=False)
    (cell,) = records(1)
    progress = PlainProgress(console, [cell], 200)
    progress.on_start(0, cell, 20)
    for done in (30, 50, 60, 70, 95):
        progress.on_advance(0, done, "-")
    progress.on_end(0, cell, 200, "accuracy 50.00 %")
    assert stream.getvalue().splitlines()[1:-1] == [
        "[1/1] model-0 x pgd20: 60 of 200 samples, 1 per second, 2.3 min remaining",
        "[1/1] model-0 x pgd20: 95 of 200 samples, 1 per second, 1.8 min remaining",
    ]


def test_speeds_in_words() -> None:
    assert speed_text(0.0, 5) == ""
    assert speed_text(0.05, 100) == ", 3 per minute, 33.3 min remaining"
    assert speed_text(2.0, 20) == ", 2 per second, 10.0 s remaining"
    assert speed_text(0.01, 100) == ", 0.6 per minute, 2.8 h remaining"


@pytest.mark.parametrize(("attack", "steps"), [("pgd20", 6), ("aa", 2)])
def test_progress_within_a_shard_changes_no_number(
    attack: str,
    steps: int,
    tiny_zoo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    request = RunRequest((attack,), models=("tiny-a",), n=20, zoo=tiny_zoo, device="cpu")
    assert run_matrix(request, tmp_path / "silent") == 0
    capsys.readouterr()
    monkeypatch.setattr(executor, "SHOW_EVERY", 0.0)
    monkeypatch.setattr(progress_module, "LINE_EVERY", 0.0)
    assert run_matrix(request, tmp_path / "loud") == 0
    shown = [int(one) for one in re.findall(r": (\d+) of 20 samples", capsys.readouterr().out)]
    assert len({*shown}) >= steps, "one shard, many steps"
    assert shown == sorted(shown)
    assert max(shown) <= 20
    one, two = (load_run(tmp_path / name).cells[0] for name in ("silent", "loud"))
    assert one.cell.hash == two.cell.hash
    pd.testing.assert_frame_equal(one.rows, two.rows)


def test_a_terminal_that_went_away_is_no_failed_attack(tiny_zoo: Path, tmp_path: Path, monkeypatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(executor, "SHOW_EVERY", 0.0)
    monkeypatch.setattr(executor, "score_text", broken)  # within a search
    with pytest.raises(BrokenPipeError):  # and after it
        run_matrix(
            RunRequest(("fgsm",), models=("tiny-a",), n=5, zoo=tiny_zoo, device="cpu"), tmp_path / "run"
        )
    assert load_run(tmp_path / "run").cells[0].cell.error is None
