"""NLL against epsilon (or steps) as inline SVG."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from robbench.report.plots import Curve, CurveFigure, dress, legend, look, svg
from robbench.results.likelihood import Nll, NllTable, bits_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOGARITHMIC = 30  # ratio of largest to smallest value from which the y axis is logarithmic
LARGEST = 1e100  # beyond it, and without any finite sample, a point is not drawn: axes overflow


def curve_figure(table: NllTable, number: int = 1) -> CurveFigure | None:
    """Mean NLL against epsilon, or against steps where one epsilon was swept over them; a line per flow (and number of
    steps, where both were swept). None when no line has two points. number: of the figure on its page."""
    by_steps = table.sweeps_steps and len({line.epsilon for line in table.lines if line.epsilon > 0}) == 1
    curves = [curve for curve in _curves(table, by_steps) if curve.points]
    if all(len(curve.points) < 2 for curve in curves):
        return None
    axis = "steps" if by_steps else table.settings.partition(";")[0]
    prefix, words = f"curves-{number}", _alternative(table.attack, axis, curves)
    measured = [
        cell for line in table.lines for cell in line.cells if cell is not None and cell.status == "ok"
    ]
    omitted = sum(not _point(0.0, cell) for cell in measured)
    return CurveFigure(svg(_figure(curves, axis), prefix, "curves", words), omitted, legend(curves, prefix))


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


def _figure(curves: Sequence[Curve], axis: str) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.1), layout="constrained")
    axes = figure.subplots()
    floor = _scale(axes, curves)
    for curve in curves:
        x, mean, lower, upper = zip(*curve.points, strict=True)
        below = [m - max(low, floor) for m, low in zip(mean, lower, strict=True)]
        above = [up - m for m, up in zip(mean, upper, strict=True)]
        axes.errorbar(x, mean, yerr=[below, above], capsize=2.5, elinewidth=1, **look(curve.style))
    dress(axes, axis, "NLL (bits/dim)")
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
