"""How to read the numbers, check, cite and add to them; and the runs behind them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from robbench import __version__
from robbench.core.counting import count_noun
from robbench.report.site.frame import ABOUT, body
from robbench.report.site.groups import Site
from robbench.report.site.page import Page, Part
from robbench.report.site.provenance import duration
from robbench.report.site.ranks import EXPLANATION
from robbench.results import wording
from robbench.results.parity import ALGORITHM, parity_note
from robbench.results.rows import cell_status
from robbench.store.records import Run


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
    """The page."""
    content = body(
        "about.html.j2",
        runs=[_run_line(run) for run in site.runs],
        ranks=EXPLANATION,
        intervals=wording.INTERVALS,
        meanings=wording.MEANINGS,
        engines=_engines(site),
        folder=site.published is None,
        version=__version__,
    )
    yield Page(ABOUT, "How to read, check, cite and submit", "about", content)


def _run_line(run: Run) -> RunLine:
    states = Counter(cell_status(run, result)[0] for result in run.cells)
    parts = [f"{states['failed']} failed"] if states["failed"] else []
    if states["not run"]:
        parts.append(f"partial: {states['ok']} of {count_noun(len(run.cells), 'cell')} done")
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
    cells = [result.cell for run in site.runs for result in run.cells]
    return list(dict.fromkeys(parity_note(cell) for cell in cells if cell.attack.algorithm == ALGORITHM))
