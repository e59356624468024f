"""Checks that the unpacked files of a bundle are the run of its manifest, measured on the weights it names."""

import os
import struct
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from pydantic import BaseModel

from robbench.bundle.manifest import MANIFEST_FILE, BundleCell, Manifest, RunIdentity
from robbench.bundle.zipcheck import refusal
from robbench.cards import DetectorReference, ModelCard
from robbench.core.errors import UserError
from robbench.core.schema import load_yaml
from robbench.specs import ThreatModel
from robbench.store.columns import list_columns
from robbench.store.frechet_records import FRECHET_FOLDER, read_record, samples_hash
from robbench.store.ledger import CELL_FILE, ORIGINALS_FILE, Ledger
from robbench.store.records import CellRecord, RunFile

_SLACK, _RATIO = (
    1 << 24,
    1000,
)  # limits of a Parquet file's pages: bytes that are always accepted, and ratio of unpacked to packed bytes
_WORDS = tuple(  # columns of values of variable length
    dict.fromkeys(c.name for c in list_columns() if pa.types.is_string(c.type) or pa.types.is_binary(c.type))
)
_NPZ_MEMBERS = {"ids.npy", "images.npy"}
_BAD_NPZ = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    RuntimeError,
)


def run_identity(run: RunFile) -> RunIdentity:
    """The identity of a run, from `run.yaml`."""
    return RunIdentity(
        dataset=run.dataset,
        dataset_revision=run.dataset_revision,
        split=run.split,
        seed=run.seed,
        n=run.n,
        samples_sha256=samples_hash(run.sample_ids),
        versions=run.versions,
    )


def check_contents(path: Path, folder: Path, manifest: Manifest) -> None:
    """`UserError` unless run.yaml, cards and cell records in `folder` are those of the manifest of bundle `path`, every
    finished cell has a shard, and no file needs excessive memory. Reads no rows."""
    _check_text(path, MANIFEST_FILE, manifest)
    try:
        for file in sorted(folder.rglob("*.yaml")):
            _check_aliases(path, file.relative_to(folder).as_posix(), file)
        run = Ledger(folder).read_run(edited=True)  # checked when the rows are read
        if run is None:
            raise refusal(path, "it has no run.yaml")
        _check_run(path, run, manifest)
        for cell in manifest.cells:
            _check_cell(path, folder, cell, manifest)
        _check_cards(path, folder, run, manifest)
        for file in sorted((folder / "threat_models").glob("*.yaml")):
            _check_text(path, f"threat_models/{file.name}", load_yaml(file, ThreatModel))
        for file in sorted((folder / FRECHET_FOLDER).glob("*.json")):
            _check_text(path, f"{FRECHET_FOLDER}/{file.name}", read_record(file))
        _check_originals(path, folder, run)
    except UserError as error:
        raise reword(path, folder, error) from error
    _check_strangers(path, manifest)


def _check_aliases(path: Path, name: str, file: Path) -> None:
    """Refuse YAML aliases, which robbench never writes: nested ones may stand for any number of values."""
    text = file.read_bytes()
    if b"&" not in text or b"*" not in text:
        return
    try:
        found = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, ValueError):  # reported when it is read with its schema
        return
    if found:
        raise refusal(path, f"file {name!r} holds YAML aliases; a bundle spells everything out")


def _check_text(path: Path, name: str, content: BaseModel) -> None:
    """Refuse control characters of terminals (escapes, carriage returns, direction marks), which could hide a
    verdict."""
    for text in _strings(content.model_dump()):
        bad = next((c for c in text if c not in "\n\t" and _is_control(c)), None)
        if bad is not None:
            raise refusal(
                path, f"file {name!r} holds the control character U+{ord(bad):04X} in {text[:60]!r}"
            )


def _is_control(character: str) -> bool:
    turns = character in "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
    return turns or unicodedata.category(character) in ("Cc", "Cs")


