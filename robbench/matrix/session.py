"""What the commands `run` and `report` do, from a request to files and lines on the terminal."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from robbench.cli_base import print_paths
from robbench.errors import UserError
from robbench.matrix.cells import Cell
from robbench.matrix.executor import execute, opened_backend
from robbench.matrix.folder import check_folder, opened
from robbench.matrix.ledger import ORIGINALS_FILE, Ledger, load_run
from robbench.matrix.plan import Plan, RunRequest, build_plan
from robbench.matrix.progress import Terminal, run_progress
from robbench.matrix.rates import PlanRates, hours_text
from robbench.matrix.records import Run


def run_matrix(request: RunRequest, folder: Path, fresh: bool = False) -> int:
    """Complete the matrix in `folder`, write and print its tables; returns the number of failed cells."""
    plan = build_plan(request)
    console = Terminal()
    with opened_backend(plan) as backend, opened(folder, plan.run, fresh) as ledger:
        records = [cell.record for cell in plan.cells]
        with run_progress(console, records, len(plan.samples)) as progress:
            finished = execute(plan, ledger, progress, backend)
        failed = sum(record.status == "failed" for record in finished)
        paths = _publish(load_run(folder), console)
    if failed:
        line = (
            f"{failed} of {len(finished)} cells failed; reasons are below the table and in {folder / 'cells'}"
        )
        console.print(line, style="red", markup=False, soft_wrap=True)
    print_paths(paths)
    return failed


def write_report(*folders: Path, sizes: bool = False, published: bool = False) -> list[Path]:
    """Write and print the tables of run folders again; returns the paths of CSV and HTML.

    sizes: print the perturbation sizes too. published: hold all runs against the published tables, on pages in the
    folder of the first, which its own page links.
    """
    from robbench.publish.terminal import terminal_sizes

    console = Terminal()
    runs = [load_run(folder) for folder in folders]
    pages = _write_published(runs, console) if published else []
    paths = []
    for number, run in enumerate(runs):
        paths += _publish(run, console, PUBLISHED_PAGES if published and number == 0 else "")
        if sizes:
            console.print(terminal_sizes(run))
    return paths + pages


PUBLISHED_PAGES = "published/index.html"


def _write_published(runs: Sequence[Run], console: Console) -> list[Path]:
    """Write the pages of published tables and print how many numbers agree; paths of overview and Markdown."""
    from robbench.publish.published_page import terminal_counts, write_published

    console.print(terminal_counts(write_published(runs, runs[0].folder)))
    overview = runs[0].folder / PUBLISHED_PAGES
    return [overview, overview.with_name("comparison.md")]


def _publish(run: Run, console: Console, published: str = "") -> list[Path]:
    """Write the tables and print accuracies and likelihoods; paths of CSV and HTML. published: as in `write_html`."""
    from robbench.publish.terminal import terminal_corruptions, terminal_likelihood
    from robbench.publish.writers import terminal_table, write_tables

    stored = Ledger(run.folder).originals()
    if any(image.shape != run.shape for image in stored.values()):
        raise UserError(
            f"{run.folder / ORIGINALS_FILE} holds images of another shape than {run.shape}; "
            f"run the same `robbench run` again to restore it"
        )

    def originals(ids: Sequence[int]) -> np.ndarray:
        return np.stack([stored[int(i)] for i in ids])

    paths = write_tables(run, run.folder, originals if stored else None, published)
    targets = {result.cell.attack.target for result in run.cells}
    if "classifier" in targets:
        console.print(terminal_table(run))
    if any(not result.cell.attack.bounded for result in run.cells):
        console.print(terminal_corruptions(run))
    if "flow" in targets:
        console.print(terminal_likelihood(run))
    return [paths["csv"], paths["html"]]


# ---------------------------------------------------------------------------------------------------- dry run
def dry_run_table(request: RunRequest, folder: Path, fresh: bool = False) -> None:
    """Print the cells, what the ledger in `folder` has of them, and the model calls still to make."""
    plan = build_plan(request)
    check_folder(folder, plan.run, fresh)
    table = Table(
        title=f"{plan.run.dataset}, {len(plan.samples)} samples, seed {plan.run.seed}, {plan.device}",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in ("model", "attack"):
        table.add_column(name, overflow="fold")
    for name in (
        "in\nledger",
        "forwards\na sample",
        "backwards\na sample",
        "forwards\nto do",
        "backwards\nto do",
        "hours",
    ):
        table.add_column(name, justify="right", overflow="fold")
    totals, rates, hours = [0, 0], PlanRates(plan), 0.0
    for cell in plan.cells:
        present = 0 if fresh else _present(Ledger(folder), plan, cell)
        missing = len(plan.samples) - present
        calls = (cell.cost.forwards, cell.cost.backwards)
        totals = [total + missing * each for total, each in zip(totals, calls, strict=True)]
        numbers = (present, *calls, *(missing * each for each in calls))
        of_cell = rates.hours(cell, missing)
        hours += of_cell
        names = (cell.record.model, cell.record.attack.label)
        table.add_row(*names, *(f"{number:,}" for number in numbers), hours_text(of_cell))
    console = Terminal()
    console.print(table)
    console.print(
        f"{len(plan.cells)} cells; at most {totals[0]:,} forwards and {totals[1]:,} backwards to compute "
        f"(a sample that breaks early needs fewer), {hours_text(hours)} hours at the rates measured on {plan.device} "
        f"just now. Nothing was computed.",
        highlight=False,
        soft_wrap=True,
    )


def _present(ledger: Ledger, plan: Plan, cell: Cell) -> int:
    """Wanted samples the ledger has; a bad shard counts as absent, and stays where it is."""
    shards = ledger.shards(cell.record.hash, lambda _path, _reason: None)
    return len(set(plan.samples).intersection(*[[i for shard in shards for i in shard.ids]]))
