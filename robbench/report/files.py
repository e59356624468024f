"""The tables of runs as files and on the terminal: what `robbench run` does last, and `robbench report` again.

No torch here: a report needs neither model nor data.
"""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from robbench.core.errors import UserError
from robbench.core.resources import write_text_atomically
from robbench.store.ledger import ORIGINALS_FILE, Ledger
from robbench.store.records import Run

PUBLISHED_PAGES = "published/index.html"


def write_report(runs: Sequence[Run], console: Console, published: bool = False) -> list[Path]:
    """Write the tables of `runs` into their folders and print them; returns the paths of CSV and HTML.

    published: hold all runs against the published tables, on a page in the folder of the first, which its page links.
    """
    pages = _write_published(runs, console) if published else []
    paths = []
    for number, run in enumerate(runs):
        paths += publish(run, console, PUBLISHED_PAGES if published and number == 0 else "")
    return paths + pages


def publish(run: Run, console: Console, published: str = "") -> list[Path]:
    """Write the tables of a run into its folder and print accuracies and likelihoods; paths of CSV and HTML.

    published: see `write_run_page`.
    """
    if any(image.shape != run.shape for image in Ledger(run.folder).originals().values()):
        raise UserError(
            f"{run.folder / ORIGINALS_FILE} holds images of another shape than {run.shape}; "
            f"run the same `robbench run` again to restore it"
        )
    paths = write_tables(run, run.folder, published)
    print_tables(run, console)
    return [paths["csv"], paths["html"]]


def write_tables(run: Run, folder: Path, published: str = "") -> dict[str, Path]:
    """Write every table of `run` into `folder`; returns the paths by kind: csv, wide (with classifiers), detection
    (with guarded ones), likelihood (with flows), markdown, html. Files are written atomically; a table that the run no
    longer has is removed.

    published: see `write_run_page`.
    """
    from robbench.report.site.build import write_run_page
    from robbench.report.writers import detection_csv, likelihood_csv, markdown, tidy_csv, wide_csv
    from robbench.results.detection import detection_table
    from robbench.results.likelihood import nll_tables
    from robbench.results.tables import leaderboard, wide

    rows, likelihoods = leaderboard(run), nll_tables(run)
    accuracies, detections = wide(rows), detection_table(run, rows)
    texts = {
        "csv": ("leaderboard.csv", tidy_csv(rows)),
        "wide": ("leaderboard-wide.csv", wide_csv(accuracies) if accuracies.models else None),
        "detection": ("detection.csv", detection_csv(detections) if detections.lines else None),
        "likelihood": ("likelihood.csv", likelihood_csv(likelihoods) if likelihoods else None),
        "markdown": ("leaderboard.md", markdown(run, rows)),
    }
    paths = {}
    for kind, (name, text) in texts.items():
        if text is None:
            (folder / name).unlink(missing_ok=True)
            continue
        paths[kind] = folder / name
        write_text_atomically(paths[kind], text)
    paths["html"] = write_run_page(run, folder / "leaderboard.html", published)
    return paths


def print_tables(run: Run, console: Console) -> None:
    """Print accuracies, corruptions and likelihoods, where the run has them."""
    from robbench.report.terminal import terminal_corruptions, terminal_detection, terminal_likelihood
    from robbench.report.writers import terminal_table
    from robbench.results.rows import models

    kinds = {model.kind for model in models(run)}
    if "classifier" in kinds:
        console.print(terminal_table(run))
    if any(result.cell.detector for result in run.cells):
        console.print(terminal_detection(run))
    if any(result.cell.attack.space == "corruption" for result in run.cells):
        console.print(terminal_corruptions(run))
    if "flow" in kinds:
        console.print(terminal_likelihood(run))


def print_sizes(run: Run, console: Console) -> None:
    """Print the perturbation sizes."""
    from robbench.report.terminal import terminal_sizes

    console.print(terminal_sizes(run))


def _write_published(runs: Sequence[Run], console: Console) -> list[Path]:
    """Write the published tables beside the runs and print how many numbers agree; paths of page and Markdown."""
    from robbench.report.published_page import terminal_counts
    from robbench.report.site.build import write_published

    console.print(terminal_counts(write_published(runs, runs[0].folder)))
    overview = runs[0].folder / PUBLISHED_PAGES
    return [overview, overview.with_name("comparison.md")]
