"""`robbench run --config FILE`: options from a YAML file, and options as run.yaml keeps them. Only click is imported
here."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from robbench.cli.base import FolderOrFile
from robbench.core.errors import UserError, unknown_name

NOT_KEPT = ("config", "out", "resume", "dry-run")  # of one call, or said by where run.yaml lies
NOT_IN_FILES = ("config", "recipe", "precision", "help")


def read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    """Make the options in a file the defaults of the command; `UserError` for keys and values that are none."""
    if path is None:
        return
    from robbench.core.schema import read_yaml

    file = path / "run.yaml" if path.is_dir() else path
    content = read_yaml(file)
    if not isinstance(content, dict):
        raise UserError(f"--config {file}: holds no options; write some, as in `attacks: [pgd20]`")
    if "dataset_revision" in content:
        content = _of_run(file, content.get("options"))
    known = {name: option for option in _options(context.command) for name in _names(option)}
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key not in known:
            raise unknown_name(f"key of {file}:", str(key), known)
        option = known[key]
        given = _value(f"{file}: key {key}", option, value)
        values[option.name or ""] = not given if f"--{key}" in option.secondary_opts else given
    context.default_map = {**(context.default_map or {}), **values}


def _of_run(file: Path, options: object) -> dict[Any, Any]:
    """The options of a run folder, whose place says what --out was."""
    if not isinstance(options, dict) or not options:
        raise UserError(
            f"--config {file}: does not say how it was run (a bundle, or a run of before options were kept); "
            f"give the options on the command line"
        )
    folder = file.absolute().parent
    return {**options, "out": str(folder.parent if "experiment" in options else folder)}


def collect_options(context: click.Context) -> dict[str, Any]:
    """The options given on the command line or in a file, as `--config` reads them."""
    found = {}
    for option in _options(context.command):
        name = _names(option)[0]
        if (
            name not in NOT_KEPT
            and context.get_parameter_source(option.name or "") != ParameterSource.DEFAULT
        ):
            value = context.params[option.name or ""]
            found[name] = [*map(_plain, value)] if isinstance(value, tuple) else _plain(value)
    return {name: value for name, value in found.items() if value is not None}


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


def _options(command: click.Command) -> list[click.Option]:
    found = [one for one in command.params if isinstance(one, click.Option)]
    return [one for one in found if _names(one)[0] not in NOT_IN_FILES]


def _names(option: click.Option) -> list[str]:
    """What the keys of an option are: "batch-size"; "resume" and "fresh"."""
    return [text.lstrip("-") for text in (*option.opts, *option.secondary_opts) if text.startswith("--")]


def _value(where: str, option: click.Option, value: object) -> object:
    """As the command line would have it: text, which the option's type then checks."""
    if option.is_flag:
        if not isinstance(value, bool):
            raise UserError(f"{where}: is {value!r}; give true or false")
        return value
    if option.multiple and isinstance(value, list):
        return [_text(where, one) for one in value]
    return [_text(where, value)] if option.multiple else _text(where, value)


def _text(where: str, value: object) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise UserError(f"{where}: is {value!r}, which is no value on a command line; give text or a number")
    return str(value)


config_option = click.option(
    "--config",
    type=FolderOrFile(),
    is_eager=True,
    expose_value=False,
    callback=read_config,
    help="YAML file of options, as run.yaml of a run; the command line goes before it.",
)
