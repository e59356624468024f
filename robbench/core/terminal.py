"""A terminal as all commands write to it: names, notes and errors of others never steer it.

Tables, bars and lines go through a `Terminal`; commands that need no rich print with `echo_line` and its neighbours
(`robbench.cli.base`). Both escape by `robbench.core.errors.printable`.
"""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from robbench.core.errors import printable, printable_text


class Terminal(Console):
    """A rich console that reports a closed pipe as what it is; rich itself would end with exit code 1, which here
    means that a check failed. Names stay as they are: rich would print ":100:" as a picture and read "[link=...]" as
    markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"emoji": False, "markup": False, **options})

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments in which names and errors, which others may have written, cannot steer the terminal."""
        for segment in super().render(renderable, options):
            text = printable_text(segment.text)
            yield segment if segment.control or text == segment.text else Segment(text, segment.style)


def print_line(console: Console, text: str, style: str = "") -> None:
    """`text` on one line, whatever is in it, not wrapped at the console's width."""
    console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)
