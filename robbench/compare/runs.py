"""Two runs compared: identities, common cells and samples, every number with its verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from robbench.compare.comparison import VERDICTS, Comparison, Correction, judge
from robbench.compare.identity import Difference, OtherRows, differences, other_labels, other_rows
from robbench.compare.minimums import hold_to_minimums
from robbench.compare.numbers import Numbers
from robbench.compare.pairing import PairedRuns, pair_runs
from robbench.core.counting import count_noun
from robbench.core.errors import known_name
from robbench.results.rows import cell_model, cell_status
from robbench.results.tables import leaderboard
from robbench.specs import attack_among
from robbench.statistics.paired import ALPHA
from robbench.store.records import CellResult, Run


@dataclass(frozen=True)
class RunDiff:
    """What `robbench diff` found.

    Attributes:
        names: of the runs as given.
        runs: both, on their common cells and samples.
        alpha: 1 - confidence of the intervals, and the level of the tests.
        correction: of the p-values for their number.
        differences: settings that differ.
        other_rows: cells of one hash and other rows.
        other_labels: common samples with another label.
        changes: every number, falls first, the biggest of each verdict before the others.
        minimums: accuracies that B must reach.
    """

    names: tuple[str, str]
    runs: PairedRuns
    alpha: float
    correction: Correction
    differences: tuple[Difference, ...]
    other_rows: tuple[OtherRows, ...]
    other_labels: int
    changes: tuple[Comparison, ...]
    minimums: tuple[Comparison, ...] = ()

    @property
    def fell(self) -> list[Comparison]:
        """The numbers that fell; with `missed` what makes the exit code 1."""
        return [change for change in self.changes if change.regression]

    @property
    def missed(self) -> list[Comparison]:
        """The minimums that B does not reach."""
        return [minimum for minimum in self.minimums if minimum.regression]

    @property
    def gaps(self) -> list[str]:
        """What of A was not compared like for like, so that no fall is no proof: what makes the exit code 3."""
        absent = [f"{cell_model(r)} x {r.cell.attack.label}" for r in self.runs.only_a]
        unfinished = [c for c in self.changes if c.verdict == "not compared" and c.a.status == "ok"]
        labels = f"{count_noun(self.other_labels, 'common sample')} with another label"
        return [
            *(found.text for found in self.differences if found.unlike),
            *([labels] if self.other_labels else []),
            *(f"{name}: not in B" for name in absent),
            *(f"{c.model} x {c.attack}: {c.b.status} in B" for c in unfinished),
        ]

    @property
    def tested(self) -> int:
        """p-values that Holm's adjustment is over."""
        return sum(change.p is not None for change in self.changes)


def compare_runs(
    a: Run,
    b: Run,
    names: tuple[str, str],
    *,
    models: Sequence[str] = (),
    attacks: Sequence[str] = (),
    alpha: float = ALPHA,
    correction: Correction = "holm",
    minimums: Mapping[str, float] = MappingProxyType({}),
) -> RunDiff:
    """Compare run b with run a on the samples and cells of both.

    models, attacks: compare these only (labels or names of attacks; empty: all). minimums: accuracies in percent that
    every classifier of b must reach, by attack (`minimums.hold_to_minimums`); they ask for all its samples and attacks.
    `UserError` for a name that is in neither run, and where nothing is in both.
    """
    whole = _filter((b,), models, ()) if minimums else []
    held = [c for run in whole for c in hold_to_minimums(minimums, leaderboard(run), names[1])]
    a, b = _filter((a, b), models, attacks)
    runs = pair_runs(a, b, names)
    changes = judge(Numbers(runs, 1 - alpha).all(), alpha, correction)
    return RunDiff(
        names=names,
        runs=runs,
        alpha=alpha,
        correction=correction,
        differences=tuple(differences(runs)),
        other_rows=tuple(other_rows(runs)),
        other_labels=other_labels(runs),
        changes=tuple(sorted(changes, key=_order)),
        minimums=tuple(held),
    )


def _order(change: Comparison) -> tuple[int, float]:
    better = change.verdict in ("better", "maybe better")
    return VERDICTS.index(change.verdict), change.loss if better else -change.loss


def _filter(runs: Sequence[Run], models: Sequence[str], attacks: Sequence[str]) -> list[Run]:
    cells = [result for run in runs for result in run.cells]
    of_models = {cell_model(result) for result in cells}
    of_attacks = {name for result in cells for name in _names(result)}
    models = [known_name("model in either run", name, of_models) for name in models]
    attacks = [attack_among(name, of_attacks, "attack in either run") for name in attacks]
    return [
        replace(
            run,
            cells=[
                result
                for result in run.cells
                if (not models or cell_model(result) in models)
                and (not attacks or not _names(result).isdisjoint(attacks))
            ],
        )
        for run in runs
    ]


def _names(result: CellResult) -> set[str]:
    return {result.cell.attack.label, result.cell.attack.name}


def document(diff: RunDiff) -> dict[str, Any]:
    """Everything as plain values for JSON: every number, every sample id."""
    runs = diff.runs
    return {
        "schema_version": 1,
        "a": _run(diff.names[0], runs.a),
        "b": _run(diff.names[1], runs.b),
        "fell": bool(diff.fell),
        "missed": bool(diff.missed),
        "gaps": diff.gaps,
        "alpha": diff.alpha,
        "correction": diff.correction,
        "tested": diff.tested,
        "common_samples": len(runs.ids),
        "differences": [vars(found) for found in diff.differences],
        "other_labels": diff.other_labels,
        "same_hash_other_rows": [vars(found) for found in diff.other_rows],
        "only_a": [_cell(runs.a, result) for result in runs.only_a],
        "only_b": [_cell(runs.b, result) for result in runs.only_b],
        "changes": [_change(change) for change in diff.changes],
        "minimums": [
            {"model": m.model, "attack": m.attack, "verdict": m.verdict, "reason": m.reason, **m.values}
            for m in diff.minimums
        ],
    }


def _run(name: str, run: Run) -> dict[str, Any]:
    return {
        "run": name,
        "dataset": run.dataset,
        "dataset_revision": run.dataset_revision,
        "seed": run.seed,
        "n": run.n,
        "versions": run.versions,
    }


def _cell(run: Run, result: CellResult) -> dict[str, Any]:
    status, note = cell_status(run, result)
    return {
        "model": cell_model(result),
        "attack": result.cell.attack.label,
        "status": status,
        "note": note,
    }


def _change(change: Comparison) -> dict[str, Any]:
    left_out = ("path", "line", "tolerance", "basis", "component", "shift")  # of tables and reference runs
    kept = {name: value for name, value in vars(change).items() if name not in left_out}
    return {**kept, "a": vars(change.a), "b": vars(change.b), "regression": change.regression}
