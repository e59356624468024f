"""The ledger's columns are declared once: what the declaration says is what outcomes hold, shards store and runs are
compared by."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pyarrow as pa
import pytest

from robbench.attacks import LikelihoodOutcome, Outcome
from robbench.cli.run import run_matrix
from robbench.run.request import RunRequest
from robbench.store.columns import LEDGER_COLUMNS, Column
from robbench.store.shards import SCHEMAS


@pytest.mark.parametrize(("target", "outcome"), [("classifier", Outcome), ("flow", LikelihoodOutcome)])
def test_columns_come_from_attributes_of_the_outcome(target: str, outcome: type) -> None:
    names = {field.name for field in fields(outcome)}
    columns = LEDGER_COLUMNS[target]  # type: ignore[index]
    assert {column.source for column in columns if column.source} <= names
    beside = [column.name for column in columns if not column.source]
    assert beside == (["nll_before", "nll_after", "witness"] if target == "classifier" else [])


def test_columns_of_one_name_are_compared_in_one_way() -> None:
    kinds: dict[str, set[str]] = {}
    for column in (column for columns in LEDGER_COLUMNS.values() for column in columns):
        kinds.setdefault(column.name, set()).add(column.kind)
    assert all(len(found) == 1 for found in kinds.values())
    assert {name for schema in SCHEMAS.values() for name in schema.names} == set(kinds)


def test_what_older_shards_lack_must_be_nullable() -> None:
    with pytest.raises(ValueError, match="'late' is newer than schema 1 and not nullable"):
        Column("late", pa.int64(), "count", since=3)


def test_a_column_is_added_in_one_place(tiny_zoo: Path, tmp_path: Path) -> None:
    """One entry more, in a process of its own: it is in the schema, in shards, and in every comparison of rows."""
    before = tmp_path / "before"
    assert (
        run_matrix(RunRequest(("fgsm",), models=("tiny-a",), n=12, zoo=tiny_zoo, device="cpu"), before) == 0
    )
    script = Path(__file__).with_name("added_column.py")
    done = subprocess.run(
        [sys.executable, script, tiny_zoo, before, tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
