"""Arrays from npz files of unknown origin: headers are checked against the file's size before memory is allocated.

No torch here.
"""

import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any
from zipfile import BadZipFile, ZipFile, ZipInfo

import numpy as np

Array = np.ndarray[tuple[int, ...], np.dtype[Any]]
_LONGEST_HEADER = 10_000  # bytes; numpy's own limit, which it checks after reading them all
_DEFLATE = 1032  # largest compression ratio of deflate
_BAD = (
    BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    KeyError,
    TypeError,
    AttributeError,
    SyntaxError,
    TokenError,  # what numpy raises on Python 3.12 and later where earlier ones raise SyntaxError
    ArithmeticError,
    RuntimeError,  # encrypted; RecursionError and NotImplementedError too
    MemoryError,
)


def npz_names(path: Path) -> list[str]:
    """Names of the arrays in an npz file. `OSError`, or `ValueError` with the reason where it is not one."""
    try:
        with ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except _BAD as error:
        raise ValueError(_reason(error)) from error


def read_npz(path: Path, names: Sequence[str]) -> dict[str, Array]:
    """The arrays `names`; others are not read, pickled objects never.

    `OSError` when the file cannot be read, `ValueError` with the reason for any other problem: not a zip file,
    encrypted, damaged, a missing array, a header that declares more than the file contains.
    """
    try:
        with ZipFile(path) as archive:
            packed = path.stat().st_size
            return {name: _array(archive, archive.getinfo(f"{name}.npy"), packed) for name in names}
    except _BAD as error:
        raise ValueError(_reason(error)) from error


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


def _array(archive: ZipFile, entry: ZipInfo, packed: int) -> Array:
    if entry.file_size > _DEFLATE * packed:
        raise ValueError(f"{entry.filename} declares {entry.file_size:,} bytes in a file of {packed:,}")
    with _open_entry(archive, entry) as stream:
        shape, dtype, offset = _header(stream)
    declared = math.prod(shape) * dtype.itemsize
    if not dtype.hasobject and declared != entry.file_size - offset:
        raise ValueError(
            f"{entry.filename} declares shape {str(shape)[:60]} of {dtype}, {declared:,} bytes, and holds "
            f"{entry.file_size - offset:,}"
        )
    with _open_entry(archive, entry) as stream:
        array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _open_entry(archive: ZipFile, entry: ZipInfo) -> IO[bytes]:
    try:
        return archive.open(entry)
    except OSError as error:  # an offset outside the file
        raise ValueError(_reason(error)) from error


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """(shape, type, bytes before the values) of an npy file."""
    version = np.lib.format.read_magic(stream)
    size = 2 if version == (1, 0) else 4
    (length,) = struct.unpack("<H" if size == 2 else "<I", stream.read(size))
    if length > _LONGEST_HEADER:
        raise ValueError(f"an npy header of {length:,} bytes; at most {_LONGEST_HEADER:,} are read")
    header = _Prefixed(struct.pack("<H" if size == 2 else "<I", length), stream)
    read = np.lib.format.read_array_header_1_0 if size == 2 else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(header)
    return shape, dtype, np.lib.format.MAGIC_LEN + size + length


class _Prefixed:
    """A stream that returns bytes which were already read from it again."""

    def __init__(self, prefix: bytes, stream: IO[bytes]) -> None:
        self._prefix, self._stream = prefix, stream

    def read(self, size: int = -1, /) -> bytes:
        given, self._prefix = self._prefix[:size], self._prefix[size:]
        return given or self._stream.read(size)
