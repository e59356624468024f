"""Published tables beside the runs: a page per table, and one that lists them all."""

from collections.abc import Iterator, Sequence

from robbench.core.resources import utf8
from robbench.report.published_page import (
    TableComparison,
    compare_tables,
    comparison_csv,
    comparison_markdown,
    overview_values,
    run_sentences,
    table_values,
)
from robbench.report.site.downloads import MEDIA
from robbench.report.site.frame import body
from robbench.report.site.groups import Site
from robbench.report.site.page import Download, Page, Part, Provenance
from robbench.results.wording import versions

FOLDER = "published"
OVERVIEW = f"{FOLDER}/index.html"
MARKDOWN = f"{FOLDER}/comparison.md"
TITLE = "Published tables"


def parts(site: Site) -> Iterator[Part]:
    """The overview, then each table and its file."""
    found = comparisons(site)
    yield _overview(site, found)
    yield Download(MARKDOWN, utf8(comparison_markdown(found, site.runs)), MEDIA["md"])
    for comparison in found:
        yield _page(site, comparison)
        csv = utf8(comparison_csv(comparison))
        yield Download(_path(comparison, "csv"), csv, MEDIA["csv"])


def comparisons(site: Site) -> list[TableComparison]:
    """The published tables held against all runs."""
    return site.once(_comparisons)


def _comparisons(site: Site) -> list[TableComparison]:
    return compare_tables(site.runs)


def page_path(comparison: TableComparison) -> str:
    """Path of the page of a table."""
    return _path(comparison, "html")


def _path(comparison: TableComparison, ending: str) -> str:
    return f"{FOLDER}/{comparison.table.name}.{ending}"


def _overview(site: Site, comparisons: Sequence[TableComparison]) -> Page:
    links = {found.table.name: f"site:{page_path(found)}" for found in comparisons}
    content = body(
        "published_overview.html.j2",
        **overview_values(comparisons, links),
        runs=run_sentences(site.runs),
        markdown=MARKDOWN,
    )
    return Page(OVERVIEW, TITLE, "published", content, provenance=_provenance(site, ()))


def _page(site: Site, comparison: TableComparison) -> Page:
    values = table_values(comparison, site.runs, f"site:{_path(comparison, 'csv')}")
    content = body("published.html.j2", **values)
    commands = (comparison.command,) if comparison.command else ()
    return Page(
        page_path(comparison),
        comparison.table.source,
        "published",
        content,
        ((TITLE, OVERVIEW),),
        _provenance(site, commands),
    )


def _provenance(site: Site, commands: tuple[str, ...]) -> Provenance:
    """How the runs are held against the tables; what computed the runs stands on their own pages."""
    names = " ".join(dict.fromkeys(run.folder.name for run in site.runs))
    return Provenance(
        (*commands, f"robbench report {names} --published"),
        (
            ("Runs", ", ".join(f"{run.folder.name} ({run.dataset}, seed {run.seed})" for run in site.runs)),
            ("Versions", "; ".join(dict.fromkeys(versions(run) for run in site.runs))),
        ),
    )
