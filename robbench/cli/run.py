"""What the command `run` does, from a request to files and lines on the terminal."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from robbench.cli.base import budgets, counts, example_count, names, print_paths, target_class
from robbench.core.places import check_output_folder
from robbench.core.terminal import Terminal, print_line
from robbench.report.files import publish
from robbench.run.cells import Cell
from robbench.run.earlier import join_earlier
from robbench.run.executor import execute, open_backend
from robbench.run.plan import Plan, build_plan
from robbench.run.progress import run_progress
from robbench.run.rates import PlanRates, format_hours
from robbench.run.request import RunRequest, pick_settings
from robbench.store.folder import check_folder, check_not_foreign, open_ledger
from robbench.store.ledger import Ledger, load_run


def build_request(options: Mapping[str, Any]) -> RunRequest:
    """The request behind the options of `robbench run`, which click has checked one by one; `UserError` for a list of
    names or numbers that cannot be read."""
    return RunRequest(
        attacks=names("--attacks", options["attacks"]),
        defenses=names("--defense", options["defenses"]),
        models=names("--model", options["models"]),
        dataset=options["dataset"],
        flow=options["flow"],
        own=options["own"],
        epsilons=budgets("--epsilon", options["epsilons"]),
        etas=budgets("--eta", options["etas"]),
        steps=counts("--steps", options["steps"]),
        target=target_class(options["target"]),
        surrogate=options["surrogate"],
        likelihood_dtype=options["likelihood_dtype"],
        likelihood_draws=options["likelihood_draws"],
        **settings(options),
    )


def settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `RunSettings` from the options of `robbench run`, for a matrix or an experiment."""
    keep = example_count(options["keep_examples"])
    return pick_settings({**options, "keep_examples": keep})


def run_matrix(request: RunRequest, folder: Path, fresh: bool = False) -> int:
    """Complete the matrix in `folder`, write and print its tables; returns the number of failed cells.

    Only what the folder says afterwards counts: a cell whose rows are not all there counts as failed too.
    """
    check_not_foreign(folder)  # before models are loaded, which can take minutes
    check_output_folder(folder)
    plan, console = build_plan(request), Terminal()
    for remark in plan.remarks:
        print_line(console, remark)
    for warning in plan.warnings:
        console.print(f"Suspicious: {warning}", style="yellow", markup=False, soft_wrap=True)
    with open_backend(plan) as backend, open_ledger(folder, plan.run, fresh) as ledger:
        records = [cell.record for cell in plan.cells]
        joined = join_earlier(plan.run, plan.cards, folder)
        plan = replace(plan, run=joined.run)
        with run_progress(console, records, len(plan.samples)) as progress:
            execute(plan, ledger, progress, backend)
        run = load_run(folder)
        paths = publish(run, console)
        if joined.left_out:
            print_line(console, joined.line(folder))
    asked = {record.hash for record in records}
    finished = [result.cell for result in run.cells if result.cell.hash in asked]
    failed = sum(record.status == "failed" for record in finished)
    unfinished = [f"{cell.model} x {cell.attack.label}" for cell in finished if cell.status == "running"]
    if unfinished:
        line = (
            f"{len(unfinished)} of {len(finished)} cells are not complete in {folder}: "
            f"{', '.join(unfinished[:5])}; run the same command again"
        )
        console.print(line, style="red", markup=False, soft_wrap=True)
    if failed:
        line = (
            f"{failed} of {len(finished)} cells failed; reasons are below the table and in {folder / 'cells'}"
        )
        print_line(console, line, "red")
    print_paths(paths)
    return failed + len(unfinished)


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
        "forwards\nper sample",
        "backwards\nper sample",
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
        table.add_row(*names, *(f"{number:,}" for number in numbers), format_hours(of_cell))
    console = Terminal()
    console.print(table)
    console.print(
        f"{len(plan.cells)} cells; at most {totals[0]:,} forwards and {totals[1]:,} backwards to compute "
        f"(a sample that breaks early needs fewer), {format_hours(hours)} hours at the rates measured on {plan.device} "
        f"just now. Nothing was computed.",
        highlight=False,
        soft_wrap=True,
    )


def _present(ledger: Ledger, plan: Plan, cell: Cell) -> int:
    """Requested samples that the ledger has; a bad shard counts as absent, and stays where it is."""
    shards = ledger.shards(cell.record.hash, lambda _path, _reason: None)
    return len(set(plan.samples).intersection(*[[i for shard in shards for i in shard.ids]]))
