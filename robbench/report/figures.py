"""Figures of `robbench figure` drawn from their records: inline SVG for pages, and a file of its own."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from robbench.report.plots import COLOURS, dress, look, svg
from robbench.report.templating import environment
from robbench.store.figure_records import FigureName, FigureRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES: dict[FigureName, str] = {
    "embedding": "Embeddings of clean and attacked images",
    "loss-surface": "Loss around clean images",
}
PANELS = 4  # kinds of images that an embedding is drawn of; all are in its file
GLYPHS = 10  # classes up to which a point is the number of its class


def draw(record: FigureRecord, prefix: str) -> str:
    """The figure as an element of a page. prefix: of its ids there."""
    figure = _embedding(record) if record.figure == "embedding" else _surface(record)
    return svg(figure, prefix, "curves", _alternative(record))


def draw_file(record: FigureRecord) -> str:
    """The figure as an SVG file."""
    return as_file(draw(record, record.figure))


def as_file(element: str) -> str:
    """A figure of a page as an SVG file, in the colours of the pages in daylight."""
    style = environment().get_template("style.css.j2").render()
    colours = dict(re.findall(r"(--curve-\d): (#[0-9a-f]{6})", style.partition("}")[0]))
    text = re.sub(r"var\((--curve-\d)\)", lambda match: colours[match[1]], element)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text.replace("currentColor", "#000000")}\n'


def notes(record: FigureRecord) -> tuple[str, ...]:
    """What stands below the figure."""
    if record.figure == "loss-surface":
        return record.facts
    kinds = list(dict.fromkeys(record.column("images")))
    marks = "A mark is the number of an image's true class. " if _few_classes(record) else ""
    left = f" Not drawn: {', '.join(map(str, kinds[PANELS:]))}." if len(kinds) > PANELS else ""
    return (*record.facts, f"{marks}n = {record.n} clean images.{left}")


def _alternative(record: FigureRecord) -> str:
    if record.figure == "embedding":
        kinds = ", ".join(map(str, dict.fromkeys(record.column("images"))))
        return f"Two coordinates of the embeddings of images ({kinds}) of {record.model}; n = {record.n}."
    losses, middle = record.numbers("loss"), record.numbers("loss")[len(record.rows) // 2]
    return (
        f"Mean cross-entropy of {record.model} against steps along the gradient's sign and a random direction: "
        f"{middle:.4g} at the images, {min(losses):.4g} to {max(losses):.4g} around them; n = {record.n}."
    )


def _surface(record: FigureRecord) -> "Figure":
    """A map of the loss; white is the smallest."""
    from matplotlib.figure import Figure

    x, y = (sorted(set(record.numbers(name))) for name in ("gradient_sign", "random"))
    places = zip(record.numbers("random"), record.numbers("gradient_sign"), strict=True)
    losses = dict(zip(places, record.numbers("loss"), strict=True))
    figure = Figure(figsize=(5.2, 3.9), layout="constrained")
    axes = figure.subplots()
    values = np.array([[losses[b, a] for a in x] for b in y])
    mesh = axes.pcolormesh(x, y, values, cmap="viridis", shading="nearest", edgecolors="face", linewidth=0.1)
    dress(axes, "step along the sign of the gradient", "step along a random direction")
    axes.grid(visible=False)
    bar = figure.colorbar(mesh, ax=axes)
    dress(bar.ax, "", "cross-entropy")
    bar.ax.grid(visible=False)
    return figure


def _embedding(record: FigureRecord) -> "Figure":
    """A panel for the clean images and each of the first attacks, all of one scale."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(record.column("images")))[:PANELS]
    rows = -(-len(kinds) // 2)
    figure = Figure(figsize=(7.2, 3.4 * rows), layout="constrained")
    panels = figure.subplots(rows, min(len(kinds), 2), sharex=True, sharey=True, squeeze=False).flatten()
    for axes, kind in zip(panels, kinds, strict=False):
        _scatter(axes, record, kind)
    for axes in panels[len(kinds) :]:
        axes.set_axis_off()
    return figure


def _scatter(axes: "Axes", record: FigureRecord, kind: object) -> None:
    x, y, labels = record.numbers("x"), record.numbers("y"), record.column("label")
    chosen = [k for k, images in enumerate(record.column("images")) if images == kind]
    for label in sorted({int(labels[k]) for k in chosen}):
        own = [k for k in chosen if labels[k] == label]
        style = _mark(label, _few_classes(record))
        axes.plot([x[k] for k in own], [y[k] for k in own], linestyle="none", **style)
    dress(axes, f"{kind}", "")


def _few_classes(record: FigureRecord) -> bool:
    return max(map(int, record.column("label"))) < GLYPHS


def _mark(label: int, few: bool) -> dict[str, Any]:
    style = {"color": look(label % COLOURS)["color"], "markeredgewidth": 0.3}
    return style | ({"marker": f"${label}$", "markersize": 5} if few else {"marker": "o", "markersize": 3})
