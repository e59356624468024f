"""Errors of the user.

Every error of the user (an unknown name, a bad file, an impossible budget) raises `UserError`; the command line prints
its single line and exits with code 2. Any other exception that escapes is a bug in robbench.
"""

import unicodedata
from collections.abc import Iterable


class UserError(Exception):
    """Bad usage or input: one line that names the argument, the value, what is accepted and the next step."""


class AttackViolation(Exception):
    """An attack left its admissible set; the message names attack, sample and distance. The cell fails."""


def printable(text: str) -> str:
    """`text` on one line, with everything that a terminal would interpret or cannot write (line ends, escape sequences,
    direction marks, surrogates) escaped as in Python: "\\x1b[31m"."""
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c)[0] == "C" or c in "\u2028\u2029" else c
        for c in text
    )


def printable_text(text: str) -> str:
    """`printable` applied to every line of `text`."""
    return "\n".join(map(printable, text.split("\n")))


def unknown_name(kind: str, name: str, known: Iterable[str], next_step: str = "") -> UserError:
    """`UserError` for an unknown name, with the nearest known name and a list of all."""
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
