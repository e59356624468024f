"""Check that a bundle states the suspicions that follow from its own counts. Needs no model and no data."""

from collections.abc import Iterator
from pathlib import Path

from robbench.attacks.named import ENGINE_VERSION
from robbench.bundle.findings import Finding, judge
from robbench.core.errors import UserError
from robbench.run.shard_work import sum_diagnostics
from robbench.store.ledger import Ledger, refuse_shard
from robbench.store.records import CellResult, Run

CHECK = "suspicions"


def suspicion_findings(folder: Path, run: Run) -> Iterator[Finding]:
    """One finding per cell of a classifier: whether it states the suspicions that follow from the counts in its shards.

    folder: the unpacked bundle.
    """
    for result in run.cells:
        if result.cell.decides:
            yield _finding(folder, result)


def _finding(folder: Path, result: CellResult) -> Finding:
    cell, rows = result.cell, len(result.rows)
    try:
        counted = sum_diagnostics(Ledger(folder).shards(cell.hash, refuse_shard))
        found = {_without_advice(one.text) for one in counted.suspicions}
    except (UserError, ValueError, ArithmeticError, RecursionError) as error:
        problem = f"its shards hold no counts that robbench writes ({' '.join(str(error).split())[:100]})"
        return judge(cell.model, cell.attack.label, CHECK, 0, [problem])
    stated = set(map(_without_advice, cell.suspicions))
    if counted.samples < rows:  # old shards without counts, or removed ones
        reason = (
            f"its shards count {counted.samples} of {rows} samples, and only counts tell what was suspicious"
        )
        return Finding(cell.model, cell.attack.label, CHECK, "unchecked", 0, reason)
    if stated != found and not counted.classes:
        reason = "its shards lack counts that robbench writes since, and earlier rules found other counts suspicious"
        return Finding(cell.model, cell.attack.label, CHECK, "unchecked", 0, reason)
    engine = cell.engine.partition(",")[0]
    if stated != found and engine != f"robbench engine {ENGINE_VERSION}":
        reason = f"measured by {engine}, which found other counts suspicious"
        return Finding(cell.model, cell.attack.label, CHECK, "unchecked", 0, reason)
    problems = [f"it leaves out: {text[:100]}" for text in sorted(found - stated)]
    problems += [f"its counts do not give: {text[:100]}" for text in sorted(stated - found)]
    return judge(cell.model, cell.attack.label, CHECK, counted.samples, problems)


def _without_advice(text: str) -> str:
    """What was found, without the next step at the end, which is worded anew now and then and claims nothing."""
    return text.rpartition("; ")[0] or text
