"""Downloading a file: to a temporary file of limited size, checked, then renamed; failures of all mirrors are
listed."""

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from http.client import HTTPException
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import urlsplit

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from robbench.core.errors import UserError
from robbench.core.resources import sha256_file, write_atomically
from robbench.core.terminal import Terminal, print_line

if TYPE_CHECKING:
    from typing_extensions import Buffer

TIMEOUT_SECONDS = 30  # without a byte from the server
BLOCK_BYTES = 1 << 18
MOST_BYTES = 4 << 30  # limit of a file of unknown size; the largest of RobustBench has 3 GB
AGENT = {"User-Agent": "robbench"}  # some hosts refuse urllib's own


class _Failed(Exception):
    """Reason why a URL gave no file."""


class TooLarge(_Failed):
    """A file is larger than allowed."""


def download(
    urls: Sequence[str],
    target: Path,
    problem: Callable[[Path], str | None],
    label: str,
    most_bytes: int = MOST_BYTES,
    advice: str = "or name the folder that holds it with --checkpoints or ROBBENCH_CHECKPOINTS",
) -> None:
    """Fetch `target` from the first of `urls` that gives the right file.

    problem: returns why a file is wrong, or None. label: name of the file in messages. most_bytes: a larger file is
    wrong; where the server announces its size nothing of it is read. advice: how else to provide the file. Nothing is
    left at `target` unless the file is right. `UserError` with every URL's failure and where to put the file by hand.
    """
    failures = []
    for url in urls:
        try:
            write_atomically(target, partial(_fetch, url, problem, most_bytes))
            return
        except _Failed as failure:
            failures.append(f"{url}: {failure}")
    raise UserError(
        f"{label} cannot be downloaded ({'; '.join(failures)}); get it another way and put it at {target}, {advice}"
    )


def _fetch(url: str, problem: Callable[[Path], str | None], most_bytes: int, temporary: Path) -> None:
    """Download `url` to `temporary` and check it; `_Failed` otherwise."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=AGENT), timeout=TIMEOUT_SECONDS
        ) as answer:
            announced = int(answer.headers.get("Content-Length") or 0)
            if announced > most_bytes:
                raise _Failed(f"has {announced:,} bytes, and {_at_most(most_bytes)}")
            received = _copy(answer, temporary, announced, url, most_bytes)
    except urllib.error.HTTPError as error:
        raise _Failed(f"the server says {error.code} {error.reason}") from error
    except urllib.error.URLError as error:
        raise _Failed(f"no connection ({_words(error.reason)})") from error
    except (HTTPException, TimeoutError, ConnectionError, ssl.SSLError, ValueError) as error:
        raise _Failed(f"the connection broke off ({_words(error)})") from error
    if announced and received != announced:
        raise _Failed(f"the connection broke off after {received:,} of {announced:,} bytes")
    wrong = problem(temporary)
    if wrong is not None:
        raise _Failed(wrong)


def _copy(answer: IO[bytes], temporary: Path, announced: int, url: str, most_bytes: int) -> int:
    """Write the response's body to a file, with a progress bar; returns its bytes. `_Failed` where it is too large."""
    console = Terminal(stderr=True)
    name = urlsplit(url).path.rpartition("/")[2] or url
    if not console.is_terminal:
        size = f" ({announced / 2**20:.1f} MiB)" if announced else ""
        print_line(console, f"downloading {url}{size}")
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
    )
    with (
        LimitedFile(temporary, most_bytes) as stream,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task(f"downloading {name}", total=announced or None)
        while block := answer.read(BLOCK_BYTES):
            stream.write(block)
            progress.advance(task, len(block))
        return stream.tell()


class LimitedFile(BufferedWriter):
    """A new file that refuses to become larger than `most_bytes`."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        super().__init__(FileIO(path, "w"))
        self._most = most_bytes

    def write(self, block: "Buffer") -> int:
        if self.tell() + memoryview(block).nbytes > self._most:
            raise TooLarge(f"is larger than expected: {_at_most(self._most)}; stopped there")
        return super().write(block)


def _at_most(most_bytes: int) -> str:
    return f"the file that is meant at most {most_bytes:,}"


def wrong_digest(path: Path, sha256: str) -> str | None:
    """Why `path` is not the file whose hex sha256 begins with `sha256`; None if it is."""
    digest = sha256_file(path)
    if digest.startswith(sha256):
        return None
    if is_html(path):
        return "is an HTML page, not weights (a login, download or error page)"
    return f"has sha256 {digest[:12]}..., not {sha256[:12]}... ({path.stat().st_size:,} bytes)"


def is_html(path: Path) -> bool:
    """Whether a file begins like a web page."""
    with path.open("rb") as stream:
        head = stream.read(512).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return head.startswith((b"<!doctype", b"<html", b"<head", b"<?xml"))


def _words(reason: object) -> str:
    return " ".join(str(reason).split())[:120] or type(reason).__name__
