"""`robbench samples`: samples of a flow scored under another. Only click is imported before the command runs."""

from pathlib import Path
from typing import Any

import click

from robbench.cli.base import (
    FolderOrFile,
    Text,
    WholeNumber,
    data_dir_option,
    data_option,
    device_option,
    print_paths,
    temperatures,
    zoo_option,
)
from robbench.cli.completion import model_completion


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    required=True,
    help="Flows to draw from (comma lists).",
    shell_complete=model_completion,
)
@click.option("--under", type=Text(), required=True, help="Flow that scores the samples.")
@click.option(
    "--temperature",
    "values",
    multiple=True,
    default=("0.5,0.7,0.9,1",),
    show_default=True,
    help="Widths of the prior.",
)
@click.option("--n", type=WholeNumber(1), default=500, show_default=True, help="Samples a temperature.")
@click.option("--seed", type=WholeNumber(0), default=0, show_default=True, help="Seed of samples and noise.")
@click.option("--out", type=FolderOrFile(), default=Path("robbench-samples"), show_default=True)
@device_option
@zoo_option
@data_option
@data_dir_option
def samples(models: tuple[str, ...], values: tuple[str, ...], out: Path, **options: Any) -> None:
    """Score samples of flows under another flow, beside test images and uniform noise.

    Example: robbench samples --model digits-glow-at,digits-glow --under digits-glow
    """
    from robbench.cli.base import names
    from robbench.cli.flow_samples import SamplesRequest, samples_report

    request = SamplesRequest(
        models=names("--model", models), temperatures=temperatures("--temperature", values), **options
    )
    print_paths(samples_report(request, out))
