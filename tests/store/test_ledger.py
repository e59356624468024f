"""Shard files: what is written is read back, and nothing that disagrees with its place is accepted."""

import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from robbench.core.errors import UserError
from robbench.store.ledger import Ledger, load_run
from robbench.store.records import CellRecord
from robbench.store.shards import (
    SCHEMAS,
    BadShardError,
    NewerLedgerError,
    read_shard,
    shard_name,
    write_shard,
)

CELL = "a" * 64
LEDGER_SCHEMA = SCHEMAS["classifier"]
CONTRACT = [
    "sample_id label clean_prediction prediction clean_margin margin robust broken_by broken_at l1 l2 linf",
    "cross_entropy nll_before nll_after forwards backwards counts_exact example witness target reached l0",
]
LATER = ["witness", "target", "reached", "l0"]  # columns that schema 1 lacks


def rows(ids: list[int]) -> pa.Table:
    """Ledger rows whose every value is a function of the sample id."""
    columns = {field.name: [_value(field, i) for i in ids] for field in LEDGER_SCHEMA}
    return pa.table(columns, schema=LEDGER_SCHEMA)


def _value(field: pa.Field, i: int) -> object:
    if field.name == "sample_id":
        return i
    if pa.types.is_boolean(field.type):
        return i % 2 == 0
    if pa.types.is_string(field.type):
        return None if i % 2 == 0 else "pgd20"
    if pa.types.is_binary(field.type):
        return bytes([i % 256]) if i < 3 else None
    return i / 2 if pa.types.is_floating(field.type) else i


def written(folder: Path, ids: list[int], cell: str = CELL) -> Path:
    path = folder / shard_name(0, ids)
    write_shard(path, rows(ids), cell, 1.5)
    return path


def test_schema_is_the_contract() -> None:
    assert LEDGER_SCHEMA.names == " ".join(CONTRACT).split()


def test_round_trip(tmp_path: Path) -> None:
    path = written(tmp_path, [5, 1, 9])
    shard = read_shard(path, CELL)
    assert shard.ids == [5, 1, 9]
    assert shard.seconds == 1.5
    assert shard.table.replace_schema_metadata().equals(rows([5, 1, 9]))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_truncated_at_any_length(tmp_path: Path) -> None:
    path = written(tmp_path, [1, 2, 3])
    content = path.read_bytes()
    for length in (0, 1, 4, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(BadShardError, match="cannot be read"):
            read_shard(path, CELL)


def test_any_flipped_byte_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    """Page checksums and the digest of the rows: a byte that decodes to other numbers is never accepted."""
    ids = list(range(60))
    path = written(tmp_path, ids)
    content, refused, begun = path.read_bytes(), 0, path.read_bytes().index(b"ARROW:schema")
    for position in range(4, len(content), 11):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x41]) + content[position + 1 :])
        try:
            shard = read_shard(path, CELL)
        except BadShardError:
            refused += position < begun // 2
            continue
        assert shard.table.replace_schema_metadata().equals(rows(ids)), position
    assert refused > 20


def test_edited_shard(tmp_path: Path) -> None:
    """Written again by a Parquet tool with all metadata, one number changed."""
    path = written(tmp_path, [1, 2, 3])
    table = pq.read_table(path)
    place = table.schema.get_field_index("prediction")
    changed = table.set_column(place, LEDGER_SCHEMA.field(place), pa.array([1, 2, 9], pa.int64()))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), path)
    with pytest.raises(BadShardError, match="other rows than were written"):
        read_shard(path, CELL)


def test_a_folder_named_like_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("s3:bucket", "file:x", "ü 雪"):
        Path(name).mkdir()
        assert read_shard(written(Path(name), [4]), CELL).ids == [4]


def test_foreign_cell(tmp_path: Path) -> None:
    with pytest.raises(BadShardError, match="another cell"):
        read_shard(written(tmp_path, [1], "b" * 64), CELL)


def test_renamed_shard(tmp_path: Path) -> None:
    path = written(tmp_path, [1, 2]).rename(tmp_path / shard_name(0, [1, 3]))
    with pytest.raises(BadShardError, match="other sample ids than its name"):
        read_shard(path, CELL)


def test_ids_outside_the_data_set(tmp_path: Path) -> None:
    path = written(tmp_path, [1, 2])
    with pytest.raises(BadShardError, match="does not have"):
        read_shard(path, CELL, frozenset([1]))


def test_repeated_id(tmp_path: Path) -> None:
    with pytest.raises(BadShardError, match="repeats"):
        read_shard(written(tmp_path, [1, 1]), CELL)


