"""What the commands `run`, `report` and `check` do, from a request to files and lines on the terminal."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from robbench.cli_base import print_paths
from robbench.matrix.executor import execute
from robbench.matrix.folder import check_folder, opened
from robbench.matrix.ledger import Ledger, load_run
from robbench.matrix.plan import Cell, Plan, RunRequest, build_plan
from robbench.matrix.progress import run_progress
from robbench.matrix.records import Run


def run_matrix(request: RunRequest, folder: Path, fresh: bool = False) -> int:
    """Complete the matrix in `folder`, write and print its tables; returns the number of failed cells."""
    plan = build_plan(request)
    console = Console()
    with opened(folder, plan.run, fresh) as ledger:
        records = [cell.record for cell in plan.cells]
        with run_progress(console, records, len(plan.samples)) as progress:
            finished = execute(plan, ledger, progress)
        failed = sum(record.status == "failed" for record in finished)
        paths = _publish(load_run(folder), console)
    if failed:
        line = (
            f"{failed} of {len(finished)} cells failed; reasons are below the table and in {folder / 'cells'}"
        )
        console.print(line, style="red", markup=False, soft_wrap=True)
    print_paths(paths)
    return failed


def write_report(folder: Path) -> list[Path]:
    """Write and print the tables of a run folder again; returns the paths of CSV and HTML."""
    return _publish(load_run(folder), Console())


def check_run(folder: Path, against: Path, tolerance: float | None = None) -> bool:
    """Compare a run with the reference numbers in `against`; prints every comparison, True when it passed."""
    from robbench.publish.check import check, check_table, passed
    from robbench.publish.tables import leaderboard

    results = check(leaderboard(load_run(folder)), against, tolerance)
    Console().print(check_table(results))
    return passed(results)


def _publish(run: Run, console: Console) -> list[Path]:
    """Write the tables and print the leaderboard; paths of CSV and HTML."""
    from robbench.publish.writers import terminal_table, write_tables

    stored = Ledger(run.folder).originals()

    def originals(ids: Sequence[int]) -> np.ndarray:
        return np.stack([stored[int(i)] for i in ids])

    paths = write_tables(run, run.folder, originals if stored else None)
    console.print(terminal_table(run))
    return [paths["csv"], paths["html"]]


# ---------------------------------------------------------------------------------------------------- dry run
def dry_run_table(request: RunRequest, folder: Path, fresh: bool = False) -> None:
    """Print the cells, what the ledger in `folder` has of them, and the model calls still to make."""
    plan = build_plan(request)
    check_folder(folder, plan.run, fresh)
    table = Table(
        title=f"{plan.run.dataset}, {len(plan.samples)} samples, seed {plan.run.seed}, {plan.device}"
    )
    for name in ("model", "attack", "threat model"):
        table.add_column(name)
    for name in ("samples", "in ledger", "forwards/sample", "backwards/sample", "forwards", "backwards"):
        table.add_column(name, justify="right")
    totals = [0, 0]
    for cell in plan.cells:
        present = 0 if fresh else _present(Ledger(folder), plan, cell)
        missing = len(plan.samples) - present
        calls = (cell.cost.forwards, cell.cost.backwards)
        totals = [total + missing * each for total, each in zip(totals, calls, strict=True)]
        numbers = (len(plan.samples), present, *calls, *(missing * each for each in calls))
        attack = cell.record.attack
        table.add_row(
            cell.record.model, attack.label, attack.threat_model, *(f"{number:,}" for number in numbers)
        )
    console = Console()
    console.print(table)
    console.print(
        f"{len(plan.cells)} cells; at most {totals[0]:,} forwards and {totals[1]:,} backwards to compute "
        f"(a sample that breaks early needs fewer). Nothing was computed.",
        highlight=False,
        soft_wrap=True,
    )


def _present(ledger: Ledger, plan: Plan, cell: Cell) -> int:
    """Wanted samples the ledger has; a bad shard counts as absent, and stays where it is."""
    shards = ledger.shards(cell.record.hash, lambda _path, _reason: None)
    return len(set(plan.samples).intersection(*[[i for shard in shards for i in shard.ids]]))
