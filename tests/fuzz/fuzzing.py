"""What the fuzzers share: how many cases, their random numbers, small runs, and what every command owes its user.

ROBBENCH_FUZZ scales the number of cases: 1 (default) for all of them, 0.05 for a look at whether they work.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from click.testing import CliRunner, Result

from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.results.tables import leaderboard
from robbench.store.ledger import load_run
from robbench.store.records import Run

T = TypeVar("T")
RUN = ("--model", "digits-standard", "--model", "digits-at", "--attacks", "fgsm,pgd20,apgd-ce")
# Columns of a row that say what was found; how long it took is nobody's verdict.
ROW_KEYS = ("model", "attack", "metric")


def cases(full: int, suite: int) -> Iterator[tuple[int, np.random.Generator]]:
    """Number and random generator of each case; `full` of them at ROBBENCH_FUZZ=1, at least two. suite: its seed."""
    share = float(os.environ.get("ROBBENCH_FUZZ", "1"))
    for number in range(max(2, round(full * share))):
        yield number, np.random.default_rng([suite, number])


def command(*arguments: object) -> Result:
    """A command in this process. A failure is one line on stderr with an exit code of its own, never a traceback."""
    result = CliRunner().invoke(main, [str(part) for part in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), (
        arguments,
        repr(result.exception),
    )
    assert "Traceback" not in result.output, (arguments, result.output)
    if result.exit_code == 2:
        errors = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
        assert len(errors) == 1, (arguments, result.output)
        assert result.stderr.rstrip().endswith(errors[0]), (arguments, result.output)
    return result


def attacked(folder: Path, *options: object) -> Path:
    """The run of all fuzzers in `folder`: two models, three attacks, several shards a cell."""
    result = command("run", *RUN, "--n", 48, "--keep-examples", 4, *options, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder


def copied(folder: Path, place: Path) -> Path:
    """A fresh copy of a run at `place`."""
    shutil.rmtree(place, ignore_errors=True)
    return Path(shutil.copytree(folder, place))


def verdicts(run: Run) -> dict[tuple[str, str], pd.DataFrame]:
    """The rows of every cell without what may differ from one computation to the next."""
    return {
        (result.cell.model_name, result.cell.attack.label): result.rows.reset_index(drop=True)
        for result in run.cells
    }


def assert_same_verdicts(found: Run, expected: Run) -> None:
    """All rows are there and equal."""
    ours, theirs = verdicts(found), verdicts(expected)
    assert ours.keys() == theirs.keys()
    for key, rows in theirs.items():
        pd.testing.assert_frame_equal(ours[key], rows, check_exact=True)


def assert_no_other_verdicts(found: Run, expected: Run) -> None:
    """Rows may be missing, and their cell is not done then; those that are there say what they said."""
    theirs = verdicts(expected)
    for key, rows in verdicts(found).items():
        wanted = theirs[key].set_index("sample_id", drop=False)
        assert set(rows["sample_id"]) <= set(wanted.index), key
        same = wanted.loc[rows["sample_id"]].reset_index(drop=True)
        pd.testing.assert_frame_equal(rows, same, check_exact=True)


def numbers(run: Run) -> dict[tuple[object, ...], object]:
    """Every number that the tables print, by what it is."""
    rows = leaderboard(run)
    return {
        tuple(getattr(row, key) for key in (*ROW_KEYS, "threat_model", "epsilon")): row.value for row in rows
    }


def printed(folder: Path) -> dict[tuple[object, ...], object]:
    """`numbers` of a run folder."""
    return numbers(load_run(folder))


def allowed(read: Callable[[], T]) -> T | None:
    """What `read` returns; None where it refuses, in one line that a person can read."""
    try:
        return read()
    except UserError as error:
        line = str(error)
    assert "\n" not in line
    assert len(line) < 5000
    return None


def files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """The files of a folder, in an order of their own."""
    return sorted(path for pattern in patterns for path in folder.rglob(pattern) if path.is_file())


def flipped(content: bytes, rng: np.random.Generator, bits: int = 1) -> bytes:
    """`content` with so many bits turned."""
    changed = bytearray(content)
    for _ in range(bits):
        position = int(rng.integers(len(changed)))
        changed[position] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def chosen(rng: np.random.Generator, options: Sequence[Any]) -> Any:
    return options[int(rng.integers(len(options)))]
