"""The verdicts on reference runs, for people and as findings."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from robbench.compare.findings import Finding, Value
from robbench.compare.paired import ALL_MODELS, IDENTITY, PairedResult
from robbench.compare.pairs import Shift
from robbench.core.counting import counted
from robbench.core.terminal import print_line
from robbench.report.check_text import blank_table, verdict_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LISTED_FAILS = 60


def print_paired(results: Sequence[PairedResult], reference: Path, console: "Console") -> bool:
    """Print a line per attack and component (over all models where there are several) and every fail; whether the check
    passed: no fail, and something compared."""
    pooled = {(r.attack, r.component) for r in results if r.model == ALL_MODELS}
    compared = [r for r in results if r.component != IDENTITY]
    fails = [r for r in results if r.regression]
    whole = [r for r in compared if r.model == ALL_MODELS or (r.attack, r.component) not in pooled]
    shown = [*whole, *[r for r in compared if r.regression and r not in whole][:LISTED_FAILS]]
    console.print(_table(shown, _caption(results, reference)))
    for result in fails[:LISTED_FAILS]:
        print_line(console, f"fail: {result.model} x {result.attack}: {result.reason}", "red")
    if len(fails) > LISTED_FAILS:
        print_line(console, f"... and {len(fails) - LISTED_FAILS} fails more (--json FILE has all)", "red")
    for line in _absent(results):
        print_line(console, line, "yellow")
    if not compared:
        print_line(console, "Nothing of the reference run is in this run, so nothing was checked.", "red")
    return bool(compared) and not fails


def of_paired(result: PairedResult, reference: Path) -> Finding:
    """The finding of a component."""
    values: dict[str, Value] = (
        dict(asdict(result.shift)) if result.component != IDENTITY else {"n": result.shift.n}
    )
    return Finding(
        group=result.model,
        name=f"{result.attack} {result.component}",
        verdict=result.verdict,
        reason=result.reason,
        gate=True,
        path=reference,
        values=values,
    )


def _absent(results: Sequence[PairedResult]) -> list[str]:
    counts = Counter(result.model for result in results if result.verdict == "not run")
    listed = ", ".join(f"{model} {count}" for model, count in counts.items())
    return [f"not run: {counted(sum(counts.values()), 'cell')} of the reference ({listed})"] if counts else []


def _caption(results: Sequence[PairedResult], reference: Path) -> str:
    counts = Counter(result.verdict for result in results)
    return (
        f"{counts['pass']} pass, {counts['fail']} fail, {counts['not run']} not run, sample by sample against "
        f"{reference}. Flips: broken now / robust now. Moved: searches that went another way. Steps: broken later / "
        f"earlier. Calls: forwards and backwards on samples that hold, over the reference's."
    )


def _table(results: Sequence[PairedResult], caption: str) -> "Table":
    from rich.text import Text

    table = blank_table(caption)
    several = any(result.model not in ("", ALL_MODELS) for result in results)
    for name in (*(["model"] if several else []), "attack", "component"):
        table.add_column(name, overflow="fold")
    for name in ("n", "flips", "moved", "steps", "shift", "calls"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    for result in results:
        texts = [*([result.model] if several else []), result.attack, result.component, *_cells(result.shift)]
        table.add_row(*(Text(text) for text in texts), verdict_text(result.verdict))
    return table


def _cells(shift: Shift) -> list[str]:
    forwards, backwards = (
        _ratio(shift.forwards, shift.reference_forwards),
        _ratio(shift.backwards, shift.reference_backwards),
    )
    return [
        str(shift.n),
        f"{shift.lost}/{shift.gained}",
        str(shift.moved),
        f"{shift.later}/{shift.earlier}",
        f"{shift.shift:+.2g}" if shift.moved else "0",
        f"{forwards} {backwards}",
    ]


def _ratio(now: int, before: int) -> str:
    return f"{now / before:.2f}" if before else "-"
