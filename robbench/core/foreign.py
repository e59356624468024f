"""Calls of code that others wrote: models, plugins, architectures that a card names.

Such code may raise anything, SystemExit(0) and StopIteration too, which would end a program or a loop as if all were
done. Here it becomes an error like any other.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from robbench.core.errors import UserError
from robbench.core.stops import reraise_stop

MESSAGE = 160  # characters of an exception's text that a line quotes


def message_of(error: BaseException, length: int = MESSAGE) -> str:
    """The text of an exception on one line, cut to `length` characters; also of one that cannot say it."""
    try:
        text = str(error)
    except BaseException as other:  # its __str__ is somebody else's code as well
        reraise_stop(other)
        text = "its message cannot be read"
    return " ".join(text[: 10 * length].split())[:length] or "no message"


def cause(error: BaseException) -> str:
    """An exception as one line quotes it: "ValueError: no such layer"."""
    return f"{type(error).__name__}: {message_of(error)}"


@contextmanager
def foreign_code(what: str, step: str = "correct that code") -> Iterator[None]:
    """Inside, whatever is raised becomes a `UserError`: "WHAT failed (SystemExit: 0); STEP".

    A `UserError` passes as it is, and so does what stops this process (`robbench.core.stops`).
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
    """Inside, what would end the caller's program or loop in silence (SystemExit, GeneratorExit, StopIteration, any
    BaseException that is no Exception) becomes a `UserError`; errors pass with their traceback."""
    try:
        yield
    except BaseException as error:
        reraise_stop(error)
        if isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration):
            raise
        raise UserError(f"{what} raised {cause(error)}; correct that code") from error
