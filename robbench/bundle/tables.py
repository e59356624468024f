"""Check of a bundle's table digests against tables derived from its rows."""

from robbench.bundle.archive import OpenBundle
from robbench.bundle.export import table_digests
from robbench.bundle.findings import WHOLE, Finding, judge

CHECK = "tables"
NEWER = ("measure",)  # columns that bundles of an older robbench lack


def table_finding(bundle: OpenBundle) -> Finding:
    """The finding whether the digests in the manifest are those of the tables derived from the rows."""
    from robbench import __version__

    claimed, derived = bundle.manifest.tables, table_digests(bundle.run)
    if claimed != derived and claimed == (before := table_digests(bundle.run, NEWER)):
        derived = before
    names = sorted(claimed.keys() | derived.keys())
    problems = [
        f"table {name} is not what the rows give"
        if name in claimed and name in derived
        else f"table {name} is {'claimed and not derived' if name in claimed else 'derived and not claimed'}"
        for name in names
        if claimed.get(name) != derived.get(name)
    ]
    writer = bundle.manifest.versions.get("robbench", "unknown")
    if problems and writer != __version__:
        problems.append(
            f"written by robbench {writer}, derived again by {__version__}, which may word notes otherwise"
        )
    return judge(WHOLE, "", CHECK, len(names), problems)
