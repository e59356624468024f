"""The start page: what was measured, the best model of each data set and threat model, one picture of all."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from robbench import __version__
from robbench.core.counting import count_noun
from robbench.report.site import published
from robbench.report.site.boards import boards
from robbench.report.site.frame import body
from robbench.report.site.groups import Group, Site
from robbench.report.site.page import Page, Part, Provenance
from robbench.report.site.tables import Board, Lead, Table, lead
from robbench.results import wording
from robbench.results.parity import ALGORITHM
from robbench.results.rows import cell_status

LINES = 6  # leaderboards of a data set's largest group that the table lists; of its other groups one
SHOWN = 50  # cells without a number that the page lists
NO_LEADER = "none is complete under every attack"
TITLE = "Adversarial robustness"


@dataclass(frozen=True)
class BoardLine:
    """A leaderboard as the start page lists it.

    Attributes:
        group: its group.
        title: of the leaderboard.
        path: of its page.
        models: how many it has.
        attacks: how many it has.
        lead: the model that leads it; None where no model may be called first.
        without: what stands in its place.
    """

    group: Group
    title: str
    path: str
    models: int
    attacks: int
    lead: Lead | None
    without: str


@dataclass(frozen=True)
class Section:
    """A group of runs. more: leaderboards beyond those listed; broken: (model, attack label, status, reason) of the
    cells without a number."""

    group: Group
    lines: tuple[BoardLine, ...]
    more: int
    broken: tuple[tuple[str, str, str, str], ...]


def parts(site: Site) -> Iterator[Part]:
    """The start page."""
    sections = [
        _section(group, LINES if place == 0 else 1)
        for groups in site.by_data.values()
        for place, group in enumerate(groups)
    ]
    content = body(
        "home.html.j2",
        summary=summary(site),
        sections=sections,
        broken=[(s.group, *line) for s in sections for line in s.broken],
        shown=SHOWN,
        picture=_picture(site.groups),
        published=site.published,
        **(_count_published(site) if site.published is None else {}),
    )
    yield Page("index.html", TITLE, "home", content, provenance=_provenance(site), description=summary(site))


def summary(site: Site) -> str:
    """What was measured, in a sentence."""
    cells = [result.cell for group in site.groups for result in group.run.cells]
    models = count_noun(len({cell.model_sha256 for cell in cells}), "model")
    attacks = count_noun(len({cell.attack.label for cell in cells}), "attack")
    data = count_noun(len({group.run.dataset for group in site.groups}), "data set")
    return f"{models} under {attacks} on {data}, measured sample by sample."


def _picture(groups: Sequence[Group]) -> tuple[Board, Table] | None:
    """The leaderboard with most models, then of AutoAttack, then with most attacks, of those that groups open with."""
    first = [(boards(group)[0], table) for group in groups if (table := boards(group)[0].accuracies)]
    drawn = [(board, table) for board, table in first if table.scatter is not None]
    return max(drawn, key=_size, default=None)


def _size(drawn: tuple[Board, Table]) -> tuple[int, bool, int]:
    board, table = drawn
    return len(table.lines), any(a.algorithm == ALGORITHM for a in board.attacks), len(board.attacks)


def _section(group: Group, limit: int) -> Section:
    single = [board for board in boards(group) if board.accuracies and not board.is_union] or boards(group)
    status = [(r.cell.model_name, r.cell.attack.label, *cell_status(group.run, r)) for r in group.run.cells]
    return Section(
        group=group,
        lines=tuple(_line(group, board) for board in single[:limit]),
        more=len(single[limit:]),
        broken=tuple(line for line in status if line[2] != "ok"),
    )


def _line(group: Group, board: Board) -> BoardLine:
    table = board.accuracies
    return BoardLine(
        group=group,
        title=board.title,
        path=board.path,
        models=len({result.cell.model for result in board.results}),
        attacks=len(board.attacks),
        lead=lead(table) if table is not None else None,
        without=NO_LEADER if table is not None else "likelihood, which has no ranks",
    )


def _count_published(site: Site) -> dict[str, object]:
    """measured: how many published tables something was measured of; all: how many there are."""
    found = published.comparisons(site)
    return {
        "measured": sum(bool(table.measured) for table in found),
        "tables": len(found),
        "overview": published.OVERVIEW,
    }


def _provenance(site: Site) -> Provenance:
    names = " ".join(dict.fromkeys(run.folder.name for run in site.runs))
    versions = dict.fromkeys(wording.versions(run) for run in site.runs)
    return Provenance(
        (f"robbench report {names} --out site",),
        (("Written by", f"robbench {__version__}"), ("Measured with", "; ".join(versions))),
    )
