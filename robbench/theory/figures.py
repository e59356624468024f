"""Figures 2 and 3 of paper 002 as PNG and SVG: the same input gives the same bytes.

Drawn without pyplot: no window, no state shared with the caller's figures.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from robbench.core.resources import write_atomically
from robbench.theory.perturbation import Floats, Gaussian, Perturbation
from robbench.theory.training import Recursion, TradeOff

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GRID = 201
CONTOURS = (1.0, 2.0, 3.0)  # Mahalanobis radii
COLOURS = ("#1b6ca8", "#d1495b", "#3a7d44", "#8d5a97")
MARKERS = ("o", "s", "^", "D")


def save_figure(figure: "Figure", stem: Path) -> list[Path]:
    """Write stem.png (150 dpi) and stem.svg, atomically and without a date; returns the paths."""
    import matplotlib as mpl

    png, svg = stem.with_name(f"{stem.name}.png"), stem.with_name(f"{stem.name}.svg")
    with mpl.rc_context({"svg.hashsalt": "robbench", "svg.fonttype": "path"}):
        write_atomically(png, lambda path: _save(figure, path, "png", {"Software": None}))
        write_atomically(svg, lambda path: _save(figure, path, "svg", {"Date": None}))
    return [png, svg]


def _save(figure: "Figure", path: Path, kind: str, metadata: dict[str, None]) -> None:
    figure.savefig(path, format=kind, dpi=150, metadata=metadata)


def perturbation_figure(model: Gaussian, points: Floats, found: Perturbation, epsilon: float) -> "Figure":
    """Figure 2: optimal perturbations of `points` [N,2] under a 2-dimensional Gaussian over its contours.

    Both arrows are drawn where two perturbations are equally good (hard case); the circles are the budget.
    """
    from matplotlib.patches import Circle

    figure, axes = _axes((6.0, 5.4))
    _contours(axes, model, np.vstack([points, points + found.delta]))
    for point, delta, mirror, hard in zip(points, found.delta, found.mirror, found.hard, strict=True):
        axes.add_patch(Circle((point[0], point[1]), epsilon, fill=False, color="0.65", linewidth=0.8))
        for arrow in (delta, mirror) if hard else (delta,):
            axes.annotate(
                "",
                xy=(point[0] + arrow[0], point[1] + arrow[1]),
                xytext=(point[0], point[1]),
                arrowprops={"arrowstyle": "-|>", "color": COLOURS[1], "shrinkA": 0, "shrinkB": 0},
            )
    axes.plot(points[:, 0], points[:, 1], "o", color="0.15", markersize=3.5, label="sample")
    axes.plot(model.mean[:1], model.mean[1:], "+", color=COLOURS[0], markersize=9, label="mean")
    axes.plot([], [], color=COLOURS[1], marker=">", label=f"optimal perturbation, epsilon = {epsilon:g}")
    axes.set(xlabel="x1", ylabel="x2", title="Optimal L2 perturbations of a Gaussian", aspect="equal")
    axes.legend(loc="upper left", fontsize=8)
    return figure


def _contours(axes: "Axes", model: Gaussian, points: Floats) -> None:
    """Draw ellipses of Mahalanobis radius 1, 2, 3 on a grid that contains them and the points."""
    reach = 3.2 * np.sqrt(np.diag(model.covariance))
    low = np.minimum(model.mean - reach, points.min(0) - 0.2)
    high = np.maximum(model.mean + reach, points.max(0) + 0.2)
    first, second = np.meshgrid(np.linspace(low[0], high[0], GRID), np.linspace(low[1], high[1], GRID))
    coordinates = model.coordinates(np.stack([first.ravel(), second.ravel()], axis=1))
    radius = np.sqrt((coordinates**2 / model.values).sum(1)).reshape(first.shape)
    axes.contour(first, second, radius, levels=CONTOURS, colors=COLOURS[0], linewidths=0.9)


def trade_off_figure(
    theory: Mapping[Recursion, TradeOff], simulation: Mapping[Recursion, TradeOff], subtitle: str
) -> "Figure":
    """Figure 3: natural likelihood drop against adversarial sensitivity, a curve per recursion, a mark per step.

    Left: closed form, spherical covariance. Right: simulation for a random covariance.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True, sharey=True)
    _curves(left, theory, "spherical covariance, closed form")
    _curves(right, simulation, "random covariance, simulated")
    left.set_ylabel("sensitivity: drop under attack (nats)")
    left.legend(fontsize=8, title="training", title_fontsize=8)
    figure.suptitle(f"Natural likelihood against robustness over training steps ({subtitle})", fontsize=11)
    return figure


def _curves(axes: "Axes", curves: Mapping[Recursion, TradeOff], title: str) -> None:
    for (name, curve), colour, marker in zip(curves.items(), COLOURS, MARKERS, strict=False):
        axes.plot(
            curve.natural_drop, curve.sensitivity, color=colour, marker=marker, markersize=4, label=name
        )
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("natural likelihood drop (nats)")
    axes.grid(alpha=0.3)


def _axes(size: Sequence[float]) -> "tuple[Figure, Axes]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0], size[1]), layout="constrained")
    return figure, figure.subplots()
