"""`robbench train` between the command line and `defenses.training`, `detectors.training`: options in, progress out."""

import shlex
from pathlib import Path
from typing import Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from robbench.cli.base import echo_line
from robbench.cli.naming import attack_names
from robbench.core.terminal import Terminal
from robbench.data.card import require_dataset
from robbench.defenses.training import Report, TrainRequest, parse_settings, train
from robbench.detectors.training import DetectorRequest, train_detector
from robbench.models.zoo import read_entry


def train_model(options: dict[str, Any]) -> None:
    """Train what the options of `robbench train` ask for and say where the model is."""
    require_dataset(options["dataset"], options["data"])
    settings = parse_settings(options.pop("settings"))
    request = TrainRequest(**options, overrides=settings)
    folder = train_with_progress(request)
    echo_line(f"MODEL {folder.absolute()}")
    flow = read_entry(folder).card.kind == "flow"
    attacks = "nll-in,nll-out,noise" if flow else "pgd20,aa"
    place = shlex.quote(str(folder))
    data = (
        f"--dataset {request.dataset}" if request.data is None else f"--data {shlex.quote(str(request.data))}"
    )
    echo_line(f"Use it: robbench run {data} --model {place} --attacks {attacks}")
    if flow and request.defense == "clean":
        echo_line(f"or in attacks: robbench run {data} --flow {place} --defense at --attacks jsa50")


def train_model_detector(options: dict[str, Any]) -> None:
    """Train the detector that the options of `robbench train --detector` ask for and say where it is."""
    settings, layers = parse_settings(options.pop("settings")), tuple(options.pop("layer"))
    options["attacks"] = attack_names(options["attacks"], options["threat_models"])
    rate = options.pop("false_positive_rate")
    rates = {} if rate is None else {"false_positive_rate": rate}
    request = DetectorRequest(**options, **rates, layers=layers, overrides=settings)
    folder = train_detector(request, echo_line)
    echo_line(f"DETECTOR {folder.absolute()}")
    echo_line(f"Its card: robbench show {shlex.quote(str(folder))}")


def train_with_progress(request: TrainRequest) -> Path:
    """Train with a bar on a terminal and a line an epoch elsewhere; returns the model's folder."""
    console = Terminal()
    return _with_bar(request, console) if console.is_terminal else train(request, _print_epoch)


def _summary(report: Report) -> str:
    """Loss, rate and validation score of an epoch in words."""
    scored = ""
    if report.score is not None and report.best is not None:
        name = report.criterion.replace("_", " ")
        scored = (
            f", validation {name} {report.score:.2f} (best {report.best:.2f} in epoch {report.best_epoch})"
        )
    return f"loss {report.loss:.4f}, learning rate {report.learning_rate:g}{scored}"


def _print_epoch(report: Report) -> None:
    if report.epoch_done:
        echo_line(f"epoch {report.epoch}/{report.epochs}: {_summary(report)}, {report.seconds:.1f} s")


def _with_bar(request: TrainRequest, console: Terminal) -> Path:
    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[summary]}", markup=False),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"{request.dataset} {request.defense}", total=None, summary="")

        def show(report: Report) -> None:
            done = (report.epoch - 1) * report.steps + report.step
            bar.update(task, total=report.epochs * report.steps, completed=done, summary=_summary(report))

        return train(request, show)
