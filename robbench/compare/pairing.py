"""The cells of two runs side by side, on the samples that both have."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from robbench.compare.keys import Key, pair_rows
from robbench.compare.pairs import select_rows
from robbench.core.errors import UserError
from robbench.results.rows import CellStatus, cell_model, cell_status
from robbench.store.records import CellResult, Run

if TYPE_CHECKING:
    import pandas as pd

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class CellPair:
    """One (model, attack) in both runs.

    Attributes:
        a, b: the cells.
        status_a, status_b: whether each is whole, and why not.
        rows_a, rows_b: rows of the common samples by sample id; empty on a side that is not whole.
    """

    a: CellResult
    b: CellResult
    status_a: tuple[CellStatus, str]
    status_b: tuple[CellStatus, str]
    rows_a: "pd.DataFrame"
    rows_b: "pd.DataFrame"

    @property
    def model(self) -> str:
        return cell_model(self.a)

    @property
    def label(self) -> str:
        return self.a.cell.attack.label

    @property
    def ok(self) -> bool:
        """Whether both runs have every sample of it."""
        return self.status_a[0] == self.status_b[0] == "ok"

    @property
    def ids(self) -> Ids:
        """Ids of the samples compared, of a pair that is `ok`."""
        return self.rows_a["sample_id"].to_numpy(dtype=np.int64)


@dataclass(frozen=True)
class PairedRuns:
    """Two runs of one data set.

    Attributes:
        a, b: the runs.
        ids: samples of both, sorted.
        cells: those of both, in A's order.
        only_a, only_b: the others.
    """

    a: Run
    b: Run
    ids: Ids
    cells: tuple[CellPair, ...]
    only_a: tuple[CellResult, ...]
    only_b: tuple[CellResult, ...]

    def models(self) -> list[list[CellPair]]:
        """The cells by model, in A's order."""
        found: dict[str, list[CellPair]] = {}
        for pair in self.cells:
            found.setdefault(pair.model, []).append(pair)
        return list(found.values())


def pair_runs(a: Run, b: Run, names: tuple[str, str]) -> PairedRuns:
    """`UserError` where no sample, or no cell, is in both. names: of the runs in messages."""
    for what, ours, theirs in (
        ("data sets", a.dataset, b.dataset),
        (f"revisions of {a.dataset}", a.dataset_revision[:12], b.dataset_revision[:12]),
    ):
        if ours != theirs:
            raise UserError(
                f"{names[0]} and {names[1]} are of different {what} ({ours}, {theirs}) and have no sample in common; "
                "give two runs on the same data"
            )
    ids = np.intersect1d(np.asarray(a.sample_ids, np.int64), np.asarray(b.sample_ids, np.int64))
    if not len(ids):
        raise UserError(
            f"{names[0]} (n {a.n}, seed {a.seed}) and {names[1]} (n {b.n}, seed {b.seed}) have no sample in common; "
            "run both with one --seed"
        )
    found = pair_rows(a.cells, b.cells, _key)
    cells = [_pair(a, b, ours, theirs[0], ids) for ours, theirs in found if theirs]
    if not cells:
        raise UserError(
            f"{names[0]} and {names[1]} have no model x attack in common; "
            f"A has {_list_names(a)}; B has {_list_names(b)}"
        )
    only_a = tuple(ours for ours, theirs in found if not theirs)
    only_b = tuple(theirs for theirs, ours in pair_rows(b.cells, a.cells, _key) if not ours)
    return PairedRuns(a, b, ids, tuple(cells), only_a, only_b)


def _pair(a: Run, b: Run, ours: CellResult, theirs: CellResult, ids: Ids) -> CellPair:
    statuses = cell_status(a, ours), cell_status(b, theirs)
    rows = [
        select_rows(result.rows, ids if status[0] == "ok" else ids[:0])
        for result, status in zip((ours, theirs), statuses, strict=True)
    ]
    return CellPair(ours, theirs, *statuses, *rows)


def _key(result: CellResult) -> Key:
    return Key(cell_model(result), result.cell.attack.label, result.cell.attack.target)


def _list_names(run: Run, most: int = 5) -> str:
    names: Sequence[str] = [f"{cell_model(r)} x {r.cell.attack.label}" for r in run.cells]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "none"
