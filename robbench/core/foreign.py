"""Calls of foreign code: models, plugins, architectures that a card names.

Such code may raise anything, also SystemExit(0) and StopIteration, which would end a program or a loop as if it had
finished. Here it becomes an ordinary error.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from robbench.core.errors import UserError
from robbench.core.stops import reraise_stop

MESSAGE = 160  # characters of an exception's text that a line quotes


def message_of(error: BaseException, length: int = MESSAGE) -> str:
    """The text of an exception on one line, cut to `length` characters; also where its `__str__` fails."""
    try:
        text = str(error)
    except BaseException as other:  # __str__ is foreign code too
        reraise_stop(other)
        text = "its message cannot be read"
    return " ".join(text[: 10 * length].split())[:length] or "no message"


def cause(error: BaseException) -> str:
    """An exception as text: "ValueError: no such layer"."""
    return f"{type(error).__name__}: {message_of(error)}"


@contextmanager
def foreign_code(what: str, step: str = "correct that code") -> Iterator[None]:
    """Inside, every exception becomes a `UserError`: "WHAT failed (SystemExit: 0); STEP".

    A `UserError` passes unchanged, and so do signals that stop this process (`robbench.core.stops`).
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        reraise_stop(error)
        raise UserError(f"{what} failed ({cause(error)}); {step}") from error


@contextmanager
def no_exit(what: str) -> Iterator[None]:
    """Inside, exceptions that would silently end the caller's program or loop (SystemExit, GeneratorExit,
    StopIteration, any BaseException that is not an Exception) become a `UserError`; errors pass with their
    traceback."""
    try:
        yield
    except BaseException as error:
        reraise_stop(error)
        if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
            raise
        raise UserError(f"{what} raised {cause(error)}; correct that code") from error
