"""Ctrl-C and SIGTERM, distinguished from exceptions of foreign code.

A model may raise KeyboardInterrupt itself, and may swallow a real one with a bare `except`. So a handler records that a
signal arrived; the exception alone does not count.
"""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

_DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)
_listening = False
_received: int | None = None


class Stopped(KeyboardInterrupt):
    """The user or the system asked this process to stop. signal: the number of the signal, SIGINT or SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = number

    @property
    def exit_code(self) -> int:
        """Exit code of a process that ended by the signal: 130 or 143."""
        return 128 + self.signal

    @property
    def word(self) -> str:
        """ "Interrupted" or "Terminated"."""
        return "Interrupted" if self.signal == signal.SIGINT else "Terminated"


@contextmanager
def listening(signals: Sequence[int] = (signal.SIGINT,)) -> Iterator[None]:
    """Inside, each of `signals` raises `Stopped` in the main thread, and is recorded.

    Signals that are ignored (a background job's SIGINT) or handled by the calling application are not changed. Outside
    the main thread, and inside another `listening`, nothing happens.
    """
    global _listening, _received
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signals}
    ours = {number: handler for number, handler in before.items() if handler in _DEFAULTS}
    # An ignored SIGINT cannot arrive, so that a KeyboardInterrupt is not the user's either.
    _listening = signal.SIGINT in ours or before.get(signal.SIGINT) == signal.SIG_IGN
    _received = None
    for number in ours:
        signal.signal(number, _stop)
    try:
        yield
    except KeyboardInterrupt as error:
        raise as_stop(error) from error
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        _listening, _received = False, None


def _stop(number: int, _frame: FrameType | None) -> None:
    global _received
    _received = number
    raise Stopped(number)


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Installs the handlers of SIGINT and SIGTERM again that a library replaces, or takes from the operating system
    without Python's knowledge, as Ray does when it starts and when it stops."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: installed by other means than Python's, and out of reach
                signal.signal(number, handler)


def remember_termination() -> None:
    """In a worker process of a library: record a SIGTERM, then call the process's own handler."""
    global _received
    if threading.current_thread() is not threading.main_thread():
        return
    theirs = signal.getsignal(signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        global _received
        _received = number
        if callable(theirs):
            theirs(number, frame)
            return
        raise Stopped(number)

    signal.signal(signal.SIGTERM, stop)


def as_stop(error: KeyboardInterrupt) -> Stopped:
    """The signal behind a KeyboardInterrupt, which libraries such as Ray raise in place of `Stopped`."""
    if isinstance(error, Stopped):
        return error
    return Stopped(signal.SIGINT if _received is None else _received)


def check_stop() -> None:
    """Raise `Stopped` if a signal arrived, even if foreign code swallowed the exception."""
    if _received is not None:
        raise Stopped(_received)


def reraise_stop(error: BaseException) -> None:
    """Raise `Stopped` if a signal arrived; return for exceptions of foreign code.

    Outside `listening`, a KeyboardInterrupt is raised again as the user's.
    """
    if _received is not None:
        raise error if isinstance(error, Stopped) else Stopped(_received) from error
    if isinstance(error, KeyboardInterrupt) and not _listening:
        raise error
