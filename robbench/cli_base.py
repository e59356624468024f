"""What the commands share: one-line errors, budgets, common options."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from robbench.completion import dataset_completion
from robbench.errors import UserError, printable
from robbench.precision import PRECISIONS, WITHDRAWN, checked_precision

_EXAMPLES = {
    "--attacks": "pgd20,aa",
    "--defense": "at,ijsat",
    "--model": "digits-at",
    "--epsilon": "0.1,8/255",
    "--eta": "0.5",
    "--steps": "10,20,50",
    "--temperature": "0.7,1",
    "--seeds": "0,1,2",
    "--precision": "fp32",
}
BAD_INPUT, CELLS_FAILED, INTERRUPTED, PIPE_CLOSED = 2, 3, 130, 141


class BadInput(click.ClickException):
    """Printed by click as one line, `Error: ...`, on stderr."""

    exit_code = BAD_INPUT


class OneLineErrors(click.Group):
    """A group whose errors are one line on stderr, `Error: ...`, and exit code 2."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            raise _usage(error) from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            raise _one_line(str(error)) from error
        except BrokenPipeError:  # `| head` has read enough; what Python still holds back must not complain
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            ctx.exit(PIPE_CLOSED)
        except OSError as error:
            raise _system_error(error) from error
        except click.UsageError as error:
            raise _usage(error) from error
        except KeyboardInterrupt:
            click.echo("Interrupted.", err=True)
            ctx.exit(INTERRUPTED)


def _system_error(error: OSError) -> Exception:
    """What the machine refused (disk full, name too long, no permission) as one line."""
    if error.errno is None:
        return error
    where = f" {str(error.filename)!r}" if error.filename is not None else ""
    return _one_line(
        f"the system refused{where}: {error.strerror}; remove the cause and run the command again"
    )


def _usage(error: click.UsageError) -> click.ClickException:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error
    path = error.ctx.command_path if error.ctx is not None else "robbench"
    return _one_line(f"{error.format_message().rstrip('.')}; see {path} --help")


def _one_line(message: str) -> click.ClickException:
    return BadInput(printable(" ".join(message.split())))


def budgets(option: str, values: Sequence[str]) -> tuple[float, ...]:
    """Finite numbers of at least 0 from comma lists and repeated flags; fractions such as 8/255 are fine."""
    return tuple(dict.fromkeys(_budget(option, part) for part in names(option, values)))


def counts(option: str, values: Sequence[str]) -> tuple[int, ...]:
    """Whole numbers of at least 1 from comma lists and repeated flags."""
    texts = names(option, values)
    wrong = [text for text in texts if not (text.isascii() and text.isdecimal() and int(text) > 0)]
    if wrong:
        raise UserError(
            f"{option} {wrong[0]} is no count; give whole numbers of at least 1: {_EXAMPLES[option]}"
        )
    return tuple(dict.fromkeys(int(text) for text in texts))


def seeds(option: str, values: Sequence[str]) -> tuple[int, ...]:
    """Whole numbers of at least 0 from comma lists and repeated flags."""
    texts = names(option, values)
    wrong = [text for text in texts if not (text.isascii() and text.isdecimal())]
    if wrong:
        raise UserError(
            f"{option} {wrong[0]} is no seed; give whole numbers of at least 0: {_EXAMPLES[option]}"
        )
    return tuple(dict.fromkeys(map(int, texts)))


def temperatures(option: str, values: Sequence[str]) -> tuple[float, ...]:
    """Finite numbers of at least 0 from comma lists and repeated flags."""
    return tuple(
        dict.fromkeys(_budget(option, part, "a temperature", "0: 0.7, 1") for part in names(option, values))
    )


def names(option: str, values: Sequence[str]) -> tuple[str, ...]:
    """The entries of comma lists and repeated flags; `UserError` for a flag without any (an unset variable)."""
    parts = [[part.strip() for part in value.split(",") if part.strip()] for value in values]
    if [] in parts:
        raise UserError(
            f"{option} is given without a value; give one or more, as in {option} {_EXAMPLES[option]}"
        )
    return tuple(dict.fromkeys(part for listed in parts for part in listed))


def _budget(
    option: str, text: str, what: str = "a budget", examples: str = "0 (0 is clean): 0.1, 8/255"
) -> float:
    try:
        value = float(Fraction(text))
    except (ValueError, ZeroDivisionError, OverflowError):
        value = -1.0
    if value < 0:
        raise UserError(f"{option} {text} is not {what}; give a finite number of at least {examples}")
    return value


def chosen_dataset(dataset: str | None, data: Path | None) -> str:
    """The name of the data set asked for: --dataset, else the one in the card of --data, else digits."""
    if data is None:
        return "digits" if dataset is None else dataset
    from robbench.data.card import read_folder_card

    name = read_folder_card(data)[0].name
    if dataset is not None:
        raise UserError(
            f"--dataset {dataset} and --data {str(data)!r} (data set {name!r}) name two data sets; leave one out"
        )
    return name


def example_count(text: str) -> int:
    """`--keep-examples`: a count, or "all"."""
    if text == "all":
        return 2**62
    if not text.isdecimal():
        raise UserError(f"--keep-examples {text!r} is no count; give a number of at least 0, or all")
    return int(text)


def print_paths(paths: Sequence[Path]) -> None:
    """Absolute paths of what was written, one a line, unwrapped."""
    for path in paths:
        click.echo(f"{path.suffix[1:].upper():5}{path.absolute()}")


def print_json(value: object) -> None:
    """One JSON document on stdout. Numbers keep every digit; what JSON has no number for (NaN, infinities) is null."""
    click.echo(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    return [_finite(entry) for entry in value] if isinstance(value, list | tuple) else value


class FolderOrFile(click.Path):
    """A path; never the empty text of an unset variable, which would be the working directory."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)


class PrecisionOfSearch(click.Choice[str]):
    """A precision to search in; of one that was withdrawn it is said why."""

    def __init__(self) -> None:
        super().__init__(PRECISIONS)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return checked_precision(value) if value in WITHDRAWN else super().convert(value, param, ctx)


class Text(click.types.StringParamType):
    """Text with something in it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail("the text is empty", param, ctx)
        return value


threads_option = click.option(
    "--threads",
    type=click.IntRange(1, 1024),
    help="CPU threads of an operation.  [default: 1, for large networks all; or OMP_NUM_THREADS]",
)
json_option = click.option("--json", "as_json", is_flag=True, help="As JSON (docs/living.md).")
device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
threat_models_option = click.option(
    "--threat-models", type=FolderOrFile(), help="Folder of further threat models (YAML)."
)
zoo_option = click.option("--zoo", type=FolderOrFile(), help="Folder of further models.")
checkpoints_option = click.option(
    "--checkpoints",
    type=FolderOrFile(),
    help="Folder of weights that cards name (docs/models.md), or ROBBENCH_CHECKPOINTS.",
)
dataset_option = click.option(
    "--dataset",
    help="Data set (robbench list datasets).  [default: digits]",
    shell_complete=dataset_completion,
)
data_option = click.option(
    "--data", type=FolderOrFile(), help="Folder of a data set of your own, with a card.yaml (docs/data.md)."
)
data_dir_option = click.option(
    "--data-dir",
    type=FolderOrFile(),
    help="Folder of data sets (torchvision's layout), or ROBBENCH_DATA.",
)
