"""The ledger: one row a sample, one atomic Parquet file a shard, cells addressed by hash.

Cells on classifiers and on flows have different columns (`SCHEMAS`); nll_*: bits/dim, l1, l2, linf: [0,1] pixels.
Schema 2 added the column `witness` (`attacks.witness`): from what a kept latent or joint example is decoded again.
Shards of schema 1 are read as rows without witnesses; one run may hold both. Shards of a newer schema are left alone.

run.yaml                                identity and last plan (`records.RunFile`)
cards/<model>.yaml                      the cards of the models of the plan
originals.npz                           clean images of the samples whose adversarial images are kept
cells/<hash16>/cell.json                `records.CellRecord`
cells/<hash16>/shard-<k>-<ids8>.parquet rows of block k; ids8 hashes the sample ids inside
frechet/<cell16|clean>-<extractor8>.json  Fréchet distances (`frechet_records.FrechetRecord`)
quarantine/                             shards that were not what they claimed to be
superseded-<k>/                         what `--fresh` put aside
"""

import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from robbench import __version__
from robbench.cards import ModelCard
from robbench.errors import UserError
from robbench.matrix.records import CellRecord, CellResult, Run, RunFile
from robbench.resources import write_atomically, write_text_atomically
from robbench.schema import dump_yaml, load_yaml, validate
from robbench.specs import ModelKind

SCHEMA_VERSION, RECORD_VERSION = 2, 1  # of shards; of run.yaml and cell.json
_STATED_VERSION = re.compile(r'^ {0,2}"?schema_version"?: ([0-9]{1,9}),?$', re.MULTILINE)
_STATED_WRITER = re.compile(r"^ {2}robbench: '?([0-9A-Za-z.+-]{1,40})'?$", re.MULTILINE)
LEDGER_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("clean_prediction", pa.int64(), nullable=False),
        pa.field("prediction", pa.int64(), nullable=False),
        pa.field("clean_margin", pa.float32(), nullable=False),
        pa.field("margin", pa.float32(), nullable=False),
        pa.field("robust", pa.bool_(), nullable=False),
        pa.field("broken_by", pa.string()),
        pa.field("broken_at", pa.int64(), nullable=False),
        pa.field("l1", pa.float32(), nullable=False),
        pa.field("l2", pa.float32(), nullable=False),
        pa.field("linf", pa.float32(), nullable=False),
        pa.field("cross_entropy", pa.float32(), nullable=False),
        pa.field("nll_before", pa.float32()),
        pa.field("nll_after", pa.float32()),
        pa.field("forwards", pa.int64(), nullable=False),
        pa.field("backwards", pa.int64(), nullable=False),
        pa.field("counts_exact", pa.bool_(), nullable=False),
        pa.field("example", pa.binary()),
        pa.field("witness", pa.binary()),
    ]
)
LIKELIHOOD_SCHEMA = pa.schema(
    [
        pa.field("sample_id", pa.int64(), nullable=False),
        pa.field("label", pa.int64(), nullable=False),
        pa.field("nll_before", pa.float64(), nullable=False),
        pa.field("nll_after", pa.float64(), nullable=False),
        pa.field("l1", pa.float32(), nullable=False),
        pa.field("l2", pa.float32(), nullable=False),
        pa.field("linf", pa.float32(), nullable=False),
        pa.field("forwards", pa.int64(), nullable=False),
        pa.field("backwards", pa.int64(), nullable=False),
        pa.field("original", pa.binary()),
        pa.field("example", pa.binary()),
    ]
)
SCHEMAS: dict[ModelKind, pa.Schema] = {"classifier": LEDGER_SCHEMA, "flow": LIKELIHOOD_SCHEMA}
_STORED: dict[int, tuple[pa.Schema, ...]] = {  # columns in files, by schema version
    1: (LEDGER_SCHEMA.remove(LEDGER_SCHEMA.get_field_index("witness")), LIKELIHOOD_SCHEMA),
    2: (LEDGER_SCHEMA, LIKELIHOOD_SCHEMA),
}
VALUE: dict[ModelKind, str] = {"classifier": "robust", "flow": "nll_after"}  # column that progress shows
RUN_FILE, CELL_FILE, LOCK_FILE, ORIGINALS_FILE = "run.yaml", "cell.json", ".lock", "originals.npz"
Images = np.ndarray[tuple[int, ...], np.dtype[np.float32]]
_KEY_VERSION, _KEY_WRITER, _KEY_CELL, _KEY_SECONDS, _KEY_ROWS, _KEY_DIAGNOSTICS = (
    b"robbench.schema_version",
    b"robbench.version",
    b"robbench.cell",
    b"robbench.seconds",
    b"robbench.rows",
    b"robbench.diagnostics",
)


_RESTORE = "run the same `robbench run` again to restore it"


