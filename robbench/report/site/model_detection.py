"""What a detector makes of the attacks on the classifier that it guards: a table, and ROC curves."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from robbench.metrics.detection import scored
from robbench.report.plots import Curve, CurveFigure, dress, legend, look, svg
from robbench.results.detection import CAPTION, DetectionTable, detection_table
from robbench.results.rows import ModelResults, TableRow, complete
from robbench.statistics.roc import Curve as Roc
from robbench.statistics.roc import roc_curve
from robbench.store.records import CellResult, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROC_COLUMNS = ("attack", "knows_detector", "false_positive_rate", "true_positive_rate")


@dataclass(frozen=True)
class DetectionSection:
    """What a model's page shows of its detector. figure: None where no attack fooled the classifier; caption: of the
    table."""

    table: DetectionTable
    figure: CurveFigure | None
    caption: str = CAPTION


def detection_section(
    run: Run, model: ModelResults, rows: Sequence[TableRow], plain: bool
) -> DetectionSection | None:
    """The section of a guarded model; None for any other. rows: of the model; plain: without a figure."""
    own = [result for result in run.cells if result.cell.model == model.name]
    if not model.detector:
        return None
    table = detection_table(replace(run, cells=own), rows)
    return DetectionSection(table, None if plain else _figure_of(complete(run, own)))


def roc_lines(run: Run, model: ModelResults) -> tuple[tuple[str | float, ...], ...]:
    """The points of the ROC curves, one per line of `ROC_COLUMNS`; none for a model without a detector."""
    return tuple(
        (result.cell.attack.label, str(result.cell.is_adaptive).lower(), float(x), float(y))
        for result, curve in _curves(complete(run, model.cells) if model.detector else [])
        for x, y in zip(curve.false_positives, curve.true_positives, strict=True)
    )


def _curves(done: Sequence[CellResult]) -> list[tuple[CellResult, Roc]]:
    pairs = ((result, roc_curve(scored(result))) for result in done)
    return [(result, curve) for result, curve in pairs if curve is not None]


def _figure_of(done: Sequence[CellResult]) -> CurveFigure | None:
    found = _curves(done)
    if not found:
        return None
    curves = [
        Curve(
            f"{result.cell.attack.label}, {'adaptive' if result.cell.is_adaptive else 'oblivious'}",
            tuple(
                (float(x), float(y), float(y), float(y))
                for x, y in zip(100 * curve.false_positives, 100 * curve.true_positives, strict=True)
            ),
            number,
        )
        for number, (result, curve) in enumerate(found)
    ]
    drawn = svg(_draw(curves), "roc", "curves", _alternative(curves))
    return CurveFigure(drawn, 0, legend(curves, "roc"))


def _draw(curves: Sequence[Curve]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 3.6), layout="constrained")
    axes = figure.subplots()
    for curve in curves:
        x, y, _, _ = zip(*curve.points, strict=True)
        axes.plot(x, y, markevery=0.15, **look(curve.style))
    axes.set(xlim=(-2, 102), ylim=(-2, 102))
    dress(axes, "natural and noisy images flagged (%)", "fooling images flagged (%)")
    return figure


def _alternative(curves: Sequence[Curve]) -> str:
    """The figure in words: what is flagged at few false positives."""
    lines = [
        f"{curve.name}: "
        + ", ".join(f"{max(y for x, y, *_ in curve.points if x <= at):.1f} at {at}" for at in (1, 5, 10, 20))
        for curve in curves
    ]
    return f"ROC curves, percent of fooling images flagged at percent of others flagged. {'; '.join(lines)}"
