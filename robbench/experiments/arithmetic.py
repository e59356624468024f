"""Printed numbers that follow from others of their table (means, differences, relative drops), recomputed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from robbench.core.errors import UserError
from robbench.experiments.published import PublishedRow


@dataclass(frozen=True)
class Arithmetic:
    """A printed number that follows from others. recomputed: from the printed ones. agrees: whether the printed number
    is equal up to the rounding of all numbers involved."""

    row: PublishedRow
    recomputed: float
    agrees: bool


def arithmetic(rows: Sequence[PublishedRow]) -> list[Arithmetic]:
    """Averages, differences and relative drops of a table, recomputed, in the table's order."""
    stated = [row for row in rows if row.origin != "recomputed"]
    return [_check(row, stated) for row in stated if row.derived]


def _check(row: PublishedRow, rows: Sequence[PublishedRow]) -> Arithmetic:
    recomputed, slack = _recompute(row, rows)
    gap = abs(float(row.value or 0) - recomputed)
    return Arithmetic(row, recomputed, gap <= row.rounding + slack + 1e-9)


def _recompute(row: PublishedRow, rows: Sequence[PublishedRow]) -> tuple[float, float]:
    """The recomputed number, and the tolerance for the rounding of a ratio.

    Means and differences have no tolerance for the rounding of columns: the papers average printed columns.
    """
    if row.combines:
        values = [_value(rows, row.row, attack=attack) for attack in row.combines]
        return math.fsum(values) / len(values), 0.0
    if row.difference_of:
        first, second = (_value(rows, label, column=row.column) for label in row.difference_of)
        return first - second, 0.0
    accuracy = _value(rows, row.row, attack=row.attack, metric="accuracy")
    clean, half = row.relative_to or 100.0, 0.05
    drop = 100 * (1 - accuracy / clean)
    return drop, 100 * (1 - (accuracy - half) / (clean + half)) - drop


def _value(rows: Sequence[PublishedRow], name: str, **requested: str) -> float:
    """The number of row `name` whose fields are `requested`, averages and drops excluded; `UserError` unless there is
    exactly one."""
    metrics = {requested["metric"]} if "metric" in requested else {"accuracy", "average_accuracy"}
    if "attack" in requested:
        metrics.discard("average_accuracy")
    found = [
        row.value
        for row in rows
        if row.row == name
        and row.metric in metrics
        and all(getattr(row, key) == requested[key] for key in requested)
    ]
    if len(found) != 1 or found[0] is None:
        raise UserError(
            f"published row {name!r} has {len(found)} numbers for {requested}; one is needed to recompute"
        )
    return float(found[0])
