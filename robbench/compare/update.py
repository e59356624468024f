"""Writing new values into a reference table, with a reason that stays in the file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from robbench.compare.reference import read_csv
from robbench.compare.tables import CheckResult
from robbench.core.errors import UserError
from robbench.core.resources import write_text_atomically
from robbench.core.spreadsheet import csv_text
from robbench.results.rows import TableRow

HISTORY = "history"
# Columns that belong to the value.
_FOLLOW = (
    "lower",
    "upper",
    "n",
    "seed",
    "model_sha256",
    "note",
    "scope",
    "near_ties",
)


def required_reason(reason: str | None, option: str) -> str:
    """The text of --reason; `UserError` without one."""
    text = " ".join((reason or "").split())
    if not text:
        raise UserError(
            f'{option} changes what later runs are held to; say why with --reason "TEXT" (it is kept in the file)'
        )
    return text


@dataclass(frozen=True)
class Change:
    """A new value for the row at `line` of `path`."""

    path: Path
    line: int
    old: float
    row: TableRow

    @property
    def text(self) -> str:
        name = f"{self.row.model} {self.row.attack} {self.row.metric}"
        return f"{self.path}:{self.line}: {name}: {self.old:g} -> {self.row.value:g}"


def update_tables(results: Sequence[CheckResult], reason: str) -> list[Change]:
    """Put what was measured in place of every gating value that failed; returns the changes.

    Value, interval, n, seed and note of a row change; its tolerance never does. The column `history` gets a line with
    date, old and new value and the reason. `UserError`, and nothing written, for numbers that were published: what is
    printed in a paper does not change with a measurement.
    """
    changes = [_change(result) for result in results if result.regression and _measured(result)]
    for path in dict.fromkeys(change.path for change in changes):
        _rewrite(path, {change.line: change for change in changes if change.path == path}, reason)
    return changes


def _measured(result: CheckResult) -> bool:
    """Whether there are two finite numbers: a failed cell has nothing to record."""
    values = (result.measured.value if result.measured else None, result.reference.value)
    return result.tolerance is not None and all(v is not None and math.isfinite(v) for v in values)


def _change(result: CheckResult) -> Change:
    reference, row = result.reference, result.measured
    if reference.source:
        raise UserError(
            f"{reference.path}, line {reference.line}: {reference.model} {reference.attack} is published "
            f"({reference.source}) and is not updated; state a tolerance in the row, or gate false, if the "
            "difference is understood"
        )
    assert row is not None
    assert reference.value is not None
    return Change(reference.path, reference.line, reference.value, row)


def _rewrite(path: Path, changes: dict[int, Change], reason: str) -> None:
    header, rows = read_csv(path)
    columns = header if HISTORY in header else [*header, HISTORY]
    lines = [columns]
    for number, cells in rows:
        row = dict(zip(header, cells, strict=True))
        lines.append(
            [_updated(row, changes[number], reason).get(name, "") for name in columns]
            if number in changes
            else [row.get(name, "") for name in columns]
        )
    write_text_atomically(path, csv_text(lines))


def _updated(row: dict[str, str], change: Change, reason: str) -> dict[str, str]:
    new = {"value": change.row.value, **{name: getattr(change.row, name) for name in _FOLLOW if name in row}}
    line = f"{date.today().isoformat()}: {row['value']} -> {change.row.value}, {reason}"
    texts = {name: "" if value is None else str(value) for name, value in new.items()}
    return {**row, **texts, HISTORY: "; ".join(part for part in (row.get(HISTORY, ""), line) if part)}