class BadShardError(Exception):
    """A shard file is not what its place in the ledger says; the message is the reason."""


class NewerLedgerError(UserError):
    """A file of the ledger was written by a newer robbench: nothing is wrong with it, and it must stay as it is."""


@dataclass(frozen=True)
class Shard:
    """Rows of one shard file (one of `SCHEMAS`), the seconds they took, and `attacks.suspicions.Diagnostics` of the
    attack as JSON ("{}" where there are none)."""

    path: Path
    table: pa.Table
    seconds: float
    diagnostics: str = "{}"

    @property
    def ids(self) -> list[int]:
        return [int(i) for i in self.table["sample_id"].to_pylist()]


def shard_name(block: int, ids: Iterable[int]) -> str:
    """File name of the rows of `ids` in block number `block`."""
    digest = hashlib.sha256(" ".join(str(i) for i in sorted(ids)).encode()).hexdigest()
    return f"shard-{block:04d}-{digest[:8]}.parquet"


def write_shard(
    path: Path, table: pa.Table, cell: str, seconds: float, diagnostics: str = "{}", smallest: bool = False
) -> None:
    """Write `table` (one of `SCHEMAS`) atomically, every page with its checksum; schema version, cell hash,
    seconds, diagnostics and a digest of the rows become metadata. smallest: spend time to save bytes."""
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
    """Options of Parquet for the fewest bytes: bytes of floats of equal weight side by side (they repeat, whole floats
    do not), dictionaries for what does, no statistics."""
    floats = [field.name for field in schema if pa.types.is_floating(field.type)]
    encodings = dict.fromkeys(floats, "BYTE_STREAM_SPLIT") | {"sample_id": "DELTA_BINARY_PACKED"}
    return {
        "compression_level": 19,
        "use_dictionary": [name for name in schema.names if name not in encodings],
        "column_encoding": encodings,
        "write_statistics": False,
    }


def read_shard(path: Path, cell: str, known: frozenset[int] | None = None) -> Shard:
    """Read a shard of the cell with hash `cell`; `BadShardError` when anything about it disagrees,
    `NewerLedgerError` when a newer robbench wrote it.

    known: ids the data set has, when the caller knows them.
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
    if not any(table.schema.equals(schema, check_metadata=False) for schema in _STORED[version]):
        raise BadShardError("has other columns than the ledger")
    if metadata.get(_KEY_ROWS, b"").decode(errors="replace") != _digest(table):
        raise BadShardError("holds other rows than were written")
    diagnostics = metadata.get(_KEY_DIAGNOSTICS, b"{}").decode(errors="replace")
    shard = Shard(path, _completed(table), _seconds(metadata), diagnostics)
    _check_ids(shard, known)
    return shard


def _version(path: Path, metadata: dict[bytes, bytes]) -> int:
    """Schema version of a shard that this robbench can read."""
    text = metadata.get(_KEY_VERSION, b"none").decode(errors="replace")
    version = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else 0
    if version > SCHEMA_VERSION:
        writer = metadata.get(_KEY_WRITER, b"").decode(errors="replace")[:40]
        raise newer_ledger(path, version, writer)
    if version not in _STORED:
        raise BadShardError(f"has schema version {text[:20]}, not one of {', '.join(map(str, _STORED))}")
    return version


def newer_ledger(path: Path, version: int, writer: str = "", known: int = SCHEMA_VERSION) -> NewerLedgerError:
    """writer: version of the robbench that wrote `path`, where it says so. known: the newest schema read here."""
    reader = f"robbench >= {writer}" if writer else "the robbench that wrote it"
    return NewerLedgerError(
        f"{path}: written by a newer robbench (ledger schema {version}); {reader} can read it, this is {__version__} "
        f"(schema {known}); nothing was changed: pip install --upgrade robbench"
    )


def _check_record_version(path: Path) -> None:
    """`NewerLedgerError` for a run.yaml or cell.json of a newer schema: it may have keys that nobody knows here."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # reading it properly says what is wrong
        return
    stated = _STATED_VERSION.search(text)
    if stated and int(stated[1]) > RECORD_VERSION:
        writer = _STATED_WRITER.search(text)
        raise newer_ledger(path, int(stated[1]), writer[1] if writer else "", RECORD_VERSION)


def _completed(table: pa.Table) -> pa.Table:
    """Rows of schema 1 with the columns of today."""
    if "witness" in table.column_names or table.column_names == LIKELIHOOD_SCHEMA.names:
        return table
    witness = pa.nulls(len(table), pa.binary())
    return table.append_column(LEDGER_SCHEMA.field("witness"), witness)


def _digest(table: pa.Table) -> str:
    """sha256 over every value: page checksums do not cover page headers, nor edits by a Parquet tool."""
    return hashlib.sha256(repr(table.to_pydict()).encode()).hexdigest()


