"""malloc's thresholds: they take effect (page faults), can be switched off, and never harm elsewhere."""

import ctypes
import json
import os
import subprocess
import sys

import pytest

from robbench.core import allocator
from robbench.core.allocator import AllocatorState, tune_allocator
from robbench.core.errors import UserError

GLIBC = (
    os.confstr("CS_GNU_LIBC_VERSION") if "CS_GNU_LIBC_VERSION" in getattr(os, "confstr_names", ()) else None
)
RECENT = GLIBC is not None and tuple(map(int, GLIBC.split()[1].split("."))) >= (2, 35)
ROUNDS, WARM_UP, MEGABYTES = 40, 20, 40
# Blocks of 40 MiB are above the largest threshold that glibc chooses on its own (32 MiB): by default each is mapped and
# faulted in anew, 256 page faults a MiB. Tuned, the heap grows for a few rounds and then serves all others.
PROGRAM = f"""
import json, resource, sys
from robbench.core.allocator import tune_allocator
if "torch" in sys.argv:
    import torch
    def block(): torch.ones({MEGABYTES} << 18)
else:  # the same malloc, without the seconds that torch takes to import
    def block(): b"x" * ({MEGABYTES} << 20)
found = tune_allocator()
again = tune_allocator()
for turn in range({ROUNDS}):
    if turn == {WARM_UP}:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(json.dumps([found.state, found == again, faults]))
"""


def clean_environment(**variables: str) -> dict[str, str]:
    """This process' environment without any setting of malloc."""
    ours = {*allocator.GLIBC_VARIABLES, allocator.VARIABLE, "GLIBC_TUNABLES", "LD_PRELOAD"}
    return {name: value for name, value in os.environ.items() if name not in ours} | variables


def measured(allocates: str, **variables: str) -> tuple[str, int]:
    """State and minor page faults of PROGRAM. allocates: torch or python."""
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, allocates],
        env=clean_environment(OMP_NUM_THREADS="1", **variables),
        capture_output=True,
        text=True,
        check=True,
    )
    state, idempotent, faults = json.loads(found.stdout)
    assert idempotent
    return state, faults


@pytest.mark.skipif(not RECENT, reason="malloc is not that of glibc 2.35 or later")
@pytest.mark.parametrize(
    ("allocates", "variables", "state", "mapped"),
    [
        ("torch", {}, "tuned", False),
        ("python", {"ROBBENCH_MALLOC": "tuned"}, "tuned", False),
        ("python", {"ROBBENCH_MALLOC": "default"}, "default", True),
        ("python", {"MALLOC_TOP_PAD_": "131072"}, "user", True),
        (
            "python",
            {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(1 << 30)},
            "user",
            False,
        ),
    ],
)
def test_page_faults(allocates: str, variables: dict[str, str], state: str, mapped: bool) -> None:
    found, faults = measured(allocates, **variables)
    every_page = (ROUNDS - WARM_UP) * MEGABYTES * 256  # pages of 4 KiB; transparent huge pages make it fewer
    assert found == state
    if mapped:
        assert faults > every_page / 600
    else:
        assert faults < every_page / 6000


def test_an_unknown_choice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBBENCH_MALLOC", "fast")
    with pytest.raises(UserError, match=r"ROBBENCH_MALLOC='fast' .* one of: default, tuned"):
        tune_allocator()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1"),
        ("MALLOC_MMAP_THRESHOLD_", "1"),
        ("MALLOC_TOP_PAD_", "1"),
        ("GLIBC_TUNABLES", "glibc.pthread.rseq=0:glibc.malloc.trim_threshold=1"),
    ],
)
def test_glibcs_own_variables_win(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    _forget_settings(monkeypatch)
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("ROBBENCH_MALLOC", "tuned")
    monkeypatch.setattr(allocator, "_raise_thresholds", _must_not_be_called)
    assert tune_allocator() == AllocatorState("user", f"malloc as set by {name}")


def test_other_tunables_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget_settings(monkeypatch)
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.pthread.rseq=0")
    monkeypatch.setattr(allocator, "_glibc", lambda: None)
    assert tune_allocator().state == "unsupported"


@pytest.mark.parametrize("error", [ValueError, AttributeError, OSError, TypeError])
def test_other_platforms_are_left_alone(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    """What os.confstr and ctypes.CDLL raise on musl, macOS and Windows."""

    def absent(_name: object) -> None:
        raise error("absent")

    _forget_settings(monkeypatch)
    monkeypatch.setattr(allocator.ctypes, "CDLL", absent)
    monkeypatch.setattr(allocator, "_raise_thresholds", _must_not_be_called)
    assert tune_allocator().state == "unsupported"


class Refusing:
    """A mallopt that accepts no mmap threshold above `limit`, or nothing."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.set: dict[int, int] = {}

    def mallopt(self, parameter: int, value: int) -> int:
        if self.limit == 0 or (parameter == allocator.M_MMAP_THRESHOLD and value > self.limit):
            return 0
        self.set[parameter] = value
        return 1


def test_old_glibc_gets_the_largest_threshold_that_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    _forget_settings(monkeypatch)
    libc = Refusing(32 << 20)
    monkeypatch.setattr(allocator, "_glibc", lambda: libc)
    state = tune_allocator()
    assert state.state == "tuned"
    assert "maps blocks from 32 MiB" in state.reason
    assert libc.set == {-1: 1 << 30, -2: 64 << 20, -3: 32 << 20}
    monkeypatch.setattr(allocator, "_glibc", lambda: Refusing(0))
    assert tune_allocator() == AllocatorState("unsupported", "glibc's mallopt refused the thresholds")


@pytest.mark.skipif(not GLIBC, reason="malloc is not glibc's")
def test_another_malloc_in_its_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, name: str | None) -> None:
            self.malloc = ctypes.c_void_p(1 if name is None else 2)

    monkeypatch.setattr(allocator.ctypes, "CDLL", Library)
    assert allocator._glibc() is None


def _forget_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*allocator.GLIBC_VARIABLES, allocator.VARIABLE, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)


def _must_not_be_called(_libc: object) -> AllocatorState:
    raise AssertionError("malloc was changed")
