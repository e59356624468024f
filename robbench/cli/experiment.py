"""`robbench run --recipe`: its options, and the way from them to an experiment. Only click is imported here."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from robbench.cli.base import FiniteNumber, FolderOrFile, Text, example_count
from robbench.cli.completion import recipe_completion
from robbench.core.errors import UserError

# What a recipe says itself, and what only a recipe can use; by parameter name.
OF_THE_RECIPE = {
    "attacks": "--attacks",
    "defenses": "--defense",
    "models": "--model",
    "dataset": "--dataset",
    "flow": "--flow",
    "epsilons": "--epsilon",
    "etas": "--eta",
    "steps": "--steps",
    "likelihood_dtype": "--likelihood-dtype",
    "likelihood_draws": "--likelihood-draws",
}
ONLY_WITH_RECIPE = {"scale": "--scale", "fid_weights": "--fid-weights"}

recipe_option = click.option(
    "--recipe",
    type=Text(),
    help="A paper's experiment instead: ijsat-table1, ..., or a YAML file (robbench list recipes).",
    shell_complete=recipe_completion,
)
scale_option = click.option(
    "--scale",
    type=FiniteNumber(),
    default=1.0,
    help="With --recipe: epochs, images and flow sizes times this, over 0 to 1.  [default: 1]",
)
fid_weights_option = click.option(
    "--fid-weights",
    type=FolderOrFile(),
    help="With --recipe: weights file of inception, for FID.  [default: downloaded once]",
)


def check_recipe_options(context: click.Context) -> None:
    """`UserError` for options that exclude each other: a recipe names its attacks, models and data itself."""
    given = {
        name
        for name in context.params
        if context.get_parameter_source(name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    }
    if "recipe" in given:
        if doubled := [option for name, option in OF_THE_RECIPE.items() if name in given]:
            raise UserError(
                f"--recipe says itself what {doubled[0]} is; leave {', '.join(doubled)} out, or copy the recipe's YAML "
                f"file, change it, and give its path"
            )
        return
    if alone := [option for name, option in ONLY_WITH_RECIPE.items() if name in given]:
        raise UserError(f"{alone[0]} is for --recipe; leave it out, or name a recipe (robbench list recipes)")
    if "attacks" not in given:
        raise UserError(
            "neither --attacks nor --recipe is given; name attacks, as in --attacks pgd20,aa, or a paper's "
            "experiment, as in --recipe ijsat-table1; see robbench run --help"
        )


def run_recipe(options: dict[str, Any], out: Path | None, resume: bool, dry_run: bool) -> int:
    """Run the experiment the options ask for, or print what it costs; returns the number of failures."""
    from robbench.cli.experiment_session import dry_run_experiment, run_experiment
    from robbench.cli.train import trained
    from robbench.experiments.runs import ExperimentRequest
    from robbench.experiments.schema import Scale, find_experiment

    request = ExperimentRequest(
        experiment=find_experiment(options["recipe"]),
        scale=Scale(options["scale"]),
        n=options["n"],
        seed=options["seed"],
        device=options["device"],
        batch_size=options["batch_size"],
        compiled=options["compiled"],
        backend=options["backend"],
        ray_address=options["ray_address"],
        gpus_per_cell=options["gpus_per_cell"],
        keep_examples=example_count(options["keep_examples"]),
        threat_models=options["threat_models"],
        zoo=options["zoo"],
        checkpoints=options["checkpoints"],
        data_dir=options["data_dir"],
        data=options["data"],
        fid_weights=options["fid_weights"],
        recipe=options["recipe"],
    )
    folder = out or Path("robbench-runs") / request.folder_name
    if dry_run:
        dry_run_experiment(request, folder)
        return 0
    return run_experiment(request, folder, trained, fresh=not resume)
