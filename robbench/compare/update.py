"""Writing new values into a reference table, with a reason that stays in the file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from robbench.compare.comparison import Comparison
from robbench.compare.reference import Reference, read_csv, write_cell
from robbench.core.errors import UserError
from robbench.core.resources import write_text_atomically
from robbench.core.spreadsheet import csv_text
from robbench.results.rows import TableRow

HISTORY = "history"
# Columns that belong to the value.
_FOLLOW = ("lower", "upper", "n", "seed", "model_sha256", "note", "scope", "near_ties")


def require_reason(reason: str | None, option: str) -> str:
    """The text of --reason; `UserError` without one."""
    text = " ".join((reason or "").split())
    if not text:
        raise UserError(
            f'{option} changes what later runs are held to; say why with --reason "TEXT" (it is kept in the file)'
        )
    return text


@dataclass(frozen=True)
class Update:
    """A new value for a line of a table."""

    old: Reference
    row: TableRow

    @property
    def text(self) -> str:
        name = f"{self.row.model} {self.row.attack} {self.row.metric}"
        return f"{self.old.path}:{self.old.line}: {name}: {self.old.value:g} -> {self.row.value:g}"


def update_tables(results: Sequence[Comparison], reason: str) -> list[Update]:
    """Put what was measured in place of every gating value that failed; returns the changes.

    Value, interval, n, seed and note of a row change; its tolerance never does. The column `history` gets a line with
    date, old and new value and the reason. `UserError`, and nothing written, for numbers that were published: what is
    printed in a paper does not change with a measurement.
    """
    updates = [Update(r.a, r.b) for r in results if r.regression and _two_numbers(r)]  # type: ignore[arg-type]
    for old in (update.old for update in updates if update.old.source):
        raise UserError(
            f"{old.path}, line {old.line}: {old.model} {old.attack} is published "
            f"({old.source}) and is not updated; state a tolerance in the row, or gate false, if the "
            "difference is understood"
        )
    for path in dict.fromkeys(update.old.path for update in updates):
        _rewrite(path, {u.old.line: u.row for u in updates if u.old.path == path}, reason)
    return updates


def _two_numbers(result: Comparison) -> bool:
    """Whether there are two finite numbers: a failed cell has nothing to record."""
    values = result.a.value, result.b.value
    return result.tolerance is not None and all(v is not None and math.isfinite(v) for v in values)


def _rewrite(path: Path, rows: dict[int, TableRow], reason: str) -> None:
    header, lines = read_csv(path)
    columns = header if HISTORY in header else [*header, HISTORY]
    text = [columns]
    for number, cells in lines:
        line = dict(zip(header, cells, strict=True))
        new = _update(line, rows[number], reason) if number in rows else line
        text.append([new.get(name, "") for name in columns])
    write_text_atomically(path, csv_text(text))


def _update(line: dict[str, str], row: TableRow, reason: str) -> dict[str, str]:
    new = {name: write_cell(row, name) for name in ("value", *_FOLLOW) if name in line}
    history = f"{date.today().isoformat()}: {line['value']} -> {new['value']}, {reason}"
    texts = {name: "" if value is None else str(value) for name, value in new.items()}
    return {**line, **texts, HISTORY: "; ".join(part for part in (line.get(HISTORY, ""), history) if part)}
