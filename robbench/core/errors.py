"""The one error type a user can cause.

Everything a user can get wrong (an unknown name, a bad file, an impossible budget) raises `UserError`; the
command line prints its single line and exits with code 2. Anything else that escapes is a bug in robbench.
"""

import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_FROM_PYTHON: ContextVar[bool] = ContextVar("from_python", default=False)


class UserError(Exception):
    """Bad usage or input: one line that names the argument, the value, what is accepted and the next step."""


class AttackViolation(Exception):
    """An attack left its admissible set. Names attack, sample and by how much; the cell is recorded as failed."""


@contextmanager
def python_arguments() -> Iterator[None]:
    """Inside, messages spell arguments as a Python call does: the user called the API and gave no options."""
    token = _FROM_PYTHON.set(True)
    try:
        yield
    finally:
        _FROM_PYTHON.reset(token)


def spell_argument(name: str, value: object = None) -> str:
    """An argument as the user writes it: "--batch-size 8" on the command line, "batch_size=8" inside
    `python_arguments`. name: a Python identifier. value: its text; True for a switch; None for the bare name."""
    if _FROM_PYTHON.get():
        return f"{name}=" if value is None else f"{name}={value}"
    option = f"--{name.replace('_', '-')}"
    return option if value is None or value is True else f"{option} {value}"


def printable(text: str) -> str:
    """`text` on one line, with everything a terminal would act on or cannot write (line ends, escape sequences,
    direction marks, half a UTF-8 character) as Python escapes it: "\\x1b[31m"."""
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" else c
        for c in text
    )


def printable_text(text: str) -> str:
    """`printable` of every line of `text`, which may have several."""
    return "\n".join(map(printable, text.split("\n")))


def unknown_name(kind: str, name: str, known: Iterable[str], next_step: str = "") -> UserError:
    """`UserError` for a name that is not registered: suggests the nearest name and lists what there is."""
    import difflib

    choices = sorted(known)
    lowered = {choice.lower(): choice for choice in choices}
    near = [
        lowered[match] for match in difflib.get_close_matches(name.lower(), list(lowered), n=1, cutoff=0.5)
    ]
    hint = f"; did you mean {near[0]!r}?" if near else "."
    listed = ", ".join(choices) or "none"
    step = f"; {next_step}" if next_step else ""
    return UserError(f"unknown {kind} {name!r}{hint} Known: {listed}{step}")
