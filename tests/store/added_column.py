"""A process in which the ledger has one column more, declared before anything else of robbench is imported."""

import sys
from pathlib import Path

import pyarrow as pa

from robbench.store import columns

NEXT = columns.find_version() + 1
COLUMN = columns.Column(
    "surprise",
    pa.float32(),
    "score",
    "cross_entropy",
    "nats",
    nullable=True,
    since=NEXT,
    reference="surprise",
)
columns.LEDGER_COLUMNS["classifier"] += (COLUMN,)


def main(zoo: Path, before: Path, out: Path) -> None:
    """before: a run of the same cell by a robbench without the column."""
    from robbench.cli.run import run_matrix
    from robbench.compare.identity import other_rows
    from robbench.compare.pairing import pair_runs
    from robbench.compare.samples import of_run, read_samples, write_reference
    from robbench.run.request import RunRequest
    from robbench.store.ledger import Ledger, load_run
    from robbench.store.merged import conflicts
    from robbench.store.shards import SCHEMA_VERSION, SCHEMAS

    assert SCHEMA_VERSION == NEXT
    assert SCHEMAS["classifier"].names[-1] == "surprise"
    assert "surprise" not in SCHEMAS["flow"].names

    old = load_run(before).cells[0].rows
    assert old["surprise"].isna().all()  # a shard of the schema before it is read all the same

    request = RunRequest(("fgsm",), models=("tiny-a",), n=12, zoo=zoo, device="cpu")
    for name in ("a", "b"):
        assert run_matrix(request, out / name) == 0
    run = load_run(out / "a")
    rows = run.cells[0].rows
    assert (rows["surprise"] == rows["cross_entropy"]).all()
    assert rows["surprise"].notna().all()

    ledger, cell = Ledger(out / "b"), run.cells[0].cell.hash
    (shard,) = ledger.shards(cell, lambda path, reason: None)
    values = pa.array([*shard.table["surprise"].to_pylist()[:-1], 99.0], pa.float32())
    place = shard.table.schema.get_field_index("surprise")
    changed = shard.table.set_column(place, shard.table.schema.field(place), values)
    ledger.write_shard(cell, 0, changed.replace_schema_metadata(), 1.0)
    other = load_run(out / "b")
    assert "has 1 rows in" in conflicts([run, other])[0]
    (difference,) = other_rows(pair_runs(run, other, ("a", "b")))
    assert (difference.rows, difference.verdicts, difference.beyond) == (1, 0, 1)

    reference = out / "reference.parquet"
    write_reference(of_run(run), reference, "a column more")
    (cell_samples,) = read_samples(reference).cells.values()
    kept = cell_samples.rows
    assert (kept["surprise"].to_numpy() == rows["surprise"].to_numpy()).all()
    changes = write_reference(of_run(other), reference, "one value is another").changes
    assert changes == "1 cells changed"


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
