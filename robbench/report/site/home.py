"""The start page: what was measured, who may lead, published tables, and how to check all of it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from robbench import __version__
from robbench.core.counting import counted
from robbench.report.site import boards, published
from robbench.report.site.frame import body
from robbench.report.site.groups import Group, Site
from robbench.report.site.page import Page, Part, Provenance
from robbench.report.site.provenance import duration
from robbench.results import wording
from robbench.results.parity import ALGORITHM, parity_note
from robbench.results.rows import CellStatus, cell_status
from robbench.store.records import CellResult, Run

LEADERS = 5  # models that may be first that a line names
NO_LEADER = "none is complete under every attack"
TITLE = "Adversarial robustness"


@dataclass(frozen=True)
class Leader:
    """A model that may be the first. rank: "1" or "1-3"; value: its worst case in percent with its interval."""

    name: str
    path: str
    rank: str
    value: str


@dataclass(frozen=True)
class BoardLine:
    """A leaderboard as the start page lists it.

    Attributes:
        title: of the leaderboard.
        path: of its page.
        models: how many it has.
        attacks: how many it has.
        ranked: whether it is of accuracies.
        leaders: models that may be the first.
        more: leaders beyond those named.
        is_sweep: whether its columns are budgets or steps of the same attacks.
    """

    title: str
    path: str
    models: int
    attacks: int
    ranked: bool
    leaders: tuple[Leader, ...]
    more: int
    is_sweep: bool = False

    @property
    def without_leaders(self) -> str:
        """What stands in the place of leaders."""
        if not self.ranked:
            return "likelihood of flows"
        return "every budget and number of steps" if self.is_sweep else NO_LEADER


@dataclass(frozen=True)
class Section:
    """A group of runs.

    Attributes:
        group: the group.
        summary: what was measured, in words.
        boards: its leaderboards.
        states: (count, what) of its cells.
        broken: (model, attack, status, reason) of the cells without numbers.
        models: (name, path) of each.
        attacks: (label, path) of each, by threat model.
        comparable: whether it has two classifiers to compare.
    """

    group: Group
    summary: str
    boards: tuple[BoardLine, ...]
    states: tuple[tuple[int, str], ...]
    broken: tuple[tuple[str, str, str, str], ...]
    models: tuple[tuple[str, str], ...]
    attacks: dict[str, list[tuple[str, str]]]
    comparable: bool

    @property
    def ranked(self) -> bool:
        """Whether any of its leaderboards has ranks."""
        return any(board.leaders for board in self.boards)


@dataclass(frozen=True)
class RunLine:
    """A run that the site was made from.

    Attributes:
        name: of its folder.
        dataset: that was attacked.
        seed: of test images and attacks.
        n: how many test images.
        cells: how many were planned.
        state: "complete", "3 failed", "partial: 5 of 12 cells done".
        is_whole: whether every cell has its number.
        time: computing time of all cells, in words.
        device: where they were computed.
        version: of robbench.
    """

    name: str
    dataset: str
    seed: int
    n: int
    cells: int
    state: str
    is_whole: bool
    time: str
    device: str
    version: str


def parts(site: Site) -> Iterator[Part]:
    """The start page."""
    content = body(
        "home.html.j2",
        sections=[_section(group) for group in site.groups],
        runs=[_run_line(run) for run in site.runs],
        published=site.published,
        **(_published(site) if site.published is None else {}),
        engines=_engines(site),
    )
    yield Page("index.html", TITLE, "home", content, provenance=_provenance(site))


# ---------------------------------------------------------------------------------------------------------- groups
def _section(group: Group) -> Section:
    cells = group.run.cells
    status = [(result, *cell_status(group.run, result)) for result in cells]
    counts = Counter(state for _, state, _ in status)
    words: dict[CellStatus, str] = {"ok": "done", "failed": "failed", "not run": "not finished"}
    return Section(
        group=group,
        summary=wording.summary(group.run),
        boards=tuple(
            replace(_board_line(board), is_sweep=group.is_sweep and board.path == group.board_path())
            for board in boards.boards(group)
        ),
        states=tuple((counts[state], word) for state, word in words.items() if counts[state]),
        broken=tuple(
            (r.cell.model_name, r.cell.attack.label, state, reason)
            for r, state, reason in status
            if state != "ok"
        ),
        models=tuple((model.name, group.model_path(model.name)) for model in group.models),
        attacks=_attacks(group),
        comparable=sum(model.kind == "classifier" for model in group.models) > 1,
    )


def _attacks(group: Group) -> dict[str, list[tuple[str, str]]]:
    """(label, path) of the attacks by threat model."""
    found: dict[str, dict[str, str]] = {}
    for result in group.run.cells:
        attack = result.cell.attack
        found.setdefault(attack.threat_model, {})[attack.label] = group.attack_path(attack.label)
    return {threat: list(paths.items()) for threat, paths in found.items()}


def _board_line(board: boards.Board) -> BoardLine:
    table = next((table for table in board.tables if not table.key), None)
    leaders = _leaders(table) if table is not None else []
    models = {result.cell.model for result in board.results}
    return BoardLine(
        title=board.title,
        path=board.path,
        models=len(models),
        attacks=len(board.attacks),
        ranked=table is not None,
        leaders=tuple(leaders[:LEADERS]),
        more=len(leaders[LEADERS:]),
    )


def _leaders(table: boards.Table) -> list[Leader]:
    """The models whose range of ranks begins with 1, in the order of the board."""
    places = {column.key: k for k, column in enumerate(table.columns)}
    if boards.RANK not in places:
        return []
    found = []
    for line in table.lines:
        name, rank, worst = line[0], line[places[boards.RANK]], line[places[boards.WORST]]
        if rank.kind == "rank" and rank.text.split("-")[0] == "1":
            value = (
                worst.text if worst.lower is None else f"{worst.text} [{worst.lower:.1f}, {worst.upper:.1f}]"
            )
            found.append(Leader(name.text, name.file, rank.text, value))
    return found


# ------------------------------------------------------------------------------------------------------------ runs
def _run_line(run: Run) -> RunLine:
    states = Counter(cell_status(run, result)[0] for result in run.cells)
    parts = [f"{states['failed']} failed"] if states["failed"] else []
    if states["not run"]:
        parts.append(f"partial: {states['ok']} of {counted(len(run.cells), 'cell')} done")
    return RunLine(
        name=run.folder.name,
        dataset=run.dataset,
        seed=run.seed,
        n=run.n,
        cells=len(run.cells),
        state=", ".join(parts) or "complete",
        is_whole=not parts,
        time=duration(sum(result.cell.seconds for result in run.cells)),
        device=", ".join(dict.fromkeys(r.cell.device or "not recorded" for r in run.cells)),
        version=run.versions.get("robbench", "not recorded"),
    )


def _engines(site: Site) -> list[str]:
    """What stands behind AutoAttack, once for all runs."""
    cells: list[CellResult] = [result for run in site.runs for result in run.cells]
    return list(dict.fromkeys(parity_note(r.cell) for r in cells if r.cell.attack.algorithm == ALGORITHM))


def _published(site: Site) -> dict[str, object]:
    """tables: (table, path) of the published tables of which something was measured; others: how many further ones."""
    found = published.comparisons(site)
    tables = [(table, published.page_path(table)) for table in found if table.measured]
    return {"tables": tables, "others": len(found) - len(tables), "overview": published.OVERVIEW}


def _provenance(site: Site) -> Provenance:
    names = " ".join(dict.fromkeys(run.folder.name for run in site.runs))
    versions = dict.fromkeys(wording.versions(run) for run in site.runs)
    return Provenance(
        (f"robbench report {names} --out site",),
        (("Written by", f"robbench {__version__}"), ("Measured with", "; ".join(versions))),
    )
