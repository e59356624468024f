"""An experiment's table beside the published one: measured and printed numbers, and reasons of empty cells."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Literal

from robbench.core.markdown import bullets, escaped, markdown_table
from robbench.core.resources import write_text_atomically
from robbench.core.spreadsheet import csv_text
from robbench.experiments.published import PublishedRow, published_index, published_table, table_rows
from robbench.experiments.schema import SETTINGS, Column, Experiment, Row
from robbench.experiments.verdicts import Setting, Verdict, in_interval, sentence, widening
from robbench.metrics.verdicts import floats
from robbench.results.rows import CLEAN, cell_status
from robbench.results.tables import TableRow, rows_under_attack
from robbench.specs import ResolvedAttack
from robbench.statistics.likelihood import Z_95
from robbench.statistics.trainings import mean_over_trainings
from robbench.store.records import Run


@dataclass(frozen=True)
class Value:
    """A measured number, or why there is none.

    Attributes:
        value: the number; None where status is not "ok".
        lower, upper: its 95 % interval; None where it has none.
        status: whether it was measured.
        reason: why it was not measured, or how a number was computed.
        n: number of images.
        needs: what robbench lacks to measure it.
    """

    value: float | None = None
    lower: float | None = None
    upper: float | None = None
    status: Literal["ok", "not run", "failed"] = "ok"
    reason: str = ""
    n: int | None = None
    needs: tuple[str, ...] = ()


def missing_value(*needs: str) -> Value:
    """A value that is not run because robbench lacks `needs`."""
    return Value(status="not run", reason=f"needs {', '.join(needs)}", needs=needs)


@dataclass(frozen=True)
class Line:
    """One cell of the table.

    Attributes:
        row, column: titles of the cell.
        published: the printed number; None without one, or where data set, model or budget are not the paper's.
        measured: number of the run.
        verdict: of the comparison.
        unit: of the printed number.
        note: further remarks.
        printed: the printed number with its digits, or "-".
        differs: whether scale, data, model or budget differ from the paper's.
    """

    row: str
    column: str
    published: float | None
    measured: Value
    verdict: Verdict
    unit: str
    note: str
    printed: str = "-"
    differs: bool = False

    @property
    def difference(self) -> float | None:
        """Measured minus published; None where one is missing or the experiment differs."""
        value = self.measured.value
        return None if value is None or self.published is None or self.differs else value - self.published

    @property
    def why(self) -> str:
        """Reason and notes in one text."""
        return "; ".join(part for part in (self.measured.reason, self.note) if part)


@dataclass(frozen=True)
class Measurements:
    """The numbers of a run by the experiment's names of models; accuracies are those under attack, as papers print
    them.

    Attributes:
        run: the run; None before there is one.
        folders: names of a model's folders, one per seed.
        failed: why models failed to train, by folder.
        left_out: why attacks were not run, by label.
        corruptions: labels of the attacks whose mean is the corruption accuracy.
        absent: a data set that robbench lacks; else "".
        not_scored: why there are no Frechet distances.
        uncorrupted: why there are no corrupted images.
        settings: numbers that need no run, by model and metric.
    """

    run: Run | None
    folders: Mapping[str, Sequence[str]]
    failed: Mapping[str, str]
    left_out: Mapping[str, str]
    corruptions: Sequence[str] = ()
    absent: str = ""
    not_scored: str = ""
    uncorrupted: str = ""
    settings: Mapping[tuple[str, str], Value] = field(default_factory=dict)

    @cached_property
    def _rows(self) -> dict[tuple[str, str, str], TableRow]:
        rows = rows_under_attack(self.run) if self.run else []
        return {(row.model, row.attack, row.metric): row for row in rows}

    def of(self, model: str, attack: str, metric: str) -> Value:
        """The metric of a model or detector under `attack` ("clean" for none), the mean over its seeds."""
        if metric in SETTINGS:
            return self.settings[model, metric]
        if self.absent:
            return missing_value(self.absent)
        if metric == "corruption_accuracy" and self.uncorrupted:
            return missing_value(f"corrupted images ({self.uncorrupted})")
        values = [self._one(folder, attack, metric) for folder in self.folders[model]]
        return values[0] if len(values) == 1 else _over_seeds(values)

    def difference(self, models: tuple[str, str], attack: str, metric: str) -> Value:
        """The first model's number minus the second's; trainings of the same seeds are paired."""
        first, second = ({f.removeprefix(model): f for f in self.folders[model]} for model in models)
        if self.absent or metric in SETTINGS or first.keys() != second.keys() or len(first) < 2:
            return _subtract(*(self.of(model, attack, metric) for model in models))
        pairs = ((first[seed], second[seed]) for seed in first)
        return _over_seeds([_subtract(*(self._one(f, attack, metric) for f in pair)) for pair in pairs])

    def _one(self, folder: str, attack: str, metric: str) -> Value:
        if folder in self.failed:
            return Value(status="failed", reason=self.failed[folder])
        if attack in self.left_out:
            return Value(status="failed", reason=self.left_out[attack])
        if metric == "accuracy_drop":
            return _drop(self._one(folder, CLEAN, "accuracy"), self._one(folder, attack, "accuracy"))
        if metric == "corruption_accuracy":
            return _average([self._one(folder, label, "accuracy") for label in self.corruptions])
        if metric == "test_loss":
            return self._loss(folder)
        return self._read_table(folder, attack, metric)

    def _read_table(self, folder: str, attack: str, metric: str) -> Value:
        """A number of the run's leaderboard."""
        row = self._rows.get((folder, attack, metric))
        if row is None:
            sizes = "no image was right before the attack" if metric in ("l2_all", "linf_all") else ""
            reason = self.not_scored if metric == "fid" else sizes
            return Value(
                status="not run", reason=reason or f"the run has no {metric} of {folder} under {attack}"
            )
        if row.value is None:
            status: Literal["failed", "not run"] = "failed" if row.status == "failed" else "not run"
            return Value(status=status, reason=row.note or "no value")
        return Value(row.value, row.lower, row.upper, n=row.n)

    def _loss(self, folder: str) -> Value:
        """Mean cross-entropy of clean images, from the cell with budget 0, with its normal interval."""
        cells = self.run.cells if self.run else []
        cell = next((c for c in cells if c.cell.model == folder and _is_clean(c.cell.attack)), None)
        if self.run is None or cell is None:
            return Value(status="not run", reason="no cell of clean images")
        status, reason = cell_status(self.run, cell)
        if status != "ok":
            return Value(status=status, reason=reason)
        losses = floats(cell.rows["cross_entropy"])
        mean = float(losses.mean())
        half = Z_95 * float(losses.std(ddof=1)) / math.sqrt(len(losses)) if len(losses) > 1 else math.inf
        return Value(mean, mean - half, mean + half, n=len(losses))


