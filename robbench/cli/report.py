"""`robbench report`: the tables of runs again, or a static site of them. Neither torch nor pandas at import."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from robbench.cli.base import FolderOrFile, Text, echo_line, print_paths
from robbench.core.counting import count_noun
from robbench.core.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from robbench.store.records import Run


@click.command()
@click.argument("paths", metavar="RUN...", nargs=-1, required=True, type=FolderOrFile())
@click.option("--out", type=FolderOrFile(), help="Write a site here: a new folder, or that of an older site.")
@click.option("--single-file", is_flag=True, help="Write the site as one page, --out FILE.html.")
@click.option(
    "--base-url",
    type=Text(),
    metavar="URL",
    help="Where --out will stand, as https://NAME.github.io/PROJECT.",
)
@click.option("--sizes", is_flag=True, help="Print perturbation sizes and Frechet distances too.")
@click.option(
    "--published", is_flag=True, help="Compare the runs with published tables (robbench list published)."
)
@click.option(
    "--mlflow",
    "mlflow_uri",
    type=Text(),
    metavar="URI",
    help="Also write the runs to an MLflow store: sqlite:///mlflow.db, http://... (docs/living.md).",
)
def report(
    paths: tuple[Path, ...],
    out: Path | None,
    single_file: bool,
    base_url: str | None,
    sizes: bool,
    published: bool,
    mlflow_uri: str | None,
) -> None:
    """Write the tables of runs again and print them, or with --out a site of pages.

    RUN is the folder of a `robbench run`, or a bundle of `robbench export`. A site shows all of them together; its
    index.html opens without a server or a network.

    Example: robbench report robbench-runs/digits-seed0 bundle.zip --out site
    """
    if single_file and out is None:
        raise UserError("--single-file needs a name for the page; give --out report.html")
    if base_url is not None and (out is None or single_file):
        raise UserError("--base-url is for a site in a folder; give --out SITE, without --single-file")
    from robbench.core.terminal import Terminal
    from robbench.report.files import print_sizes

    console = Terminal()
    if out is not None:
        from robbench.report.site.build import check_out
        from robbench.report.site.hosting import check_base_url

        check_out(out, paths, single_file)
        base_url = check_base_url(base_url) if base_url is not None else ""
    with _open(paths) as runs:
        if out is None:
            _write_tables(paths, runs, published, console)
        else:
            _write_site(paths, runs, out, single_file, base_url or "")
            _print_published(runs, published, console)
        for run in runs if sizes else ():
            print_sizes(run, console)
        if mlflow_uri is not None:
            _export(runs, mlflow_uri)


def _open(paths: Sequence[Path]) -> AbstractContextManager[list["Run"]]:
    from robbench.bundle.runs import open_runs

    return open_runs(paths)


def _write_tables(paths: Sequence[Path], runs: Sequence["Run"], published: bool, console: "Console") -> None:
    """Write and print the tables of run folders; those of bundles, which stay as they are, are printed only."""
    from robbench.report.files import print_tables, write_report

    folders = [run for path, run in zip(paths, runs, strict=True) if path.is_dir()]
    if published and len(folders) < len(runs):
        raise UserError(
            "--published writes pages beside a run, and a bundle has no room for them; give --out SITE"
        )
    written = write_report(folders, console, published)
    for path, run in zip(paths, runs, strict=True):
        if not path.is_dir():
            print_tables(run, console)
    print_paths(written)


def _write_site(
    paths: Sequence[Path], runs: Sequence["Run"], out: Path, single_file: bool, base_url: str
) -> None:
    """Write the site; print its start page and its size."""
    from robbench.report.site import write_single_file, write_site

    page = write_single_file(runs, out, paths) if single_file else write_site(runs, out, paths, base_url)
    files = [page] if single_file else [path for path in out.rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in files) / 1e6
    print_paths([page])
    echo_line(f"     {size:.1f} MB" + ("" if single_file else f" in {count_noun(len(files), 'file')}"))


def _export(runs: Sequence["Run"], uri: str) -> None:
    from robbench.report.mlflow_export import export

    for run in runs:
        for line in export(run, uri):
            echo_line(line)


def _print_published(runs: Sequence["Run"], requested: bool, console: "Console") -> None:
    if requested:
        from robbench.report.published_page import compare_tables, terminal_counts

        console.print(terminal_counts(compare_tables(runs)))
