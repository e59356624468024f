"""Where data files live: shipped with the package, or in a folder the user names."""

import hashlib
import os
import tempfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from robbench.errors import UserError


def data_root() -> Path:
    """The folder of `threat_models`, `recipes`, `experiments`, `zoo` and `reports`: in the wheel, or the checkout."""
    packaged = Path(str(files("robbench"))) / "_data"
    return packaged if packaged.is_dir() else Path(str(files("robbench"))).parent


def existing_folder(path: str | Path, option: str) -> Path:
    """`path` as a folder the user named with `option`; `UserError` if it is not one."""
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
    """Call `write(temporary path beside path)`, flush it to disk, then rename it into place.

    A reader never sees half a file, whatever kills this process and whenever.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomically(path: Path, text: str) -> None:
    """`write_atomically` for UTF-8 text with unix line ends."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))