def _strings(value: object) -> Iterator[str]:
    """Every string in a document, keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from _strings(key)
            yield from _strings(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _strings(part)


def reword(path: Path, folder: Path, error: UserError) -> UserError:
    """An error of the ledger without the temporary folder and the advice to run again."""
    text = str(error)
    if text.startswith("bundle "):
        return error
    return refusal(path, text.replace(f"{folder}{os.sep}", "").split("; run the same")[0])


def _check_run(path: Path, run: RunFile, manifest: Manifest) -> None:
    _check_text(path, "run.yaml", run)
    if run_identity(run) != manifest.run:
        raise refusal(path, f"run.yaml is of another run than {MANIFEST_FILE}")
    planned = [(entry.hash, entry.model, entry.attack) for entry in run.cells]
    if planned != [(cell.hash, cell.model, cell.attack) for cell in manifest.cells]:
        raise refusal(path, f"run.yaml plans other cells than {MANIFEST_FILE}")
    if not planned:
        raise refusal(path, "the run has no cells")
    titles = Counter(cell.title for cell in manifest.cells)
    if twice := [title for title, count in titles.items() if count > 1]:
        raise refusal(path, f"run.yaml plans cell {twice[0]} twice; averages would count it as often")


def _check_cell(path: Path, folder: Path, cell: BundleCell, manifest: Manifest) -> None:
    record = Ledger(folder).read_cell(cell.hash, edited=True)
    place = f"cells/{cell.hash[:16]}"
    if record is None:
        raise refusal(path, f"file '{place}/{CELL_FILE}' of cell {cell.title} is missing")
    _check_text(path, f"{place}/{CELL_FILE}", record)
    shards = sorted((folder / place).glob("shard-*.parquet"))
    if cell.rows and not shards:
        raise refusal(path, f"the shard of cell {cell.title} is missing in '{place}'")
    for shard in shards:
        _check_shard(path, shard, f"'{place}/{shard.name}' of cell {cell.title}", manifest.run.n)
    if record.model_sha256 != manifest.models.get(cell.model):
        raise refusal(
            path,
            f"cell {cell.title} was measured on weights {record.model_sha256[:12]}, {MANIFEST_FILE} names "
            f"{manifest.models.get(cell.model, 'none')[:12]}",
        )
    _check_detector(path, f"cell {cell.title}", record.detector, manifest)
    _check_flows(path, cell, record, manifest)


def _check_detector(path: Path, what: str, detector: DetectorReference | None, manifest: Manifest) -> None:
    named = manifest.detectors.get(detector.name, "none") if detector else ""
    if detector is not None and named != detector.sha256:
        raise refusal(
            path,
            f"{what} has detector {detector.name} with weights {detector.sha256[:12]}, {MANIFEST_FILE} names "
            f"{named[:12]}",
        )


def _check_flows(path: Path, cell: BundleCell, record: CellRecord, manifest: Manifest) -> None:
    for flow in (record.attack_flow, record.nll_flow):
        if flow is not None and manifest.flows.get(flow.name) != flow.sha256:
            named = manifest.flows.get(flow.name, "none")[:12]
            raise refusal(
                path,
                f"cell {cell.title} used flow {flow.name} with weights {flow.sha256[:12]}, {MANIFEST_FILE} names "
                f"{named}",
            )


def _check_shard(path: Path, shard: Path, title: str, n: int) -> None:
    """Refuse a shard with more rows, or more bytes, than the run can have."""
    try:
        with pa.OSFile(str(shard)) as stream:
            metadata = pq.ParquetFile(stream).metadata
            groups = [metadata.row_group(k) for k in range(metadata.num_row_groups)]
            rows, size = metadata.num_rows, sum(group.total_byte_size for group in groups)
        if rows <= n and size <= _allowed_bytes(shard):
            size = max(size, _count_variable_bytes(shard))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise refusal(path, f"shard {title} cannot be read as Parquet ({reason})") from error
    packed = shard.stat().st_size
    if rows > n or size > _allowed_bytes(shard):
        raise refusal(
            path,
            f"shard {title} declares {rows:,} rows and {size:,} bytes in {packed:,}; the run has {n:,} samples",
        )


def _allowed_bytes(shard: Path) -> int:
    return _SLACK + _RATIO * shard.stat().st_size


def _count_variable_bytes(shard: Path) -> int:
    """Bytes in memory of values of variable length, which the file stores once and memory once per row."""
    with pa.OSFile(str(shard)) as stream:
        words = [name for name in _WORDS if name in pq.ParquetFile(stream).schema_arrow.names]
        stream.seek(0)
        table = pq.ParquetFile(stream, read_dictionary=words).read(columns=words)
    return sum(_length(chunk) for column in table.columns for chunk in column.chunks)


def _length(chunk: pa.Array) -> int:
    """Bytes of the values that a (dictionary) array represents."""
    if not pa.types.is_dictionary(chunk.type):
        return int(chunk.nbytes)
    return int(pc.sum(pc.binary_length(chunk.dictionary).take(chunk.indices)).as_py() or 0)


def _check_cards(path: Path, folder: Path, run: RunFile, manifest: Manifest) -> None:
    for name in run.models:
        file = f"cards/{name}.yaml"
        if not (folder / file).is_file():
            raise refusal(path, f"file {file!r} is missing: the card of model {name}")
        card = load_yaml(folder / file, ModelCard)
        _check_text(path, file, card)
        if card.name != name or card.weights.sha256 != manifest.models.get(name):
            raise refusal(
                path,
                f"{file} is of {card.name} with weights {card.weights.sha256[:12]}, {MANIFEST_FILE} names "
                f"{name} with {manifest.models.get(name, 'none')[:12]}",
            )
        _check_detector(path, file, card.detector.reference if card.detector else None, manifest)


def _check_strangers(path: Path, manifest: Manifest) -> None:
    """Refuse cells and cards that are not in the plan, since nothing verifies them."""
    known = {f"cells/{cell.hash[:16]}/" for cell in manifest.cells}
    known |= {f"cards/{name}.yaml" for name in manifest.models}
    for name in manifest.files:
        if name.startswith(("cells/", "cards/")) and not name.startswith(tuple(known)):
            raise refusal(path, f"file {name!r} belongs to nothing in the plan of run.yaml")


def _check_originals(path: Path, folder: Path, run: RunFile) -> None:
    """Check the clean images: one array each of ids and images, no larger than the run's samples."""
    stored = folder / ORIGINALS_FILE
    if not stored.is_file():
        return
    channels, height, width = run.shape
    allowed = run.n * (4 * channels * height * width + 8) + 4096
    try:
        with zipfile.ZipFile(stored) as archive:
            members = {entry.filename for entry in archive.infolist()}
            if members != _NPZ_MEMBERS or len(archive.infolist()) != len(_NPZ_MEMBERS):
                raise refusal(path, f"{ORIGINALS_FILE} holds other arrays than ids and images")
            size = sum(_count_bytes(archive, entry, allowed) for entry in archive.infolist())
    except _BAD_NPZ as error:
        raise refusal(
            path, f"{ORIGINALS_FILE} cannot be read ({' '.join(str(error).split())[:80]})"
        ) from error
    if size > allowed:
        raise refusal(
            path, f"zip bomb: {ORIGINALS_FILE} holds more than the {allowed:,} bytes of {run.n} images"
        )
    images = Ledger(folder).originals().values()
    if any(image.shape != run.shape for image in images):
        raise refusal(path, f"{ORIGINALS_FILE} holds images of another shape than {run.shape}")


def _count_bytes(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, allowed: int) -> int:
    """Unpacked bytes of an entry, counted while reading; stops at the first block beyond `allowed`."""
    size = 0
    with archive.open(entry) as stream:
        while block := stream.read(1 << 20):
            size += len(block)
            if size > allowed:
                break
    return size
