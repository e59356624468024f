"""The command line. Only click is imported here: each command imports what it needs when it runs."""

from pathlib import Path
from typing import Any

import click

from robbench import __version__
from robbench.cli import help
from robbench.cli.badge import badge
from robbench.cli.base import (
    FiniteNumber,
    FolderOrFile,
    OneLineErrors,
    PluralChoice,
    Text,
    WholeNumber,
    checkpoints_option,
    compute_in,
    data_dir_option,
    data_option,
    dataset_option,
    device_option,
    echo_text,
    json_option,
    precision_option,
    threads_option,
    threat_models_option,
    zoo_option,
)
from robbench.cli.bench import bench
from robbench.cli.bundle import export, merge, verify
from robbench.cli.check import check
from robbench.cli.completion import (
    attack_completion,
    completion,
    defense_completion,
    model_completion,
    shown_completion,
)
from robbench.cli.config import collect_options, config_option
from robbench.cli.dataset import read_data, run_folder
from robbench.cli.diff import diff
from robbench.cli.experiment import (
    experiment_option,
    experiment_options,
    fid_weights_option,
    recipe_option,
    run_experiment,
    scale_option,
)
from robbench.cli.fid import fid
from robbench.cli.figure import figure
from robbench.cli.gc import gc
from robbench.cli.help import GroupedCommand
from robbench.cli.own import init, own_model_options
from robbench.cli.report import report
from robbench.cli.samples import samples
from robbench.cli.theory import theory
from robbench.cli.train import train
from robbench.cli.watch import watch
from robbench.core.errors import UserError
from robbench.core.stops import as_stop

KINDS = (
    "attacks",
    "defenses",
    "detectors",
    "models",
    "datasets",
    "threat-models",
    "recipes",
    "experiments",
    "published",
)


@click.group(
    "robbench",
    cls=OneLineErrors,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, prog_name="robbench")
@click.option("--debug", is_flag=True, help="Show the traceback of an error, or ROBBENCH_DEBUG=1.")
def main(debug: bool) -> None:
    """Adversarial-robustness benchmark: attacks x models, one verified row a sample, tables and leaderboards.

    Exit codes: 0 done, 1 a check failed, 2 bad usage or input, 3 some cells failed, or not everything
    could be checked, 70 an unexpected error of robbench, 130 interrupted, 143 terminated.
    """


@main.command(cls=GroupedCommand, groups=help.RUN)
@click.option(
    "--attacks", multiple=True, help="Attacks, as in pgd20,aa,jsa50.", shell_complete=attack_completion
)
@click.option(
    "--defense",
    "defenses",
    multiple=True,
    help="Every zoo model of these defenses.",
    shell_complete=defense_completion,
)
@click.option(
    "--model",
    "models",
    multiple=True,
    help="Zoo models, cards, module:Class with --weights, torchvision:NAME, timm:NAME, ...",
    shell_complete=model_completion,
)
@own_model_options
@dataset_option
@data_option
@click.option("--like", type=Text(), help="For a folder: the data set whose budgets and models fit.")
@click.option("--size", type=Text(), help="For a folder of images: resize them to 32, or to 32x48.")
@click.option(
    "--n", type=WholeNumber(), help="Test images, drawn by seed.  [default: all of digits, 1000 of others]"
)
@click.option("--seed", type=WholeNumber(0), default=0, show_default=True, help="Seed of subset and attacks.")
@device_option
@click.option("--batch-size", type=WholeNumber(1), default=256, show_default=True, help="Images at once.")
@click.option(
    "--flow",
    type=Text(),
    help="Normalizing flow of latent attacks and NLL.  [default: the data set's in the zoo]",
)
@click.option(
    "--epsilon",
    "epsilons",
    multiple=True,
    help="Image budgets instead of the data set's: 0.1,8/255; for attacks on flows of 255: 4,8.",
)
@click.option("--eta", "etas", multiple=True, help="Latent budgets instead of the data set's.")
@click.option("--steps", multiple=True, help="Steps instead of those of iterative attacks: 10,20,50.")
@click.option(
    "--target",
    type=Text(),
    help="Targeted attacks: random or least-likely wrong class per sample, or the number of a class.",
)
@click.option(
    "--surrogate",
    type=Text(),
    help="Transfer attacks: search this model instead, and score what is found on the attacked ones.",
    shell_complete=model_completion,
)
@click.option(
    "--likelihood-dtype",
    type=click.Choice(("float32", "float64")),
    help="In what flows score attacked images.  [default: float32]",
)
@click.option(
    "--likelihood-draws",
    type=click.IntRange(1),
    help="Score attacked images of flows by importance-weighted bits/dim over so many noise draws.  [default: 1]",
)
@precision_option
@click.option("--compile", "compiled", is_flag=True, help="Search with torch.compile.")
@click.option(
    "--backend",
    type=click.Choice(("local", "ray")),
    default="local",
    show_default=True,
    help="In this process, or in Ray tasks of one CPU thread each.",
)
@click.option("--ray-address", type=Text(), help="Ray cluster: auto or host:port.  [default: a new one here]")
@click.option(
    "--gpus-per-cell",
    type=FiniteNumber(),
    help="GPUs a Ray task takes, as in 0.25.  [default: 1 where there are some]",
)
@click.option("--out", type=FolderOrFile(), help="[default: robbench-runs/<dataset>-seed<seed>]")
@click.option("--resume/--fresh", default=True, help="Keep finished cells (default), or put them aside.")
@click.option("--dry-run", is_flag=True, help="Print the matrix and its cost, compute nothing.")
@click.option(
    "--keep-examples", default="16", show_default=True, help="Adversarial images kept a cell: N or all."
)
@threat_models_option
@zoo_option
@checkpoints_option
@data_dir_option
@config_option
@experiment_option
@recipe_option
@scale_option
@fid_weights_option
@threads_option
@click.pass_context
def run(
    context: click.Context,
    /,
    resume: bool,
    dry_run: bool,
    out: Path | None,
    threads: int | None,
    **options: Any,
) -> None:
    """Attack models and write tables; with --experiment a paper's table, trainings included.

    Example: robbench run --defense ijsat --attacks pgd20,aa,jsa50

    Example: robbench run --experiment ijsat-table1 --scale 0.01
    """
    kept = collect_options(context)
    options = experiment_options(context, options) | {"options": kept}
    if threads is not None and options["backend"] == "ray":
        raise UserError(
            f"--threads {threads} with --backend ray: Ray tasks have one CPU thread each; leave --threads out"
        )
    if options["experiment"] is not None:
        context.exit(_of_experiment(context, options, out, resume, dry_run, threads))
    for option in ("experiment", "scale", "fid_weights"):
        del options[option]
    from robbench.cli.naming import settle_names

    read_data(options, out)
    options = settle_names(options)
    folder = out or run_folder(options["dataset"], options["seed"])
    try:
        from robbench.cli.run import build_request, dry_run_table, run_matrix
        from robbench.core.allocator import tune_allocator

        tune_allocator()
        compute_in(context, threads)
        request = build_request(options)
        if dry_run:
            dry_run_table(request, folder, fresh=not resume)
            return
        failed = run_matrix(request, folder, fresh=not resume)
    except KeyboardInterrupt as error:
        stop = as_stop(error)
        echo_text(
            f"\n{stop.word}. Finished shards are in {folder.absolute()}; run the same command again to resume"
            + ("" if resume else " (without --fresh)"),
            err=True,
        )
        context.exit(stop.exit_code)
    context.exit(3 if failed else 0)


