"""Downloading a weights file: to a temporary file, checked, then renamed; every mirror's failure is listed."""

import ssl
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from robbench.errors import UserError
from robbench.resources import sha256_file, write_atomically
from robbench.terminal import Terminal, print_line

TIMEOUT_SECONDS = 30  # without a byte from the server
BLOCK_BYTES = 1 << 18
AGENT = {"User-Agent": "robbench"}  # some hosts refuse urllib's own


class _Failed(Exception):
    """Why one URL gave no file, in a few words."""


def download(urls: Sequence[str], target: Path, problem: Callable[[Path], str | None], label: str) -> None:
    """Fetch `target` from the first of `urls` that gives the right file.

    problem: why a file is not the one that is meant, or None. label: what the messages call it. Nothing is left in the
    place of `target` unless the file is right. `UserError` with every URL's failure and where to put the file by hand.
    """
    failures = []
    for url in urls:
        try:
            write_atomically(target, partial(_fetch, url, problem))
            return
        except _Failed as failure:
            failures.append(f"{url}: {failure}")
    raise UserError(
        f"{label} cannot be downloaded ({'; '.join(failures)}); get it another way and put it at {target}, "
        f"or name the folder that holds it with --checkpoints or ROBBENCH_CHECKPOINTS"
    )


def _fetch(url: str, problem: Callable[[Path], str | None], temporary: Path) -> None:
    """`url` as the file `temporary`, complete and right, or `_Failed`."""
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, headers=AGENT), timeout=TIMEOUT_SECONDS
        ) as answer:
            announced = int(answer.headers.get("Content-Length") or 0)
            received = _copy(answer, temporary, announced, url)
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


def _copy(answer: IO[bytes], temporary: Path, announced: int, url: str) -> int:
    """Write the answer's body to a file under a progress bar; bytes written."""
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
        temporary.open("wb") as stream,
        Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        task = progress.add_task(f"downloading {name}", total=announced or None)
        while block := answer.read(BLOCK_BYTES):
            stream.write(block)
            progress.advance(task, len(block))
        return stream.tell()


def wrong_digest(path: Path, sha256: str) -> str | None:
    """Why `path` is not the file whose hex sha256 begins with `sha256`; None when it is."""
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