def stated(table: pa.Table, version: bytes, writer: bytes = b"0.1.0") -> pa.Table:
    """`table` as a shard that says it has this schema version and was written by that robbench."""
    changes = {b"robbench.schema_version": version, b"robbench.version": writer}
    return table.replace_schema_metadata({**table.schema.metadata, **changes})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.drop_columns(["linf"]), "other columns"),
        (lambda t: t.append_column("extra", pa.array([1])), "other columns"),
        (lambda t: t.set_column(1, "label", pa.array([1], pa.int32())), "other columns"),
        (lambda t: t.replace_schema_metadata(), "schema version none"),
        (lambda t: stated(t, b"0"), "schema version 0, not one of 1, 2, 3"),
        (lambda t: stated(t, b"1"), "other columns"),
        (lambda t: stated(t.drop_columns(["witness"]), b"2"), "other columns"),
        (lambda t: stated(t.drop_columns(["l0"]), b"3"), "other columns"),
        (lambda t: stated(t, "\u0663".encode()), "schema version"),
        (lambda t: stated(t, b"-3"), "schema version -3"),
    ],
)
def test_other_schema(tmp_path: Path, change: object, reason: str) -> None:
    path = written(tmp_path, [7])
    pq.write_table(change(pq.read_table(path)), path)  # type: ignore[operator]
    with pytest.raises(BadShardError, match=reason):
        read_shard(path, CELL)


def first_schema(path: Path) -> None:
    """Make the shard at `path` what a robbench of ledger schema 1 wrote: without `LATER`, another digest, no writer."""
    table = pq.read_table(path)
    old = table.drop_columns([name for name in LATER if name in table.column_names])
    kept = {k: v for k, v in table.schema.metadata.items() if k.startswith(b"robbench.")}
    del kept[b"robbench.version"]
    digest = hashlib.sha256(repr(old.to_pydict()).encode()).hexdigest().encode()
    changes = {b"robbench.schema_version": b"1", b"robbench.rows": digest}
    pq.write_table(old.replace_schema_metadata({**kept, **changes}), path, compression="zstd")


def test_a_shard_of_the_first_schema(tmp_path: Path) -> None:
    path = written(tmp_path, [5, 1, 9])
    first_schema(path)
    assert not {*LATER} & {*pq.read_table(path).column_names}
    shard = read_shard(path, CELL)
    assert shard.table.schema.equals(LEDGER_SCHEMA, check_metadata=False)
    assert all(shard.table[name].to_pylist() == [None] * 3 for name in LATER)
    expected = rows([5, 1, 9]).drop_columns(LATER)
    assert shard.table.drop_columns(LATER).replace_schema_metadata().equals(expected)


def test_a_newer_shard_is_left_alone(tmp_path: Path) -> None:
    """Unlike a bad one: it is not handed to whoever would quarantine it, whatever columns it has."""
    ledger = Ledger(tmp_path)
    ledger.write_shard(CELL, 0, rows([1, 2]), 0.1)
    path = ledger.cell_folder(CELL) / shard_name(0, [1, 2])
    table = pq.read_table(path).append_column("later", pa.array([1, 2]))
    pq.write_table(stated(table, b"5", writer=b"4.5.6"), path)
    moved: list[Path] = []
    with pytest.raises(NewerLedgerError) as caught:
        ledger.shards(CELL, lambda found, reason: moved.append(found))
    assert moved == []
    text = f"{path}: written by a newer robbench (ledger schema 5); robbench >= 4.5.6 can read it"
    assert str(caught.value).startswith(text)


