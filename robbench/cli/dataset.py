"""Which data set a command is about: a name, or a folder of one's own. Only click is imported before that is known."""

import os
from pathlib import Path
from typing import Any

from robbench.cli.base import echo_line, resolve_if_known
from robbench.core.errors import UserError, known_name


def choose_dataset(dataset: str | None, data: Path | None) -> tuple[str, Path | None]:
    """The name of the data set asked for, and the folder where it is one of one's own: --dataset, a name or a folder,
    or --data, a folder; else digits."""
    data = choose_folder(dataset, data)
    if data is None:
        return "digits" if dataset is None else resolve_dataset(dataset), None
    from robbench.data.card import read_folder_card

    return read_folder_card(data)[0].name, data


def resolve_dataset(name: str) -> str:
    """The data set that a name means; itself where it means none, for whoever loads it to refuse."""
    from robbench.data.names import dataset_names

    return resolve_if_known(
        "--dataset", name, lambda written: known_name("data set", written, dataset_names())
    )


def choose_folder(dataset: str | None, data: Path | None) -> Path | None:
    """The folder that --data or --dataset names; None for a data set by name, also where a folder is called like it."""
    if dataset is not None and data is not None:
        raise UserError(f"--dataset {dataset} and --data {str(data)!r} name two data sets; leave one out")
    if dataset is None:
        return data
    from robbench.data.names import dataset_names

    path = Path(dataset).expanduser()
    is_path = dataset.strip() and dataset not in dataset_names() and (os.sep in dataset or path.is_dir())
    return path if is_path else None


def read_data(options: dict[str, Any], out: Path | None) -> None:
    """Set `dataset` and `data` of the options of `robbench run` to name and folder of the requested data set, None
    where none was requested, and remove --like and --size; a folder without a card gets one, and a line says where."""
    like, size = options.pop("like"), options.pop("size")
    folder = choose_folder(options["dataset"], options["data"])
    if folder is None:
        for option, value in (("--like", like), ("--size", size)):
            if value is not None:
                raise UserError(
                    f"{option} {value} is for a folder of one's own; leave it out, or name one with --dataset"
                )
        if options["dataset"] is not None:
            options["dataset"] = resolve_dataset(options["dataset"])
        return
    from robbench.data.bare import own_data

    own = own_data(folder, size, like, lambda name: out or run_folder(name, options["seed"]))
    if own.line:
        echo_line(own.line)
    options["dataset"], options["data"] = own.name, own.path


def run_folder(dataset: str, seed: int) -> Path:
    """Where a run goes unless --out says otherwise."""
    return Path("robbench-runs") / f"{dataset}-seed{seed}"
