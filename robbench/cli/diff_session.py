"""What `robbench diff` does, from its options to lines on the terminal and a verdict."""

from dataclasses import dataclass
from pathlib import Path

from robbench.bundle.runs import opened_runs
from robbench.cli.base import print_json
from robbench.compare.comparison import Correction
from robbench.compare.runs import compare_runs, document
from robbench.core.errors import UserError
from robbench.core.terminal import Terminal
from robbench.report.diff_text import print_diff
from robbench.statistics.paired import ALPHA

SMALLEST_ALPHA = 1e-12  # far below, 1 - alpha / 2 is 1 and there is no quantile of it


@dataclass(frozen=True)
class DiffRequest:
    """Options of `robbench diff`. models, attacks: compare these only; empty: all. as_json: JSON instead of tables."""

    run_a: Path
    run_b: Path
    models: tuple[str, ...] = ()
    attacks: tuple[str, ...] = ()
    alpha: float = ALPHA
    correction: Correction = "holm"
    as_json: bool = False


def diff_runs(request: DiffRequest) -> bool:
    """Compare two runs and print what changed; True when nothing fell."""
    if not SMALLEST_ALPHA <= request.alpha < 1:
        raise UserError(
            f"--alpha {request.alpha:g} is no error rate; give a number between 0 and 1 (at least "
            f"{SMALLEST_ALPHA:g}), as in --alpha 0.05"
        )
    with opened_runs([request.run_a, request.run_b]) as (a, b):
        found = compare_runs(
            a,
            b,
            (str(request.run_a), str(request.run_b)),
            models=request.models,
            attacks=request.attacks,
            alpha=request.alpha,
            correction=request.correction,
        )
    if request.as_json:
        print_json(document(found))
    else:
        print_diff(found, Terminal())
    return not found.fell
