"""Compares a run with reference tables, number by number: pass, fail or not run.

NaN and infinity never pass. A cell that failed in the run fails; one that is missing is "not run": no number to judge.
A worst case or average over other attacks than the reference's is another quantity: not run, so that a part of a
published matrix can be checked against all of it.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from robbench.compare.comparison import Comparison, Side, Verdict
from robbench.compare.keys import Key, pair_rows
from robbench.compare.policy import Policy, same_samples
from robbench.compare.reference import Reference, read_references
from robbench.core.errors import UserError
from robbench.results.rows import TableRow
from robbench.results.tables import leaderboard
from robbench.store.records import Run


def check(
    measured: Run | Sequence[TableRow],
    against: Path,
    tolerance: float | None = None,
    policy: Policy | None = None,
) -> list[Comparison]:
    """One comparison a row of the reference CSV (or of all in a folder), in its order, for a run or its `leaderboard`.

    tolerance: percentage points, instead of the policy's for numbers in percent. Raises `UserError` for a reference
    that is missing, no CSV, lacks columns or holds malformed numbers, and for a negative tolerance.
    """
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise UserError(f"--tolerance {tolerance} is no tolerance; give a finite number of at least 0")
    chosen = policy or Policy(points=tolerance)
    rows = leaderboard(measured) if isinstance(measured, Run) else measured
    return [_compare(*pair, chosen) for pair in pair_rows(read_references(against), rows, _key)]


def has_passed(results: Sequence[Comparison]) -> bool:
    """No regression and at least one number compared: a check that compared nothing has shown nothing."""
    return not any(result.regression for result in results) and any(
        result.verdict != "not run" for result in results
    )


def list_compared(results: Sequence[Comparison]) -> set[str]:
    """What has a verdict, as "model x attack"."""
    return {f"{result.model} x {result.attack}" for result in results if result.verdict != "not run"}


def without_reference(measured: Sequence[TableRow], results: Sequence[Comparison]) -> list[str]:
    """Accuracies, and of flows bits/dim, of the run that no reference number speaks of, as "model x attack": after a
    renamed attack or model, everything that is left may still pass."""
    compared = list_compared(results)
    names = dict.fromkeys(f"{row.model} x {row.attack}" for row in measured if row.kind.headline)
    return [name for name in names if name not in compared]


def _compare(reference: Reference, found: Sequence[TableRow], policy: Policy) -> Comparison:
    if len(found) > 1:
        raise UserError(
            f"{reference.path}, line {reference.line}: {reference.model} {reference.attack} {reference.metric} matches "
            f"{len(found)} numbers of the run; add the columns threat_model, epsilon and eta"
        )
    row = found[0] if found else None
    values = reference.value, row.value if row else None
    blank = Comparison(
        model=reference.model,
        attack=reference.attack,
        metric=reference.metric,
        threat_model=reference.threat_model or "",
        a=reference,
        b=row or Side(),
        gate=reference.gate,
        path=reference.path,
        line=reference.line,
        n=row.n if row else 0,
        difference=None if values[0] is None or values[1] is None else values[1] - values[0],
    )
    return _judge(blank, reference, row, policy)


def _judge(blank: Comparison, reference: Reference, row: TableRow | None, policy: Policy) -> Comparison:
    if row is None:
        return blank.with_verdict("not run", "not in the run")
    if reference.value is None:
        return blank.with_verdict("not run", "the reference has no number")
    if reference.measure not in ("", row.measure):
        other = row.measure or "another one"
        return blank.with_verdict(
            "not run", f"the reference is {reference.measure}, the run's number {other}"
        )
    if not row.measured:
        failed = row.status == "failed" and not reference.combined
        return blank.with_verdict(
            "fail" if failed else "not run", f"{row.status}: {row.note}" if row.note else row.status
        )
    if not reference.stated:
        why = "the reference does not say which attacks it combines; write it anew from its run (column combined)"
        return blank.with_verdict("not run", why)
    if not _over_the_same(reference, row):
        return blank.with_verdict("not run", f"the run's number is {row.note}")
    if not math.isfinite(reference.value):
        return blank.with_verdict("fail", f"the reference value is {reference.value}", reference.tolerance)
    if row.value is None or not math.isfinite(row.value):
        return blank.with_verdict(
            "fail", f"measured no finite value ({row.note or row.value})", reference.tolerance
        )
    allowed = policy.allow(reference, row)
    # Values printed with few digits: allow for the rounding of the subtraction, not more.
    rounding = 1e-9 * max(1.0, abs(reference.value))
    close = abs(row.value - reference.value) <= allowed.tolerance + rounding
    verdict: Verdict = "pass" if close and allowed.comparable else "fail"
    return blank.with_verdict(verdict, _other_samples(reference, row), allowed.tolerance, allowed.basis)


def _over_the_same(reference: Reference, row: TableRow) -> bool:
    """Whether both numbers combine the same attacks, or are means over equally many samples."""
    if reference.combined:
        return reference.combined == frozenset(row.combined)
    return reference.scope in ("", row.scope)


def _key(row: Reference | TableRow) -> Key:
    """A row of the run always says whether it has a budget, a reference only where it has the column."""
    budgets = row.epsilon, row.eta
    epsilon, eta = budgets if isinstance(row, Reference) else ["none" if b is None else b for b in budgets]
    return Key(row.model, row.attack, None, row.dataset, row.metric, row.threat_model, epsilon, eta)


def _other_samples(reference: Reference, row: TableRow) -> str:
    """How the measured samples differ from the reference's; empty when they do not."""
    if same_samples(reference, row) is not False:
        return ""
    pairs = (("n", reference.n, row.n), ("seed", reference.seed, row.seed))
    return ", ".join(
        f"{name} {ours}, reference {other}" for name, other, ours in pairs if other not in (None, ours)
    )
