"""Ctrl-C and SIGTERM, told apart from exceptions that other people's code raises.

A model may raise KeyboardInterrupt too, and may swallow a real one with a bare `except`. What counts is therefore that
a signal arrived, which only a handler sees, and not which exception reaches us.
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
        """What shells call a process that ended by the signal: 130 or 143."""
        return 128 + self.signal

    @property
    def word(self) -> str:
        """What happened, in one word."""
        return "Interrupted" if self.signal == signal.SIGINT else "Terminated"


@contextmanager
def listening(signals: Sequence[int] = (signal.SIGINT,)) -> Iterator[None]:
    """Inside, each of `signals` raises `Stopped` in the main thread, and is remembered.

    A signal that is ignored (a background job's SIGINT), or that the application around us handles itself, stays as it
    is. Outside the main thread, and inside another `listening`, nothing changes.
    """
    global _listening, _received
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signals}
    ours = {number: handler for number, handler in before.items() if handler in _DEFAULTS}
    # An ignored SIGINT cannot arrive: a KeyboardInterrupt is not the user's then either.
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
    """What `listening` has installed is there afterwards, whatever a library installs inside."""
    ours = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is _stop]
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, _stop)


def remember_termination() -> None:
    """In a worker process that is not ours: remember a SIGTERM and then do what the process does at one."""
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
    """The signal behind a KeyboardInterrupt: libraries raise a plain one in place of ours (Ray's waiting loops do)."""
    if isinstance(error, Stopped):
        return error
    return Stopped(signal.SIGINT if _received is None else _received)


def check_stop() -> None:
    """`Stopped` when a signal arrived, though other people's code swallowed the exception."""
    if _received is not None:
        raise Stopped(_received)


def reraise_stop(error: BaseException) -> None:
    """Raise again what stops this process; return for every exception that the code around it made itself.

    Where nobody listens to signals, a KeyboardInterrupt is taken for the user's.
    """
    if _received is not None:
        raise error if isinstance(error, Stopped) else Stopped(_received) from error
    if isinstance(error, KeyboardInterrupt) and not _listening:
        raise error
