"""Output on a terminal, which names, notes and errors of others never control.

Tables, bars and lines go through a `Terminal`; commands that need no rich print with `echo_line` and similar functions
(`robbench.cli.base`). Both escape with `robbench.core.errors.printable`.
"""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from robbench.core.errors import printable, printable_text


class Terminal(Console):
    """A rich console that raises BrokenPipeError for a closed pipe, where rich would exit with code 1 (here: a failed
    check), and that prints names verbatim, where rich would interpret ":100:" and "[link=...]"."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"emoji": False, "markup": False, **options})

    def on_broken_pipe(self) -> None:
        """Raise instead of rich's exit with code 1."""
        raise BrokenPipeError

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Segments without control characters from names and errors."""
        for segment in super().render(renderable, options):
            text = printable_text(segment.text)
            yield segment if segment.control or text == segment.text else Segment(text, segment.style)


def print_line(console: Console, text: str, style: str = "") -> None:
    """Print `text` on one line, escaped and not wrapped at the console's width."""
    console.print(printable(text), style=style, markup=False, highlight=False, soft_wrap=True)
