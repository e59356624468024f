"""`robbench run --experiment`: its options, and the way from them to an experiment. Only click is imported here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from robbench.cli.base import FiniteNumber, FolderOrFile, Text, echo_line
from robbench.cli.completion import experiment_completion
from robbench.core.errors import UserError

# What an experiment says itself, and what only an experiment can use; names of parameters.
OF_THE_EXPERIMENT = (
    *("attacks", "defenses", "models", "dataset", "flow", "epsilons", "etas", "steps"),
    *("likelihood_dtype", "likelihood_draws", "like", "size"),
    *("weights", "model_args", "weights_key", "mean", "std"),
)
ONLY_WITH_EXPERIMENT = ("scale", "fid_weights")

experiment_option = click.option(
    "--experiment",
    type=Text(),
    help="A paper's table instead: ijsat-table1, ..., or a YAML file (robbench list experiments).",
    shell_complete=experiment_completion,
)
recipe_option = click.option("--recipe", type=Text(), hidden=True)  # the name of before, for one version
scale_option = click.option(
    "--scale",
    type=FiniteNumber(),
    default=1.0,
    help="With --experiment: epochs, images and flow sizes times this, over 0 to 1.  [default: 1]",
)
fid_weights_option = click.option(
    "--fid-weights",
    type=FolderOrFile(),
    help="With --experiment: weights file of inception, for FID.  [default: downloaded once]",
)


def experiment_options(context: click.Context, options: dict[str, Any]) -> dict[str, Any]:
    """The options of `run`, --recipe of before as --experiment; `UserError` for options that exclude each other: an
    experiment names its attacks, models and data itself."""
    unset = ParameterSource.DEFAULT
    given = {name for name in context.params if context.get_parameter_source(name) != unset}
    old = options.pop("recipe")
    if old is not None:
        if "experiment" in given:
            raise UserError(f"--experiment and --recipe {old} are one option; leave --recipe out")
        echo_line(
            f"--recipe is now --experiment, and goes with the next version: --experiment {old}", err=True
        )
        given, options["experiment"] = given | {"experiment"}, old
    _check_options(given, {p.name or "": p.opts[0] for p in context.command.params})
    return options


def _check_options(given: set[str], option: Mapping[str, str]) -> None:
    """given: names of parameters. option: how each is written."""
    if "experiment" in given:
        if doubled := [option[name] for name in OF_THE_EXPERIMENT if name in given]:
            raise UserError(
                f"--experiment says itself what {doubled[0]} is; leave {', '.join(doubled)} out, or copy the "
                f"experiment's YAML file, change it, and give its path"
            )
        return
    if alone := [option[name] for name in ONLY_WITH_EXPERIMENT if name in given]:
        raise UserError(
            f"{alone[0]} is for --experiment; leave it out, or name an experiment (robbench list experiments)"
        )
    if "attacks" not in given:
        raise UserError(
            "neither --attacks nor --experiment is given; name attacks, as in --attacks pgd20,aa, or a paper's "
            "table, as in --experiment ijsat-table1; see robbench run --help"
        )


def run_experiment(options: dict[str, Any], out: Path | None, resume: bool, dry_run: bool) -> int:
    """Run the experiment the options ask for, or print what it costs; returns the number of failures."""
    from robbench.cli import experiment_session
    from robbench.cli.run import settings
    from robbench.cli.train_session import train_with_progress
    from robbench.experiments.request import ExperimentRequest
    from robbench.experiments.schema import Scale, find_experiment

    request = ExperimentRequest(
        experiment=find_experiment(options["experiment"]),
        requested=options["experiment"],
        scale=Scale(options["scale"]),
        fid_weights=options["fid_weights"],
        **settings(options),
    )
    folder = out or Path("robbench-runs") / request.folder_name
    if dry_run:
        experiment_session.dry_run_experiment(request, folder)
        return 0
    return experiment_session.run_experiment(request, folder, train_with_progress, fresh=not resume)
