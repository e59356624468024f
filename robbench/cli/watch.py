"""`robbench watch`: a run in progress, seen from outside. Only click is imported before the command runs."""

from pathlib import Path

import click

from robbench.cli.base import CELLS_FAILED, FolderOrFile, print_json
from robbench.core.errors import UserError


@click.command()
@click.argument("run_folder", metavar="RUN", type=FolderOrFile())
@click.option(
    "--interval",
    type=click.FloatRange(0.1, 3600),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Say how it stands and end.")
@click.option("--json", "as_json", is_flag=True, help="With --once: as JSON (docs/living.md).")
@click.pass_context
def watch(context: click.Context, run_folder: Path, interval: float, once: bool, as_json: bool) -> None:
    """Show a run in progress, also one that was started elsewhere on the same folder.

    Reads only. RUN is the --out of a run that has begun. Ends when the run has: exit code 3 when cells failed.
    """
    if as_json and not once:
        raise click.UsageError("--json says how it stands now; give --once too")
    if interval != interval:  # NaN, which no range refuses
        raise UserError("--interval nan is no number of seconds; give 0.1 to 3600")
    from robbench.core.terminal import Terminal
    from robbench.run.watch import Watcher, refuse_no_run
    from robbench.run.watch_screen import show_once, snapshot_json, watch_run

    refuse_no_run(run_folder)
    console, watcher = Terminal(), Watcher(run_folder)
    if once:
        snapshot = watcher.look()
        if as_json:
            print_json(snapshot_json(snapshot))
        else:
            show_once(snapshot, console)
    else:
        snapshot = watch_run(watcher, interval, console)
    context.exit(CELLS_FAILED if snapshot.count("failed") else 0)