def _of_experiment(
    context: click.Context,
    options: dict[str, Any],
    out: Path | None,
    resume: bool,
    dry_run: bool,
    threads: int | None,
) -> int:
    """Run an experiment; the exit code."""
    from robbench.core.allocator import tune_allocator

    try:
        tune_allocator()
        compute_in(context, threads)
        return 3 if run_experiment(options, out, resume, dry_run) else 0
    except KeyboardInterrupt as error:
        stop = as_stop(error)
        echo_text(
            f"\n{stop.word}. Run the same command again: it resumes after the last epoch or shard", err=True
        )
        return stop.exit_code


@main.command("list")
@click.argument("kind", type=PluralChoice(KINDS))
@threat_models_option
@zoo_option
@data_dir_option
@json_option
def list_command(
    kind: str, threat_models: Path | None, zoo: Path | None, data_dir: Path | None, as_json: bool
) -> None:
    """List attacks, defenses, detectors, models, datasets, threat-models, recipes, experiments or published tables."""
    from robbench.cli.catalog import list_kind
    from robbench.cli.catalog_json import Folders

    list_kind(kind, Folders(threat_models, zoo, data_dir=data_dir), as_json)


@main.command()
@click.argument("name", shell_complete=shown_completion)
@threat_models_option
@zoo_option
@checkpoints_option
@data_dir_option
@json_option
@click.option(
    "--intrinsic-dimension", is_flag=True, help="Of a data set: estimate it from 1,000 images instead."
)
def show(name: str, as_json: bool, intrinsic_dimension: bool, **options: Path | None) -> None:
    """Show an attack, threat model, model, recipe, experiment, data set, defense, detector or table.

    Example: robbench show "IJSAT Table 1"
    """
    from robbench.cli.catalog import show_name
    from robbench.cli.catalog_json import Folders
    from robbench.cli.intrinsic_dimension import show_intrinsic_dimension

    if intrinsic_dimension:
        show_intrinsic_dimension(name, options["data_dir"], as_json)
    else:
        show_name(name, Folders(**options), as_json)


@main.command()
@click.argument("what", nargs=-1)
@zoo_option
@checkpoints_option
@data_dir_option
@json_option
@click.pass_context
def doctor(
    context: click.Context,
    /,
    what: tuple[str, ...],
    zoo: Path | None,
    checkpoints: Path | None,
    data_dir: Path | None,
    as_json: bool,
) -> None:
    """Say what is installed, present or missing, and how to get it.

    All of it, or WHAT: packages, models, data-sets, ...; torch, mnist, digits-at, ...
    """
    from robbench.cli.doctor import examine

    context.exit(0 if examine(zoo, data_dir, checkpoints, as_json, what) else 1)


for command in (
    badge,
    bench,
    check,
    completion,
    diff,
    export,
    fid,
    figure,
    gc,
    init,
    merge,
    report,
    samples,
    theory,
    train,
    verify,
    watch,
):
    main.add_command(command)
