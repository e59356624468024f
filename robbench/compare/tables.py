"""Compares a run with reference tables, number by number: pass, fail or not run.

NaN and infinity never pass. A cell that failed in the run fails; one that is missing is "not run": no number to judge.
A worst case or average over other attacks than the reference's is another quantity: not run, so that a part of a
published matrix can be checked against all of it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from robbench.compare.policy import Policy, same_samples
from robbench.compare.reference import Budget, Reference, read_references
from robbench.core.errors import UserError
from robbench.results.rows import TableRow
from robbench.results.tables import leaderboard
from robbench.store.records import Run

Verdict = Literal["pass", "fail", "not run"]
_SAME_BUDGET = 1e-6  # relative: 8/255 written with seven digits is still 8/255


@dataclass(frozen=True)
class CheckResult:
    """Verdict on one reference number. tolerance: the absolute one that was applied, None when none was. basis: what
    the tolerance is made of."""

    reference: Reference
    measured: TableRow | None
    tolerance: float | None
    verdict: Verdict
    reason: str
    basis: str = ""

    @property
    def difference(self) -> float | None:
        """Measured minus reference value, None when one of them is missing."""
        if self.measured is None or self.measured.value is None or self.reference.value is None:
            return None
        return self.measured.value - self.reference.value

    @property
    def regression(self) -> bool:
        """Whether this alone fails a check: rows with gate false never do."""
        return self.verdict == "fail" and self.reference.gate


def check(
    measured: Run | Sequence[TableRow],
    against: Path,
    tolerance: float | None = None,
    policy: Policy | None = None,
) -> list[CheckResult]:
    """One result a row of the reference CSV (or of all in a folder), in its order, for a run or its `leaderboard`.

    tolerance: percentage points, instead of the policy's for numbers in percent. Raises `UserError` for a reference
    that is missing, no CSV, lacks columns or holds malformed numbers, and for a negative tolerance.
    """
    if tolerance is not None and not (math.isfinite(tolerance) and tolerance >= 0):
        raise UserError(f"--tolerance {tolerance} is no tolerance; give a finite number of at least 0")
    chosen = policy or Policy(points=tolerance)
    rows = leaderboard(measured) if isinstance(measured, Run) else measured
    return [_judge(reference, rows, chosen) for reference in read_references(against)]


def passed(results: Sequence[CheckResult]) -> bool:
    """No regression and at least one number compared: a check that compared nothing has shown nothing."""
    return not any(result.regression for result in results) and any(
        result.verdict != "not run" for result in results
    )


def without_reference(measured: Sequence[TableRow], results: Sequence[CheckResult]) -> list[str]:
    """Accuracies, and of flows bits/dim, of the run that no reference number speaks of, as "model x attack": after a
    renamed attack or model, everything that is left may still pass."""
    judged = [r for r in results if r.verdict != "not run"]
    compared = {(r.measured.model, r.measured.attack) for r in judged if r.measured is not None}
    names = {(row.model, row.attack): None for row in measured if row.kind.headline}
    return [f"{model} x {attack}" for model, attack in names if (model, attack) not in compared]


def _judge(reference: Reference, rows: Sequence[TableRow], policy: Policy) -> CheckResult:
    found = [row for row in rows if _matches(reference, row)]
    if len(found) > 1:
        raise UserError(
            f"{reference.path}, line {reference.line}: {reference.model} {reference.attack} {reference.metric} matches "
            f"{len(found)} numbers of the run; add the columns threat_model, epsilon and eta"
        )
    if not found:
        return CheckResult(reference, None, None, "not run", "not in the run")
    row = found[0]
    if reference.value is None:
        return CheckResult(reference, row, None, "not run", "the reference has no number")
    if reference.measure not in ("", row.measure):
        why = f"the reference is {reference.measure}, the run's number {row.measure or 'another one'}"
        return CheckResult(reference, row, None, "not run", why)
    if not row.measured:
        verdict: Verdict = "fail" if row.status == "failed" and not reference.combined else "not run"
        why = f"{row.status}: {row.note}" if row.note else row.status
        return CheckResult(reference, row, None, verdict, why)
    if not reference.stated:
        why = "the reference does not say which attacks it combines; write it anew from its run (column combined)"
        return CheckResult(reference, row, None, "not run", why)
    if not _over_the_same(reference, row):
        return CheckResult(reference, row, None, "not run", f"the run's number is {row.note}")
    return _compare(reference, row, reference.value, policy)


def _over_the_same(reference: Reference, row: TableRow) -> bool:
    """Whether both numbers combine the same attacks, or are means over equally many samples."""
    if reference.combined:
        return reference.combined == frozenset(row.combined)
    return reference.scope in ("", row.scope)


def _compare(reference: Reference, row: TableRow, value: float, policy: Policy) -> CheckResult:
    if not math.isfinite(value):
        return CheckResult(reference, row, reference.tolerance, "fail", f"the reference value is {value}")
    if row.value is None or not math.isfinite(row.value):
        why = f"measured no finite value ({row.note or row.value})"
        return CheckResult(reference, row, reference.tolerance, "fail", why)
    allowed = policy.allowed(reference, row)
    others = _other_samples(reference, row)
    if not allowed.comparable:
        return CheckResult(reference, row, allowed.tolerance, "fail", others, allowed.basis)
    # Values printed with few digits: allow for the rounding of the subtraction, not more.
    close = abs(row.value - value) <= allowed.tolerance + 1e-9 * max(1.0, abs(value))
    return CheckResult(reference, row, allowed.tolerance, "pass" if close else "fail", others, allowed.basis)


def _matches(reference: Reference, row: TableRow) -> bool:
    same = (reference.dataset, reference.model, reference.attack, reference.metric)
    return (
        same == (row.dataset, row.model, row.attack, row.metric)
        and reference.threat_model in (None, row.threat_model)
        and _same_budget(reference.epsilon, row.epsilon)
        and _same_budget(reference.eta, row.eta)
    )


def _same_budget(reference: Budget, measured: float | None) -> bool:
    if reference is None:
        return True
    if reference == "none" or measured is None:
        return reference == "none" and measured is None
    return math.isclose(reference, measured, rel_tol=_SAME_BUDGET, abs_tol=1e-12)


def _other_samples(reference: Reference, row: TableRow) -> str:
    """How the measured samples differ from the reference's; empty when they do not."""
    if same_samples(reference, row) is not False:
        return ""
    pairs = (("n", reference.n, row.n), ("seed", reference.seed, row.seed))
    return ", ".join(
        f"{name} {ours}, reference {other}" for name, other, ours in pairs if other not in (None, ours)
    )
