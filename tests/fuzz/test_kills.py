"""A run killed at any moment and completed says what an undisturbed run says."""

import multiprocessing
import time
from pathlib import Path

from fuzzing import RUN, assert_same_verdicts, attacked, cases
from multiprocessing_run import run_command

from robbench.store.ledger import load_run

KILLS, MOST_A_RUN = 60, 3  # in all; of one run, before it is completed


def test_random_kills(tmp_path: Path) -> None:
    """SIGKILL at a random moment, one to three times, then the same command to its end. The processes are forked from
    one that has imported everything: nearly all of their time is the run's own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["multiprocessing_run"])
    options = ("--n", "48", "--keep-examples", "4", "--batch-size", "8")
    expected = load_run(attacked(tmp_path / "undisturbed", "--batch-size", 8))

    def started(folder: Path) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=run_command, args=(["run", *RUN, *options, "--out", str(folder)],))
        process.start()
        return process

    begun = time.monotonic()
    warm = started(tmp_path / "warm")
    warm.join()
    assert warm.exitcode == 0
    seconds, left, alive = time.monotonic() - begun, 0, 0
    for number, rng in cases(KILLS, 1):
        folder = tmp_path / f"run-{number - left}"
        process = started(folder)
        process.join(rng.uniform(0, 1.1) * seconds)
        alive += process.is_alive()
        process.kill()
        process.join()
        left += 1
        if left < rng.integers(1, MOST_A_RUN + 1):
            continue
        assert_same_verdicts(load_run(attacked(folder, "--batch-size", 8)), expected)
        assert not list(folder.rglob("*.tmp")), "what a killed process left is removed by the next"
        left = 0
    assert alive, "no process was killed before its end"
