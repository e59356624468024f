"""Tuning of glibc's malloc to keep freed memory, so that large tensors are not mapped, zeroed and unmapped at every
use.

By default glibc gives blocks above M_MMAP_THRESHOLD (at most 32 MiB) and a free heap top above M_TRIM_THRESHOLD (at
most 64 MiB) back to the kernel at once. A loop that allocates the same activations again and again, as attacks and
training do, then pays a page fault every 4 KiB each time. `tune_allocator` raises both thresholds and M_TOP_PAD
(the step in which the heap grows) with mallopt(3), for the whole process and those it forks.

The cost: resident memory stays near its peak instead of falling between batches, up to `TRIM_THRESHOLD` at the top of
the heap and without limit below blocks still in use. The peak itself grows by fragmentation only.

The user can change it: ROBBENCH_MALLOC=default leaves malloc alone, and glibc's own variables (MALLOC_TRIM_THRESHOLD_,
MALLOC_MMAP_THRESHOLD_, MALLOC_TOP_PAD_, MALLOC_MMAP_MAX_, glibc.malloc in GLIBC_TUNABLES) win. Nothing happens on
musl, macOS, Windows, or under another allocator (LD_PRELOAD of jemalloc, tcmalloc, ...). GPU memory is not touched.
"""

import ctypes
import os
from dataclasses import dataclass
from typing import Literal

from robbench.core.errors import UserError

VARIABLE = "ROBBENCH_MALLOC"
CHOICES = ("default", "tuned")
GLIBC_VARIABLES = (
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "MALLOC_MMAP_MAX_",
)

# Parameters of mallopt, from glibc's <malloc.h>, and what they are set to, in bytes.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
TRIM_THRESHOLD = 1 << 30
TOP_PAD = 64 << 20
MMAP_THRESHOLDS = (1 << 30, 32 << 20)  # glibc before 2.35 refuses more than 32 MiB


@dataclass(frozen=True)
class AllocatorState:
    """What was done with malloc; reason: text for a terminal.

    tuned: thresholds raised. default: switched off by ROBBENCH_MALLOC. user: glibc's own variables are set, which are
    respected. unsupported: not glibc's malloc, or it refused.
    """

    state: Literal["tuned", "default", "user", "unsupported"]
    reason: str


def tune_allocator() -> AllocatorState:
    """Raise the thresholds of this process (see the module docstring); calling it again changes nothing.

    `UserError` for an unknown value of ROBBENCH_MALLOC, on every platform; no other error.
    """
    choice = os.environ.get(VARIABLE, "tuned")
    if choice not in CHOICES:
        raise UserError(f"{VARIABLE}={choice!r} in the environment; set it to one of: {', '.join(CHOICES)}")
    if choice == "default":
        return AllocatorState("default", f"malloc left alone, {VARIABLE}=default")
    if chosen := _glibc_variables():
        return AllocatorState("user", f"malloc as set by {', '.join(chosen)}")
    libc = _glibc()
    if libc is None:
        return AllocatorState("unsupported", "malloc is not glibc's; left alone")
    return _raise_thresholds(libc)


def _glibc_variables() -> list[str]:
    """The variables by which the user has configured glibc's malloc."""
    found = [name for name in GLIBC_VARIABLES if name in os.environ]
    return found + ["GLIBC_TUNABLES"] * ("glibc.malloc." in os.environ.get("GLIBC_TUNABLES", ""))


def _glibc() -> ctypes.CDLL | None:
    """glibc where malloc is its own; None elsewhere and where another library replaces malloc."""
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
        process, libc = ctypes.CDLL(None), ctypes.CDLL("libc.so.6")
        used, own = (ctypes.cast(library.malloc, ctypes.c_void_p).value for library in (process, libc))
    except (ValueError, AttributeError, OSError, TypeError):  # on other platforms
        return None
    return libc if used == own else None


def _raise_thresholds(libc: ctypes.CDLL) -> AllocatorState:
    """mallopt returns 1 when it accepts a value, else 0."""
    accepted = next((size for size in MMAP_THRESHOLDS if libc.mallopt(M_MMAP_THRESHOLD, size)), None)
    trimmed, padded = libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD), libc.mallopt(M_TOP_PAD, TOP_PAD)
    if accepted is None or not trimmed or not padded:
        return AllocatorState("unsupported", "glibc's mallopt refused the thresholds")
    return AllocatorState(
        "tuned",
        f"freed memory is kept: glibc maps blocks from {accepted >> 20} MiB, trims from {TRIM_THRESHOLD >> 20} MiB; "
        f"{VARIABLE}=default turns it off",
    )
