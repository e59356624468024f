"""A run on a disk that fills up ends with one line, loses nothing, and is completed when there is room."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import RUN, assert_no_other_verdicts, assert_same_verdicts, attacked, cases, command

from robbench.core.errors import UserError
from robbench.store.ledger import load_run

DISKS = 10


@contextlib.contextmanager
def disk(place: Path, kilobytes: int) -> Iterator[Path]:
    """A file system of so many kilobytes at `place`."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module", autouse=True)
def can_mount(tmp_path_factory: pytest.TempPathFactory) -> None:
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        with disk(tmp_path_factory.mktemp("mount") / "tried", 64):
            pass
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no small file system can be mounted here: {error}")


def test_full_disks(tmp_path: Path, undisturbed: Path) -> None:
    expected, refused = load_run(undisturbed), 0
    needed = sum(path.stat().st_size for path in undisturbed.rglob("*")) // 1024
    for number, rng in cases(DISKS, 2):
        with disk(tmp_path / f"disk-{number}", int(rng.integers(8, needed + 64))) as place:
            folder = place / "run"
            result = command("run", *RUN, "--n", 48, "--keep-examples", 4, "--out", folder)
            assert result.exit_code in (0, 2), result.output
            refused += result.exit_code == 2
            if result.exit_code == 2:
                assert "No space left" in result.stderr or "disk" in result.stderr, result.stderr
                with contextlib.suppress(UserError):  # before run.yaml there is no run to read
                    assert_no_other_verdicts(load_run(folder), expected)
            subprocess.run(["mount", "-o", f"remount,size={4 * needed + 4096}k", str(place)], check=True)
            assert_same_verdicts(load_run(attacked(folder)), expected)
    assert refused, "no disk was full"
