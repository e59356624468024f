"""From runs to files: a folder of pages, or one page that holds them all.

A pure function of runs, cards and shipped tables: the same input gives the same bytes, and nothing is fetched.
"""

import base64
import fcntl
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from robbench.core.errors import UserError
from robbench.core.places import check_output_file, check_output_folder
from robbench.core.resources import new_folder, utf8, write_text_atomically
from robbench.report.site import hosting
from robbench.report.site.frame import (
    INDEX,
    SCRIPT,
    SIGNATURE,
    STYLE,
    Frame,
    Tab,
    frame_page,
    frame_together,
    script,
    search_index,
    style,
    today,
)
from robbench.report.site.groups import Site, site_of
from robbench.report.site.page import Download, Page, Part, without_links
from robbench.store.records import Run

if TYPE_CHECKING:
    from robbench.report.published_page import TableComparison

MARKER = (
    ".robbench-site"  # lists the files of a site as sha256sum does; a folder with it is ours to write anew
)
INLINE = 3_000_000  # bytes of downloads that a single file holds


def parts(site: Site) -> Iterator[Part]:
    """Every page and download of a site; the start page first."""
    from robbench.report.site import (
        about,
        attack_page,
        board_page,
        catalog,
        compare_page,
        downloads,
        home,
        model_page,
        published,
    )

    more = _endings(site)
    modules = [home, board_page, catalog, model_page, attack_page, compare_page, published, about, downloads]
    if site.published is not None:
        modules.remove(published)
    for module in modules:
        for part in module.parts(site):
            if isinstance(part, Page) and part.path in more:
                yield replace(part, body=part.body + more[part.path])
            else:
                yield part


def _endings(site: Site) -> dict[str, Markup]:
    """What pages of models end with, by path: a way to compare two of them, and the files of their tables."""
    from robbench.report.site import compare_page, downloads

    found: dict[str, Markup] = {}
    for group in site.groups:
        tables = downloads.tables_by_page(group)
        for path in (group.model_path(model.name) for model in group.models):
            found[path] = compare_page.link(group, path) + downloads.section(tables.get(path, []))
    return found


def frame_of(site: Site, base_url: str = "") -> Frame:
    """The header and footer of a site: a tab a data set, which opens the group of it with most cells."""
    tabs = [
        Tab(name, groups[0].board_path(), tuple(group.slug for group in groups))
        for name, groups in site.by_data.items()
    ]
    published = "published/index.html" if site.published is None else ""
    return Frame(tuple(tabs), published, base_url.rstrip("/"), today())


