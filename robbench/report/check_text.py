"""The verdicts on reference tables and reference runs, for people."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from robbench.compare.comparison import FAILS, Comparison, Side
from robbench.compare.paired import ALL_MODELS
from robbench.compare.pairs import IDENTITY, Shift
from robbench.compare.tables import has_passed
from robbench.core.counting import count_noun
from robbench.core.terminal import print_line
from robbench.results.rows import WORST_CASE

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

LISTED_ABSENT, LISTED_FAILS = 40, 60
STYLES = {"pass": "green", "fail": "bold red", "differs": "magenta", "not run": "yellow"}
Kind = Literal["text", "number", "unbroken number", "verdict"]


def text_table(
    caption: str | None, columns: Sequence[tuple[str, Kind]], rows: Iterable[Sequence[str]]
) -> "Table":
    """A table in the style of all comparisons; verdicts are in their colours."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        caption=None if caption is None else Text(caption),
    )
    for name, kind in columns:
        table.add_column(
            name,
            justify="right" if "number" in kind else "left",
            overflow="fold",
            no_wrap=kind in ("verdict", "unbroken number"),
        )
    for row in rows:
        kinds = (kind for _, kind in columns)
        styles = (STYLES[text] if kind == "verdict" else "" for text, kind in zip(row, kinds, strict=True))
        table.add_row(*(Text(text, style) for text, style in zip(row, styles, strict=True)))
    return table


def print_results(results: Sequence[Comparison], console: "Console") -> bool:
    """Print the verdicts; whether the check passed.

    A small matrix checked against a large reference leaves thousands of numbers out: beyond `LISTED_ABSENT` they are
    counted a model instead of listed.
    """
    absent = [result for result in results if isinstance(result.b, Side)]  # and no row of the run
    few = len(absent) <= LISTED_ABSENT
    listed = results if few else [result for result in results if not isinstance(result.b, Side)]
    table = check_table(listed)
    if console.measure(table, options=console.options.update_width(10_000)).maximum > console.width:
        table = _narrow_table(listed)
    console.print(table)
    if not few:
        where = _by_model(absent)
        print_line(
            console,
            f"not run, not in this run: {count_noun(len(absent), 'number')} of the reference ({where})",
        )
    if all(result.verdict == "not run" for result in results):
        print_line(
            console, "Nothing of the reference was measured by this run, so nothing was checked.", "red"
        )
    return has_passed(results)


def check_table(results: Sequence[Comparison]) -> "Table":
    """The verdicts as a rich table: reference, measured, and what difference is allowed on what ground."""
    numbers: list[tuple[str, Kind]] = [
        (n, "number") for n in ("reference", "measured", "difference", "allowed")
    ]
    columns: list[tuple[str, Kind]] = [(name, "text") for name in ("model", "attack", "metric")]
    columns += [*numbers, ("verdict", "verdict"), ("why", "text")]
    rows = ([*_cells(r), show_verdict(r), "; ".join(filter(None, (r.reason, r.basis)))] for r in results)
    return text_table(_caption(results), columns, rows)


def _narrow_table(results: Sequence[Comparison]) -> "Table":
    """The same with one text a comparison, for a terminal or log that has no room for nine columns."""
    rows = []
    for result in results:
        model, attack, metric, reference, measured, *_ = _cells(result)
        why = f" ({result.reason})" if result.reason else ""
        rows.append(
            (show_verdict(result), f"{model} {attack} {metric.replace('_', ' ')}{why}", measured, reference)
        )
    columns: list[tuple[str, Kind]] = [
        ("verdict", "verdict"), ("what", "text"), ("measured", "number"), ("reference", "number"),
    ]  # fmt: skip
    return text_table(_caption(results), columns, rows)


def show_verdict(result: Comparison) -> str:
    """The verdict as printed: "differs" for a fail that does not gate."""
    return "differs" if result.verdict in FAILS and not result.gate else result.verdict


def _caption(results: Sequence[Comparison]) -> str:
    counts = Counter(map(show_verdict, results))
    ungated = f", {counts['differs']} differ and do not gate" if counts["differs"] else ""
    return f"{counts['pass']} pass, {counts['fail']} fail, {counts['not run']} not run{ungated}."


def _cells(result: Comparison) -> list[str]:
    threat = f" ({result.threat_model})" if result.threat_model and result.attack == WORST_CASE else ""
    return [
        result.model,
        result.attack + threat,
        result.metric,
        *("-" if value is None else f"{value:.4g}" for value in (result.a.value, result.b.value)),
        "-" if result.difference is None else f"{result.difference:+.3g}",
        "-" if result.tolerance is None else f"{result.tolerance:.3g}",
    ]


def _by_model(results: Iterable[Comparison]) -> str:
    counts = Counter(result.model for result in results)
    return ", ".join(f"{model or 'no model named'} {count}" for model, count in counts.items())


def print_paired(results: Sequence[Comparison], reference: Path, console: "Console") -> bool:
    """Print a line per attack and component (over all models where there are several) and every fail; whether the check
    passed: no fail, and something compared."""
    pooled = {(r.attack, r.component) for r in results if r.model == ALL_MODELS}
    compared = [r for r in results if r.component != IDENTITY]
    fails = [r for r in results if r.regression]
    whole = [r for r in compared if r.model == ALL_MODELS or (r.attack, r.component) not in pooled]
    single = [r for r in compared if r.regression and r not in whole][:LISTED_FAILS]
    console.print(_table_of_pairs([*whole, *single], _caption_of_pairs(results, reference)))
    for result in fails[:LISTED_FAILS]:
        print_line(console, f"fail: {result.model} x {result.attack}: {result.reason}", "red")
    if len(fails) > LISTED_FAILS:
        print_line(console, f"... and {len(fails) - LISTED_FAILS} fails more (--json FILE has all)", "red")
    if absent := [result for result in results if result.verdict == "not run"]:
        count = count_noun(len(absent), "cell")
        print_line(console, f"not run: {count} of the reference ({_by_model(absent)})", "yellow")
    if not compared:
        print_line(console, "Nothing of the reference run is in this run, so nothing was checked.", "red")
    return bool(compared) and not fails


def _caption_of_pairs(results: Sequence[Comparison], reference: Path) -> str:
    return (
        f"{_caption(results).removesuffix('.')}, sample by sample against "
        f"{reference}. Flips: broken now / robust now. Moved: searches that went another way. Steps: broken later / "
        f"earlier. Calls: forwards and backwards on samples that hold, over the reference's."
    )


def _table_of_pairs(results: Sequence[Comparison], caption: str) -> "Table":
    several = any(result.model not in ("", ALL_MODELS) for result in results)
    names = [*(["model"] if several else []), "attack", "component"]
    columns: list[tuple[str, Kind]] = [(name, "text") for name in names]
    columns += [(name, "number") for name in ("n", "flips", "moved", "steps", "shift", "calls")]
    rows = (
        [*([r.model] if several else []), r.attack, r.component, *_shift_cells(r.shift), r.verdict]
        for r in results
    )
    return text_table(caption, [*columns, ("verdict", "verdict")], rows)


def _shift_cells(shift: Shift) -> list[str]:
    pairs = (shift.forwards, shift.reference_forwards), (shift.backwards, shift.reference_backwards)
    return [
        str(shift.n),
        f"{shift.lost}/{shift.gained}",
        str(shift.moved),
        f"{shift.later}/{shift.earlier}",
        f"{shift.shift:+.2g}" if shift.moved else "0",
        " ".join(f"{now / before:.2f}" if before else "-" for now, before in pairs),
    ]
