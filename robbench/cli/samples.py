"""`robbench samples`: samples of a flow scored under another. Only click is imported before the command runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robbench.cli.base import (
    FolderOrFile,
    Text,
    WholeNumber,
    data_dir_option,
    data_option,
    device_option,
    names,
    print_paths,
    temperatures,
    zoo_option,
)
from robbench.cli.completion import model_completion
from robbench.core.errors import UserError

if TYPE_CHECKING:
    import torch

    from robbench.models.entry import ZooEntry
    from robbench.models.flows.base import FlowModel
    from robbench.run.flow_samples import ScoredSamples

COLUMNS = (
    *("images", "temperature", "under", "mean", "lower", "upper", "median"),
    *("n", "n_finite", "unit", "seed"),
)
Lines = list[tuple[str, "ScoredSamples"]]


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    required=True,
    help="Flows to draw from (comma lists).",
    shell_complete=model_completion,
)
@click.option("--under", type=Text(), required=True, help="Flow that scores the samples.")
@click.option(
    "--temperature",
    "values",
    multiple=True,
    default=("0.5,0.7,0.9,1",),
    show_default=True,
    help="Widths of the prior.",
)
@click.option("--n", type=WholeNumber(1), default=500, show_default=True, help="Samples per temperature.")
@click.option("--seed", type=WholeNumber(0), default=0, show_default=True, help="Seed of samples and noise.")
@click.option("--out", type=FolderOrFile(), default=Path("robbench-samples"), show_default=True)
@device_option
@zoo_option
@data_option
@data_dir_option
def samples(models: tuple[str, ...], values: tuple[str, ...], out: Path, **options: Any) -> None:
    """Score samples of flows under another flow, beside test images and uniform noise.

    Example: robbench samples --model digits-glow-at,digits-glow --under digits-glow
    """
    request = SamplesRequest(
        models=names("--model", models), temperatures=temperatures("--temperature", values), **options
    )
    print_paths(samples_report(request, out))


@dataclass(frozen=True)
class SamplesRequest:
    """What to draw and to score.

    Attributes:
        models: flows to draw from.
        under: the flow that scores.
        temperatures: factors of the prior's standard deviation.
        n: samples per temperature, and at most so many test images.
        seed: of samples and noise.
        device: as for `resolve_device`.
        zoo: folder of the models.
        data_dir: folder of the data sets.
        data: folder of a data set.
    """

    models: tuple[str, ...]
    under: str
    temperatures: tuple[float, ...]
    n: int = 500
    seed: int = 0
    device: str = "auto"
    zoo: Path | None = None
    data_dir: Path | None = None
    data: Path | None = None


def samples_report(request: SamplesRequest, out: Path) -> list[Path]:
    """Score, print the table, write OUT/samples.csv; `UserError` for models that are no flows of one data set."""
    from robbench.core.device import resolve_device
    from robbench.core.places import check_output_folder
    from robbench.core.resources import write_text_atomically
    from robbench.models.loading import load_flow
    from robbench.models.zoo import zoo_entries
    from robbench.run.flow_samples import score_samples

    check_output_folder(out)
    device, entries = resolve_device(request.device), zoo_entries(request.zoo)
    under = _flow_entry("--under", request.under, entries)
    judge = load_flow(under, device)
    lines = _reference_lines(request, under.card.dataset, judge, device)
    for name in request.models:
        entry = _flow_entry("--model", name, entries)
        if entry.card.dataset != under.card.dataset:
            raise UserError(
                f"--model {name!r} models {entry.card.dataset} and --under {request.under!r} {under.card.dataset}; "
                f"name flows of one data set"
            )
        found = score_samples(load_flow(entry, device), judge, request.temperatures, request.n, request.seed)
        lines += [(f"samples of {entry.card.name}", one) for one in found]
    _print(lines, under.card.name)
    path = out / "samples.csv"
    write_text_atomically(path, _csv(lines, under.card.name, request.seed))
    return [path]


def _flow_entry(option: str, name: str, entries: "dict[str, ZooEntry]") -> "ZooEntry":
    from robbench.models.zoo import find_model

    entry = find_model(name, entries, "flow")
    if entry.card.kind != "flow":
        raise UserError(f"{option} {name!r} is a {entry.card.kind}, not a flow; see robbench list models")
    return entry


def _reference_lines(
    request: SamplesRequest, dataset_name: str, judge: "FlowModel", device: "torch.device"
) -> Lines:
    """Test images and uniform noise under the same flow: what the samples are compared with."""
    import torch

    from robbench.attacks.likelihood import noise_images
    from robbench.data import load_dataset, sample_ids
    from robbench.run.flow_samples import score_images

    dataset = load_dataset(dataset_name, request.data_dir, request.data)
    ids = sample_ids(dataset.test, min(request.n, len(dataset.test)), request.seed)
    images, _ = dataset.test.by_ids(ids)
    noise = noise_images(request.seed, torch.tensor(ids), judge.input_shape, judge.grey_levels)
    return [
        ("test images", score_images(judge, images.to(device), request.seed)),
        ("uniform noise images", score_images(judge, noise.to(device), request.seed)),
    ]


def _print(lines: Lines, under: str) -> None:
    from rich import box
    from rich.table import Table

    from robbench.core.terminal import Terminal, print_line

    table = Table(title=f"Bits/dim under {under}", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("images", overflow="fold")
    for title in ("temperature", "mean", "95 % interval", "median", "n"):
        table.add_column(title, justify="right")
    for name, scored in lines:
        s = scored.summary
        interval = "-" if s.lower is None or s.upper is None else f"{s.lower:.4g} to {s.upper:.4g}"
        temperature = "" if scored.temperature is None else f"{scored.temperature:g}"
        table.add_row(name, temperature, _number(s.mean), interval, _number(s.median), str(s.n))
    console = Terminal()
    console.print(table)
    for name, scored in lines:
        if scored.summary.note:
            print_line(console, f"* {name}: {scored.summary.note}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _csv(lines: Lines, under: str, seed: int) -> str:
    from robbench.core.spreadsheet import csv_text

    return csv_text([COLUMNS, *(_values(name, scored, under, seed) for name, scored in lines)])


def _values(name: str, scored: "ScoredSamples", under: str, seed: int) -> tuple[object, ...]:
    """The cells of `COLUMNS`."""
    s = scored.summary
    numbers = (s.mean, s.lower, s.upper, s.median, s.n, s.n_finite)
    return (name, scored.temperature, under, *numbers, "bits/dim", seed)
