"""robbench in processes of its own (a real pid, real signals, real streams) without importing torch in each: they are
forked from one server a worker of pytest, which has imported everything and done nothing."""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "torch",
        "torchvision",
        "sklearn.datasets",
        "robbench.cli.app",
        "robbench.cli.run",
        "robbench.bundle.verify",
        "robbench.defenses.training",
        "robbench.models.loading",
        "robbench.report.site",
        "robbench.run.executor",
    ]
)
Target = Callable[[], object]


class Command:
    """A process: what it printed so far, and `subprocess.Popen`'s poll, wait and send_signal."""

    def __init__(self, arguments: Sequence[object], folder: Path, **how: object) -> None:
        self._printed = {"stdout": folder / "stdout", "stderr": folder / "stderr", **how.pop("streams", {})}
        run = (list(map(str, arguments)), {name: str(path) for name, path in self._printed.items()}, how)
        self._process = _SERVER.Process(target=_run, args=run)
        self._process.start()
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        return self._read("stdout")

    @property
    def stderr(self) -> str:
        return self._read("stderr")

    def _read(self, name: str) -> str:
        path = self._printed[name]
        return path.read_text(encoding="utf-8", errors="surrogateescape") if Path(path).is_file() else ""

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float = 120) -> int:
        """Exit code; minus the number of the signal that killed it."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, (f"still running after {seconds} s", self.stderr)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()


@contextmanager
def started(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    paths: Sequence[Path] = (),
    streams: Mapping[str, Path | str] | None = None,
    target: Target | None = None,
) -> Iterator[Command]:
    """`robbench ARGUMENTS`, killed at the end of the block if it still runs then.

    env: variables beside those of the server. paths: go first in sys.path. streams: files or devices for stdin, stdout
    and stderr in the place of temporary files; "closed pipe" is a pipe that nobody reads. target: a function of a
    module, run in the place of robbench.
    """
    with tempfile.TemporaryDirectory() as folder:
        how = {"cwd": str(cwd or Path.cwd()), "env": dict(env or {}), "paths": list(map(str, paths))}
        command = Command(arguments, Path(folder), **how, streams=dict(streams or {}), target=target)
        try:
            yield command
        finally:
            command.end()


def finished(*arguments: object, seconds: float = 300, **how: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `robbench ARGUMENTS`; how: as for `started`."""
    with started(*arguments, **how) as command:
        return command.wait(seconds), command.stdout, command.stderr


def closed_pipe() -> int:
    """The writing end of a pipe that nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def _run(arguments: list[str], streams: dict[str, str], how: dict) -> None:
    """In the child: streams, folder, variables and signals as a shell gives them, then `python -m robbench`."""
    os.chdir(how["cwd"])
    os.environ.update(how["env"])
    sys.path[:0] = how["paths"]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        place = streams.get(name, os.devnull)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOCTTY if number else os.O_RDONLY
        os.dup2(closed_pipe() if place == "closed pipe" else os.open(place, flags, 0o600), number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.argv = ["robbench", *arguments]
    code: object = 0
    try:
        if how["target"] is not None:
            how["target"]()
        else:
            runpy.run_module("robbench", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    try:
        sys.stdout.flush()
    except OSError:
        code = 120  # as Python ends where its last flush fails
    os._exit(code if isinstance(code, int) else int(code is not None))
