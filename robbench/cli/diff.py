"""`robbench diff`: what changed between two runs. Only click is imported before the command runs."""

from pathlib import Path
from typing import Any

import click

from robbench.cli.base import FiniteNumber, FolderOrFile, json_option, names


@click.command()
@click.argument("run_a", metavar="RUN_A", type=FolderOrFile())
@click.argument("run_b", metavar="RUN_B", type=FolderOrFile())
@click.option("--model", "models", multiple=True, help="Compare these models only.")
@click.option("--attacks", multiple=True, help="Compare these attacks only, as in pgd20,aa.")
@click.option(
    "--alpha", type=FiniteNumber(), default=0.05, show_default=True, help="Error rate of intervals and tests."
)
@click.option(
    "--correction",
    type=click.Choice(("holm", "none")),
    default="holm",
    show_default=True,
    help="For many numbers at once; none: each interval decides alone.",
)
@json_option
@click.pass_context
def diff(context: click.Context, /, run_a: Path, run_b: Path, **options: Any) -> None:
    """Compare two runs (folders or bundles) sample by sample; exit 1 when a number fell beyond its interval.

    Example: robbench diff robbench-runs/before robbench-runs/after
    """
    from robbench.cli.diff_session import DiffRequest, diff_runs

    options["models"] = names("--model", options["models"])
    options["attacks"] = names("--attacks", options["attacks"])
    context.exit(0 if diff_runs(DiffRequest(run_a, run_b, **options)) else 1)