def write_site(runs: Sequence[Run], folder: Path, inputs: Sequence[Path] = (), base_url: str = "") -> Path:
    """Write the site of `runs` into `folder`, in the place of an older site; returns the start page.

    inputs: run folders and bundles that the runs were read from. base_url: address that the site will have, for what
    search engines, previews and GitHub Pages read. `UserError` for a folder that holds something else or
    overlaps an input, and for runs without any cell. The folder is replaced when all is written: a reader never sees
    half a site.
    """
    check_out(folder, [*inputs, *(run.folder for run in runs)])
    site = _site(runs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _temporary(folder) as fresh:
        _fill(fresh, site, base_url)
        _check_folder(folder)
        _replace(folder, fresh)
    _remove_leftovers(folder)
    return folder / "index.html"


@contextmanager
def _temporary(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, locked as long as it is in use and gone afterwards."""
    path = new_folder(folder.parent, _prefix(folder))
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


def _prefix(folder: Path) -> str:
    return f".{folder.name}.robbench-"


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed reports have left beside `folder`; the temporary folder of a living one is locked."""
    for path in folder.parent.glob(f"{glob.escape(_prefix(folder))}*"):
        if path.is_symlink() or not path.is_dir():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        finally:
            os.close(handle)
        shutil.rmtree(path, ignore_errors=True)


def _fill(folder: Path, site: Site, base_url: str) -> None:
    """Write every file, and last the list of them."""
    frame, found = frame_of(site, base_url), list(parts(site))
    pages = [part for part in found if isinstance(part, Page)]
    hosted = hosting.parts(pages, frame, site) if base_url else []
    sums = []
    for part in (*_assets(), Download(INDEX, utf8(search_index(pages)), "text/javascript"), *found, *hosted):
        content = part.content if isinstance(part, Download) else utf8(frame_page(part, frame))
        path = folder / part.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as stream:  # two pages of one name would hide one of them
            stream.write(content)
        sums.append(f"{hashlib.sha256(content).hexdigest()}  {part.path}\n")
    (folder / MARKER).write_text("".join(sorted(sums, key=lambda line: line.split("  ", 1)[1])))


def _replace(folder: Path, fresh: Path) -> None:
    """Put `fresh` in the place of `folder`; when that fails, the old one is back."""
    if not folder.exists():
        fresh.rename(folder)
        return
    with _temporary(folder) as aside:
        folder.rename(aside / "old")
        try:
            fresh.rename(folder)
        except BaseException:  # also a Ctrl-C in between
            if not folder.exists():
                (aside / "old").rename(folder)
            raise


def write_single_file(runs: Sequence[Run], path: Path, inputs: Sequence[Path] = ()) -> Path:
    """Write the whole site into one HTML file; returns its path. `UserError` as in `write_site`.

    Of the downloads it holds the small ones, up to 3 MB; a page names those that only the folder has.
    """
    check_out(path, [*inputs, *(run.folder for run in runs)], single_file=True)
    write_text_atomically(path, _together(_site(runs)))
    return path


def write_run_page(run: Run, path: Path, published: str = "") -> Path:
    """Write `run_page` atomically; returns the path."""
    write_text_atomically(path, run_page(run, published))
    return path


def run_page(run: Run, published: str = "") -> str:
    """The site of one run as one HTML page that opens on its leaderboard.

    published: relative address of the pages of published tables, where they were written beside it.
    """
    site = replace(site_of([run]), published=published)
    return _together(site, start=site.groups[0].board_path())


def write_published(runs: Sequence[Run], folder: Path) -> "list[TableComparison]":
    """Hold `runs` against every published table in `folder`/published: the site of the runs as one page that opens on
    the tables, a CSV a table, and what was measured as Markdown. Returns the comparisons."""
    from robbench.report.site import published

    site = _site(runs)
    for part in published.parts(site):
        if isinstance(part, Download):
            write_text_atomically(folder / part.path, part.content.decode())
    write_text_atomically(folder / published.OVERVIEW, _together(site, start=published.OVERVIEW))
    return published.comparisons(site)


def _together(site: Site, start: str = "index.html") -> str:
    """The site as one page, which shows the page `start` first."""
    found = list(parts(site))
    files, left = _inline([part for part in found if isinstance(part, Download)])
    pages = [
        replace(part, body=Markup(without_links(part.body, left))) for part in found if isinstance(part, Page)
    ]
    return frame_together(pages, files, start, frame_of(site))


def _inline(files: Sequence[Download]) -> tuple[dict[str, str], frozenset[str]]:
    """Data URIs of the files by path, smallest first up to `INLINE`; and the paths that found no room."""
    room, uris = INLINE, {}
    for file in sorted(files, key=lambda file: (len(file.content), file.path)):
        uri = _data_uri(file)
        room -= len(uri)
        if room >= 0:
            uris[file.path] = uri
    return uris, frozenset(file.path for file in files) - uris.keys()


def _site(runs: Sequence[Run]) -> Site:
    for run in runs:
        if not run.cells:
            raise UserError(f"{str(run.folder)!r} has no cells; run attacks first (robbench run)")
    return site_of(runs)


def check_out(out: Path, inputs: Sequence[Path], single_file: bool = False) -> None:
    """`UserError` unless a site of the runs in `inputs`, or one page of it, may be written at `out`."""
    _check_place(out, inputs)
    if not single_file:
        _check_folder(out)
        check_output_folder(out.absolute().parent)  # it is made beside `out`, and then renamed
        return
    if out.is_dir() or (out.exists() and not _is_ours(out)):
        raise UserError(
            f"--out {str(out)!r} exists and is no page of robbench; with --single-file give a new file's name"
        )
    check_output_file(out, "--out")


def _check_place(out: Path, inputs: Sequence[Path]) -> None:
    """`UserError` for a link, the working folder, and whatever lies in, is or holds an input."""
    if out.is_symlink():
        raise UserError(f"--out {str(out)!r} is a symbolic link; name the place that it leads to")
    place = out.resolve()
    if place == Path.cwd().resolve():
        raise UserError(f"--out {str(out)!r} is the working folder; give a new folder's name")
    for given in inputs:
        other = given.resolve()
        inside = place == other or (given.is_dir() and other in place.parents)
        if inside or place in other.parents:
            what = "is or lies inside" if inside else "holds"
            raise UserError(f"--out {str(out)!r} {what} the run {str(given)!r}; give a place of its own")


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {str(folder)!r} is a file; give a folder, or --single-file")
    content = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    if not content:
        return
    if MARKER not in content:
        raise UserError(
            f"--out {str(folder)!r} holds something else ({', '.join(content[:3])}); give a new or empty folder"
        )
    foreign = sorted(_files(folder) - _read_marker(folder / MARKER) - {MARKER})
    if foreign:
        raise UserError(
            f"--out {str(folder)!r} holds files that robbench did not write ({', '.join(foreign[:3])}); "
            f"move them away, or give another folder"
        )


def _files(folder: Path) -> set[str]:
    """Everything below a folder that is no folder, and empty folders."""
    return {
        os.path.relpath(path, folder).replace(os.sep, "/")
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    }


def _read_marker(marker: Path) -> set[str]:
    text = marker.read_text(encoding="utf-8", errors="replace")
    return {line.partition("  ")[2] for line in text.splitlines()}


def _is_ours(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(SIGNATURE)) == SIGNATURE.encode()


def _assets() -> tuple[Download, Download]:
    return (
        Download(STYLE, style().encode(), "text/css"),
        Download(SCRIPT, script().encode(), "text/javascript"),
    )


def _data_uri(file: Download) -> str:
    return f"data:{file.media};base64,{base64.b64encode(file.content).decode()}"