def _is_clean(attack: ResolvedAttack) -> bool:
    """Whether the attack leaves every image as it is: a budget of 0, except where fog, snow or JPEG perturb too."""
    return attack.epsilon == 0 and attack.semantics == "worst-case"


def _combine(values: Sequence[Value], compute: Callable[[Sequence[float]], Value]) -> Value:
    """The value computed from several numbers; the first missing one where there is any."""
    missing = next((value for value in values if value.value is None), None)
    numbers = [value.value for value in values if value.value is not None]
    return missing or replace(compute(numbers), n=values[0].n)


def _drop(clean: Value, attacked: Value) -> Value:
    """100 (1 - attacked / clean), without an interval, since both accuracies are on the same images."""
    if clean.value == 0 and attacked.value is not None:
        return Value(status="not run", reason="no clean image is classified correctly", n=clean.n)
    return _combine((clean, attacked), lambda both: Value(100.0 * (1.0 - both[1] / both[0])))


def _subtract(first: Value, second: Value) -> Value:
    """Without an interval, since both numbers are on the same images."""
    return _combine((first, second), lambda both: Value(both[0] - both[1]))


def _over_seeds(values: Sequence[Value]) -> Value:
    """Mean over trainings, with Student's interval over seeds."""
    return _combine(values, _student)


def _student(numbers: Sequence[float]) -> Value:
    return Value(*mean_over_trainings(numbers), reason=f"mean of {len(numbers)} trainings")


def _average(values: Sequence[Value]) -> Value:
    """Unweighted mean, without an interval, since all numbers are on the same images; or the reasons of missing
    ones."""
    missing = [value for value in values if value.value is None]
    if missing and all(value.needs for value in missing):
        return missing_value(*dict.fromkeys(need for value in missing for need in value.needs))
    if missing:
        failed = any(value.status == "failed" for value in missing)
        reason = "; ".join(dict.fromkeys(value.reason for value in missing))
        return Value(status="failed" if failed else "not run", reason=reason)
    return _combine(values, lambda numbers: Value(fmean(numbers)))


def comparison(
    experiment: Experiment,
    measured: Measurements,
    labels: Mapping[tuple[str, str], str],
    differs: str,
    published: Mapping[tuple[str, str], PublishedRow] | None,
    settings: Mapping[tuple[str, str], Setting],
) -> list[Line]:
    """One line per cell, rows outermost: the cells of the published table, or all where nothing is printed.

    labels: the attack of a cell (row, column), "clean" for none. differs: why numbers are not comparable with the
    printed ones ("scale 0.01"); empty for the experiment itself. settings: of every measured cell.
    """
    lines = []
    for row, column in product(experiment.rows, experiment.columns):
        printed = published.get((row.title, column.title)) if published is not None else None
        if printed is not None or published is None:
            value = _measure(experiment, row, column, measured, labels)
            setting = settings.get((row.title, column.title))
            lines.append(_line(row, column, printed, value, differs, setting))
    return lines


