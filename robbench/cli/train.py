"""`robbench train`: a model by --defense, or a detector of adversarial images by --detector.

Only click is imported here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from robbench.cli import help
from robbench.cli.base import (
    FiniteNumber,
    FolderOrFile,
    Text,
    WholeNumber,
    checkpoints_option,
    compute_in,
    data_dir_option,
    data_option,
    dataset_option,
    device_option,
    echo_text,
    threads_option,
    threat_models_option,
    zoo_option,
)
from robbench.cli.completion import (
    attack_completion,
    defense_completion,
    model_completion,
    schedule_completion,
)
from robbench.cli.dataset import choose_dataset
from robbench.cli.help import GroupedCommand
from robbench.core.errors import UserError
from robbench.core.stops import as_stop

Command = TypeVar("Command", bound=Callable[..., Any])
OF_DEFENSES = ("recipe", "architecture", "epochs", "train_samples", "flow")
OF_DETECTORS = ("model", "attacks", "layer", "n", "false_positive_rate", "checkpoints")


def detector_options(command: Command) -> Command:
    """The options that belong to `--detector`."""
    for option in reversed(
        (
            click.option("--detector", type=Text(), help="Train a detector (robbench list detectors)."),
            click.option(
                "--model",
                type=Text(),
                help="The classifier that a detector guards.",
                shell_complete=model_completion,
            ),
            click.option(
                "--attacks",
                multiple=True,
                help="Attacks that a detector is trained against, as in pgd20.",
                shell_complete=attack_completion,
            ),
            click.option(
                "--layer", multiple=True, help="Layers of a detector's features.  [default: the detector's]"
            ),
            click.option(
                "--n", type=WholeNumber(1), help="Validation images to attack.  [default: half, at most 1000]"
            ),
            click.option(
                "--false-positive-rate",
                type=FiniteNumber(),
                help="Share of clean images that a detector flags.  [default: 0.05]",
            ),
            checkpoints_option,
        )
    ):
        command = option(command)
    return command


@click.command(cls=GroupedCommand, groups=help.TRAIN)
@click.option(
    "--defense", help="Training method (robbench list defenses).", shell_complete=defense_completion
)
@detector_options
@dataset_option
@data_option
@click.option(
    "--recipe",
    type=Text(),
    help="Training schedule (robbench show NAME).  [default: the data set's]",
    shell_complete=schedule_completion,
)
@click.option("--architecture", type=Text(), help="[default: the data set's]")
@click.option(
    "--seed", type=WholeNumber(0), default=0, show_default=True, help="Seed of weights, order and noise."
)
@click.option("--epochs", type=WholeNumber(1), help="[default: the recipe's]")
@click.option("--train-samples", type=WholeNumber(1), help="Use only so many training images, drawn by seed.")
@click.option(
    "--flow", type=Text(), help="Flow of latent and joint defenses.  [default: the data set's in the zoo]"
)
@click.option("--name", type=Text(), help="Name of the model.  [default: <dataset>-<defense>]")
@click.option(
    "--out",
    type=FolderOrFile(),
    default=Path("robbench-training"),
    show_default=True,
    help="Where the model folder goes.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a parameter of the defense or detector; recipe.KEY and architecture.KEY reach those.",
)
@device_option
@threat_models_option
@zoo_option
@data_dir_option
@threads_option
@click.pass_context
def train(context: click.Context, /, threads: int | None, **options: Any) -> None:
    """Train a model, or with --detector a detector of adversarial images, and write a zoo folder for it.

    Example: robbench train --defense at --dataset digits

    Example: robbench train --detector lid --model digits-at --attacks pgd20
    """
    check_options(options)
    from robbench.cli.train_session import train_model, train_model_detector
    from robbench.core.allocator import tune_allocator

    guard = options["detector"] is not None
    if not guard or options["dataset"] is not None or options["data"] is not None:
        options["dataset"], options["data"] = choose_dataset(options["dataset"], options["data"])
    unused = (*OF_DEFENSES, "defense") if guard else (*OF_DETECTORS, "detector")
    used = {name: value for name, value in options.items() if name not in unused}
    try:
        tune_allocator()
        compute_in(context, threads)
        (train_model_detector if guard else train_model)(used)
    except KeyboardInterrupt as error:
        stop = as_stop(error)
        step = "train it" if guard else "resume after the last whole epoch"
        echo_text(f"\n{stop.word}. Run the same command again to {step}", err=True)
        context.exit(stop.exit_code)


def check_options(options: dict[str, Any]) -> None:
    """`UserError` unless the options ask for one thing, a model or a detector, and are all of it."""
    defense, detector = options["defense"], options["detector"]
    if (defense is None) == (detector is None):
        found = "are two trainings; leave one out" if defense else "are both missing; give one of them"
        raise UserError(f"--defense and --detector {found}, as in --defense at (robbench list defenses)")
    noun, others = ("detector", OF_DEFENSES) if defense is None else ("defense", OF_DETECTORS)
    for name in others:
        if options[name] not in (None, ()):
            other = "defense" if noun == "detector" else "detector"
            raise UserError(f"--{name.replace('_', '-')} is of a training with --{other}; leave it out")
    if detector is None:
        return
    for name in ("model", "attacks"):
        if not options[name]:
            example = "digits-at" if name == "model" else "pgd20"
            raise UserError(f"--detector {detector} needs --{name}; give one, as in --{name} {example}")
