"""The smallest distance of each sample over the minimal-norm attacks of one norm."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from robbench.metrics.minimal_norm import SMALLEST_DISTANCE, distances, is_minimal, median_number
from robbench.results.rows import (
    WORST_CASE,
    ModelResults,
    TableRow,
    blank_model_row,
    complete,
    with_number,
    without_value,
)
from robbench.statistics.accuracy import worst_case
from robbench.store.records import CellResult, Run


def smallest_rows(run: Run, model: ModelResults, attacks: Sequence[CellResult]) -> list[TableRow]:
    """A row for each norm in which the table has several minimal-norm attacks and the model one at least; partial where
    it lacks some. attacks: of the table."""
    own, requested = (_by_norm(cells) for cells in (model.cells, attacks))
    return [_row(run, cells, requested[norm]) for norm, cells in own.items() if len(requested[norm]) > 1]


def _by_norm(results: Sequence[CellResult]) -> dict[str, list[CellResult]]:
    groups: dict[str, list[CellResult]] = {}
    for result in results:
        if is_minimal(result.cell):
            groups.setdefault(result.cell.attack.norm, []).append(result)
    return groups


def _row(run: Run, results: Sequence[CellResult], attacks: Sequence[CellResult]) -> TableRow:
    blank = blank_model_row(
        run, results[0], SMALLEST_DISTANCE, WORST_CASE, results[0].cell.attack.threat_model
    )
    if len(complete(run, results)) < len(results):
        return without_value(blank, run, results)
    found = [distances(result) for result in results]
    # The same samples in the same order, or a ValueError.
    worst_case([r.rows["sample_id"].to_numpy() for r in results], [np.isinf(each) for each in found])
    labels = tuple(result.cell.attack.label for result in results)
    missing = tuple(a.cell.attack.label for a in attacks if a.cell.attack.label not in labels)
    row = with_number(blank, median_number(np.minimum.reduce(found)))
    return replace(row, status="partial" if missing else "ok", combined=labels, missing=missing)
