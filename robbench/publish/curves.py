"""NLL against epsilon (or steps) as inline SVG: the same numbers give the same bytes, in the reader's colours.

Drawn on matplotlib's own canvas, without pyplot. Names stay out of the picture, in a legend of the page.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from robbench.publish.likelihood import Nll, NllTable, bits_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = 6  # --curve-1 to --curve-6 of the page's style sheet
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P")
LOGARITHMIC = 30  # ratio of largest to smallest value from which the y axis is logarithmic
LARGEST = 1e100  # beyond it, and without any finite sample, a point is not drawn: axes overflow
# Placeholders that the page's own colours replace; matplotlib takes only colours it knows.
_INK = "#010203"
_CURVES = tuple(f"#0102{10 + k}" for k in range(COLOURS))


@dataclass(frozen=True)
class Curve:
    """One line of a figure. points: (x, mean, lower, upper), finite, by x."""

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


def curve_figure(table: NllTable, number: int = 1) -> CurveFigure | None:
    """Mean NLL against epsilon, or against steps where one epsilon was swept over them; a line a flow (and number of
    steps, where both were swept). None when no line has two points. number: of the figure on its page."""
    by_steps = table.sweeps_steps and len({line.epsilon for line in table.lines if line.epsilon > 0}) == 1
    curves = [curve for curve in _curves(table, by_steps) if curve.points]
    if all(len(curve.points) < 2 for curve in curves):
        return None
    axis = "steps" if by_steps else table.settings.partition(";")[0]
    prefix, words = f"curves-{number}", _alternative(table.attack, axis, curves)
    legend = [(_svg(_swatch_figure(c), f"{prefix}-{c.style}", "swatch"), c.name) for c in curves]
    measured = [
        cell for line in table.lines for cell in line.cells if cell is not None and cell.status == "ok"
    ]
    omitted = sum(not _point(0.0, cell) for cell in measured)
    return CurveFigure(_svg(_figure(curves, axis), prefix, "curves", words), omitted, tuple(legend))


def _curves(table: NllTable, by_steps: bool) -> list[Curve]:
    """A curve starts at the images before the attack, which have no steps."""
    steps = sorted({line.steps for line in table.lines if line.steps is not None})
    groups: list[int | None] = [*steps] if table.sweeps_steps and not by_steps else [None]
    curves: list[Curve] = []
    for position, (name, defense) in enumerate(table.models):
        for group in groups:
            lines = [line for line in table.lines if group is None or line.steps in (None, group)]
            points = [
                point
                for line in lines
                for point in _point(
                    float((line.steps or 0) if by_steps else line.epsilon), line.cells[position]
                )
            ]
            label = f"{name} ({defense})" + ("" if group is None else f", {group} steps")
            curves.append(Curve(label, tuple(sorted(points)), len(curves)))
    return curves


def _point(x: float, cell: Nll | None) -> list[tuple[float, float, float, float]]:
    if cell is None or cell.mean is None or not abs(cell.mean) <= LARGEST:
        return []
    return [
        (
            x,
            cell.mean,
            cell.mean if cell.lower is None else cell.lower,
            cell.mean if cell.upper is None else cell.upper,
        )
    ]


def _alternative(attack: str, axis: str, curves: Sequence[Curve]) -> str:
    """The figure's numbers in words."""
    lines = [f"{c.name}: " + ", ".join(f"{bits_text(y)} at {x:g}" for x, y, _, _ in c.points) for c in curves]
    return f"Mean NLL in bits/dim under {attack} against {axis}. " + "; ".join(lines)


# ------------------------------------------------------------------------------------------------- matplotlib
def _figure(curves: Sequence[Curve], axis: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.subplots()
    floor = _scale(axes, curves)
    for curve in curves:
        x, mean, lower, upper = zip(*curve.points, strict=True)
        below = [m - max(low, floor) for m, low in zip(mean, lower, strict=True)]
        above = [up - m for m, up in zip(mean, upper, strict=True)]
        axes.errorbar(x, mean, yerr=[below, above], capsize=2.5, elinewidth=1, **_style(curve.style))
    _dress(axes, axis)
    return figure


def _scale(axes: "Axes", curves: Sequence[Curve]) -> float:
    """Makes the y axis logarithmic where the values need it; returns the lowest value it can show."""
    values = [mean for curve in curves for _, mean, _, _ in curve.points]
    if min(values) > 0 and max(values) > LOGARITHMIC * min(values):
        axes.set_yscale("log")
        floor = min(values) / 2
        axes.set_ylim(floor, min(2 * max(upper for curve in curves for *_, upper in curve.points), 1e300))
        return floor
    if max(map(abs, values)) > LOGARITHMIC * max(min(map(abs, values)), 1.0):
        axes.set_yscale("symlog")
    return -math.inf


def _style(number: int) -> "dict[str, Any]":
    return {
        "color": _CURVES[number % COLOURS],
        "linestyle": DASHES[(number // COLOURS + number) % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 5,
        "linewidth": 1.6,
    }


def _dress(axes: "Axes", axis: str) -> None:
    """Everything but the curves in one colour, which the page replaces by that of its text."""
    axes.set_xlabel(axis, color=_INK)
    axes.set_ylabel("NLL (bits/dim)", color=_INK)
    axes.tick_params(which="both", colors=_INK)
    axes.grid(color=_INK, alpha=0.15, linewidth=0.8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_INK)


def _swatch_figure(curve: Curve) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(0.5, 0.17))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 2), ylim=(0, 2))
    axes.plot([0.1, 1, 1.9], [1, 1, 1], markevery=[1], **_style(curve.style))
    return figure


def _svg(figure: "Figure", prefix: str, style: str, alternative: str = "") -> str:
    """The figure as an element of a page: no prolog, metadata or style sheet, ids of its own, the page's colours."""
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
