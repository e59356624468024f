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
@click.option(
    "--min",
    "minimums",
    multiple=True,
    metavar="ATTACK=PERCENT,...",
    help="Accuracies that every classifier of RUN_B must reach, as in aa=45,clean=80.",
)
@click.option(
    "--accept-differences",
    is_flag=True,
    help="Exit 0 where other budgets, samples or engines were compared, or cells are missing.",
)
@click.option(
    "--format",
    "output",
    type=click.Choice(("text", "github", "markdown", "json")),
    default="text",
    show_default=True,
    help="github: text, annotations of failures, and a summary.",
)
@click.option("--junit", type=FolderOrFile(), metavar="FILE", help="Write the verdicts as JUnit XML.")
@json_option
@click.pass_context
def diff(context: click.Context, /, run_a: Path, run_b: Path, as_json: bool, **options: Any) -> None:
    """Compare two runs (folders or bundles) sample by sample; exit 1 when a number fell beyond its interval.

    Example: robbench diff baseline.zip RUN --min aa=45,clean=80 --format github
    """
    from robbench.cli.diff_session import DiffRequest, diff_runs

    for option, name in (("--model", "models"), ("--attacks", "attacks"), ("--min", "minimums")):
        options[name] = names(option, options[name])
    options["output"] = "json" if as_json else options["output"]
    context.exit(diff_runs(DiffRequest(run_a, run_b, **options)))