def _seconds(metadata: dict[bytes, bytes]) -> float:
    try:
        return float(metadata[_KEY_SECONDS])
    except (KeyError, ValueError) as error:
        raise BadShardError("has no computing time in its metadata") from error


def _check_ids(shard: Shard, known: frozenset[int] | None) -> None:
    ids = shard.ids
    if len(set(ids)) != len(ids):
        raise BadShardError("repeats a sample id")
    if not shard.path.stem.endswith(shard_name(0, ids).removesuffix(".parquet")[-8:]):
        raise BadShardError("holds other sample ids than its name says")
    if known is not None and not known.issuperset(ids):
        raise BadShardError("holds sample ids that the data set does not have")


class Ledger:
    """Reads and writes one run folder. Creating it touches nothing on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def cell_folder(self, cell: str) -> Path:
        return self.folder / "cells" / cell[:16]

    # ------------------------------------------------------------------------------------------ run and cells
    def read_run(self) -> RunFile | None:
        """run.yaml, or None when there is none yet. `UserError` when it is malformed or newer than this robbench."""
        path = self.folder / RUN_FILE
        if not path.exists():
            return None
        _check_record_version(path)
        return load_yaml(path, RunFile)

    def write_run(
        self, run: RunFile, cards: dict[str, ModelCard], records: Sequence[CellRecord] = ()
    ) -> None:
        """Record a plan: cards, cell.json of cells not begun, and last run.yaml (now it is a run folder)."""
        for record in records:
            if not (self.cell_folder(record.hash) / CELL_FILE).exists():
                self.write_cell(record)
        for name, card in cards.items():
            write_text_atomically(self.folder / "cards" / f"{name}.yaml", dump_yaml(card))
        write_text_atomically(self.folder / RUN_FILE, dump_yaml(run))

    def read_cell(self, cell: str) -> CellRecord | None:
        """cell.json of the cell with this hash, or None; `UserError` when it is malformed."""
        path = self.cell_folder(cell) / CELL_FILE
        if not path.exists():
            return None
        _check_record_version(path)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            record = validate(content, CellRecord, str(path))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: is not JSON ({error}); {_RESTORE}") from error
        except UserError as error:
            raise UserError(f"{error}; {_RESTORE}") from error
        if record.hash != cell:
            raise UserError(f"{path}: is the record of another cell; {_RESTORE}")
        return record

    def write_cell(self, record: CellRecord) -> None:
        path = self.cell_folder(record.hash) / CELL_FILE
        write_text_atomically(path, record.model_dump_json(indent=2) + "\n")

    def originals(self) -> dict[int, Images]:
        """Clean images [C,H,W] in [0,1] by sample id, of the samples with kept examples; `UserError` when the
        file is damaged."""
        path = self.folder / ORIGINALS_FILE
        if not path.exists():
            return {}
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                ids, images = stored["ids"], stored["images"]
                if images.dtype != np.float32 or images.ndim != 4:
                    raise ValueError(f"holds {images.dtype} {images.shape}, not float32 images")
                return {int(i): image for i, image in zip(ids, images, strict=True)}
        except (ValueError, TypeError, OSError, EOFError, KeyError, BadZipFile, zlib.error) as error:
            raise UserError(f"{path} cannot be read ({error}); {_RESTORE}") from error

    def add_originals(self, images: dict[int, Images], on_bad: Callable[[Path, str], None]) -> None:
        """Add clean images to those stored; nothing is written when all are there. `on_bad(path, reason)` must
        move a damaged file away; it is then written anew."""
        path, shapes = self.folder / ORIGINALS_FILE, {image.shape for image in images.values()}
        try:
            stored = self.originals()
            if not shapes.issuperset(image.shape for image in stored.values()):
                raise UserError(f"{path} holds images of another shape")
        except UserError as error:
            on_bad(path, str(error).removeprefix(f"{path} ").removesuffix(f"; {_RESTORE}"))
            stored = {}
        if images.keys() <= stored.keys():
            return
        self._write_originals({**stored, **images})

    def keep_originals(self, ids: Set[int]) -> None:
        """Forget every stored clean image but those of `ids`."""
        kept = {i: image for i, image in self.originals().items() if i in ids}
        if kept:
            self._write_originals(kept)
        else:
            (self.folder / ORIGINALS_FILE).unlink(missing_ok=True)

    def _write_originals(self, images: dict[int, Images]) -> None:
        ids = np.array(sorted(images), dtype=np.int64)
        stack = np.stack([images[int(i)] for i in ids])

        def save(temporary: Path) -> None:
            with temporary.open("wb") as stream:
                np.savez_compressed(stream, ids=ids, images=stack)

        write_atomically(self.folder / ORIGINALS_FILE, save)

    # ------------------------------------------------------------------------------------------------- shards
    def shards(
        self, cell: str, on_bad: Callable[[Path, str], None], known: frozenset[int] | None = None
    ) -> list[Shard]:
        """Good shards of a cell in name order; `on_bad(path, reason)` for every bad one. `NewerLedgerError` for one
        that a newer robbench wrote: it is no reason to compute anything again."""
        good: list[Shard] = []
        seen: set[int] = set()
        for path in sorted(self.cell_folder(cell).glob("shard-*.parquet")):
            try:
                shard = read_shard(path, cell, known)
                if not seen.isdisjoint(shard.ids):
                    raise BadShardError("repeats sample ids of another shard")
            except BadShardError as error:
                on_bad(path, str(error))
                continue
            seen.update(shard.ids)
            good.append(shard)
        return good

    def write_shard(
        self,
        cell: str,
        block: int,
        table: pa.Table,
        seconds: float,
        diagnostics: str = "{}",
        smallest: bool = False,
    ) -> None:
        path = self.cell_folder(cell) / shard_name(block, table["sample_id"].to_pylist())
        write_shard(path, table, cell, seconds, diagnostics, smallest)

    def quarantine(self, path: Path) -> Path:
        """Move a bad shard to quarantine/ under a name that is free; returns where it went."""
        folder = self.folder / "quarantine"
        folder.mkdir(exist_ok=True)
        place = f"{path.parent.name}-" if path.parent != self.folder else ""
        names = (f"{place}{path.stem}{suffix}{path.suffix}" for suffix in _suffixes())
        target = next(folder / name for name in names if not (folder / name).exists())
        return path.rename(target)

    def supersede(self, paths: Sequence[Path]) -> Path | None:
        """Move what exists of `paths` (in this folder) to a new superseded-<k>/; None when nothing does."""
        present = [path for path in paths if path.exists()]
        if not present:
            return None
        names = (f"superseded-{k}" for k in range(1, 1_000_000))
        aside = next(self.folder / name for name in names if not (self.folder / name).exists())
        for path in present:
            target = aside / path.relative_to(self.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
        return aside


def _suffixes() -> Iterable[str]:
    yield ""
    for k in range(2, 1_000_000):
        yield f"-{k}"


# ----------------------------------------------------------------------------------------------- reading back
def load_run(folder: Path) -> Run:
    """The last plan of a run folder with all rows it has so far. Reads only; needs no data set and no model.

    A cell with fewer rows than the plan wants has status "running". Raises `UserError` for a folder that is
    no run and for a damaged shard.
    """
    ledger = Ledger(folder)
    run = ledger.read_run() if folder.is_dir() else None
    if run is None:
        raise UserError(
            f"{str(folder)!r} is not a run folder (no {RUN_FILE}); give the --out of a `robbench run`"
        )
    wanted = pa.array(sorted(run.sample_ids), pa.int64())
    cells = [
        _load_cell(ledger, entry.hash, entry.model, entry.defense, entry.attack, wanted)
        for entry in run.cells
    ]
    cards = {name: _load_card(folder / "cards" / f"{name}.yaml") for name in run.models}
    return Run(
        folder=folder,
        dataset=run.dataset,
        dataset_revision=run.dataset_revision,
        seed=run.seed,
        n=run.n,
        shape=run.shape,
        class_names=run.class_names,
        sample_ids=tuple(run.sample_ids),
        cells=cells,
        cards=cards,
        versions=run.versions,
        data=run.data,
        note=run.note,
    )


def _load_card(path: Path) -> ModelCard:
    try:
        return load_yaml(path, ModelCard)
    except UserError as error:
        raise UserError(f"{error}; {_RESTORE}") from error


def _load_cell(
    ledger: Ledger, cell: str, model: str, defense: str, label: str, wanted: pa.Array
) -> CellResult:
    record = ledger.read_cell(cell)
    if record is None:
        raise UserError(f"{ledger.cell_folder(cell) / CELL_FILE} of {model} x {label} is missing; {_RESTORE}")
    shards = ledger.shards(cell, _refuse)
    empty = SCHEMAS[record.attack.target].empty_table()
    table = pa.concat_tables([empty, *(s.table.replace_schema_metadata() for s in shards)])
    table = table.filter(pc.is_in(table["sample_id"], value_set=wanted)).sort_by("sample_id")
    status = record.status
    if status != "failed":
        status = "ok" if len(table) == len(wanted) else "running"
    changes = {
        "model": model,
        "defense": defense,
        "attack": record.attack.model_copy(update={"label": label}),
        "status": status,
        "seconds": sum(shard.seconds for shard in shards),
    }
    return CellResult(record.model_copy(update=changes), table.to_pandas())


def _refuse(path: Path, reason: str) -> None:
    raise UserError(f"{path} {reason}; run the same `robbench run` again to quarantine and recompute it")
