"""Compares a run with a reference table, metric by metric: pass, fail or not run.

A reference is a CSV with at least the columns dataset, model, attack, metric and value, as leaderboard.csv.
The rest is optional and narrows a comparison when present:

* threat_model, epsilon, eta: part of the key. A reference without the column matches whatever the run has,
  and is an error when that is more than one row. An empty epsilon or eta means "has none".
* n, seed: which samples were measured. Other samples are another measurement, so a difference is a fail,
  unless the row's own `tolerance` says how far apart the numbers may lie all the same; it is shown either
  way.
* tolerance: largest allowed |measured - reference| in the metric's unit; else `default_tolerance`.
* status: a row that is not "ok" holds no number, nor does one with an empty value: not run.
* note: worst cases and averages name there what they combine. Over other attacks they are another quantity:
  not run, so that a part of a published matrix can be checked against all of it.

NaN and infinity never pass. A cell that failed or is missing in the run is "not run": no number to judge.
"""

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from robbench.errors import UserError
from robbench.matrix.records import Run
from robbench.publish.likelihood import BITS
from robbench.publish.rows import TableRow
from robbench.publish.tables import combined_attacks, leaderboard

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

Verdict = Literal["pass", "fail", "not run"]

REQUIRED = ("dataset", "model", "attack", "metric", "value")
PERCENTAGE_POINTS = 0.5
RELATIVE = 0.01
BITS_PER_DIM = 0.01
LISTED_ABSENT = 40
_SAME_BUDGET = 1e-6  # relative: 8/255 written with seven digits is still 8/255


@dataclass(frozen=True)
class Reference:
    """One number of the reference table. None: the column is absent, or the cell empty.

    epsilon, eta: None only without the column; an empty cell is "none", for it says that there is no budget.
    combined: what a worst case or average combines, empty for anything else.
    """

    line: int
    dataset: str
    model: str
    attack: str
    metric: str
    value: float | None
    threat_model: str | None
    epsilon: float | Literal["none"] | None
    eta: float | Literal["none"] | None
    n: int | None
    seed: int | None
    tolerance: float | None
    combined: frozenset[str]


@dataclass(frozen=True)
class CheckResult:
    """Verdict on one reference number. tolerance: the absolute one that was applied, None when none was."""

    reference: Reference
    measured: TableRow | None
    tolerance: float | None
    verdict: Verdict
    reason: str

    @property
    def difference(self) -> float | None:
        """Measured minus reference value, None when one of them is missing."""
        if self.measured is None or self.measured.value is None or self.reference.value is None:
            return None
        return self.measured.value - self.reference.value


def check(
    measured: Run | Sequence[TableRow], reference: Path, tolerance: float | None = None
) -> list[CheckResult]:
    """One result a row of the reference CSV, in its order, for a run or its `leaderboard`.

    tolerance: replaces the default of `PERCENTAGE_POINTS` for metrics in percent. Raises `UserError` for a
    reference that is missing, no CSV, lacks columns or holds malformed numbers, and for a negative tolerance.
    """
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise UserError(f"--tolerance {tolerance} is no tolerance; give a finite number of at least 0")
    rows = leaderboard(measured) if isinstance(measured, Run) else measured
    return [_judge(wanted, rows, tolerance, reference) for wanted in read_reference(reference)]


def passed(results: Sequence[CheckResult]) -> bool:
    """No fail and at least one pass: a check that compared nothing has shown nothing."""
    verdicts = {result.verdict for result in results}
    return "fail" not in verdicts and "pass" in verdicts


def without_reference(measured: Sequence[TableRow], results: Sequence[CheckResult]) -> list[str]:
    """Accuracies, and of flows bits/dim, of the run that no reference number speaks of, as "model x attack": after a
    renamed attack or model, everything that is left may still pass."""
    compared = {(r.measured.model, r.measured.attack) for r in results if r.measured is not None}
    names = {(row.model, row.attack): None for row in measured if row.metric in ("accuracy", "bits_per_dim")}
    return [f"{model} x {attack}" for model, attack in names if (model, attack) not in compared]


def default_tolerance(unit: str, value: float, percentage_points: float | None = None) -> float:
    """0.5 percentage points for metrics in percent (or `percentage_points`); for bits/dim 0.01 or 1 % of the reference,
    whichever is larger; else 1 % of the reference."""
    if unit == "%":
        return PERCENTAGE_POINTS if percentage_points is None else percentage_points
    relative = RELATIVE * abs(value)
    return max(BITS_PER_DIM, relative) if unit == BITS else relative


