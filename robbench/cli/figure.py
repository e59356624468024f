"""`robbench figure`: embeddings and loss surfaces of a run's models. Only click is imported before the command runs."""

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


@click.command()
@click.argument("name", metavar="embedding|loss-surface", type=Text())
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
    """Compute a figure of a run's models, from the images that the run keeps.

    Its numbers (CSV) and picture (SVG) lie in RUN/figures, and robbench report shows both on the models' pages. To keep
    all images: robbench run --keep-examples all.

    Example: robbench figure loss-surface robbench-runs/digits-seed0 --model digits-at
    """
    from robbench.core.resources import write_text_atomically
    from robbench.core.spreadsheet import csv_text
    from robbench.report.figures import draw_file
    from robbench.run.figures import compute_figures
    from robbench.run.subjects import FigureRequest
    from robbench.store.figure_records import figure_path

    for option in ("models", "attacks"):
        options[option] = names(option, options[option])
    for record in compute_figures(run_folder, name, FigureRequest(**options)):
        table, picture = (figure_path(run_folder, record, ending) for ending in ("csv", "svg"))
        write_text_atomically(table, csv_text([record.columns, *record.rows]))
        write_text_atomically(picture, draw_file(record))
        echo_line(f"{record.model}: {' '.join(record.facts)}")
        print_paths([table, picture])
