"""The tables of runs as files and on the terminal: what `robbench run` does last, and `robbench report` again.

No torch here: a report needs neither model nor data.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from robbench.core.errors import UserError
from robbench.store.ledger import ORIGINALS_FILE, Ledger
from robbench.store.records import Run

PUBLISHED_PAGES = "published/index.html"


def write_report(runs: Sequence[Run], console: Console, published: bool = False) -> list[Path]:
    """Write the tables of `runs` into their folders and print them; returns the paths of CSV and HTML.

    published: hold all runs against the published tables, on pages in the folder of the first, which its page links.
    """
    pages = _write_published(runs, console) if published else []
    paths = []
    for number, run in enumerate(runs):
        paths += publish(run, console, PUBLISHED_PAGES if published and number == 0 else "")
    return paths + pages


def publish(run: Run, console: Console, published: str = "") -> list[Path]:
    """Write the tables of a run into its folder and print accuracies and likelihoods; paths of CSV and HTML.

    published: as in `write_html`.
    """
    from robbench.report.writers import write_tables

    stored = Ledger(run.folder).originals()
    if any(image.shape != run.shape for image in stored.values()):
        raise UserError(
            f"{run.folder / ORIGINALS_FILE} holds images of another shape than {run.shape}; "
            f"run the same `robbench run` again to restore it"
        )

    def originals(ids: Sequence[int]) -> np.ndarray:
        return np.stack([stored[int(i)] for i in ids])

    paths = write_tables(run, run.folder, originals if stored else None, published)
    print_tables(run, console)
    return [paths["csv"], paths["html"]]


def print_tables(run: Run, console: Console) -> None:
    """Print accuracies, corruptions and likelihoods, where the run has them."""
    from robbench.report.terminal import terminal_corruptions, terminal_likelihood
    from robbench.report.writers import terminal_table

    targets = {result.cell.attack.target for result in run.cells}
    if "classifier" in targets:
        console.print(terminal_table(run))
    if any(result.cell.attack.space == "corruption" for result in run.cells):
        console.print(terminal_corruptions(run))
    if "flow" in targets:
        console.print(terminal_likelihood(run))


def print_sizes(run: Run, console: Console) -> None:
    """Print the perturbation sizes."""
    from robbench.report.terminal import terminal_sizes

    console.print(terminal_sizes(run))


def _write_published(runs: Sequence[Run], console: Console) -> list[Path]:
    """Write the pages of published tables and print how many numbers agree; paths of overview and Markdown."""
    from robbench.report.published_page import terminal_counts, write_published

    console.print(terminal_counts(write_published(runs, runs[0].folder)))
    overview = runs[0].folder / PUBLISHED_PAGES
    return [overview, overview.with_name("comparison.md")]
