"""What makes runs one leaderboard, and every reason why they are none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from written_runs import write_run

from robbench.core.errors import UserError
from robbench.store.ledger import load_run
from robbench.store.merged import conflicts, merge_runs, source_of, version_conflicts
from robbench.store.records import CellResult, Run

Change = Callable[[Run], Run]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two models, two attacks."""
    write_run(tmp_path / "run")
    return load_run(tmp_path / "run")


def part(run: Run, *cells: int) -> Run:
    """The run with some of its cells only."""
    kept = [run.cells[number] for number in cells]
    return replace(run, cells=kept, cards={r.cell.model: run.cards[r.cell.model] for r in kept})


def with_cells(run: Run, **changes: Any) -> Run:
    """The run with something changed in every cell's record."""
    return replace(run, cells=[CellResult(r.cell.model_copy(update=changes), r.rows) for r in run.cells])


def test_parts_are_the_whole_again(run: Run) -> None:
    union = merge_runs([part(run, 3, 0), part(run, 1, 2), part(run, 0)])
    assert sorted(r.cell.hash for r in union.cells) == sorted(r.cell.hash for r in run.cells)
    models = [r.cell.model for r in union.cells]
    assert models == sorted(models, key=models.index)  # models outermost
    assert union.cards == run.cards
    for result in union.cells:
        mine = next(r for r in run.cells if r.cell.hash == result.cell.hash)
        pd.testing.assert_frame_equal(result.rows, mine.rows)


def test_merging_with_itself_changes_nothing(run: Run) -> None:
    union = merge_runs([run, run, run])
    assert [r.cell for r in union.cells] == [r.cell for r in run.cells]
    assert (union.versions, union.note) == (run.versions, run.note)
    assert merge_runs([run]).cells == run.cells


def test_the_fuller_cell_is_taken(run: Run) -> None:
    def thinner(rows: pd.DataFrame) -> pd.DataFrame:
        return rows.iloc[:-1]

    def barer(rows: pd.DataFrame) -> pd.DataFrame:
        return rows.assign(example=None, witness=None)

    for change in (thinner, barer):
        less = replace(run, cells=[CellResult(r.cell, change(r.rows)) for r in run.cells])
        for order in ([less, run], [run, less]):
            union = merge_runs(order, ["a", "b"])
            assert all(source_of(order, result) is run for result in union.cells)
            assert all(mine.rows is its.rows for mine, its in zip(union.cells, run.cells, strict=True))


def test_notes_are_kept_once(run: Run) -> None:
    noted = [replace(run, note=text) for text in ("a", "b", "a", "")]
    assert merge_runs(noted).note == "a. b"


# ------------------------------------------------------------------------------------------------------ conflicts
def other_card(run: Run, **changes: Any) -> Run:
    name = run.cells[0].cell.model
    return replace(run, cards={**run.cards, name: run.cards[name].model_copy(update=changes)})


def other_weights(run: Run) -> Run:
    card = run.cards[run.cells[0].cell.model]
    return other_card(run, weights=card.weights.model_copy(update={"sha256": "9" * 64}))


def other_attack(run: Run) -> Run:
    cells = []
    for result in run.cells:
        spec = result.cell.attack
        changed = spec.model_copy(update={"parameters": {**spec.parameters, "steps": 99}})
        cells.append(CellResult(result.cell.model_copy(update={"attack": changed}), result.rows))
    return replace(run, cells=cells)


def edited(column: str, change: Callable[[Any], Any]) -> Change:
    def edit(run: Run) -> Run:
        rows = run.cells[0].rows.copy()
        rows[column] = change(rows[column])
        return replace(run, cells=[CellResult(run.cells[0].cell, rows), *run.cells[1:]])

    return edit


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda r: replace(r, dataset="mnist"), "data set is .* in one and mnist in two"),
        (lambda r: replace(r, dataset_revision="e" * 64), "data set revision is .* and eeeeeeeeeeee"),
        (lambda r: replace(r, seed=77), "seed is .* and 77 in two"),
        (lambda r: replace(r, n=r.n + 1), "number of samples"),
        (lambda r: replace(r, sample_ids=(*r.sample_ids[:-1], 10**9)), "1 of .* samples of one are not"),
        (lambda r: with_cells(r, engine="robbench engine 99"), "engine is .* and robbench engine 99"),
        (lambda r: replace(r, versions={**r.versions, "torch": "99.0"}), "torch is .* and 99 in two"),
        (lambda r: replace(r, versions={**r.versions, "robbench": "0.99.1"}), r"robbench is .* and 0\.99 in"),
        (other_weights, "is another one in two .*rename one"),
        (lambda r: other_card(r, defense="other"), "has defense 'other' in two"),
        (other_attack, "is not the same in one and two: parameters.steps .* and 99"),
        (lambda r: with_cells(r, search_precision="bf16"), "search precision fp32 and bf16"),
        (lambda r: with_cells(r, nll_flow=None, attack_flow=None), "flow"),
        (edited("robust", lambda c: ~c), "rows in one that are others in two"),
        (edited("margin", lambda c: c + 0.1), "rows in one that are others in two"),
        (lambda r: with_cells(r, hash="7" * 64), "has cell hash"),
    ],
)
def test_conflicts(run: Run, change: Change, why: str) -> None:
    """Each is named with the next step, from either side."""
    other = change(run)
    assert conflicts([run, run]) == []
    assert conflicts([run, other], ["one", "two"])
    assert conflicts([other, run], ["one", "two"])
    with pytest.raises(UserError, match=why) as refusal:
        merge_runs([run, other], ["one", "two"])
    assert ";" in str(refusal.value)
    with pytest.raises(UserError):
        merge_runs([run, run, other])


def test_versions_can_be_accepted(run: Run) -> None:
    """Then the union names both."""
    mine = run.versions.get("torch", "unknown")
    other = replace(part(run, 0), versions={**run.versions, "torch": "99.0"})
    assert len(version_conflicts([run, other])) == 1
    union = merge_runs([run, other], accept_versions=True)
    assert "99.0" in union.versions["torch"]
    assert mine == "unknown" or mine in union.versions["torch"]


def test_rounding_is_no_conflict(run: Run) -> None:
    """The same cell on another processor; minor versions."""
    other = edited("margin", lambda c: c + 1e-5)(run)
    minor = replace(run, versions={**run.versions, "torch": run.versions.get("torch", "0.0") + ".9"})
    assert conflicts([run, other]) == conflicts([run, minor]) == []


def test_nothing() -> None:
    with pytest.raises(UserError, match="nothing to merge"):
        merge_runs([])
