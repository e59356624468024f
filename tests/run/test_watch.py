"""A run seen from outside: what is shown, of real processes too, and that looking changes nothing."""

import fcntl
import io
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner
from processes import finished, started
from scipy.stats import binomtest

from robbench.cli.app import main
from robbench.cli.run import run_matrix
from robbench.core.errors import UserError
from robbench.core.terminal import Terminal
from robbench.run.request import RunRequest
from robbench.run.watch import CellView, ShardFile, Snapshot, Speed, Watcher
from robbench.run.watch_screen import changes, duration, screen, speed_text, watch_run, writer_text
from robbench.store.folder import lock_folder, lock_is_held
from robbench.store.ledger import Ledger, load_run
from robbench.store.records import CellRecord

SLOW = """
name: slow
space: image
norm: linf
description: long enough to be watched
budgets:
  digits: {epsilon: 0.2}
attacks:
  slow-pgd: {algorithm: pgd, parameters: {steps: 400, relative_step_size: 0.1}}
"""


@pytest.fixture(scope="module")
def finished_run(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two models x two attacks on 250 samples, all done. Read only."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    fields = {"attacks": ("fgsm", "pgd10"), "models": ("tiny-a", "tiny-b"), "zoo": tiny_zoo}
    run_matrix(RunRequest(**fields, n=250, device="cpu"), folder)  # type: ignore[arg-type]
    return folder


@pytest.fixture
def copied(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


def invoked(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["watch", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def contents(folder: Path) -> dict[Path, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ------------------------------------------------------------------------------------------------ one look
def test_a_look_is_what_the_ledger_says_and_changes_nothing(finished_run: Path) -> None:
    before = contents(finished_run)
    snapshot = Watcher(finished_run).look()
    assert contents(finished_run) == before
    assert snapshot.ended
    for view, result in zip(snapshot.cells, load_run(finished_run).cells, strict=True):
        correct, n = int(result.rows["robust"].sum()), len(result.rows)
        assert (view.model, view.attack, view.done, view.state) == (
            result.cell.model,
            result.cell.attack.label,
            250,
            "done",
        )
        assert view.score == pytest.approx(100 * correct / n)
        interval = binomtest(correct, n).proportion_ci(method="wilson")
        assert (view.lower, view.upper) == pytest.approx((100 * interval.low, 100 * interval.high))
        assert not view.partial


def test_json_has_every_number_in_full(finished_run: Path) -> None:
    code, output, _ = invoked(finished_run, "--once", "--json")
    found = json.loads(output)
    assert code == 0
    cells = Watcher(finished_run).look().cells
    assert [cell["lower"] for cell in found["cells"]] == [cell.lower for cell in cells]
    assert (found["dataset"], found["n"], found["begun"], found["ended"]) == ("digits", 250, True, True)
    assert {"folder", "writing", "last_shard", "damaged", "rate", "remaining", "unknown"} <= set(found)


def test_partial_cells_are_said_to_be_partial(copied: Path) -> None:
    cells = sorted(copied.glob("cells/*"))
    for path in sorted(cells[0].glob("shard-*"))[1:]:
        path.unlink()
    for path in cells[1].glob("shard-*"):
        path.unlink()
    snapshot = Watcher(copied).look()
    assert sorted(cell.state for cell in snapshot.cells) == ["done", "done", "missing", "running"]
    assert not snapshot.ended
    assert not snapshot.settled
    lines = list(changes(None, snapshot))
    assert "4 cells, 2 done, 1 running, 0 failed, 1 missing; 620 of 1,000 samples" in lines[0]
    assert sum("120 of 250" in line and "so far" in line for line in lines) == 1
    assert any(line.startswith("Nobody on this machine is writing; run the same") for line in lines)
    running = next(cell for cell in snapshot.cells if cell.state == "running")
    assert running.partial


def changed(path: Path, **changes: object) -> None:
    """Another record in place of a cell.json, as robbench writes it."""
    record = load_cell(path).model_copy(update=changes)
    Ledger(path.parent.parent.parent).write_cell(record)


def load_cell(path: Path) -> CellRecord:
    cell = json.loads(path.read_text())["hash"]
    record = Ledger(path.parent.parent.parent).read_cell(cell)
    assert record is not None
    return record


def test_a_cell_that_is_begun_is_running_before_its_first_shard(copied: Path) -> None:
    cells = sorted(copied.glob("cells/*"))[:2]
    for cell in cells:
        changed(cell / "cell.json", status="running")
        for shard in cell.glob("shard-*"):
            shard.unlink()
    written = (copied / "run.yaml").stat().st_mtime
    os.utime(cells[0] / "cell.json", (written - 1, written - 1))
    os.utime(cells[1] / "cell.json", (written + 1, written + 1))
    with lock_folder(copied, ""):
        states = [cell.state for cell in Watcher(copied).look().cells]
        assert sorted(states) == ["done", "done", "missing", "running"]
    assert Watcher(copied).look().count("missing") == 2


def test_failed_cells_end_the_watch_with_3_and_their_reason(copied: Path) -> None:
    record = next(copied.glob("cells/*/cell.json"))
    changed(record, status="failed", error="it left its ball")
    for shard in record.parent.glob("shard-*"):
        shard.unlink()
    code, output, _ = invoked(copied)
    assert code == 3
    assert "it left its ball" in invoked(copied, "--once", "--json")[1]
    assert output.splitlines()[-1] == "Ended: 1 of 4 cells failed; the others are done."


def test_half_written_damaged_and_vanishing_files(copied: Path) -> None:
    first, second = sorted(copied.glob("cells/*/shard-*"))[:2]
    (first.parent / f".{first.name}.abcdefgh.tmp").write_bytes(b"PAR1 half")
    watcher = Watcher(copied)
    assert watcher.look().ended
    whole, text = first.read_bytes(), (first.parent / "cell.json").read_text()
    first.write_bytes(whole[:200])
    second.unlink()
    damaged = watcher.look()
    assert damaged.damaged == 1
    assert not damaged.settled
    assert any("1 damaged shard;" in line for line in changes(None, damaged))
    first.write_bytes(whole)  # replaced by a good one: read again
    (first.parent / "cell.json").unlink()
    again = watcher.look()
    assert again.damaged == 0
    assert again.count("done") == 3  # without its record a cell is not done, whatever its shards say
    (first.parent / "cell.json").write_text(text + "x")
    assert any("cell.json" in cell.error for cell in watcher.look().cells)


def test_a_folder_moved_aside_while_it_is_watched_waits_again(copied: Path) -> None:
    watcher = Watcher(copied)
    begun = watcher.look()
    (copied / "superseded-1").mkdir()
    for name in ("run.yaml", "cells", "cards"):
        (copied / name).rename(copied / "superseded-1" / name)
    for name in (
        "leaderboard.csv",
        "leaderboard.html",
        "leaderboard.md",
        "leaderboard-wide.csv",
        "originals.npz",
    ):
        (copied / name).unlink()
    shutil.rmtree(copied / "superseded-1")
    waiting = watcher.look()
    assert not waiting.begun
    assert list(changes(begun, waiting)) == [f"Waiting for a run: no run.yaml in {copied} yet."]


@pytest.mark.parametrize("name", ["file", "foreign"])
def test_what_can_never_be_a_run_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").write_text("x")
    code, _, error = invoked(tmp_path / name)
    assert code == 2
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert "give the --out of a `robbench run`" in error
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "foreign", "thesis.tex"]


def test_a_damaged_run_file_is_an_error(copied: Path) -> None:
    (copied / "run.yaml").write_text("dataset: [")
    code, _, error = invoked(copied)
    assert code == 2
    assert "run.yaml" in error


def test_an_interval_that_is_no_number_is_refused(finished_run: Path) -> None:
    code, _, error = invoked(finished_run, "--interval", "nan")
    assert (code, error.count("\n")) == (2, 1)
    assert "--interval nan" in error


def test_json_needs_once(finished_run: Path) -> None:
    code, _, error = invoked(finished_run, "--json")
    assert code == 2
    assert "--once" in error


# ----------------------------------------------------------------------------------------------------- the lock
def test_the_lock_is_seen_and_never_taken(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert lock_is_held(folder) is False
    with lock_folder(folder, ""):
        assert lock_is_held(folder) is True
        with pytest.raises(UserError, match="another robbench run is writing"), lock_folder(folder, "or not"):
            pass
    assert lock_is_held(folder) is False
    with (folder / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody who looked has kept it
    assert lock_is_held(folder, tmp_path / "absent") is None


def test_a_lock_on_another_file_or_only_waited_for_is_none(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    status = (tmp_path / ".lock").stat()
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    table = tmp_path / "locks"
    for line, held in (
        (f"1: FLOCK  ADVISORY  WRITE 999999 {device}:{status.st_ino} 0 EOF", True),
        (f"1: -> FLOCK  ADVISORY  WRITE 999999 {device}:{status.st_ino} 0 EOF", False),
        (f"1: POSIX  ADVISORY  WRITE 999999 {device}:{status.st_ino} 0 EOF", False),
        (f"1: FLOCK  ADVISORY  WRITE 999999 {device}:{status.st_ino}7 0 EOF", False),
        (f"1: FLOCK  ADVISORY  WRITE 999999 ff:ff:{status.st_ino} 0 EOF", False),
    ):
        table.write_text(line + "\n")
        assert lock_is_held(tmp_path, table) is held, line


def test_another_device_number_counts_when_the_process_has_the_file_open(tmp_path: Path) -> None:
    """overlayfs and btrfs."""
    (tmp_path / ".lock").touch()
    inode, table = (tmp_path / ".lock").stat().st_ino, tmp_path / "locks"
    table.write_text(f"1: FLOCK  ADVISORY  WRITE {os.getpid()} ff:ff:{inode} 0 EOF\n")
    assert lock_is_held(tmp_path, table) is False
    with (tmp_path / ".lock").open():
        assert lock_is_held(tmp_path, table) is True


# ------------------------------------------------------------------------------------------------------- speed
def shard(samples: int, seconds: float, finished: float) -> ShardFile:
    return ShardFile({"worst-case": dict.fromkeys(range(samples), 1.0)}, seconds, finished)


def test_speed_of_one_worker_and_of_three() -> None:
    one = Speed.of([shard(100, 10.0, 1010.0), shard(100, 10.0, 1020.0)])
    assert one == Speed(samples=10.0, workers=1.0)
    three = Speed.of([shard(100, 10.0, 1010.0) for _ in range(3)])
    assert three == Speed(samples=30.0, workers=3.0)
    assert Speed.of([]) is None


def test_an_earlier_session_does_not_count_as_slowness() -> None:
    yesterday = [shard(100, 10.0, 1000.0), shard(100, 10.0, 1010.0)]
    today = [shard(50, 5.0, 90_000.0), shard(50, 5.0, 90_005.0)]
    assert Speed.of(yesterday + today) == Speed(samples=10.0, workers=1.0)


def cell(attack: str, done: int, seconds: float, model: str = "m") -> CellView:
    state = "done" if done == 100 else "running" if done else "missing"
    return CellView(model, attack, "classifier", state, done, 100, seconds)  # type: ignore[arg-type]


def test_time_to_go_from_own_shards_from_the_same_attack_or_said_to_be_unknown() -> None:
    from robbench.run.watch import _remaining

    own = cell("aa", 25, 50.0)  # 75 samples at 2 s
    known = [cell("pgd", 100, 10.0), cell("pgd", 0, 0.0, "other")]  # 100 samples at 0.1 s
    unknown = cell("square", 0, 0.0)
    assert _remaining([own, *known, unknown], Speed(1.0, 2.0)) == (pytest.approx(80.0), 1)
    assert _remaining([unknown], Speed(1.0, 1.0)) == (None, 1)
    assert _remaining([own], None) == (None, 0)
    assert _remaining([cell("pgd", 100, 10.0)], Speed(1.0, 1.0)) == (0.0, 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3600, "60 min"), (11_100, "3 h 05 min"), (None, "?")],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text


# -------------------------------------------------------------------------------------------------------- words
def a_snapshot(**fields: object) -> Snapshot:
    cells = (cell("pgd", 100, 10.0), cell("aa", 25, 50.0))
    return replace(Snapshot(Path("run"), "digits", 100, cells, writing=True), **fields)


def test_one_line_a_change_and_none_without() -> None:
    before = a_snapshot()
    assert list(changes(before, before)) == []
    more = replace(before, cells=(before.cells[0], replace(cell("aa", 50, 90.0), score=50.0)))
    assert list(changes(before, more)) == ["[2/2] m x aa: running, 50 of 100, accuracy 50.0 % so far"]
    stopped = list(changes(before, replace(before, writing=False)))
    assert len(stopped) == 1
    assert stopped[0].startswith("Nobody on this machine is writing; run the same `robbench run` again")
    other = list(changes(before, replace(before, cells=before.cells[:1])))
    assert other[0].startswith("Another plan: digits, n = 100: 1 cell, 1 done")


def test_a_system_that_does_not_tell_who_writes_is_said_to() -> None:
    unknown = a_snapshot(writing=None)
    assert "does not tell" in writer_text(unknown)
    assert not unknown.ended
    assert replace(unknown, cells=unknown.cells[:1]).ended


def test_time_to_go_is_shown_while_somebody_writes_only() -> None:
    running = a_snapshot(remaining=75.0, rate=2.5, unknown=1, last_shard=1000.0)
    rate, remaining, age = speed_text(running, 1007.0).split("; ")
    assert rate == "2.5 samples/s in the latest session"
    assert remaining == "about 75 s to go, without 1 cell no shard tells the speed of"
    assert age == "last shard 7 s ago"
    assert "to go" not in speed_text(replace(running, writing=False), 1007.0)
    assert speed_text(a_snapshot(), 0.0) == "no shard yet"


def drawn(snapshot: Snapshot, height: int = 40, width: int = 100) -> str:
    stream = io.StringIO()
    console = Terminal(file=stream, force_terminal=True, width=width, height=height, color_system=None)
    console.print(screen(snapshot, height, width, at=1007.0))
    return stream.getvalue()


def test_the_screen_shows_the_cells_around_the_running_one() -> None:
    cells = [cell("pgd", 100, 1.0, f"model-{k}") for k in range(60)] + [cell("pgd", 0, 0.0, "model-60")] * 30
    text = drawn(a_snapshot(cells=tuple(cells)), height=20)
    assert "model-60" in text
    assert "model-3 " not in text
    assert "cells 55 to 66 of 90" in text
    assert len(text.splitlines()) <= 20


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_screen_fits(width: int) -> None:
    failed = replace(cell("aa[bold]", 0, 0.0), state="failed", error="it [red]broke " * 20)
    text = drawn(a_snapshot(cells=(failed, cell("pgd", 25, 1.0)), damaged=2), width=width)
    assert max(map(len, text.splitlines())) <= width
    assert width < 80 or "aa[bold]" in text


def test_a_score_is_whole_on_the_narrowest_screen() -> None:
    one = replace(
        cell("a-long-attack@0.25", 25, 1.0, "a-model-with-a-long-name"), score=69.2, lower=60.4, upper=76.7
    )
    assert "69.2 [60.4, 76.7] % so far" in drawn(a_snapshot(cells=(one,)), width=80)
    assert drawn(a_snapshot(cells=(one,)), width=40).count("running   69.2 %\n") == 1


def test_an_error_cannot_steer_the_terminal() -> None:
    failed = replace(cell("aa", 0, 0.0), state="failed", error="it\x1b[2Jbroke\nhere")
    assert r"it\x1b[2Jbroke here" in drawn(a_snapshot(cells=(failed,)))
    assert r"m x aa: failed, 0 of 100 (it" in "".join(changes(None, a_snapshot(cells=(failed,))))


def test_a_plan_is_read_once_and_again_when_it_changes(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, read = Watcher(copied), []
    original = Ledger.read_run
    monkeypatch.setattr(Ledger, "read_run", lambda ledger: read.append(1) or original(ledger))
    assert [len(watcher.look().cells) for _ in range(3)] == [4, 4, 4]
    assert len(read) == 1
    (copied / "run.yaml").touch()
    watcher.look()
    assert len(read) == 2


def test_live_view_on_a_terminal_ends_with_the_run(finished_run: Path) -> None:
    stream = io.StringIO()
    console = Terminal(file=stream, force_terminal=True, width=100, height=40)
    assert watch_run(Watcher(finished_run), 0.1, console).ended
    assert "Done: 4 cells." in stream.getvalue()


# ----------------------------------------------------------------------------------------------- real processes
def test_a_run_started_elsewhere_killed_and_resumed(tiny_zoo: Path, tmp_path: Path) -> None:
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "slow.yaml").write_text(SLOW)
    folder = tmp_path / "run"
    options = ["--model", "tiny-a", "--attacks", "slow-pgd", "--zoo", tiny_zoo]
    command = ["run", *options, "--threat-models", tmp_path / "specs", "--out", folder, "--device", "cpu"]
    with ExitStack() as stack:
        with lock_folder(folder, "or wait"):  # a run that has begun, and not yet written its run.yaml
            watch = stack.enter_context(started("watch", folder, "--interval", "0.1"))
            wait_for(lambda: watch.stdout)
        run = stack.enter_context(started(*command))
        wait_for(lambda: "120 of 360" in watch.stdout or run.poll() is not None)
        assert run.poll() is None, run.stderr
        run.send_signal(signal.SIGKILL)
        run.wait()
        wait_for(lambda: "Nobody on this machine is writing" in watch.stdout)
        assert watch.poll() is None
        assert "A run is writing." in watch.stdout
        assert "so far" in watch.stdout
        code, _, errors = finished(*command)
        assert code == 0, errors
        assert watch.wait(60) == 0
        lines = watch.stdout.splitlines()
    assert lines[-1] == "Done: 1 cell."
    assert any(
        line.startswith("[1/1] tiny-a x slow-pgd: done, 360 of 360, robust accuracy ") for line in lines
    )
    assert lines.count("A run is writing.") == 2
    assert all(line != following for line, following in pairwise(lines))  # a line a change


def test_ctrl_c_ends_the_watch(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # A run that has begun, and not yet written its run.yaml.
    with lock_folder(folder, "or wait"), started("watch", folder, "--interval", "0.1") as watch:
        wait_for(lambda: watch.stdout)
        assert watch.stdout.startswith(
            f"Waiting for a run: no run.yaml in {folder} yet, but a process holds the lock"
        )
        watch.send_signal(signal.SIGINT)
        assert watch.wait(30) == 130
        assert "Traceback" not in watch.stderr
    assert [path.name for path in folder.iterdir()] == [".lock"]
