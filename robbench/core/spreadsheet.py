"""Writing CSV tables whose texts are never formulas, and reading their cells.

Spreadsheets compute a cell that begins with = + - or @, also after a tab or line end (OWASP, "CSV Injection"). Such a
text gets an apostrophe in front; a number such as -0.5 does not. A text that begins with an apostrophe gets another
one, so that `plain_cell` recovers the original exactly.
"""

import re
from collections.abc import Iterable, Sequence

MARK = "'"
_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_MARKED = re.compile(r"'+[=+\-@\t\r\n]")
_QUOTED = re.compile(r'[",\r\n]')
# Where the list separator is a semicolon or tab, an unquoted one would begin another cell.
_OTHER_SEPARATOR = re.compile(r"[;\t]\s*['\"]*[=+\-@]")


def csv_text(lines: Iterable[Sequence[object]]) -> str:
    """Lines of cells as CSV with unix line ends; None is an empty cell, floats keep every digit."""
    return "".join(_line(line) + "\n" for line in lines)


def plain_cell(text: str) -> str:
    """The original text of a cell of `csv_text`."""
    return text.removeprefix(MARK) if _MARKED.match(text) else text


def _line(line: Sequence[object]) -> str:
    text = ",".join(map(_cell, line))
    return text or ('""' if len(line) == 1 else "")  # an empty line would be no row


def _cell(value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        return repr(value) if type(value) is float else str(value)
    text = MARK + value if _FORMULA.match(value) and not _is_number(value) else value
    if _QUOTED.search(text) or _OTHER_SEPARATOR.search(text):
        return '"' + text.replace('"', '""') + '"'
    return text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
