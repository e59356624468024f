"""`robbench figure`: the numbers of one figure about each model of a run, from the images that the run keeps.

A figure is a function of a `Subject` and a `FigureRequest` that returns `Numbers`, one module each.
"""

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast, get_args

from robbench.attacks.trust.context import full_precision
from robbench.core.errors import UserError, known_name
from robbench.run.embedding import embed
from robbench.run.loss_surface import measure_surface
from robbench.run.subjects import FigureRequest, Numbers, Subject, find_subjects
from robbench.store.figure_records import FigureName, FigureRecord, write_figure
from robbench.store.ledger import load_run

FIGURES: dict[FigureName, Callable[[Subject, FigureRequest], Numbers]] = {
    "embedding": embed,
    "loss-surface": measure_surface,
}


def compute_figures(folder: Path, name: str, request: FigureRequest) -> Iterator[FigureRecord]:
    """Compute a figure of every requested model of a run folder and store its record; yields them one by one.

    `UserError` for unknown names and a run or model that the figure cannot be computed of.
    """
    figure = cast(
        FigureName,
        known_name("figure", name, (*get_args(FigureName), "training"), "see robbench figure --help"),
    )
    if request.points < 3 or request.points % 2 == 0:
        raise UserError(f"--points {request.points}: give an odd number from 3, so that 0 is one of them")
    if request.extent is not None and not 0 < request.extent <= 1:
        raise UserError(
            f"--extent {request.extent:g} is not in (0, 1], the range of pixels; give one, as in 0.1"
        )
    run = load_run(folder)
    for load in find_subjects(run, request):
        subject = load()
        with full_precision():
            numbers = FIGURES[figure](subject, request)
        record = FigureRecord(
            figure=figure,
            model=subject.name,
            model_hash=run.cards[subject.name].function_hash,
            dataset=run.dataset,
            n=numbers.n,
            seed=run.seed,
            columns=numbers.columns,
            rows=numbers.rows,
            facts=numbers.facts,
            command=shlex.join(
                ["robbench", "figure", figure, "RUN", "--model", subject.name, *numbers.options]
            ),
        )
        write_figure(folder, record)
        yield record
