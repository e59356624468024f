"""Locations of data files, and atomic writing."""

import hashlib
import os
import secrets
import stat
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from robbench.core.errors import UserError


def data_root() -> Path:
    """The folder with `threat_models`, `recipes`, `experiments`, `zoo` and `reports`, in the wheel or the checkout."""
    packaged = Path(str(files("robbench"))) / "_data"
    return packaged if packaged.is_dir() else Path(str(files("robbench"))).parent


def existing_folder(path: str | Path, option: str) -> Path:
    """`path`, given with `option`, as a folder; `UserError` if it is not one."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{option} {str(path)!r} is not a folder; give an existing folder")
    return folder


def dataset_root(option: str | Path | None) -> Path:
    """Folder of downloaded data sets: `--data-dir`, else ROBBENCH_DATA, else the user's cache."""
    if option is not None:
        return existing_folder(option, "--data-dir")
    if os.environ.get("ROBBENCH_DATA"):
        return existing_folder(os.environ["ROBBENCH_DATA"], "ROBBENCH_DATA")
    return cache_folder("data")


def cache_folder(name: str) -> Path:
    """Folder `name` in the user's cache: XDG_CACHE_HOME, else ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "robbench" / name


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary path beside path)`, flush the file to disk, then rename it to `path`.

    A reader never sees a partial file, even when this process is killed. Permissions follow the umask.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _new_file(path)
    try:
        mode = stat.S_IMODE(temporary.stat().st_mode)
        write(temporary)
        temporary.chmod(mode)  # safetensors replaces the file by its own
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _new_file(path: Path) -> Path:
    """An empty file beside `path` with the permissions of the umask, which `tempfile` ignores."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        except FileExistsError:
            continue
        return temporary


def new_folder(parent: Path, prefix: str) -> Path:
    """A new folder in `parent` with `prefix` and a unique name, and the permissions of the umask."""
    while True:
        folder = parent / f"{prefix}{secrets.token_hex(4)}"
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for UTF-8 text with unix line ends."""
    write_atomically(path, lambda temporary: temporary.write_bytes(utf8(text)))


def utf8(text: str) -> bytes:
    """`text` as UTF-8. Surrogates, which file names or foreign errors may contain, are escaped: "\\udc80"."""
    return text.encode("utf-8", errors="backslashreplace")
