"""The verdicts on reference tables, for people."""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from robbench.compare.reference import Reference
from robbench.compare.tables import CheckResult, passed
from robbench.core.counting import counted
from robbench.core.terminal import print_line

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

LISTED_ABSENT = 40
STYLES = {"pass": "green", "fail": "bold red", "differs": "magenta", "not run": "yellow"}


def print_results(results: Sequence[CheckResult], console: "Console") -> bool:
    """Print the verdicts; whether the check `passed`.

    A small matrix checked against a large reference leaves thousands of numbers out: beyond `LISTED_ABSENT` they are
    counted a model instead of listed.
    """
    absent = [result for result in results if _absent(result)]
    few = len(absent) <= LISTED_ABSENT
    shown = results if few else [result for result in results if not _absent(result)]
    table = check_table(shown)
    if console.measure(table, options=console.options.update_width(10_000)).maximum > console.width:
        table = _narrow_table(shown)
    console.print(table)
    if not few:
        counts = Counter(result.reference.model for result in absent)
        listed = ", ".join(f"{model or 'no model named'} {count}" for model, count in counts.items())
        print_line(
            console, f"not run, not in this run: {counted(len(absent), 'number')} of the reference ({listed})"
        )
    if not any(result.verdict != "not run" for result in results):
        print_line(
            console, "Nothing of the reference was measured by this run, so nothing was checked.", "red"
        )
    return passed(results)


def _absent(result: CheckResult) -> bool:
    return result.verdict == "not run" and result.measured is None


def check_table(results: Sequence[CheckResult]) -> "Table":
    """The verdicts as a rich table: reference, measured, and what difference is allowed on what ground."""
    from rich.text import Text

    table = blank_table(_caption(results))
    for name in ("model", "attack", "metric"):
        table.add_column(name, overflow="fold")
    for name in ("reference", "measured", "difference", "allowed"):
        table.add_column(name, justify="right", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("why", overflow="fold")
    for result in results:
        why = "; ".join(part for part in (result.reason, result.basis) if part)
        table.add_row(*(Text(text) for text in _cells(result)), verdict_text(shown(result)), Text(why))
    return table


def _narrow_table(results: Sequence[CheckResult]) -> "Table":
    """The same with one text a comparison, for a terminal or log that has no room for nine columns."""
    from rich.text import Text

    table = blank_table(_caption(results))
    table.add_column("verdict", no_wrap=True)
    table.add_column("what", overflow="fold")
    for name in ("measured", "reference"):
        table.add_column(name, justify="right", overflow="fold")
    for result in results:
        model, attack, metric, reference, measured, *_ = _cells(result)
        what = f"{model} {attack} {metric.replace('_', ' ')}" + (
            f" ({result.reason})" if result.reason else ""
        )
        table.add_row(verdict_text(shown(result)), *(Text(text) for text in (what, measured, reference)))
    return table


def blank_table(caption: str) -> "Table":
    """A table in the style of all checks."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    return Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), caption=Text(caption))


def verdict_text(verdict: str) -> "Text":
    """A verdict in its colour."""
    from rich.text import Text

    return Text(verdict, style=STYLES[verdict])


def shown(result: CheckResult) -> str:
    """The verdict as printed: "differs" for a fail that does not gate."""
    return "differs" if result.verdict == "fail" and not result.regression else result.verdict


def _caption(results: Sequence[CheckResult]) -> str:
    counts = Counter(map(shown, results))
    ungated = f", {counts['differs']} differ and do not gate" if counts["differs"] else ""
    return f"{counts['pass']} pass, {counts['fail']} fail, {counts['not run']} not run{ungated}."


def _cells(result: CheckResult) -> list[str]:
    reference, measured = result.reference, result.measured
    difference = "-" if result.difference is None else f"{result.difference:+.3g}"
    return [
        reference.model,
        reference.attack + _qualifier(reference),
        reference.metric,
        _number(reference.value),
        _number(measured.value if measured else None),
        difference,
        "-" if result.tolerance is None else f"{result.tolerance:.3g}",
    ]


def _qualifier(reference: Reference) -> str:
    """The threat model where the attack alone does not say it."""
    return (
        f" ({reference.threat_model})" if reference.threat_model and reference.attack == "worst-case" else ""
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
