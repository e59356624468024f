"""`robbench completion`, and what a shell completes: attacks, models, defenses, data sets; the last item of a list.

A shell waits for the answer after every TAB, so that nothing here imports torch, and nobody could read an error: where
the files behind the names are wrong there are no suggestions, and the command itself says why.
"""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from robbench.core.errors import UserError

Names = Callable[[click.Context], Iterable[str]]
SHELLS = ("bash", "zsh", "fish")
Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


def _completer(names: Names, lists: bool = True, paths: bool = False) -> Completer:
    """names: what there is. lists: the option takes comma lists. paths: it takes files and folders too."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        given, comma, last = incomplete.rpartition(",") if lists else ("", "", incomplete)
        if paths and not given and last.startswith((".", "/", "~")):
            return [CompletionItem(incomplete, type="file")]
        taken = set(given.split(","))
        found = sorted(
            name for name in _find_names(names, context) if name.startswith(last) and name not in taken
        )
        return [CompletionItem(f"{given}{comma}{name}") for name in found]

    return complete


def _find_names(names: Names, context: click.Context) -> set[str]:
    try:
        return set(names(context))
    except (UserError, OSError):
        return set()


def _folder(context: click.Context, option: str) -> Path | None:
    """What --zoo or --threat-models names further left on the line."""
    value: Any = context.params.get(option)
    return Path(value) if value else None


def _attack_names(context: click.Context) -> Iterable[str]:
    from robbench.specs import listed_attacks, threat_models

    return listed_attacks(threat_models(_folder(context, "threat_models")))


def _model_names(context: click.Context) -> Iterable[str]:
    from robbench.models.zoo import detector_entries, zoo_entries

    zoo = _folder(context, "zoo")
    return (*zoo_entries(zoo), *detector_entries(zoo))


def _defense_names(context: click.Context) -> Iterable[str]:
    """Those that models were trained by, and those of installed packages; the registry itself needs torch."""
    from importlib.metadata import entry_points

    from robbench.models.zoo import zoo_entries

    trained = {entry.card.defense for entry in zoo_entries(_folder(context, "zoo")).values()}
    return trained | {point.name for point in entry_points(group="robbench.defenses")}


def _dataset_names(context: click.Context) -> Iterable[str]:
    from robbench.data.names import dataset_names

    return dataset_names()


def _names_to_show(context: click.Context) -> Iterable[str]:
    """Whatever `robbench show` knows."""
    from robbench.experiments.published import published_index
    from robbench.experiments.schema import experiment_names
    from robbench.recipes import recipes
    from robbench.specs import threat_models

    yield from _attack_names(context)
    yield from threat_models(_folder(context, "threat_models"))
    yield from _model_names(context)
    yield from _defense_names(context)
    yield from _dataset_names(context)
    yield from (*experiment_names(), *recipes())
    yield from (table.name for table in published_index().tables)


def _experiment_names(context: click.Context) -> Iterable[str]:
    from robbench.experiments.schema import experiment_names

    return experiment_names()


def _schedule_names(context: click.Context) -> Iterable[str]:
    from robbench.recipes import recipes

    return recipes()


attack_completion = _completer(_attack_names)
model_completion = _completer(_model_names, paths=True)
defense_completion = _completer(_defense_names)
dataset_completion = _completer(_dataset_names, lists=False)
shown_completion = _completer(_names_to_show, lists=False, paths=True)
experiment_completion = _completer(_experiment_names, lists=False)
schedule_completion = _completer(_schedule_names, lists=False)


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script that completes commands, options and names in a shell.

    Example: eval "$(robbench completion bash)" in ~/.bashrc (docs/living.md: zsh, fish)
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None  # click has all three
    program = context.find_root().command
    script = found(program, {}, "robbench", "_ROBBENCH_COMPLETE")
    # `source()` would first ask the bash on this machine for its version, and the script may be for another.
    click.echo(script.source_template % script.source_vars())
