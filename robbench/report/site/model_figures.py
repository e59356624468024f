"""Figures of a model's page beside its tables: settings of the training that a group sweeps, and those of
`robbench figure`."""

from dataclasses import dataclass

from robbench.report.figures import TITLES, draw, notes
from robbench.report.plots import CurveFigure
from robbench.report.site.groups import Group
from robbench.report.site.training_sweeps import COLUMNS, training_sweeps
from robbench.store.figure_records import FigureRecord, read_figures

FIGURED = 1_000  # models of a group up to which their pages have figures and images


@dataclass(frozen=True)
class ModelFigure:
    """A figure of a page. notes: below it. key: of its file. columns, lines: the numbers of the file."""

    title: str
    picture: CurveFigure
    notes: tuple[str, ...]
    key: str
    columns: tuple[str, ...]
    lines: tuple[tuple[str | int | float | None, ...], ...]


def model_figures(group: Group, model: str) -> list[ModelFigure]:
    """The figures of a model, those of trainings first."""
    sweeps = [
        ModelFigure(one.title, one.figure, (one.note,), f"training-{k}", COLUMNS, one.lines)
        for k, one in enumerate(training_sweeps(group, model), start=1)
    ]
    card = group.card(model)
    own = card.function_hash if card else ""
    return sweeps + [_drawn(record) for record in group.once(_records) if record.model_hash == own]


def _records(group: Group) -> list[FigureRecord]:
    return read_figures([run.folder for run in group.sources])


def _drawn(record: FigureRecord) -> ModelFigure:
    picture = CurveFigure(draw(record, record.figure), 0, ())
    below = (*notes(record), f"Computed by: {record.command}")
    return ModelFigure(TITLES[record.figure], picture, below, record.figure, record.columns, record.rows)
