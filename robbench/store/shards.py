"""Shards: the Parquet files of the ledger, each with the rows of one block of samples of one cell.

Cells on classifiers and on flows have different columns (`store.columns`). A shard of an older schema is read with
nulls in missing columns, so that one run may contain both; a shard of a newer schema is refused and left as it is.
"""

import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from robbench import __version__
from robbench.core.errors import UserError
from robbench.core.resources import write_atomically
from robbench.specs import ModelKind, Semantics
from robbench.store.columns import LEDGER_COLUMNS, build_schema, find_version, select_names

SCHEMA_VERSION = find_version()
SCHEMAS: dict[ModelKind, pa.Schema] = {target: build_schema(target) for target in LEDGER_COLUMNS}
_STORED = {  # schemas in files and the one that each is completed to, by version
    version: [(build_schema(target, version), schema) for target, schema in SCHEMAS.items()]
    for version in range(1, SCHEMA_VERSION + 1)
}
_KEY_VERSION, _KEY_WRITER, _KEY_CELL, _KEY_SECONDS, _KEY_ROWS, _KEY_DIAGNOSTICS = (
    b"robbench.schema_version",
    b"robbench.version",
    b"robbench.cell",
    b"robbench.seconds",
    b"robbench.rows",
    b"robbench.diagnostics",
)


class BadShardError(Exception):
    """A shard file is damaged or belongs elsewhere; the message is the reason."""


class NewerLedgerError(UserError):
    """A file of the ledger was written by a newer robbench; it is intact and must stay."""


@dataclass(frozen=True)
class Shard:
    """Rows of one shard file (one of `SCHEMAS`), the seconds they took, and the attack's `Diagnostics` as JSON ("{}"
    where there are none)."""

    path: Path
    table: pa.Table
    seconds: float
    diagnostics: str = "{}"

    @property
    def ids(self) -> list[int]:
        """Sample ids of the rows."""
        return [int(i) for i in self.table["sample_id"].to_pylist()]


def shown_values(table: pa.Table, semantics: Semantics) -> dict[int, float]:
    """Values by sample id whose mean is the score in progress displays: for a classifier the verdicts (0 or 1) that
    tables show under these semantics, for a flow bits/dim of the attacked image."""
    if "robust" not in table.column_names:
        column = table["nll_after"]
    else:
        column = pc.greater(table["margin"], 0) if semantics == "perturbation" else table["robust"]
    return dict(zip(table["sample_id"].to_pylist(), map(float, column.to_pylist()), strict=True))


def shard_name(block: int, ids: Iterable[int]) -> str:
    """File name of the shard with the rows of `ids` in block `block`."""
    digest = hashlib.sha256(" ".join(str(i) for i in sorted(ids)).encode()).hexdigest()
    return f"shard-{block:04d}-{digest[:8]}.parquet"


def write_shard(
    path: Path, table: pa.Table, cell: str, seconds: float, diagnostics: str = "{}", smallest: bool = False
) -> None:
    """Write `table` (one of `SCHEMAS`) atomically, every page with its checksum; schema version, cell hash, seconds,
    diagnostics and a digest of the rows become metadata. smallest: compress harder, more slowly."""
    stamped = table.cast(next(schema for schema in SCHEMAS.values() if schema.names == table.column_names))
    metadata = {
        _KEY_VERSION: str(SCHEMA_VERSION),
        _KEY_WRITER: __version__,
        _KEY_CELL: cell,
        _KEY_SECONDS: f"{seconds:.3f}",
        _KEY_ROWS: _digest(stamped),
        _KEY_DIAGNOSTICS: diagnostics,
    }
    stamped = stamped.replace_schema_metadata(metadata)
    options = _smallest(stamped.schema) if smallest else {"write_page_checksum": True}

    def save(temporary: Path) -> None:  # open files: PyArrow would read a name such as "s3:x" as an address
        with temporary.open("wb") as stream:
            pq.write_table(stamped, stream, compression="zstd", **options)

    write_atomically(path, save)


def _smallest(schema: pa.Schema) -> dict[str, Any]:
    """Parquet options for the fewest bytes: floats split into streams of equally significant bytes, which repeat, and
    dictionaries for other columns, without statistics."""
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    encodings = dict.fromkeys(floats, "BYTE_STREAM_SPLIT") | {"sample_id": "DELTA_BINARY_PACKED"}
    return {
        "compression_level": 19,
        "use_dictionary": [name for name in schema.names if name not in encodings],
        "column_encoding": encodings,
        "write_statistics": False,
    }