def test_newer_records(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    record = json.loads(cell_record(CELL).model_dump_json()) | {"schema_version": 3, "later": 1}
    ledger.cell_folder(CELL).mkdir(parents=True)
    (ledger.cell_folder(CELL) / "cell.json").write_text(json.dumps(record, indent=2))
    with pytest.raises(
        NewerLedgerError, match=r"newer robbench \(ledger schema 3\); the robbench that wrote it"
    ):
        ledger.read_cell(CELL)
    (tmp_path / "run.yaml").write_text("schema_version: 3\nlater: 1\nversions:\n  robbench: 2.0.0\n")
    with pytest.raises(NewerLedgerError, match=r"robbench >= 2\.0\.0 can read it"):
        load_run(tmp_path)


def test_smallest_shards_hold_the_same(tmp_path: Path) -> None:
    ids, sizes = list(range(360)), []
    for smallest in (False, True):
        path = tmp_path / str(smallest) / shard_name(0, ids)
        write_shard(path, rows(ids), CELL, 1.5, '{"samples": 3}', smallest)
        shard = read_shard(path, CELL)
        assert shard.table.replace_schema_metadata().equals(rows(ids))
        assert (shard.seconds, shard.diagnostics) == (1.5, '{"samples": 3}')
        sizes.append(path.stat().st_size)
    assert sizes[1] < 0.8 * sizes[0]


def test_two_shards_with_one_sample(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write_shard(CELL, 0, rows([1, 2]), 0.1)
    ledger.write_shard(CELL, 1, rows([2, 3]), 0.1)
    bad: list[tuple[str, str]] = []
    good = ledger.shards(CELL, lambda path, reason: bad.append((path.name, reason)))
    assert [shard.ids for shard in good] == [[1, 2]]
    assert bad == [(shard_name(1, [2, 3]), "repeats sample ids of another shard")]


def test_quarantine_never_overwrites(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    places = []
    for content in (b"one", b"two"):
        path = ledger.cell_folder(CELL) / "shard-0000-00000000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        places.append(ledger.quarantine(path))
    assert [place.read_bytes() for place in places] == [b"one", b"two"]
    assert all(place.parent == tmp_path / "quarantine" for place in places)


def test_supersede_keeps_everything(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.write_shard(CELL, 0, rows([1]), 0.1)
    first = ledger.supersede([ledger.cell_folder(CELL)])
    ledger.write_shard(CELL, 0, rows([2]), 0.1)
    second = ledger.supersede([ledger.cell_folder(CELL)])
    assert ledger.supersede([ledger.cell_folder(CELL)]) is None
    assert (first, second) == (tmp_path / "superseded-1", tmp_path / "superseded-2")
    for aside, ids in ((first, [1]), (second, [2])):
        assert (aside / "cells" / CELL[:16] / shard_name(0, ids)).is_file()


def test_not_a_run_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match="not a run folder"):
            load_run(folder)


def cell_record(cell: str) -> CellRecord:
    """A record of the cell with hash `cell`."""
    attack = {"name": "a", "label": "a", "threat_model": "t", "space": "image", "norm": "linf"}
    attack |= {"epsilon": 0.1, "eta": None, "algorithm": "pgd", "parameters": {}}
    fields = {"hash": cell, "model": "m", "defense": "d", "dataset": "digits", "dataset_revision": "b" * 64}
    fields |= {"seed": 0, "attack": attack, "model_sha256": "c" * 64, "engine": "robbench engine 1"}
    return CellRecord.model_validate(fields)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "[" * 100_000, "{}", cell_record("b" * 64).model_dump_json()]
)
def test_damaged_cell_record(tmp_path: Path, content: str) -> None:
    ledger = Ledger(tmp_path)
    path = ledger.cell_folder(CELL) / "cell.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(UserError, match=r"cell\.json.*run the same"):
        ledger.read_cell(CELL)


def test_malformed_run_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("dataset: digits\nsurprise: 1\n")
    with pytest.raises(UserError, match=r"run\.yaml: .*key"):
        load_run(tmp_path)


def unwanted(path: Path, reason: str) -> None:
    raise AssertionError((path, reason))


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped", "other shape", "folder"])
def test_damaged_originals_are_put_aside_and_written_again(tmp_path: Path, damage: str) -> None:
    import numpy as np

    ledger, image = Ledger(tmp_path), np.full((1, 8, 8), 0.25, np.float32)
    ledger.add_originals({3: image}, unwanted)
    path = tmp_path / "originals.npz"
    content = path.read_bytes()
    if damage == "other shape":
        path.unlink()
        ledger.add_originals({3: np.zeros((1, 4, 8), np.float32)}, unwanted)
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]
        path.write_bytes({"empty": b"", "truncated": content[:middle], "flipped": flipped}[damage])
    if damage != "other shape":
        with pytest.raises(UserError, match=r"originals\.npz.*run the same"):
            ledger.originals()
    ledger.add_originals({3: image}, lambda bad, _: ledger.quarantine(bad) and None)
    assert np.array_equal(ledger.originals()[3], image)
    assert [aside.name for aside in (tmp_path / "quarantine").iterdir()] == ["originals.npz"]


def test_originals_accumulate(tmp_path: Path) -> None:
    import numpy as np

    ledger = Ledger(tmp_path)
    one, two = np.full((1, 2, 2), 0.25, np.float32), np.full((1, 2, 2), 0.5, np.float32)
    ledger.add_originals({3: one}, unwanted)
    ledger.add_originals({1: two}, unwanted)
    before = (tmp_path / "originals.npz").stat().st_mtime_ns
    ledger.add_originals({3: one}, unwanted)
    stored = ledger.originals()
    assert sorted(stored) == [1, 3]
    assert np.array_equal(stored[1], two)
    assert (tmp_path / "originals.npz").stat().st_mtime_ns == before
