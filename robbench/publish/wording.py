"""Sentences and number formats that terminal, Markdown and HTML share."""

from collections.abc import Sequence

from robbench.matrix.records import Run
from robbench.publish.rows import AVERAGE, WORST_CASE, TableRow
from robbench.specs import ModelKind

INTERVALS = (
    "95 % intervals: Wilson score for accuracies, bootstrap over samples for the average (unweighted mean of "
    "clean and all attacks). Worst case: a sample counts as correct only if no attack broke it."
)


def number_text(row: TableRow | None) -> str:
    """Three decimals, or a dash where nothing was measured; a star where samples were left out."""
    if row is None or row.value is None:
        return "-" if row is None or not row.note else "none finite"
    digits = f"{row.value:.3f}" if abs(row.value) < 1e4 else f"{row.value:.3e}"
    return digits + ("*" if "left out" in row.note else "")


def summary(run: Run, kind: ModelKind | None = None) -> str:
    """One sentence: how much was measured, of classifiers or flows alone when `kind` says so."""
    cells = [result.cell for result in run.cells if kind in (None, result.cell.attack.target)]
    models = len({cell.model for cell in cells})
    attacks = len({cell.attack.label for cell in cells})
    counted = [_counted(models, "model"), _counted(attacks, "attack"), f"n = {run.n} test images"]
    return f"{', '.join(counted)}, seed {run.seed}."


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def versions(run: Run) -> str:
    """ "robbench 0.1.0, torch 2.8.0", as recorded by the run."""
    return ", ".join(f"{name} {version}" for name, version in run.versions.items())


def problems(rows: Sequence[TableRow]) -> list[str]:
    """What a reader must know about single numbers: failures, missing parts, near ties, left-out values."""
    kept = [row for row in rows if row.attack not in (WORST_CASE, AVERAGE) and _is_problem(row)]
    return [f"{row.model}, {row.attack}, {row.metric.replace('_', ' ')}: {_reason(row)}" for row in kept]


def _is_problem(row: TableRow) -> bool:
    return row.status != "ok" or any(word in row.note for word in ("left out", "|margin|", "differ"))


def _reason(row: TableRow) -> str:
    if row.status == "ok":
        return row.note
    return f"{row.status} ({row.note})" if row.note else row.status
