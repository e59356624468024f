"""The one Jinja environment of everything that is published."""

from functools import cache
from typing import TYPE_CHECKING

from robbench.core.counting import count_noun

if TYPE_CHECKING:
    from jinja2 import Environment


@cache
def environment() -> "Environment":
    """Templates of `robbench.report`, escaping on, undefined names are errors; `n | counted("cell")` is "1 cell"."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    made = Environment(
        loader=PackageLoader("robbench.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["counted"] = count_noun
    return made
