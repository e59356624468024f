"""Output files and folders: checked before the work begins, and recognised while it goes on."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from robbench.core.errors import UserError, spell_argument


@dataclass(frozen=True)
class Place:
    """An output folder. device, inode: identify it independently of its name; option: argument that named it, ""
    for the output's."""

    folder: Path
    device: int
    inode: int
    option: str = ""

    @classmethod
    def of(cls, folder: Path, option: str = "") -> "Place":
        """The folder as it is now; it must exist."""
        status = folder.stat()
        return cls(folder, status.st_dev, status.st_ino, option)

    def require(self) -> None:
        """`UserError` when the folder was removed, renamed or replaced, where writing would create a partial second
        one."""
        try:
            status = self.folder.stat()
            same = (status.st_dev, status.st_ino) == (self.device, self.inode)
        except OSError:
            same = False
        if not same:
            path = repr(str(self.folder))
            named = f"{self.option} {path}" if self.option else spell_argument("out", path)
            raise UserError(
                f"{named} was removed or renamed while robbench was writing to it, and nothing more is written there; "
                f"what was finished is where the folder is now: bring it back and run the same command again"
            )


def check_output_file(path: Path | None, option: str) -> None:
    """`UserError` unless a file can be written at `path` (None: no file is requested); leaves nothing behind."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(
            f"{option} {str(path)!r} is a folder; give the name of a file, as in {path / path.name}"
        )
    if path.exists() and not path.is_file():
        raise UserError(f"{option} {str(path)!r} is no plain file and would be replaced; give another name")
    with _refusals(path, option):
        _try_folder(path.absolute().parent)


def check_output_folder(path: Path, option: str = "--out") -> None:
    """`UserError` unless files can be written into the folder `path`, which may be missing; nothing is left behind."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{option} {str(path)!r} is a file; give a folder")
    with _refusals(path, option):
        _try_folder(path.absolute())


@contextmanager
def _refusals(path: Path, option: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{option} {str(path)!r} cannot be written ({error.strerror}); give a place that you may write to"
        ) from error


def _try_folder(folder: Path) -> None:
    """Create the missing parts of `folder` and a file in it, and remove them again, the only reliable test."""
    made: list[Path] = []
    try:
        for part in reversed([folder, *folder.parents]):
            if not part.exists():
                part.mkdir()
                made.append(part)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".robbench-", suffix=".tmp"):
            pass
    finally:
        for part in reversed(made):
            os.rmdir(part)
