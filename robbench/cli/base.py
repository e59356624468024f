"""What the commands share: one-line errors, budgets, common options."""

import io
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from robbench.cli.completion import dataset_completion
from robbench.core.errors import UserError, printable, printable_text
from robbench.core.foreign import cause
from robbench.core.numerals import number, whole_number
from robbench.core.precision import PRECISION, WITHDRAWN, check_precision
from robbench.core.stops import Stopped, listening

_EXAMPLES = {
    "--attacks": "pgd20,aa",
    "--min": "aa=45,clean=80",
    "--defense": "at,ijsat",
    "--model": "digits-at",
    "--epsilon": "0.1,8/255",
    "--eta": "0.5",
    "--steps": "10,20,50",
    "--temperature": "0.7,1",
    "--seeds": "0,1,2",
    "--precision": "fp32",
}
BAD_INPUT, CELLS_FAILED, UNEXPECTED, INTERRUPTED, PIPE_CLOSED = 2, 3, 70, 130, 141


class BadInput(click.ClickException):
    """Printed by click as one line, `Error: ...`, on stderr."""

    exit_code = BAD_INPUT


class Unexpected(click.ClickException):
    """An exception that nobody expected, as one line with an exit code of its own."""

    exit_code = UNEXPECTED


class OneLineErrors(click.Group):
    """A group whose errors are one line on stderr, `Error: ...`, and exit code 2; 70 for what nobody expected.

    Nothing but a command's own `context.exit` ends the program well: a SystemExit comes from code of others.
    """

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        with _one_line_errors():
            _check_encoding(args)
            return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; SIGINT and SIGTERM end it as KeyboardInterrupt."""
        with _one_line_errors(), listening((signal.SIGINT, signal.SIGTERM)):
            return super().invoke(ctx)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    _write_any_name(sys.stdout)
    try:
        yield
    except (click.exceptions.Exit, click.exceptions.Abort):
        raise
    except click.UsageError as error:
        raise _usage(error) from error
    except click.ClickException:
        raise
    except UserError as error:
        _show_traceback(error)
        raise _one_line(str(error)) from error
    except (
        BrokenPipeError
    ) as error:  # `| head` has read enough; what Python still holds back must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise click.exceptions.Exit(PIPE_CLOSED) from error
    except OSError as error:
        _show_traceback(error)
        _drop_refused_output()
        raise _system_error(error) from error
    except Stopped as stop:
        echo_line(f"{stop.word}.", err=True)
        raise click.exceptions.Exit(stop.exit_code) from stop
    except KeyboardInterrupt as error:
        echo_line("Interrupted.", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from error
    except MemoryError as error:
        _show_traceback(error)
        raise _one_line(
            f"there is not enough memory ({cause(error)}); ask for fewer or smaller things at once (--n, "
            f"--batch-size), or run where there is more"
        ) from error
    except BaseException as error:
        raise _report_crash(error) from error


def _drop_refused_output() -> None:
    """What Python holds back for a full disk must not complain once more, and change the exit code, at the end."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _check_encoding(args: Sequence[str]) -> None:
    """`UserError` for bytes that are no UTF-8 text: tables, cards and bundles could not name them."""
    for argument in args:
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"argument {argument[:200]!r} is not UTF-8 text; rename that file or folder, or name another"
            ) from error


