"""Errors of the user.

Every error of the user (an unknown name, a bad file, an impossible budget) raises `UserError`; the command line prints
its single line and exits with code 2. Any other exception that escapes is a bug in robbench.
"""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

LISTED_BY = {  # the list of `robbench list` that has the names of a kind
    "attack": "attacks",
    "data set": "datasets",
    "defense": "defenses",
    "detector": "detectors",
    "experiment": "experiments",
    "flow": "models",
    "model": "models",
    "recipe": "recipes",
    "published table": "published",
}
SUGGESTED = 3  # names in a message, at most
NEAR = 0.15  # by how much a suggestion may be less like a name than the best one is
_FROM_PYTHON: ContextVar[bool] = ContextVar("from_python", default=False)


class UserError(Exception):
    """Bad usage or input: one line that names the argument, the value, what is accepted and the next step."""


class AttackViolation(Exception):
    """An attack left its admissible set; the message names attack, sample and distance. The cell fails."""


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


def folded(name: str) -> str:
    """A name without what people write in several ways: case, dashes, underscores, dots, spaces. "+" stays: AA+ is
    not AA."""
    return re.sub(r"[\s_.-]+", "", name).casefold()


def known_name(
    kind: str,
    name: str,
    known: Iterable[str],
    next_step: str = "",
) -> str:
    """The one of `known` that `name` is, or is when case, dashes and the like do not count; `unknown_name` otherwise,
    also where it could be two of them."""
    choices = set(known)
    if name in choices:
        return name
    alike = {choice for choice in choices if folded(choice) == folded(name)}
    if len(alike) == 1:
        return alike.pop()
    raise unknown_name(kind, name, choices, next_step, sorted(alike))


def unknown_name(
    kind: str, name: str, known: Iterable[str], next_step: str = "", near: Sequence[str] = ()
) -> UserError:
    """`UserError` for a name that is none of `known`: suggests up to three, and says which command lists all.

    near: what to suggest in place of names that are spelt alike.
    """
    choices = sorted(known)
    found = [one for one in near if one in choices][:SUGGESTED] or nearest(name, choices)
    quoted = [repr(choice) for choice in found]
    if quoted:
        *others, last = quoted
        parts = [f"did you mean {', '.join(others)} or {last}?" if others else f"did you mean {last}?"]
    elif 0 < len(choices) <= 2 * SUGGESTED:
        parts = [f"known: {', '.join(choices)}"]
    else:
        parts = []
    if kind in LISTED_BY:
        parts.append(f"robbench list {LISTED_BY[kind]} has all")
    return UserError("; ".join([f"unknown {kind} {name!r}", *parts, *([next_step] if next_step else [])]))


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """Up to three of `known` that are spelt most like `name`, the nearest first; where some begin with it, these."""
    from difflib import SequenceMatcher
    from itertools import takewhile

    wanted = folded(name)
    choices = {choice: folded(choice) for choice in known}
    longer = {choice: text for choice, text in choices.items() if text.startswith(wanted)} if wanted else {}
    alike = {choice: SequenceMatcher(None, t, wanted).ratio() for choice, t in (longer or choices).items()}
    least = max(0.5, max(alike.values(), default=0.0) - NEAR)
    shared = {
        choice: sum(
            1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(choices[choice], wanted, strict=False))
        )
        for choice in alike
    }
    best = sorted((-ratio, -shared[choice], choice) for choice, ratio in alike.items() if ratio >= least)
    return [choice for _, _, choice in best[:SUGGESTED]]
