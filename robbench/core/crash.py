"""Unexpected exceptions on the command line: one line, and a file with the traceback."""

import os
import platform
import shlex
import sys
import tempfile
import time
import traceback
from pathlib import Path

from robbench import __version__
from robbench.core.foreign import cause


def crash_line(error: BaseException) -> str:
    """Write the traceback to a file; returns a line with the error, that file, and how to report it."""
    what = f"robbench ended on an unexpected {cause(error)}"
    try:
        path = _write_report(error)
    except OSError as problem:
        return f"{what}; its traceback could not be written ({problem.strerror}): run again with --debug, and report it"
    return f"{what}; the traceback is in {path}: please report it with that file and the command"


def _write_report(error: BaseException) -> Path:
    """Write command, versions and traceback to the system's folder of temporary files."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = Path(tempfile.gettempdir()) / f"robbench-crash-{stamp}-{os.getpid()}.txt"
    lines = (
        f"command: {shlex.join(['robbench', *sys.argv[1:]])}",
        f"robbench {__version__}, Python {platform.python_version()}, {platform.platform()}",
        "",
        "".join(traceback.format_exception(error)),
    )
    # "x": never follows an existing link.
    with path.open("x", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write("\n".join(lines))
    return path
