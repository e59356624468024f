"""Reading a zip file of unknown origin: names stay inside the folder, and no entry exceeds its declared size.

Headers are not trusted: bytes are counted while they are decompressed, and reading stops at the limit.
"""

import hashlib
import re
import stat
import struct
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, LargeZipFile, ZipFile, ZipInfo

from robbench.core.errors import UserError

BLOCK = 1 << 20
_BAD_ZIP = (BadZipFile, EOFError, zlib.error, struct.error, ValueError, OverflowError, RuntimeError)
_DEPTH = 3  # cells/<hash16>/<file>
_ENCRYPTED = 0x1 | 0x40
_DRIVE = re.compile(r"^[A-Za-z]:")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".onnx", ".pkl", ".pickle", ".h5", ".msgpack")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".zst", ".7z", ".rar")


@dataclass(frozen=True)
class Limits:
    """Limits of a bundle. files: number of entries; total: unpacked bytes; ratio: unpacked over packed bytes, in total
    and per entry above `slack` bytes."""

    files: int = 100_000
    total: int = 32 << 30
    ratio: int = 100
    slack: int = 1 << 20


def refusal(path: Path, reason: str) -> UserError:
    """The error for a bundle that is not accepted."""
    return UserError(f"bundle {str(path)!r} is refused: {reason}")


@contextmanager
def open_zip(path: Path, limits: Limits) -> Iterator[tuple[ZipFile, dict[str, ZipInfo]]]:
    """The zip file and its entries by name; `UserError` unless all names and declared sizes are acceptable."""
    if not path.is_file():
        raise UserError(f"bundle {str(path)!r} is no file; give a file written by `robbench export`")
    try:
        archive = ZipFile(path)
    except (LargeZipFile, OSError, *_BAD_ZIP) as error:
        raise refusal(path, f"not a zip file ({error}); give a file written by `robbench export`") from error
    with archive:
        entries = archive.infolist()
        _check_count(path, entries, limits)
        for entry in entries:
            _check_entry(path, entry)
        _check_distinct(path, [entry.filename for entry in entries])
        _check_sizes(path, entries, limits)
        yield archive, {entry.filename: entry for entry in entries}


def _check_count(path: Path, entries: list[ZipInfo], limits: Limits) -> None:
    if len(entries) > limits.files:
        raise refusal(path, f"zip bomb: {len(entries):,} files, at most {limits.files:,} are accepted")


def _check_entry(path: Path, entry: ZipInfo) -> None:
    # zipfile truncates the name at a null byte and replaces the system's separator by "/".
    if problem := name_problem(entry.orig_filename):
        raise refusal(path, f"file {entry.orig_filename[:80]!r} {problem}")
    if entry.flag_bits & _ENCRYPTED:
        raise refusal(path, f"file {entry.filename!r} is encrypted; a bundle is readable by everybody")
    if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
        kind = "a link" if stat.S_ISLNK(entry.external_attr >> 16) else "no plain file"
        raise refusal(path, f"file {entry.filename!r} is {kind}")
    if entry.compress_type not in (ZIP_STORED, ZIP_DEFLATED):
        raise refusal(path, f"file {entry.filename!r} is packed by method {entry.compress_type}, not deflate")


def name_problem(name: str) -> str | None:
    """Why an entry of this name is not accepted; None where it is."""
    parts = name.split("/")
    rules: Iterable[tuple[bool, str]] = (
        (any(ord(c) < 32 or ord(c) == 127 for c in name), "has control characters in its name"),
        ("\\" in name, "has a backslash in its name"),
        (name.startswith("/") or bool(_DRIVE.match(name)), "has an absolute path"),
        (".." in parts, "climbs out of its folder"),
        (name.endswith("/"), "is a folder; a bundle lists files only"),
        ("" in parts or "." in parts, "has an empty or '.' part in its path"),
        (len(parts) > _DEPTH, f"is nested too deep ({len(parts)} levels, at most {_DEPTH})"),
        (name.lower().endswith(_WEIGHTS), "looks like weights; a bundle holds none, only their sha256"),
        (name.lower().endswith(_ARCHIVES), "is an archive inside the archive; a bundle nests none"),
    )
    return next((problem for wrong, problem in rules if wrong), None)


def _check_distinct(path: Path, names: list[str]) -> None:
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other is name:
            continue
        if other == name:
            raise refusal(path, f"file {name!r} is there twice")
        raise refusal(path, f"files {other!r} and {name!r} differ in case only")


def _check_sizes(path: Path, entries: list[ZipInfo], limits: Limits) -> None:
    for entry in entries:
        if entry.file_size > limits.slack and entry.file_size > limits.ratio * max(1, entry.compress_size):
            raise refusal(
                path,
                f"zip bomb: file {entry.filename!r} grows from {entry.compress_size:,} to {entry.file_size:,} "
                f"bytes; at most {limits.ratio} times is accepted",
            )
    total, packed = sum(entry.file_size for entry in entries), path.stat().st_size
    allowed = min(limits.total, limits.ratio * packed + limits.slack)
    if total > allowed:
        raise refusal(path, f"zip bomb: {total:,} bytes in {packed:,}, at most {allowed:,} are accepted")
    _check_overlap(path, entries)


def _check_overlap(path: Path, entries: list[ZipInfo]) -> None:
    """Refuse entries that share compressed bytes, as zip bombs do."""
    end, previous = 0, ""
    for entry in sorted(entries, key=lambda e: e.header_offset):
        if entry.header_offset < end:
            raise refusal(path, f"zip bomb: files {previous!r} and {entry.filename!r} share bytes")
        end, previous = entry.header_offset + 30 + entry.compress_size, entry.filename


def _open_entry(path: Path, archive: ZipFile, entry: ZipInfo) -> IO[bytes]:
    try:
        return archive.open(entry)
    except OSError as error:  # an offset outside the file
        raise refusal(path, f"file {entry.filename!r} cannot be found in it ({error})") from error


def copy_entry(path: Path, archive: ZipFile, entry: ZipInfo, target: BinaryIO, limit: int) -> str:
    """Unpack an entry into `target`, at most `limit` bytes; returns the sha256 of the written bytes."""
    digest, size = hashlib.sha256(), 0
    try:
        with _open_entry(path, archive, entry) as stream:
            while block := stream.read(min(BLOCK, limit + 1 - size)):
                size += len(block)
                if size > limit:
                    raise refusal(
                        path,
                        f"zip bomb: file {entry.filename!r} holds more than the {limit:,} bytes declared",
                    )
                digest.update(block)
                target.write(block)
    except _BAD_ZIP as error:  # RuntimeError: encryption, or NotImplementedError
        reason = " ".join(str(error).split())[:120]
        raise refusal(path, f"file {entry.filename!r} cannot be unpacked ({reason})") from error
    return digest.hexdigest()
