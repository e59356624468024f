"""CSV as every table is written, and the way back: what others wrote into a name or a note is never a formula.

Spreadsheets compute a cell that begins with = + - or @, also behind a tab or line end (OWASP, "CSV Injection"). Such a
text gets an apostrophe in front, as one types it there by hand; a text that is a number, such as -0.5, stays. A text
that had an apostrophe there already gets another one, so that `plain_cell` gives back exactly what was written.
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
    """What a cell said before `csv_text` made it harmless."""
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