def _write_any_name(stream: Any) -> None:
    """The working folder's name may be no text either: what the terminal cannot write is escaped, not an error."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
        stream.reconfigure(errors="backslashreplace")


def _report_crash(error: BaseException) -> click.ClickException:
    from robbench.core.crash import crash_line

    _show_traceback(error)
    return Unexpected(printable(crash_line(error)))


def _show_traceback(error: BaseException) -> None:
    """Where it is asked for, by --debug or ROBBENCH_DEBUG (any value but "" and "0")."""
    context = click.get_current_context(silent=True)
    asked = context is not None and context.find_root().params.get("debug")
    if asked or os.environ.get("ROBBENCH_DEBUG", "") not in ("", "0"):
        import traceback

        echo_text("".join(traceback.format_exception(error)), err=True)


def _system_error(error: OSError) -> click.ClickException:
    """What the machine refused (disk full, name too long, no permission) as one line."""
    if error.errno is None:
        return _report_crash(error)
    where = f" {str(error.filename)!r}" if error.filename is not None else ""
    return _one_line(
        f"the system refused{where}: {error.strerror}; remove the cause and run the command again"
    )


def _usage(error: click.UsageError) -> click.ClickException:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        return error
    path = error.ctx.command_path if error.ctx is not None else "robbench"
    text = re.sub(
        r"(\S{40})\S{200,}", r"\1...", error.format_message().rstrip(".")
    )  # click quotes values whole
    return _one_line(f"{text}; see {path} --help")


def _one_line(message: str) -> click.ClickException:
    return BadInput(printable(" ".join(message.split())))


def budgets(option: str, values: Sequence[str]) -> tuple[float, ...]:
    """Finite numbers of at least 0 from comma lists and repeated flags; fractions such as 8/255 are fine."""
    return tuple(dict.fromkeys(_budget(option, part) for part in names(option, values)))


def counts(option: str, values: Sequence[str]) -> tuple[int, ...]:
    """Whole numbers of at least 1 from comma lists and repeated flags."""
    texts = names(option, values)
    found = {text: whole_number(text) for text in texts}
    for text, value in found.items():
        if value is None or value < 1:
            raise UserError(
                f"{option} {text[:40]} is no count; give whole numbers of at least 1: {_EXAMPLES[option]}"
            )
    return tuple(dict.fromkeys(value for value in found.values() if value is not None))


def target_class(text: str | None) -> str | int | None:
    """What `--target` names: "random", "least-likely", or the number of a class; None where it is not given."""
    plain = None if text is None else text.strip().lower()
    number_of_class = None if plain is None else whole_number(plain)
    if plain in (None, "random", "least-likely"):
        return plain
    if number_of_class is None:
        raise UserError(
            f"--target {plain[:40]} is no target; give random, least-likely, or the number of a class (0, 1, ...)"
        )
    return number_of_class


def seeds(option: str, values: Sequence[str]) -> tuple[int, ...]:
    """Whole numbers of at least 0 from comma lists and repeated flags."""
    texts = names(option, values)
    found = {text: whole_number(text) for text in texts}
    for text, value in found.items():
        if value is None:
            raise UserError(
                f"{option} {text[:40]} is no seed; give whole numbers of at least 0: {_EXAMPLES[option]}"
            )
    return tuple(dict.fromkeys(value for value in found.values() if value is not None))


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


def _budget(option: str, text: str, what: str = "a budget", examples: str = "0: 0.1, 8/255") -> float:
    value = number(text)
    if value is None or value < 0:
        raise UserError(f"{option} {text[:40]} is not {what}; give a finite number of at least {examples}")
    return value


def resolve_option(option: str, written: str, find: Callable[[str], str]) -> str:
    """What `find` says that `written` means; said on stderr where it is written in another way."""
    found = find(written)
    if found != written:
        echo_line(f"{option} {written} is {found} here", err=True)
    return found


def resolve_if_known(option: str, written: str, find: Callable[[str], str]) -> str:
    """`resolve_option`, but an unknown name stays as it is: whoever loads it refuses it, and knows more (plugins)."""
    try:
        return resolve_option(option, written, find)
    except UserError:
        return written


def example_count(text: str) -> int:
    """`--keep-examples`: a count, or "all"."""
    if text == "all":
        return 2**62
    count = whole_number(text)
    if count is None:
        raise UserError(f"--keep-examples {text[:40]!r} is no count; give a number of at least 0, or all")
    return count


# Everything a command prints without rich goes through these; with rich, through `robbench.core.terminal`.
def echo_line(text: str = "", err: bool = False) -> None:
    """`text` on one line, whatever is in it."""
    click.echo(printable(text), err=err)


def echo_text(text: str, err: bool = False) -> None:
    """A text of several lines: a card, a description."""
    click.echo(printable_text(text), err=err)


def echo_cells(cells: Iterable[str]) -> None:
    """A row for `cut` and `grep`: one line, a tab between two cells and nowhere else."""
    click.echo("\t".join(map(printable, cells)))


def print_paths(paths: Sequence[Path]) -> None:
    """Absolute paths of what was written, one a line, unwrapped."""
    for path in paths:
        echo_line(f"{path.suffix[1:].upper():5}{path.absolute()}")


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
        super().__init__((PRECISION,))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value in WITHDRAWN:
            check_precision(value)
        return super().convert(value, param, ctx)


class PluralChoice(click.Choice[str]):
    """A choice of plurals that takes the singulars too: "attack" for "attacks"."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The chosen plural."""
        return super().convert(f"{value}s" if f"{value}s" in self.choices else value, param, ctx)


class WholeNumber(click.IntRange):
    """A whole number of at least `least` and below 10^18: no tensor, file or table holds a larger one."""

    def __init__(self, least: int | None = None) -> None:
        super().__init__(least)

    def _describe_range(self) -> str:
        return "" if self.min is None else super()._describe_range()

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and whole_number(value.strip().lstrip("+-")) is None:
            self.fail(f"{value[:40]!r} is no whole number below 10^18", param, ctx)
        return super().convert(value, param, ctx)


class FiniteNumber(click.types.FloatParamType):
    """A decimal number or a fraction (8/255); neither NaN nor an infinity, which pass any comparison or none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        found = number(value) if isinstance(value, str) else value
        if found is None:
            self.fail(f"{value[:40]!r} is no finite number", param, ctx)
        return super().convert(found, param, ctx)


class Text(click.types.StringParamType):
    """Text with something in it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not str(value).strip():
            self.fail("the text is empty", param, ctx)
        return value


def compute_in(context: click.Context, threads: int | None) -> None:
    """Compute in so many CPU threads until the command ends. The rule is imported here because torch comes with it."""
    from robbench.core.threads import thread_rule

    context.with_resource(thread_rule(threads))


precision_option = click.option(  # only to say why other precisions are gone: there is one
    "--precision", type=PrecisionOfSearch(), default=PRECISION, hidden=True, expose_value=False
)
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
    help="Data set, a name (robbench list datasets) or a folder of class folders.  [default: digits]",
    shell_complete=dataset_completion,
)
data_option = click.option(
    "--data", type=FolderOrFile(), help="Folder of a data set of your own, arrays or images (docs/data.md)."
)
data_dir_option = click.option(
    "--data-dir",
    type=FolderOrFile(),
    help="Folder of data sets (torchvision's layout), or ROBBENCH_DATA.",
)
