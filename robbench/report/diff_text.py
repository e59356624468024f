"""A comparison of two runs for people: what fell first, each verdict in a table of its own."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from robbench.compare.comparison import Comparison, Side, Verdict
from robbench.compare.reference import Reference
from robbench.compare.runs import RunDiff
from robbench.core.counting import count_noun
from robbench.core.markdown import bullets, escaped, markdown_table
from robbench.core.terminal import print_line
from robbench.report.check_text import Kind, text_table
from robbench.results.likelihood import bits_text
from robbench.results.rows import CLEAN, WORST_CASE, TableRow, cell_model
from robbench.results.tables import ALL_THREATS
from robbench.store.records import CellResult, Run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LISTED_CHANGES, LISTED_DIFFERENCES, LISTED_CELLS, LISTED_IDS, LISTED_FALLS = 25, 20, 8, 8, 10
LISTED_QUIET = 5
HEADINGS: dict[Verdict, tuple[str, str]] = {
    "failed": ("Failed in B, and not in A", "bold red"),
    "worse": ("Worse in B", "bold red"),
    "maybe worse": ("Perhaps worse: beyond its own interval, no surprise among so many", "yellow"),
    "not compared": ("Not compared: a run has no number", "yellow"),
    "maybe better": ("Perhaps better: beyond its own interval, no surprise among so many", ""),
    "better": ("Better in B", "green"),
    "within interval": ("Biggest changes within their intervals", "dim"),
    "not judged": ("Not judged: a distance without an interval", ""),
}
QUIET: tuple[Verdict, ...] = ("within interval", "unchanged")


def print_diff(diff: RunDiff, console: "Console") -> None:
    """Print what changed."""
    _print_identity(diff, console)
    for verdict, (heading, style) in HEADINGS.items():
        found = [change for change in diff.changes if change.verdict == verdict]
        if found:
            _heading(console, f"{heading} ({len(found)})", style)
            most = LISTED_QUIET if verdict in QUIET else LISTED_CHANGES
            console.print(_table(found[:most]))
            _more(console, len(found), most)
    if any(change.fell or change.rose for change in diff.fell[:LISTED_FALLS]):
        _heading(console, "Samples behind the falls")
    for change in diff.fell[:LISTED_FALLS]:
        _print_samples(change, console)
    _more(console, len(diff.fell), LISTED_FALLS)
    _print_notes(diff, console)
    counts = Counter(change.verdict for change in diff.changes)
    quiet = ", ".join(f"{counts[verdict]} {verdict}" for verdict in QUIET)
    _heading(console, f"{count_noun(len(diff.changes), 'number')} compared: {quiet}.")
    console.print(_method(diff), markup=False, highlight=False)
    _print_verdict(diff, console)


def _heading(console: "Console", text: str, style: str = "") -> None:
    console.print()
    print_line(console, text, style)


def _print_verdict(diff: RunDiff, console: "Console") -> None:
    for missed in diff.missed:
        print_line(console, f"{missed.model} {missed.attack}: {missed.reason}", "bold red")
    if diff.gaps:
        _heading(console, "Not compared like for like (exit code 3 without --accept-differences)", "yellow")
    for gap in diff.gaps[:LISTED_DIFFERENCES]:
        print_line(console, f"  {gap}", "yellow")
    _more(console, len(diff.gaps), LISTED_DIFFERENCES)
    style = "bold red" if diff.fell or diff.missed else "yellow" if diff.gaps else "green"
    print_line(console, verdict_line(diff), style)


def verdict_line(diff: RunDiff) -> str:
    """The last line of a comparison: what fell, and which minimums are missed."""
    fell = (
        f"{count_noun(len(diff.fell), 'number')} fell." if diff.fell else "Nothing fell beyond its interval."
    )
    if not diff.minimums:
        return fell
    return f"{fell} {count_noun(len(diff.missed), 'minimum')} of {len(diff.minimums)} missed."


def diff_markdown(diff: RunDiff) -> str:
    """The comparison as a GitHub table: what changed beyond chance or is not judged, the minimums, and what was not
    compared like for like."""
    a, b = (f"{name} ({run.dataset}, n = {run.n}, seed {run.seed})" for name, run in _name_runs(diff))
    loud = [change for change in diff.changes if change.verdict not in QUIET]
    lines = [[change.verdict, name_of(change), *numbers_of(change)] for change in loud[:LISTED_CHANGES]]
    lines += [
        [
            "missed" if m.regression else "reached",
            f"minimum {m.model} {m.attack}",
            f"{m.a.value:g}",
            _value(m.b, "%"),
        ]
        + ["-"] * 3
        for m in diff.minimums
    ]
    more = len(loud) - LISTED_CHANGES
    parts = [f"### Robustness: {escaped(verdict_line(diff))}", f"A: {escaped(a)}. B: {escaped(b)}."]
    if lines:
        parts.append(markdown_table(["verdict", "what", "A", "B", "B - A", "p", "-/+"], lines))
    parts += [f"{more} more changes are in --format json."] if more > 0 else []
    if diff.gaps:
        parts += ["Not compared like for like:", bullets(diff.gaps[:LISTED_DIFFERENCES])]
    return "\n\n".join([*parts, f"{count_noun(len(diff.changes), 'number')} compared."]) + "\n"


def _name_runs(diff: RunDiff) -> list[tuple[str, Run]]:
    return list(zip(diff.names, (diff.runs.a, diff.runs.b), strict=True))


def _print_identity(diff: RunDiff, console: "Console") -> None:
    runs = diff.runs
    for side, (name, run) in zip("AB", _name_runs(diff), strict=True):
        print_line(console, f"{side}: {name} ({run.dataset}, n = {run.n}, seed {run.seed})")
    shared = f"{count_noun(len(runs.ids), 'sample')} and {count_noun(len(runs.cells), 'cell')} in both."
    print_line(console, shared if diff.differences else f"{shared} Their settings are the same.")
    if diff.differences:
        _heading(console, "Different settings, A -> B", "yellow")
    for found in diff.differences[:LISTED_DIFFERENCES]:
        print_line(console, f"  {found.text}")
    _more(console, len(diff.differences), LISTED_DIFFERENCES)
    for side, only in (("A", runs.only_a), ("B", runs.only_b)):
        if only:
            _heading(console, f"Only in {side}: {_cells(only)}", "yellow")
    _print_alarms(diff, console)


def _print_alarms(diff: RunDiff, console: "Console") -> None:
    """What should not be: other labels of the same samples, other rows under the same hash."""
    if diff.other_labels:
        samples = count_noun(diff.other_labels, "common sample")
        _heading(console, f"B has other labels for {samples}: these are not the same data.", "bold red")
    loud = [found for found in diff.other_rows if found.beyond]
    if loud:
        cells = count_noun(len(loud), "cell")
        _heading(
            console, f"SAME CELL HASH, OTHER ROWS in {cells}: one computation gave two results.", "bold red"
        )
    for found in loud[:LISTED_CELLS]:
        line = (
            f"  {found.model} x {found.attack}: {found.rows} of {found.n} rows, {found.beyond} beyond rounding, "
            f"{found.verdicts} in verdict or step"
        )
        print_line(console, line, "red")
    _more(console, len(loud), LISTED_CELLS)
    if rounding := len(diff.other_rows) - len(loud):
        _heading(
            console,
            f"Rows differ by rounding in {count_noun(rounding, 'cell')} of the same hash "
            "(another machine or batch size).",
            "yellow",
        )


def _cells(results: Sequence[CellResult]) -> str:
    names = [f"{cell_model(r)} x {r.cell.attack.label}" for r in results]
    more = f" and {len(names) - LISTED_CELLS} more" if len(names) > LISTED_CELLS else ""
    return ", ".join(names[:LISTED_CELLS]) + more


def _more(console: "Console", count: int, listed: int) -> None:
    if count > listed:
        print_line(console, f"  ... and {count - listed} more (--json has all)")


def _table(changes: Sequence[Comparison]) -> "Table":
    columns: list[tuple[str, Kind]] = [("what", "text")]
    columns += [(name, "unbroken number") for name in ("A", "B", "B - A", "p", "-/+")]
    return text_table(None, columns, ([name_of(change), *numbers_of(change)] for change in changes))


def name_of(change: Comparison) -> str:
    """ "digits-at pgd20", "digits-at worst case linf@0.2", "digits-glow nll-in@8 bits/dim"."""
    words = [change.model or CLEAN, change.attack if change.model else ""]
    if change.attack == WORST_CASE:
        words = [
            change.model,
            "worst case",
            change.threat_model if change.threat_model != ALL_THREATS else "",
        ]
    plain = change.measure if change.measure == "accuracy under attack" else ""
    unit = {"%": plain, "distance": change.metric}.get(change.unit, change.unit)
    return " ".join(filter(None, [*words, unit]))


def numbers_of(change: Comparison) -> list[str]:
    """A, B, their difference with its interval, p, and how many samples fell and rose."""
    return [
        _value(change.a, change.unit),
        _value(change.b, change.unit),
        _difference(change),
        "-" if change.p_adjusted is None else _p_text(change.p_adjusted),
        f"{len(change.fell)}/{len(change.rose)}" if change.p is not None else "-",
    ]


def _value(side: Side | Reference | TableRow, unit: str) -> str:
    if side.status != "ok":
        return side.status
    if side.value is None:
        return "none finite"
    return f"{side.value:.1f}" if unit == "%" else bits_text(side.value)


def _difference(change: Comparison) -> str:
    if change.difference is None:
        return "-"
    if change.lower is None or change.upper is None:
        return _format_signed(change.difference, change.unit)
    bounds = ", ".join(_format_signed(value, change.unit) for value in (change.lower, change.upper))
    return f"{_format_signed(change.difference, change.unit)} [{bounds}]"


def _format_signed(value: float, unit: str) -> str:
    text = f"{value:+.1f}" if unit == "%" else f"{value:+.3g}"
    return text.replace("-0.0", "0.0") if unit == "%" and math.isclose(float(text), 0) else text


def _p_text(p: float) -> str:
    return f"{p:.2f}" if p >= 0.095 else f"{p:.1g}"


def _print_samples(change: Comparison, console: "Console") -> None:
    for ids, words in ((change.fell, "worse in B"), (change.rose, "better in B")):
        if ids:
            more = f" and {len(ids) - LISTED_IDS} more" if len(ids) > LISTED_IDS else ""
            listed = ", ".join(map(str, ids[:LISTED_IDS]))
            print_line(console, f"  {name_of(change)}, samples {words}: {listed}{more}")


def _print_notes(diff: RunDiff, console: "Console") -> None:
    """Why there is no number; what combined numbers leave out; near ties among the samples that changed."""
    lines: dict[str, None] = {}
    for change in diff.changes:
        sides = (("A", change.a), ("B", change.b))
        reasons = [f"{side} {s.status}: {s.note}" for side, s in sides if s.status != "ok" and s.note]
        ties = [f"{change.near_ties} of the samples that changed are near ties"] if change.near_ties else []
        for text in [*reasons, *change.notes, *ties]:
            lines[" ".join(f"* {name_of(change)}: {text}".split())] = None
    for line in list(lines)[:LISTED_DIFFERENCES]:
        print_line(console, line, "yellow")
    _more(console, len(lines), LISTED_DIFFERENCES)


def _method(diff: RunDiff) -> str:
    percent = f"{100 * (1 - diff.alpha):.12g} %"
    numbers = count_noun(diff.tested, "number")
    adjusted = (
        f"adjusted by Holm over {numbers}, and a fall needs p <= {diff.alpha:g}, too"
        if diff.correction == "holm"
        else f"not adjusted for {numbers}: of unchanged ones about {100 * diff.alpha / 2:g} in 100 fall"
    )
    return (
        f"B - A with its paired {percent} interval (accuracies: Newcombe 1998, method 10; means: normal). -/+: samples "
        f"worse and better in B. p: exact test of the two, {adjusted}."
    )
