"""`robbench figure`: embeddings and loss surfaces of a run's models. Only click is imported before the command runs."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from robbench.cli.base import (
    FiniteNumber,
    FolderOrFile,
    Text,
    WholeNumber,
    device_option,
    echo_line,
    names,
    print_paths,
    zoo_option,
)
from robbench.core.errors import UserError

TRAINING = "training"


@click.command()
@click.argument("name", metavar="embedding|loss-surface|training", type=Text())
@click.argument("run_folder", metavar="RUN", type=FolderOrFile())
@click.option("--model", "models", multiple=True, help="Models of the run.  [default: all its classifiers]")
@click.option(
    "--attacks", multiple=True, help="Attacked images of an embedding.  [default: all that kept images]"
)
@click.option("--n", type=WholeNumber(1), help="Stored images, at most.  [default: all]")
@click.option(
    "--extent",
    type=FiniteNumber(),
    help="Largest step of a loss surface.  [default: the run's largest Linf budget]",
)
@click.option(
    "--points", type=WholeNumber(3), default=21, show_default=True, help="Of a loss surface, a direction."
)
@zoo_option
@device_option
def figure(name: str, run_folder: Path, **options: Any) -> None:
    """Compute a figure of a run's models: numbers (CSV) and a picture (SVG) in RUN/figures.

    embedding and loss-surface take the images that the run keeps (robbench run --keep-examples all); training is
    accuracy against every setting of the training that models of the run differ in alone. The models' pages of robbench
    report show them.

    Example: robbench figure loss-surface robbench-runs/digits-seed0 --model digits-at
    """
    if name == TRAINING:
        _write_sweeps(run_folder)
        return
    from robbench.report.figures import draw_file
    from robbench.run.figures import compute_figures
    from robbench.run.subjects import FigureRequest
    from robbench.store.figure_records import figure_path

    for option in ("models", "attacks"):
        options[option] = names(option, options[option])
    for record in compute_figures(run_folder, name, FigureRequest(**options)):
        echo_line(f"{record.model}: {' '.join(record.facts)}")
        _write(figure_path(run_folder, record, "csv"), [record.columns, *record.rows], draw_file(record))


def _write_sweeps(folder: Path) -> None:
    from robbench.report.site.groups import site_of
    from robbench.report.site.page import slugs
    from robbench.report.site.training_sweeps import COLUMNS, all_sweeps
    from robbench.store.figure_records import FIGURES_FOLDER
    from robbench.store.ledger import load_run

    sweeps = [sweep for group in site_of([load_run(folder)]).groups for sweep in all_sweeps(group)]
    if not sweeps:
        raise UserError(
            f"{str(folder)!r} has no two classifiers whose cards differ in one setting of the training alone (the seed "
            f"aside), with finished attacks in common; run such models together"
        )
    stems = slugs(sweep.title.removeprefix("Accuracy against ") for sweep in sweeps)
    for sweep, stem in zip(sweeps, stems.values(), strict=True):
        echo_line(f"{sweep.title}. {sweep.note}")
        path = folder / FIGURES_FOLDER / f"{TRAINING}-{stem}.csv"
        _write(path, [COLUMNS, *sweep.lines], sweep.file)


def _write(table: Path, lines: Iterable[Sequence[object]], svg: str) -> None:
    from robbench.core.resources import write_text_atomically
    from robbench.core.spreadsheet import csv_text

    picture = table.with_suffix(".svg")
    table.parent.mkdir(exist_ok=True)
    write_text_atomically(table, csv_text(lines))
    write_text_atomically(picture, svg)
    print_paths([table, picture])
