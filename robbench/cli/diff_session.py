"""What `robbench diff` does, from its options to files, lines on the terminal and an exit code."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from robbench.bundle.runs import open_runs
from robbench.cli.base import CELLS_FAILED, echo_text, print_json
from robbench.compare.comparison import Correction
from robbench.compare.documents import annotations, as_junit
from robbench.compare.minimums import parse_minimums
from robbench.compare.runs import RunDiff, compare_runs, document
from robbench.core.errors import UserError
from robbench.core.places import check_output_file
from robbench.core.resources import write_text_atomically
from robbench.core.terminal import Terminal, print_line
from robbench.report.diff_text import diff_markdown, print_diff
from robbench.statistics.paired import ALPHA

SMALLEST_ALPHA = 1e-12  # far below, 1 - alpha / 2 is 1 and there is no quantile of it
FELL, UNLIKE = 1, CELLS_FAILED
SUMMARY = "GITHUB_STEP_SUMMARY"
TITLE = "robbench diff"


@dataclass(frozen=True)
class DiffRequest:
    """Options of `robbench diff`.

    Attributes:
        run_a, run_b: folders or bundles: what was, and what is.
        models, attacks: compare these only; empty: all.
        alpha, correction: error rate of intervals and tests, and how it is kept over many.
        minimums: texts as "aa=45".
        accept_differences: whether numbers that were not compared like for like are no reason for an exit code.
        output: what is printed.
        junit: file to write.
    """

    run_a: Path
    run_b: Path
    models: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ()
    alpha: float = ALPHA
    correction: Correction = "holm"
    minimums: tuple[str, ...] = ()
    accept_differences: bool = False
    output: Literal["text", "github", "markdown", "json"] = "text"
    junit: Path | None = None


def diff_runs(request: DiffRequest) -> int:
    """Compare two runs, print and write what changed; the exit code."""
    if not SMALLEST_ALPHA <= request.alpha < 1:
        raise UserError(
            f"--alpha {request.alpha:g} is no error rate; give a number between 0 and 1 (at least "
            f"{SMALLEST_ALPHA:g}), as in --alpha 0.05"
        )
    minimums, summary = parse_minimums(request.minimums), os.environ.get(SUMMARY)
    summary_file = Path(summary) if summary and request.output == "github" else None
    check_output_file(request.junit, "--junit")
    check_output_file(summary_file, SUMMARY)
    with open_runs([request.run_a, request.run_b]) as (a, b):
        found = compare_runs(
            a,
            b,
            (str(request.run_a), str(request.run_b)),
            models=request.models,
            attacks=request.attacks,
            alpha=request.alpha,
            correction=request.correction,
            minimums=minimums,
        )
    gaps = [] if request.accept_differences else found.gaps
    _print(request, found, gaps)
    if request.junit is not None:
        title = f"{TITLE} {request.run_a} {request.run_b}"
        write_text_atomically(request.junit, as_junit(title, [*found.changes, *found.minimums], gaps))
    if summary_file is not None:
        with summary_file.open("a", encoding="utf-8") as stream:
            stream.write(diff_markdown(found))
    return FELL if found.fell or found.missed else UNLIKE if gaps else 0


def _print(request: DiffRequest, found: RunDiff, gaps: list[str]) -> None:
    console = Terminal()
    if request.output == "json":
        print_json(document(found))
    elif request.output == "markdown":
        echo_text(diff_markdown(found))
    else:
        print_diff(found, console)
    if request.output == "github":
        for line in annotations(TITLE, [*found.fell, *found.missed], gaps):
            print_line(console, line)
