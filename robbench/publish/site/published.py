"""Published tables beside the runs: a page a table, and one that lists them all."""

from collections.abc import Iterator, Sequence

from robbench.publish.published_page import (
    TableComparison,
    comparison_csv,
    comparison_markdown,
    overview_values,
    run_sentences,
    table_values,
)
from robbench.publish.site.downloads import MEDIA
from robbench.publish.site.frame import body
from robbench.publish.site.groups import Site
from robbench.publish.site.page import Download, Page, Part, Provenance
from robbench.publish.wording import versions
from robbench.resources import utf8

FOLDER = "published"
OVERVIEW = f"{FOLDER}/index.html"
MARKDOWN = f"{FOLDER}/comparison.md"
TITLE = "Published tables"


def parts(site: Site) -> Iterator[Part]:
    """The overview, then each table and its file."""
    yield _overview(site, site.published)
    yield Download(MARKDOWN, utf8(comparison_markdown(site.published, site.runs)), MEDIA["md"])
    for comparison in site.published:
        yield _page(site, comparison)
        csv = utf8(comparison_csv(comparison))
        yield Download(_path(comparison, "csv"), csv, MEDIA["csv"])


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