def _measure(
    experiment: Experiment,
    row: Row,
    column: Column,
    measured: Measurements,
    labels: Mapping[tuple[str, str], str],
) -> Value:
    if needs := tuple(dict.fromkeys((*row.needs, *column.needs))):
        return missing_value(*needs)
    if column.metric == "average_accuracy":
        others = [other for other in experiment.columns if other is not column]
        return _average([_measure(experiment, row, other, measured, labels) for other in others])
    label = labels.get((row.title, column.title), CLEAN)
    if row.difference:
        return measured.difference(row.difference, label, column.metric)
    model = row.model_of(column.title)
    if model is None:
        return Value(status="not run", reason="no model of the experiment is for this cell")
    return measured.of(model, label, column.metric)


def _line(
    row: Row,
    column: Column,
    printed: PublishedRow | None,
    value: Value,
    differs: str,
    setting: Setting | None,
) -> Line:
    apart = sentence(setting.apart_from(printed)) if printed is not None and setting is not None else ""
    if apart:
        printed, differs = None, "; ".join(filter(None, [differs, f"not comparable: {apart}"]))
    number = None if printed is None or printed.value is None else float(printed.value)
    text = f"printed: {printed.printed_as}" if printed is not None and number is None else ""
    return Line(
        row=row.title,
        column=column.title,
        published=number,
        measured=value,
        verdict=_verdict(number, widening(printed) if printed else 0.0, value, differs),
        unit=printed.unit if printed else "",
        note="; ".join(part for part in (differs, text, printed.doubt if printed else "") if part),
        printed="-" if printed is None or printed.value is None else f"{printed.value}",
        differs=bool(differs),
    )


def _verdict(printed: float | None, widened: float, value: Value, differs: str) -> Verdict:
    """The verdict; none for a run that differs from the experiment, and for numbers without an interval (FID, means
    over columns)."""
    if value.status != "ok":
        return value.status
    if differs:
        return "not comparable"
    if printed is None or value.lower is None or value.upper is None:
        return "not compared"
    return in_interval(printed, value.lower, value.upper, widened)


def printed_cells(table: str) -> dict[tuple[str, str], PublishedRow]:
    """The printed numbers of a published table by row and column, without recomputed ones."""
    rows = table_rows(published_table(table, published_index()))
    return {(row.row, row.column): row for row in rows if row.origin != "recomputed"}


HEADER = (
    "row",
    "column",
    "published",
    "measured",
    "lower",
    "upper",
    "n",
    "difference",
    "unit",
    "verdict",
    "note",
)


def write_comparison(folder: Path, title: str, notes: Sequence[str], lines: Sequence[Line]) -> list[Path]:
    """comparison.csv and comparison.md in `folder`; returns their paths."""
    table, text = folder / "comparison.csv", folder / "comparison.md"
    write_text_atomically(table, csv_text([HEADER, *map(_values, lines)]))
    write_text_atomically(text, _markdown(title, notes, lines))
    return [table, text]


def _values(line: Line) -> tuple[object, ...]:
    """The cells of `HEADER`."""
    measured = (line.measured.value, line.measured.lower, line.measured.upper, line.measured.n)
    verdict = (line.difference, line.unit, line.verdict, line.why)
    return (line.row, line.column, line.published, *measured, *verdict)


def _markdown(title: str, notes: Sequence[str], lines: Sequence[Line]) -> str:
    header = ["", "", "published", "measured", "n", "difference", "verdict", "note"]
    rows = [[line.row, line.column, *texts(line), line.note] for line in lines]
    return f"# {escaped(title)}\n\n{bullets(notes)}\n\n{markdown_table(header, rows)}\n"


def texts(line: Line) -> list[str]:
    """Published, measured with its interval (or the reason why not), n, difference, verdict."""
    m = line.measured
    published = line.printed
    if m.value is None:
        return [published, f"{m.status}: {m.reason}", "-", "-", "-"]
    interval = "" if m.lower is None or m.upper is None else f" [{number(m.lower)}, {number(m.upper)}]"
    if m.n is None and m.lower == m.upper:  # a setting
        interval = ""
    difference = "-" if line.difference is None else f"{line.difference:+.2f}"
    return [published, number(m.value) + interval, "-" if m.n is None else f"{m.n}", difference, line.verdict]


def number(value: float) -> str:
    """A number with two decimals; four significant digits for small and for large ones."""
    return f"{value:.2f}" if 0.1 <= abs(value) < 1e4 or value == 0 else f"{value:.4g}"