def read_shard(path: Path, cell: str, known: frozenset[int] | None = None) -> Shard:
    """Read a shard of the cell with hash `cell`; `BadShardError` where it is damaged or of another cell,
    `NewerLedgerError` where a newer robbench wrote it.

    known: ids of the data set, where the caller knows them.
    """
    try:
        # A native file: an Arrow thread that still held a Python one at exit would abort the process.
        with pa.OSFile(str(path)) as stream:
            file = pq.ParquetFile(stream, page_checksum_verification=True)
            metadata = file.schema_arrow.metadata or {}
            version = _version(path, metadata)
            table = file.read()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise BadShardError(f"cannot be read as Parquet ({' '.join(str(error).split())[:120]})") from error
    if metadata.get(_KEY_CELL, b"").decode(errors="replace") != cell:
        raise BadShardError("belongs to another cell")
    schema = _full_schema(table, version)
    if metadata.get(_KEY_ROWS, b"").decode(errors="replace") != _digest(table):
        raise BadShardError("holds other rows than were written")
    diagnostics = metadata.get(_KEY_DIAGNOSTICS, b"{}").decode(errors="replace")
    shard = Shard(path, _complete(table, schema), _seconds(metadata), diagnostics)
    _check_ids(shard, known)
    _check_distances(shard)
    return shard


def _check_distances(shard: Shard) -> None:
    """`BadShardError` for a negative or non-finite distance, which no attack stores."""
    for name in (name for name in select_names("distance") if name in shard.table.column_names):
        distances = shard.table[name].drop_null().to_numpy()
        if not ((distances >= 0) & (distances < float("inf"))).all():
            raise BadShardError(f"holds a negative or non-finite distance ({name})")


def _version(path: Path, metadata: dict[bytes, bytes]) -> int:
    """Schema version of a shard; raises for one that this robbench cannot read."""
    text = metadata.get(_KEY_VERSION, b"none").decode(errors="replace")
    version = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if version > SCHEMA_VERSION:
        writer = metadata.get(_KEY_WRITER, b"").decode(errors="replace")[:40]
        raise newer_ledger(path, version, writer)
    if version not in _STORED:
        raise BadShardError(f"has schema version {text[:20]}, not one of {', '.join(map(str, _STORED))}")
    return version


def newer_ledger(path: Path, version: int, writer: str = "", known: int = SCHEMA_VERSION) -> NewerLedgerError:
    """The error for a file of a newer schema. writer: version of the robbench that wrote it, if known; known: newest
    schema of this robbench."""
    reader = f"robbench >= {writer}" if writer else "the robbench that wrote it"
    return NewerLedgerError(
        f"{path}: written by a newer robbench (ledger schema {version}); {reader} can read it, this is {__version__} "
        f"(schema {known}); nothing was changed: pip install --upgrade robbench"
    )


def _full_schema(table: pa.Table, version: int) -> pa.Schema:
    """The present schema for a table read from a shard of schema `version`."""
    for stored, schema in _STORED[version]:
        if table.schema.equals(stored, check_metadata=False):
            return schema
    raise BadShardError("has other columns than the ledger")


def _complete(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The rows with every column of `schema`, missing ones with nulls."""
    for place, field in enumerate(schema):
        if field.name not in table.column_names:
            table = table.add_column(place, field, pa.nulls(len(table), field.type))
    return table


def _digest(table: pa.Table) -> str:
    """sha256 over every value: page checksums do not cover page headers, nor edits by a Parquet tool."""
    return hashlib.sha256(repr(table.to_pydict()).encode()).hexdigest()


def _seconds(metadata: dict[bytes, bytes]) -> float:
    try:
        seconds = float(metadata[_KEY_SECONDS])
    except (KeyError, ValueError) as error:
        raise BadShardError("has no computing time in its metadata") from error
    if not 0 <= seconds < math.inf:
        raise BadShardError(f"has a computing time of {seconds:g} seconds")
    return seconds


def _check_ids(shard: Shard, known: frozenset[int] | None) -> None:
    ids = shard.ids
    if len(set(ids)) != len(ids):
        raise BadShardError("repeats a sample id")
    if not shard.path.stem.endswith(shard_name(0, ids).removesuffix(".parquet")[-8:]):
        raise BadShardError("holds other sample ids than its name says")
    if known is not None and not known.issuperset(ids):
        raise BadShardError("holds sample ids that the data set does not have")