# ------------------------------------------------------------------------------------------------- comparison
def _judge(wanted: Reference, rows: Sequence[TableRow], tolerance: float | None, path: Path) -> CheckResult:
    found = [row for row in rows if _matches(wanted, row)]
    if len(found) > 1:
        raise UserError(
            f"{path}, line {wanted.line}: {wanted.model} {wanted.attack} {wanted.metric} matches "
            f"{len(found)} numbers of the run; add the columns threat_model, epsilon and eta"
        )
    if not found:
        return CheckResult(wanted, None, None, "not run", "not in the run")
    row = found[0]
    if wanted.value is None:
        return CheckResult(wanted, row, None, "not run", "the reference has no number")
    if row.status != "ok":
        verdict: Verdict = "fail" if row.status == "failed" and not wanted.combined else "not run"
        return CheckResult(
            wanted, row, None, verdict, f"{row.status}: {row.note}" if row.note else row.status
        )
    if wanted.combined and wanted.combined != combined_attacks(row.note):
        return CheckResult(wanted, row, None, "not run", f"the run's number is {row.note}")
    return _compare(wanted, row, wanted.value, tolerance)


def _compare(wanted: Reference, row: TableRow, value: float, tolerance: float | None) -> CheckResult:
    allowed = wanted.tolerance
    if allowed is None:
        allowed = default_tolerance(row.unit, value, tolerance)
    other_samples = _other_samples(wanted, row)
    if not math.isfinite(value):
        return CheckResult(wanted, row, allowed, "fail", f"the reference value is {value}")
    if row.value is None or not math.isfinite(row.value):
        return CheckResult(
            wanted, row, allowed, "fail", f"measured no finite value ({row.note or row.value})"
        )
    if other_samples and wanted.tolerance is None:
        return CheckResult(wanted, row, allowed, "fail", other_samples)
    # Values printed with few digits: allow for the rounding of the subtraction, not more.
    close = abs(row.value - value) <= allowed + 1e-9 * max(1.0, abs(value))
    return CheckResult(wanted, row, allowed, "pass" if close else "fail", other_samples)


def _matches(wanted: Reference, row: TableRow) -> bool:
    same = (wanted.dataset, wanted.model, wanted.attack, wanted.metric)
    return (
        same == (row.dataset, row.model, row.attack, row.metric)
        and wanted.threat_model in (None, row.threat_model)
        and _same_budget(wanted.epsilon, row.epsilon)
        and _same_budget(wanted.eta, row.eta)
    )


def _same_budget(wanted: float | Literal["none"] | None, measured: float | None) -> bool:
    if wanted is None:
        return True
    if wanted == "none" or measured is None:
        return wanted == "none" and measured is None
    return math.isclose(wanted, measured, rel_tol=_SAME_BUDGET, abs_tol=1e-12)


def _other_samples(wanted: Reference, row: TableRow) -> str:
    """How the measured samples differ from the reference's; empty when they do not."""
    pairs = (("n", wanted.n, row.n), ("seed", wanted.seed, row.seed))
    return ", ".join(
        f"{name} {ours}, reference {other}" for name, other, ours in pairs if other not in (None, ours)
    )


