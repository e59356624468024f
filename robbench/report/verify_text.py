"""What verifying found, for people."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from robbench.bundle.findings import AGREES, DIFFERS, WHOLE, Finding, Verdict, Verification, models_of
from robbench.core.counting import count_noun
from robbench.core.terminal import print_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

STYLES: dict[Verdict, str] = {
    "agrees": "green",
    "weaker": "yellow",
    "differs": "bold red",
    "unchecked": "yellow",
}
_WORST: tuple[Verdict, ...] = ("differs", "unchecked", "weaker", "agrees")
LISTED = 40  # reasons printed; all are in the JSON


def print_verification(result: Verification, console: "Console") -> None:
    """A table per model, what differs and what could not be checked with its reason, and the verdict."""
    console.print(_table(result))
    for verdict in ("differs", "unchecked", "weaker"):
        for line in _reasons(result.of(verdict)):
            _line(console, f"{verdict}: {line}", STYLES[verdict])
    for line in _reasons([finding for finding in result.of("agrees") if finding.reason]):
        _line(console, line)
    for note in result.notes:
        _line(console, f"* {note}")
    _line(console, *_verdict(result))


def _line(console: "Console", text: str, style: str = "") -> None:
    print_line(console, " ".join(text.split()), style)


def _table(result: Verification) -> "Table":
    from rich import box
    from rich.table import Table
    from rich.text import Text

    about = result.about
    title = f"{about['bundle']}: {about['dataset']}, n = {about['n']}, {count_noun(about['cells'], 'cell')}"
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), title=Text(title))
    table.add_column("model", overflow="fold")
    table.add_column("check", no_wrap=True)
    for name in ("cells", "compared", "near ties"):
        table.add_column(name, justify="right")
    table.add_column("verdict", overflow="fold")
    for model in (WHOLE, *models_of(result.findings)):
        own = [finding for finding in result.findings if finding.model == model]
        for number, check in enumerate(dict.fromkeys(finding.check for finding in own)):
            part = [finding for finding in own if finding.check == check]
            name = ("the bundle" if model == WHOLE else model) if number == 0 else ""
            table.add_row(Text(name), check, *_numbers(part), _verdict_text(part))
    return table


def _numbers(part: Sequence[Finding]) -> list[str]:
    cells = len({finding.attack for finding in part if finding.attack})
    compared, ties = sum(finding.count for finding in part), sum(finding.near_ties for finding in part)
    return [str(cells) if cells else "", f"{compared:,}" if compared else "", str(ties) if ties else ""]


def _verdict_text(part: Sequence[Finding]) -> "Text":
    from rich.text import Text

    worst = next(verdict for verdict in _WORST if any(finding.verdict == verdict for finding in part))
    count = sum(finding.verdict == worst for finding in part)
    text = worst if len(part) == 1 or count == len(part) else f"{worst} ({count} of {len(part)})"
    return Text(text, style=STYLES[worst])


def _reasons(findings: Sequence[Finding]) -> list[str]:
    """One line a check and reason: what it is about, and why."""
    groups: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        groups.setdefault((finding.check, finding.reason), []).append(finding)
    lines = [f"{check}, {_about(group)}: {reason}" for (check, reason), group in groups.items()]
    more = [f"and {len(lines) - LISTED} more (--json lists all)"] if len(lines) > LISTED else []
    return lines[:LISTED] + more


def _about(group: Sequence[Finding]) -> str:
    first = " x ".join(part for part in (group[0].model, group[0].attack) if part) or "the bundle"
    return first if len(group) == 1 else f"{len(group)} cells, first {first}"


def _verdict(result: Verification) -> tuple[str, str]:
    differs, unchecked = len(result.of("differs")), len(result.of("unchecked"))
    if result.exit_code == DIFFERS:
        return f"{differs} checks do not agree.", STYLES["differs"]
    open_ends = f"; {unchecked} checks were not done" if unchecked else ""
    if result.files_only:
        return f"Files, rows and tables agree{open_ends}: nothing was re-scored.", STYLES["weaker"]
    if result.exit_code == AGREES:
        weaker = "; some of it only with what the bundle itself says" if result.of("weaker") else ""
        return f"Everything that was checked agrees{weaker}.", STYLES["agrees"]
    return f"Nothing differs{open_ends}.", STYLES["unchecked"]
