"""The last resort of the command line: an exception that nobody expected, as one line and a file with the traceback."""

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
    """What happened, where the traceback is, and how to report it; writes the file."""
    what = f"robbench ended on an unexpected {cause(error)}"
    try:
        path = _written(error)
    except OSError as problem:
        return f"{what}; its traceback could not be written ({problem.strerror}): run again with --debug, and report it"
    return f"{what}; the traceback is in {path}: please report it with that file and the command"


def _written(error: BaseException) -> Path:
    """The file with command, versions and traceback, in the system's folder of temporary files."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = Path(tempfile.gettempdir()) / f"robbench-crash-{stamp}-{os.getpid()}.txt"
    lines = (
        f"command: {shlex.join(['robbench', *sys.argv[1:]])}",
        f"robbench {__version__}, Python {platform.python_version()}, {platform.platform()}",
        "",
        "".join(traceback.format_exception(error)),
    )
    # "x": never through a link that somebody has put there.
    with path.open("x", encoding="utf-8", errors="backslashreplace") as stream:
        stream.write("\n".join(lines))
    return path
