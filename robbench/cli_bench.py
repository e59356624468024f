"""`robbench bench`: comparisons with other implementations. Only click is imported before a command runs."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from robbench.cli_base import (
    FolderOrFile,
    data_dir_option,
    device_option,
    names,
    print_paths,
    seeds,
    zoo_option,
)


@click.group()
def bench() -> None:
    """Compare with other implementations: verdicts first, then times, in one process."""


@bench.command("aa")
@click.option("--model", "models", multiple=True, required=True, help="Zoo classifiers of one data set.")
@click.option("--attack", default="aa", show_default=True, type=click.Choice(("aa", "aa-l2", "aa-l1")))
@click.option(
    "--n", type=click.IntRange(1), default=1000, show_default=True, help="Test images, drawn by seed."
)
@click.option(
    "--seeds",
    "seed_texts",
    multiple=True,
    default=("0,1,2",),
    show_default=True,
    help="Seeds of the attacks.",
)
@click.option("--batch-size", type=click.IntRange(1), default=256, show_default=True)
@click.option("--out", type=FolderOrFile(), default=Path("robbench-bench"), show_default=True)
@device_option
@zoo_option
@data_dir_option
def autoattack(
    models: tuple[str, ...],
    attack: str,
    n: int,
    seed_texts: tuple[str, ...],
    batch_size: int,
    out: Path,
    **options: Any,
) -> None:
    """AutoAttack against the reference package: parity of verdicts, times, distance to the floor.

    Example: robbench bench aa --model digits-at,digits-trades --n 360
    """
    from robbench.allocator import tune_allocator
    from robbench.bench import autoattack as contest_of
    from robbench.bench.models import loaded
    from robbench.resources import write_text_atomically

    tune_allocator()
    contest = contest_of.Contest(attack, n, seeds("--seeds", seed_texts), batch_size=batch_size)
    entries = loaded(names("--model", models), **options)
    found = [contest_of.compare(model, data, contest, device, click.echo) for model, data, device in entries]
    command = shlex.join(["robbench", *sys.argv[1:]])
    stem = out / f"{attack}-{'-'.join(dict.fromkeys(data.name for _, data, _ in entries))}"
    text = contest_of.markdown(found, contest, command)
    paths = [stem.with_suffix(".json"), stem.with_suffix(".md")]
    write_text_atomically(paths[0], json.dumps(contest_of.report(found, contest, command), indent=1) + "\n")
    write_text_atomically(paths[1], text)
    click.echo(text)
    print_paths(paths)