# -------------------------------------------------------------------------------------------------- reading
def read_reference(path: Path) -> list[Reference]:
    """The rows of a reference CSV; `UserError` naming file, line and column for anything malformed."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            lines = list(csv.reader(stream, strict=True))
    except OSError as error:
        raise UserError(
            f"--against {str(path)!r} cannot be read ({error.strerror}); give a CSV file"
        ) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--against {str(path)!r} is not CSV text ({error}); give a tidy CSV file") from error
    header = lines[0] if lines else []
    missing = [name for name in REQUIRED if name not in header]
    if missing:
        raise UserError(
            f"--against {str(path)!r} lacks the columns {', '.join(missing)}; "
            f"give a tidy table like leaderboard.csv"
        )
    repeated = sorted(name for name, count in Counter(header).items() if count > 1)
    if repeated:
        raise UserError(f"--against {str(path)!r} has two columns {repeated[0]!r}; remove one")
    rows = [(number, line) for number, line in enumerate(lines[1:], 2) if line]
    if not rows:
        raise UserError(f"--against {str(path)!r} has no rows; give a table with numbers to compare with")
    return [_reference(path, number, header, line) for number, line in rows]


def _reference(path: Path, number: int, header: Sequence[str], line: Sequence[str]) -> Reference:
    if len(line) != len(header):
        raise UserError(
            f"{path}, line {number}: {len(line)} cells for {len(header)} columns; repair the file"
        )
    cells = dict(zip(header, (cell.strip() for cell in line), strict=True))
    number_of = _Cells(path, number, cells)
    has_value = cells.get("status", "ok") == "ok"
    allowed = number_of.real("tolerance")
    if allowed is not None and not (math.isfinite(allowed) and allowed >= 0):
        raise UserError(
            f"{path}, line {number}: tolerance {allowed} is none; give a finite number of at least 0"
        )
    return Reference(
        line=number,
        dataset=cells["dataset"],
        model=cells["model"],
        attack=cells["attack"],
        metric=cells["metric"],
        value=number_of.real("value") if has_value else None,
        threat_model=cells.get("threat_model"),
        epsilon=number_of.budget("epsilon"),
        eta=number_of.budget("eta"),
        n=number_of.whole("n"),
        seed=number_of.whole("seed"),
        tolerance=allowed,
        combined=combined_attacks(cells.get("note", "")),
    )


@dataclass(frozen=True)
class _Cells:
    """Numbers of one line of a CSV, with errors that say where."""

    path: Path
    line: int
    cells: Mapping[str, str]

    def real(self, column: str) -> float | None:
        """None when the column is absent or the cell empty."""
        text = self.cells.get(column, "")
        if not text:
            return None
        try:
            return float(text)
        except ValueError as error:
            raise UserError(
                f"{self.path}, line {self.line}: {column} {text!r} is not a number; write it as 12.34"
            ) from error

    def whole(self, column: str) -> int | None:
        value = self.real(column)
        if value is not None and not value.is_integer():
            raise UserError(f"{self.path}, line {self.line}: {column} {value} is not a whole number")
        return None if value is None else int(value)

    def budget(self, column: str) -> float | Literal["none"] | None:
        """None without the column, "none" for an empty cell."""
        value = self.real(column)
        if value is None:
            return "none" if column in self.cells else None
        if not math.isfinite(value):
            raise UserError(
                f"{self.path}, line {self.line}: {column} {value} is no budget; give a finite number"
            )
        return value


# -------------------------------------------------------------------------------------------------- printing
def print_results(results: Sequence[CheckResult], console: "Console") -> bool:
    """Print the verdicts; whether the check `passed`.

    A small matrix checked against a large reference leaves thousands of numbers out: beyond `LISTED_ABSENT` they are
    counted a model instead of listed.
    """
    absent = [result for result in results if _absent(result)]
    few = len(absent) <= LISTED_ABSENT
    shown = results if few else [result for result in results if not _absent(result)]
    table = check_table(shown)
    if console.measure(table, options=console.options.update_width(10_000)).maximum > console.width:
        table = _narrow_table(shown)
    console.print(table)
    if not few:
        counts = Counter(result.reference.model for result in absent)
        listed = ", ".join(f"{model} {count}" for model, count in counts.items())
        console.print(
            f"not run, not in this run: {len(absent)} numbers of the reference ({listed})",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if not any(result.verdict != "not run" for result in results):
        console.print(
            "Nothing of the reference was measured by this run, so nothing was checked.", style="red"
        )
    return passed(results)


def _absent(result: CheckResult) -> bool:
    return result.verdict == "not run" and result.measured is None


def check_table(results: Sequence[CheckResult]) -> "Table":
    """The verdicts as a rich table, with counts and the tolerances that apply in the caption."""
    from rich.text import Text

    table = _blank_table(results)
    for name in ("model", "attack", "metric"):
        table.add_column(name, overflow="fold")
    for name in ("reference", "measured", "difference", "allowed"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("why", overflow="fold")
    for result in results:
        table.add_row(*(Text(text) for text in _cells(result)), _verdict(result.verdict), Text(result.reason))
    return table


def _narrow_table(results: Sequence[CheckResult]) -> "Table":
    """The same with one text a comparison, for a terminal or log that has no room for nine columns."""
    from rich.text import Text

    table = _blank_table(results)
    table.add_column("verdict", no_wrap=True)
    table.add_column("what", overflow="fold")
    for name in ("measured", "reference"):
        table.add_column(name, justify="right", overflow="fold")
    for result in results:
        model, attack, metric, reference, measured, *_ = _cells(result)
        what = f"{model} {attack} {metric.replace('_', ' ')}" + (
            f" ({result.reason})" if result.reason else ""
        )
        table.add_row(_verdict(result.verdict), *(Text(text) for text in (what, measured, reference)))
    return table


def _blank_table(results: Sequence[CheckResult]) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    counts = Counter(result.verdict for result in results)
    caption = (
        f"{counts['pass']} pass, {counts['fail']} fail, {counts['not run']} not run. Tolerance where the "
        f"reference states none: {PERCENTAGE_POINTS} percentage points, {100 * RELATIVE:g} % in other units "
        f"(of bits/dim at least {BITS_PER_DIM:g})."
    )
    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption=Text(caption))


def _cells(result: CheckResult) -> list[str]:
    wanted, measured = result.reference, result.measured
    difference = "-" if result.difference is None else f"{result.difference:+.3g}"
    return [
        wanted.model,
        wanted.attack + _qualifier(wanted),
        wanted.metric,
        _shown(wanted.value),
        _shown(measured.value if measured else None),
        difference,
        "-" if result.tolerance is None else f"{result.tolerance:.3g}",
    ]


def _qualifier(wanted: Reference) -> str:
    """The threat model where the attack alone does not say it."""
    return f" ({wanted.threat_model})" if wanted.threat_model and wanted.attack == "worst-case" else ""


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _verdict(verdict: Verdict) -> "Text":
    from rich.text import Text

    return Text(verdict, style={"pass": "green", "fail": "bold red", "not run": "yellow"}[verdict])
