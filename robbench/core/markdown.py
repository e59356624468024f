"""Markdown in which names, notes and versions of others stay plain text.

GitHub's dialect renders raw HTML, remote images and links; escaping prevents that a name or a note contains any.
"""

import re
from collections.abc import Sequence

from robbench.core.errors import printable

# Characters with a meaning anywhere, and ends of the text of a link, an image or the name of a definition.
_SPECIAL = re.compile(r"[\\|`*_<>&~$]|\](?=[(\[:])")
# Beginnings of a heading, a list, a line or a footnote.
_BEGINNING = re.compile(r"(?=#{1,6}(?:\s|$)|[-+](?:[-+\s]|$)|=)")
_NUMBERED = re.compile(r"(\d{1,9})([.)])(?=\s|$)")


def escaped(text: str) -> str:
    """`text` as plain text within a line: a table cell, a part of a sentence."""
    return _SPECIAL.sub(r"\\\g<0>", printable(" ".join(text.split())))


def paragraph(text: str) -> str:
    """`text` as plain text that begins a paragraph, a heading or an entry of a list."""
    flat = escaped(text)
    if _NUMBERED.match(flat):
        flat = _NUMBERED.sub(r"\1\\\2", flat, count=1)
    return _BEGINNING.sub(r"\\", flat, count=1) if _BEGINNING.match(flat) else flat


def bullets(texts: Sequence[str]) -> str:
    """A list with one entry per text."""
    return "\n".join(f"* {paragraph(text)}" for text in texts)


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A GitHub table; cells are plain text."""
    rows = [_row([escaped(cell) for cell in line]) for line in (header, *lines)]
    return "\n".join([rows[0], _row(["---"] * len(header)), *rows[1:]])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
