"""What the figures of all pages share: inline SVG in the reader's colours, the same numbers giving the same bytes.

Drawn on matplotlib's own canvas, without pyplot. Names stay out of the picture, in a legend of the page.
"""

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = 6  # --curve-1 to --curve-6 of the page's style sheet
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
# Placeholders that the page's own colours replace; matplotlib takes only colours it knows.
_INK = "#010203"
_CURVES = tuple(f"#0102{10 + k}" for k in range(COLOURS))
_SWATCH = "swatch"


@dataclass(frozen=True)
class Curve:
    """One line of a figure. points: (x, mean, lower, upper), finite, by x. style: number of colour, dash and marker."""

    name: str
    points: tuple[tuple[float, float, float, float], ...]
    style: int


@dataclass(frozen=True)
class CurveFigure:
    """A figure. svg: inline, with a text alternative. legend: (piece of the line as SVG, its name). omitted: points
    that are in the table and too large to draw."""

    svg: str
    omitted: int
    legend: tuple[tuple[str, str], ...]


def look(number: int) -> dict[str, Any]:
    """Colour, dash and marker of curve `number`, from 0: neighbours differ in all three."""
    return {
        "color": _CURVES[number % COLOURS],
        "linestyle": DASHES[(number // COLOURS + number) % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.6,
    }


def dress(axes: "Axes", x: str, y: str) -> None:
    """Everything but the curves in one colour, which the page replaces by that of its text. x, y: what the axes are."""
    axes.set_xlabel(x, color=_INK)
    axes.set_ylabel(y, color=_INK)
    axes.tick_params(which="both", colors=_INK)
    axes.grid(color=_INK, alpha=0.15, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_INK)


def legend(curves: Sequence[Curve], prefix: str) -> tuple[tuple[str, str], ...]:
    """A piece of each curve as SVG, and its name. prefix: of the figure's ids on its page."""
    return tuple(
        (_swatch(curve.style).replace(f"{_SWATCH}-", f"{prefix}-{curve.style}-"), curve.name)
        for curve in curves
    )


@cache
def _swatch(style: int) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.5, 0.17))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 2), ylim=(0, 2))
    axes.plot([0.1, 1, 1.9], [1, 1, 1], markevery=[1], **look(style))
    return svg(figure, _SWATCH, "swatch")


def svg(figure: "Figure", prefix: str, style: str, alternative: str = "") -> str:
    """The figure as an element of a page: no prolog, metadata or style sheet, ids that begin with `prefix`, the page's
    colours. style: CSS class. alternative: the figure in words; without it the figure is hidden from screen readers."""
    import matplotlib as mpl
    from markupsafe import escape

    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": prefix, "svg.fonttype": "path"}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = text[text.index("<svg ") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{prefix}-", text)
    for placeholder, own in (
        (_INK, "currentColor"),
        *((c, f"var(--curve-{k})") for k, c in enumerate(_CURVES, 1)),
    ):
        text = text.replace(placeholder, own)
    role = f'role="img" aria-label="{escape(alternative)}"' if alternative else 'aria-hidden="true"'
    return text.replace("<svg ", f'<svg class="{style}" {role} ', 1)
