"""Texts as others may write them into a card, a note, a name or an error, and how to look at a terminal."""

import os
import pty
import re
import select
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from processes import started

RED = "\x1b[31mred\x1b[0m"
LINK = "\x1b]8;;http://evil.example\x07click\x1b]8;;\x07"
TITLE = "\x1b]0;owned\x07"
C1 = "\x9b2J\x9d0;owned\x9c"  # the same in single characters of the upper half
BIDI = "\u202ereversed\u2066 \u200f"
LINES = "\nEverything required works.\r\x0b\x0c\x85\u2028\u2029forged line"
MARKUP = "[red]text[/red] [link=http://evil.example]here[/link] :100:"
HALF = "\ud800 \udcff"
HTML = "<img src=http://evil.example/x.png onerror=alert(1)><script>alert(1)</script>"
MARKDOWN = (
    "![x](http://evil.example/x.png) [y](javascript:alert(1)) [z]: http://evil.example/ | a ` b ``` ~~c~~ $d$ "
    "&lt;"
)
FORMULA = '=HYPERLINK("http://evil.example","x")'
ALL = " ".join((RED, LINK, TITLE, C1, BIDI, LINES, MARKUP, HTML, MARKDOWN, FORMULA))

_OWN = re.compile(
    r"\x1b\[[0-9;]*m"  # colours
    r"|\x1b\[\??[0-9]*[hlAKJGF]"  # cursor of live tables
    r"|\x1b\[[0-9;]*H"
)


def steering(output: str) -> set[str]:
    """What of a terminal's output would steer it, beyond colours and the cursor of live tables."""
    text = _OWN.sub("", output).replace("\r\n", "\n")
    found = {
        c for c in text if (unicodedata.category(c)[0] == "C" or c in "\u2028\u2029") and c not in "\n\t"
    }
    return {c.encode("unicode_escape").decode() for c in found - {"\r"}}


def links(output: str) -> bool:
    """Whether the terminal would show a link."""
    return "\x1b]8;" in output


def on_a_terminal(arguments: Sequence[str], seconds: float = 240) -> tuple[int, str]:
    """Exit code and output of `robbench ARGUMENTS` on a terminal of 100 columns."""
    master, slave = pty.openpty()
    terminal = Path(os.ttyname(slave))
    environment = {"COLUMNS": "100", "LINES": "40", "TERM": "xterm-256color"}
    pieces = []
    with started(
        *arguments, env=environment, streams=dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    ) as command:
        while command.poll() is None or select.select([master], [], [], 0)[0]:
            if select.select([master], [], [], 0.1)[0]:
                pieces.append(os.read(master, 1 << 16))
        code = command.wait(seconds)
    os.close(slave)
    os.close(master)
    return code, b"".join(pieces).decode("utf-8", "surrogateescape")
