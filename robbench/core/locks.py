"""Locks on files, so that one process writes to an output at a time. The system releases them when a process ends,
however it ends; the empty lock file may stay."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TABLE = Path("/proc/locks")  # Linux's list of all locks


class LockHeldError(Exception):
    """Another process has the lock. process: " (process 4242)" where known, else ""."""

    def __init__(self, process: str) -> None:
        super().__init__(f"the lock is held{process}")
        self.process = process


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Inside, hold the lock of the file `path`, which is created if absent. `LockHeldError` when another process holds
    it, OSError when it cannot be created."""
    with path.open("a") as stream:  # "a" does not truncate the target of a link
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holders = holding_processes(path) or []
            known = [number for number in holders if number > 0]  # 0: a process of another container
            raise LockHeldError(f" (process {known[0]})" if known else "") from error
        yield


def holding_processes(path: Path, table: Path = TABLE) -> list[int] | None:
    """Processes of this machine that hold the lock of `path`; None where the system does not report it.

    Reads Linux's list of locks: trying the lock would take it, so that a process that starts just then would fail.
    """
    try:
        lines = table.read_text(encoding="ascii").splitlines()
        status = path.stat()
    except FileNotFoundError:
        return [] if table.exists() else None
    except OSError:
        return None
    device, inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}", str(status.st_ino)
    # "1: FLOCK  ADVISORY  WRITE 27612 fe:00:16116084 0 EOF"; "1: -> FLOCK ..." only waits
    locked_files = [(fields[4], fields[5]) for fields in map(str.split, lines) if fields[1] == "FLOCK"]
    same = [(process, file) for process, file in locked_files if file.rpartition(":")[2] == inode]
    # overlayfs and btrfs have other device numbers in this list than in a file's status
    return [
        int(process) for process, file in same if file.startswith(f"{device}:") or _has_open(process, path)
    ]


def _has_open(process: str, path: Path) -> bool:
    """Whether a process has the file open; False for one that is gone or another user's."""
    try:
        return any(descriptor.samefile(path) for descriptor in Path(f"/proc/{process}/fd").iterdir())
    except OSError:
        return False
