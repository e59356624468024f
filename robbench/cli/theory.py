"""`robbench theory`: closed-form results on likelihood attacks. Only click is imported before a command runs."""

from pathlib import Path
from typing import Any

import click

from robbench.cli.base import FiniteNumber, FolderOrFile, WholeNumber, print_paths

RECURSIONS = ("paper_geometric", "refit", "reperturb", "fixed_data")


@click.group()
def theory() -> None:
    """Exact results to hold attacks and defenses against."""


@theory.command()
@click.option("--n", type=WholeNumber(), default=10, show_default=True, help="Dimensions.")
@click.option(
    "--epsilon", type=FiniteNumber(), default=0.5, show_default=True, help="L2 radius, in units of the data."
)
@click.option(
    "--sigma", type=FiniteNumber(), default=1.0, show_default=True, help="Standard deviation of the data."
)
@click.option(
    "--steps", type=WholeNumber(), default=10, show_default=True, help="Steps of adversarial training."
)
@click.option("--seed", type=WholeNumber(0), default=0, show_default=True, help="Seed of all simulations.")
@click.option(
    "--recursion",
    type=click.Choice(("all", *RECURSIONS)),
    default="all",
    show_default=True,
    help="What a step of adversarial training does.",
)
@click.option(
    "--drop", type=FiniteNumber(), default=0.5, show_default=True, help="Likelihood drop to guarantee, nats."
)
@click.option(
    "--gamma",
    type=FiniteNumber(),
    default=0.05,
    show_default=True,
    help="Probability that the guarantee fails.",
)
@click.option(
    "--samples", type=WholeNumber(), default=10_000, show_default=True, help="Draws of every simulation."
)
@click.option("--out", type=FolderOrFile(), default=Path("robbench-theory"), show_default=True)
def linear(out: Path, recursion: str, **options: Any) -> None:
    """Gaussian flows: optimal attacks, adversarial training and its guarantee (figures 2 and 3 of the theory).

    Example: robbench theory linear --n 10 --epsilon 0.5 --recursion refit
    """
    from robbench.benchmarks.theory_report import LinearRequest, linear_report
    from robbench.core.terminal import Terminal

    chosen: Any = RECURSIONS if recursion == "all" else (recursion,)
    request = LinearRequest(recursions=chosen, **options)
    print_paths(linear_report(request, out, Terminal()))
