"""Accuracy on corrupted images: the mean over 15 corruptions and 5 severities, and a table per model, for the published
files and for generated images apart.

The mean is unweighted, as papers on CIFAR-10-C print it (not mCE, which divides by a reference network's errors), and
given only where all 75 cells are planned.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from robbench.data.corruption_names import SEVERITIES, Corruption, Headline
from robbench.metrics.accuracy import CORRUPTION_ACCURACY
from robbench.metrics.verdicts import right_under_attack
from robbench.results.rows import (
    ModelResults,
    TableRow,
    blank_model_row,
    cell_status,
    complete,
    models,
    with_estimate,
    without_value,
)
from robbench.statistics import accuracy
from robbench.store.records import CellResult, Run

SPACE = "corruption"
PUBLISHED, GENERATED = "corruptions", "corruptions-generated"
# Of the shipped threat models, by the prefix of their attacks; labels of the means, as their groups are called.
THREAT_MODELS = MEANS = {PUBLISHED: "c", GENERATED: "g"}
HEADER = ("corruption", *(f"severity {severity}" for severity in range(1, SEVERITIES + 1)), "mean")
CAPTION = (
    "Accuracy under attack in percent: on corrupted images, also of samples whose clean image is misclassified. Mean: "
    "unweighted, over the 15 corruptions of the benchmark; what stands below it is no part of it."
)
Grid = dict[tuple[str, int], CellResult]
HEADLINE = [(name, severity) for name in get_args(Headline) for severity in range(1, SEVERITIES + 1)]


@dataclass(frozen=True)
class CorruptionTable:
    """Columns as in HEADER; numbers that were not requested are empty. threat_model: where the images are from."""

    model: str
    threat_model: str
    lines: tuple[tuple[str, ...], ...]

    @property
    def title(self) -> str:
        """The model, and the threat model unless its images are the published ones."""
        return self.model if self.threat_model == PUBLISHED else f"{self.model} ({self.threat_model})"


def without_corruptions(model: ModelResults) -> ModelResults:
    """The model without its corruption cells, as the average combines it."""
    return ModelResults(model.name, tuple(r for r in model.cells if r.cell.attack.space != SPACE))


def shorten_group(attacks: str) -> str:
    """A comma list of attacks, in which the name of a group replaces its 75 members where all are present."""
    names = attacks.split(",")
    for group, prefix in THREAT_MODELS.items():
        members = {f"{prefix}-{name}-{k}" for name in get_args(Headline) for k in range(1, SEVERITIES + 1)}
        if members.issubset(names):
            names = list(dict.fromkeys(group if name in members else name for name in names))
    return ",".join(names)


def mean_rows(run: Run, model: ModelResults) -> list[TableRow]:
    """The mean over corruptions and severities of each threat model of which all 75 were requested."""
    return [
        _mean_row(run, results, threat_model)
        for threat_model, grid in _grids(model).items()
        if len(results := [grid[key] for key in HEADLINE if key in grid]) == len(HEADLINE)
    ]


def _mean_row(run: Run, results: Sequence[CellResult], threat_model: str) -> TableRow:
    blank = blank_model_row(
        run, results[0], CORRUPTION_ACCURACY, threat_model, threat_model, "accuracy under attack"
    )
    if len(complete(run, results)) < len(results):
        return without_value(blank, run, results)
    estimate = accuracy.average([right_under_attack(result.rows) for result in results], run.seed)
    scope = "over 15 corruptions x 5 severities with equal weights"
    return replace(with_estimate(blank, estimate), scope=scope)


def corruption_tables(run: Run) -> list[CorruptionTable]:
    """One table per model and threat model with corruption cells."""
    return [
        CorruptionTable(model.name, threat_model, tuple(_lines(run, grid)))
        for model in models(run)
        for threat_model, grid in _grids(model).items()
    ]


def _grids(model: ModelResults) -> dict[str, Grid]:
    """The corruption cells of a model by threat model."""
    found: dict[str, Grid] = {}
    for result in model.cells:
        attack = result.cell.attack
        if attack.space == SPACE:
            key = str(attack.parameters["corruption"]), int(attack.parameters["severity"])
            found.setdefault(attack.threat_model, {})[key] = result
    return found


def _lines(run: Run, grid: Grid) -> list[tuple[str, ...]]:
    present = {name for name, _ in grid}
    headline = get_args(Headline)
    lines = [_line(run, grid, name, [name]) for name in headline if name in present]
    if present.issuperset(headline):
        lines.append(_line(run, grid, "mean", headline))
    return lines + [
        _line(run, grid, n, [n]) for n in get_args(Corruption) if n in present and n not in headline
    ]


def _line(run: Run, grid: Grid, title: str, names: Sequence[str]) -> tuple[str, ...]:
    columns = [[grid.get((name, severity)) for name in names] for severity in range(1, SEVERITIES + 1)]
    texts = [_mean_text(run, column) for column in columns]
    return (title, *texts, _mean_text(run, [cell for column in columns for cell in column]))


def _mean_text(run: Run, cells: Sequence[CellResult | None]) -> str:
    """ "83.2", the mean over cells of equally many samples; empty where a cell was not requested."""
    found = [cell for cell in cells if cell is not None]
    if len(found) < len(cells):
        return ""
    statuses = {cell_status(run, cell)[0] for cell in found} - {"ok"}
    if statuses:
        return "failed" if "failed" in statuses else "not run"
    return f"{sum(100 * float(right_under_attack(cell.rows).mean()) for cell in found) / len(found):.1f}"
