"""The tables of a bundle, derived again from its rows."""

from robbench.bundle.archive import OpenBundle
from robbench.bundle.export import table_digests
from robbench.bundle.findings import WHOLE, Finding, judged

CHECK = "tables"
NEWER = (
    "measure",
)  # columns that bundles of an older robbench lack; each follows from the rows that are checked


def table_finding(bundle: OpenBundle) -> Finding:
    """Whether every table that the manifest claims follows from the rows, and no other one does."""
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
    return judged(WHOLE, "", CHECK, len(names), problems)
