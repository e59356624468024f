"""A flipped bit in a shard is seen, or changes nothing; never a verdict in silence."""

from pathlib import Path

from fuzzing import (
    assert_no_other_verdicts,
    assert_same_verdicts,
    attacked,
    cases,
    chosen,
    copied,
    files,
    flipped,
)

from robbench.core.errors import UserError
from robbench.store.ledger import load_run

FLIPS, REPAIRS = 1500, 20


def test_flipped_bits(tmp_path: Path, undisturbed: Path) -> None:
    folder, seen = copied(undisturbed, tmp_path / "run"), 0
    expected = load_run(folder)
    shards = files(folder, ["shard-*.parquet"])
    total = 0
    for _, rng in cases(FLIPS, 3):
        shard, total = chosen(rng, shards), total + 1
        content = shard.read_bytes()
        shard.write_bytes(flipped(content, rng))
        try:
            found = load_run(folder)
        except UserError:
            seen += 1
        else:
            assert_no_other_verdicts(found, expected)
        shard.write_bytes(content)
    assert seen > total / 4, "the rest is what Parquet writes and nobody reads: statistics, offsets, names"


def test_the_same_command_repairs(tmp_path: Path, undisturbed: Path) -> None:
    """Bits flipped in several shards: the next run puts the shards aside and computes them again."""
    expected = load_run(undisturbed)
    for _, rng in cases(REPAIRS, 4):
        folder = copied(undisturbed, tmp_path / "run")
        for shard in files(folder, ["shard-*.parquet"])[:: int(rng.integers(1, 4))]:
            shard.write_bytes(flipped(shard.read_bytes(), rng, 3))
        assert_same_verdicts(load_run(attacked(folder)), expected)
