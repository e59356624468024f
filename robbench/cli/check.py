"""`robbench check`: holds a run to reference numbers. Only click is imported before the command runs."""

from pathlib import Path
from typing import Any

import click

from robbench.cli.base import FiniteNumber, FolderOrFile, Text


@click.command()
@click.argument("run_folder", metavar="RUN", type=FolderOrFile())
@click.option(
    "--against",
    multiple=True,
    type=FolderOrFile(),
    help="Tidy CSV, a folder of them, a reference run (.parquet) or a run folder.",
)
@click.option(
    "--tolerance-policy",
    type=click.Choice(("default", "exact", "interval")),
    default="default",
    show_default=True,
    help="How far numbers may lie apart; see docs/check.md.",
)
@click.option(
    "--tolerance",
    type=FiniteNumber(),
    help="Percentage points an accuracy may be off, instead of the policy.",
)
@click.option(
    "--complete",
    is_flag=True,
    help="Fail unless every accuracy of the run has a reference, and the run every cell of a reference run.",
)
@click.option("--json", type=FolderOrFile(), metavar="FILE", help="Write the verdicts as JSON.")
@click.option("--junit", type=FolderOrFile(), metavar="FILE", help="Write the verdicts as JUnit XML.")
@click.option(
    "--format",
    "output",
    type=click.Choice(("text", "github")),
    default="text",
    show_default=True,
    help="github: annotations for GitHub Actions, too.",
)
@click.option("--update", is_flag=True, help="Write measured values over those of the CSV that failed.")
@click.option(
    "--write-reference",
    type=FolderOrFile(),
    metavar="FILE",
    help="Write the run, sample by sample, as a reference (.parquet).",
)
@click.option("--reason", type=Text(), help="Why a reference changes; kept in the file.")
@click.pass_context
def check(context: click.Context, /, **options: Any) -> None:
    """Compare a run with reference numbers; exit 1 when one is off.

    Example: robbench check RUN --against reports/leaderboard/digits.csv
    """
    from robbench.cli.check_session import CheckRequest, check_run

    against: tuple[Path, ...] = options.pop("against")
    context.exit(0 if check_run(CheckRequest(**options, against=against)) else 1)
