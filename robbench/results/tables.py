"""A run as tidy table rows: one number per row, with its interval, sample count and status."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from robbench.metrics import all_metrics
from robbench.metrics.accuracy import (
    ACCURACY,
    AVERAGE_ACCURACY,
    CORRUPTION_ACCURACY,
    ROBUST_ACCURACY,
    WORST_CASE_ACCURACY,
    count_near_ties,
)
from robbench.metrics.minimal_norm import is_minimal
from robbench.metrics.verdicts import clean_correct, right_under_attack, robust, shown_verdicts
from robbench.results import corruptions, unforeseen
from robbench.results.minimal_norm import smallest_rows
from robbench.results.parity import parity_note
from robbench.results.perturbation import frechet_rows
from robbench.results.rows import (
    AVERAGE,
    CLEAN,
    COLUMNS,
    WORST_CASE,
    ModelResults,
    TableRow,
    adversaries,
    blank_model_row,
    cell_rows,
    complete,
    models,
    with_estimate,
    without_value,
)
from robbench.results.threats import group_by_threat
from robbench.specs import ATTACKED_BY, Threat
from robbench.statistics import accuracy
from robbench.store.records import CellResult, Run

__all__ = ["COLUMNS", "TableRow", "Wide", "leaderboard", "models", "wide"]

ALL_THREATS = "all"


@dataclass(frozen=True)
class Wide:
    """The accuracies as a matrix: one line per model; columns clean, attacks, worst cases, average. Models with a
    partial worst case or average come last.

    cells: by (model, column); pairs without a planned cell are absent.
    """

    models: tuple[tuple[str, str], ...]  # (name, defense)
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], TableRow]


def wide(rows: Sequence[TableRow], per_threat_model: bool = True) -> Wide:
    """`rows` of `leaderboard` as a matrix.

    With `per_threat_model`, the worst case under one threat model and budget has a column where it combines several but
    not all attacks.
    """
    accuracies = _without_corruptions([row for row in rows if row.kind.accuracy])
    threats: dict[Threat, set[str]] = {}
    for row in accuracies:
        if (
            row.metric == ACCURACY.name
            and row.attack != CLEAN
            and row.threat_model not in corruptions.THREAT_MODELS
        ):
            threats.setdefault(_threat(row), set()).add(row.attack)
    names = [name for name, _, _ in threats]
    cells: dict[tuple[str, str], TableRow] = {}
    for row in accuracies:
        if _is_of_one_threat(row) and not (per_threat_model and len(threats) > 1 and _several(row, threats)):
            continue
        cells[row.model, _column(row, names.count(row.threat_model) > 1)] = row
    columns = dict.fromkeys(column for _, column in cells)
    names_and_defenses, partly = _names(accuracies), partly_attacked(accuracies)
    return Wide(
        models=tuple(sorted(names_and_defenses, key=lambda model: model[0] in partly)),
        columns=tuple(sorted(columns, key=_column_group)),
        cells=cells,
    )


def _names(rows: Sequence[TableRow]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((row.model, row.defense) for row in rows))


def partly_attacked(rows: Sequence[TableRow]) -> set[str]:
    """Names of the models that were run under a part of the attacks only."""
    return {row.model for row in rows if row.status == "partial"}


def _without_corruptions(rows: Sequence[TableRow]) -> list[TableRow]:
    """`rows` without the single corruptions where their mean is there; these have tables of their own."""
    means = {row.threat_model for row in rows if row.metric == CORRUPTION_ACCURACY.name}
    return [row for row in rows if row.threat_model not in means or row.metric == CORRUPTION_ACCURACY.name]


def _threat(row: TableRow) -> Threat:
    return row.threat_model, row.epsilon, row.eta


def _several(worst: TableRow, threats: Mapping[Threat, set[str]]) -> bool:
    """Whether a worst case under one threat model combines several attacks; where it has no budget
    (`ResolvedAttack.threat`), theirs may differ."""
    own = threats.get(_threat(worst))
    if own is None:
        own = set().union(
            *(attacks for threat, attacks in threats.items() if threat[0] == worst.threat_model)
        )
    return len(own) > 1


def _is_of_one_threat(row: TableRow) -> bool:
    return row.attack == WORST_CASE and row.threat_model != ALL_THREATS


def robust_column(label: str) -> str:
    """Column of the robust accuracy of an attack whose own column shows the accuracy under attack."""
    return f"{label} (robust)"


def _column(row: TableRow, with_budget: bool) -> str:
    if row.metric == ROBUST_ACCURACY.name:
        return robust_column(row.attack)
    if not _is_of_one_threat(row):
        return "worst case" if row.attack == WORST_CASE else row.attack
    budgets = [f"{value:g}" for value in (row.epsilon, row.eta) if value is not None] if with_budget else []
    return "@".join([f"worst {row.threat_model}", *budgets])


def _column_group(column: str) -> int:
    """Clean, attacks, worst cases, average; the order inside a group stays."""
    if column.startswith("worst "):
        return 3 if column == "worst case" else 2
    return {CLEAN: 0, AVERAGE: 4}.get(column, 1)


def leaderboard(run: Run) -> list[TableRow]:
    """All numbers of a run. Order: models as planned; for a classifier clean, attacks, worst cases, average, then
    likelihoods and distances by attack; for a flow likelihoods and distances by attack. Fréchet distances come last."""
    return [*run.once(_ledger_rows), *frechet_rows(run)]


def _ledger_rows(run: Run) -> tuple[TableRow, ...]:
    """The rows that follow from the ledger alone, computed once for all tables and pages."""
    rows: list[TableRow] = []
    found = models(run)
    attacks = searched_attacks([model for model in found if model.kind == "classifier"])
    for model in found:
        rows += (
            _classifier_rows(run, model, attacks) if model.kind == "classifier" else _flow_rows(run, model)
        )
    return tuple(rows)


def rows_under_attack(run: Run) -> list[TableRow]:
    """`leaderboard` with the accuracy under attack in place of every attack's robust accuracy, as papers print it.

    Both are equal for attacks that do not search misclassified images, as attacks on the true label here by default.
    """
    cells = {(r.cell.model_name, r.cell.attack.label): r for r in run.cells}
    rows = []
    for row in leaderboard(run):
        result = cells.get((row.model, row.attack))
        if result is None or is_minimal(result.cell):  # papers print those at a budget, too
            rows.append(row)
            continue
        if row.metric == ACCURACY.name and row.measure == "robust accuracy":
            row = replace(row, measure="accuracy under attack")
            if row.status == "ok":
                row = with_estimate(row, accuracy.accuracy(right_under_attack(result.rows)))
        rows.append(row)
    return rows


def searched_attacks(classifiers: Sequence[ModelResults]) -> tuple[CellResult, ...]:
    """One cell of each attack that is not a corruption, in plan order: those that an average of these classifiers
    combines, and, as far as they are adversaries, a worst case."""
    cells: dict[str, CellResult] = {}
    for model in classifiers:
        for result in corruptions.without_corruptions(model).cells:
            cells.setdefault(result.cell.attack.label, result)
    return tuple(cells.values())


def _flow_rows(run: Run, model: ModelResults) -> list[TableRow]:
    metrics = list(all_metrics())
    return [row for result in model.cells for row in cell_rows(run, result, metrics)]


def _classifier_rows(run: Run, model: ModelResults, attacks: Sequence[CellResult]) -> list[TableRow]:
    others = [metric for metric in all_metrics() if not metric.accuracy]
    rows = accuracy_rows(run, model, attacks)
    rows += [row for result in model.cells for row in cell_rows(run, result, others)]
    return _mark_oblivious(run, model, rows + smallest_rows(run, model, attacks))


def _mark_oblivious(run: Run, model: ModelResults, rows: list[TableRow]) -> list[TableRow]:
    """The rows, marked where no attack on a guarded classifier that knows its detector was finished."""
    if not model.detector or any(one.cell.is_adaptive for one in complete(run, model.cells)):
        return rows
    return [replace(row, oblivious=row.attack != CLEAN and row.kind.attacked) for row in rows]


def accuracy_rows(run: Run, model: ModelResults, attacks: Sequence[CellResult]) -> list[TableRow]:
    """Clean, attacks, worst cases and average of a classifier, over the cells of `model`.

    attacks: of the table, as `searched_attacks`; a worst case or average that lacks one of them is partial.
    """
    fitting = ATTACKED_BY[model.first.cell.kind]
    attacks = [one for one in attacks if one.cell.attack.target in fitting]
    rows = [_clean_row(run, model)]
    for result in model.cells:
        rows += _attack_rows(run, result)
    rows += corruptions.mean_rows(run, model)
    rows += unforeseen.uar_rows(run, model)
    if (own := corruptions.without_corruptions(model)).cells:
        rows += _worst_case_rows(run, adversaries(own.cells), adversaries(attacks))
        rows.append(_average_row(run, own, attacks))
    return _mark_oblivious(run, model, rows)


def _clean_row(run: Run, model: ModelResults) -> TableRow:
    done = complete(run, model.cells)
    blank = blank_model_row(run, model.first, ACCURACY, CLEAN, CLEAN, "accuracy")
    if not done:
        scores = [r.cell.clean for r in model.cells if r.cell.clean and r.cell.clean.samples == run.n]
        if not scores:
            return without_value(blank, run, model.cells)
        estimate = accuracy.wilson(scores[0].right, scores[0].samples)
        remark = "scored without an attack: no attack on this model was finished"
        return replace(with_estimate(blank, estimate), remarks=(remark,))
    clean = [clean_correct(result.rows) for result in done]
    differing = int(np.any([column != clean[0] for column in clean], axis=0).sum())
    row = with_estimate(blank, accuracy.accuracy(clean[0]))
    return replace(row, differing=differing, near_ties=count_near_ties(done[0], "clean_margin"))


def _attack_rows(run: Run, result: CellResult) -> list[TableRow]:
    """The accuracies of one attack; the first row has its parity note and suspicions."""
    rows = cell_rows(run, result, [metric for metric in all_metrics() if metric.accuracy])
    parity = parity_note(result.cell)
    return [
        replace(row, remarks=(parity,) if parity else (), suspicions=result.cell.doubts)
        if row.metric == ACCURACY.name and row.status == "ok"
        else row
        for row in rows
    ]


def _worst_case_rows(
    run: Run, results: Sequence[CellResult], attacks: Sequence[CellResult]
) -> list[TableRow]:
    """One row per threat model and budget, then one over all; none without results. results: adversaries of the model;
    attacks: adversaries of the table."""
    if not results:
        return []
    requested, found = (group_by_threat(cells, lambda r: r.cell.attack) for cells in (attacks, results))
    rows = [_worst_case_row(run, group, requested[threat], *threat) for threat, group in found.items()]
    return [*rows, _worst_case_row(run, results, attacks, ALL_THREATS, None, None)]


def _worst_case_row(
    run: Run,
    results: Sequence[CellResult],
    attacks: Sequence[CellResult],
    threat_model: str,
    epsilon: float | None,
    eta: float | None,
) -> TableRow:
    metric = WORST_CASE_ACCURACY
    blank = blank_model_row(
        run, results[0], metric, WORST_CASE, threat_model, "robust accuracy", epsilon, eta
    )
    if len(complete(run, results)) < len(results):
        return without_value(blank, run, results)
    worst = accuracy.worst_case([_ids(r.rows) for r in results], [robust(r.rows) for r in results])
    return _combine(blank, accuracy.accuracy(worst), _labels(results), attacks)


def _average_row(run: Run, model: ModelResults, attacks: Sequence[CellResult]) -> TableRow:
    blank = blank_model_row(run, model.first, AVERAGE_ACCURACY, AVERAGE, ALL_THREATS)
    if len(complete(run, model.cells)) < len(model.cells):
        return without_value(blank, run, model.cells)
    _same_samples(model.cells)
    columns = [clean_correct(model.first.rows), *map(shown_verdicts, model.cells)]
    estimate = accuracy.average(columns, run.seed)
    return _combine(blank, estimate, [CLEAN, *_labels(model.cells)], attacks)


def _combine(
    blank: TableRow, estimate: accuracy.Estimate, parts: Sequence[str], attacks: Sequence[CellResult]
) -> TableRow:
    """The row of a number that combines `parts`, partial where one of `attacks` is not among them."""
    missing = tuple(label for label in _labels(attacks) if label not in parts)
    row = with_estimate(blank, estimate)
    return replace(row, status="partial" if missing else "ok", combined=tuple(parts), missing=missing)


def _same_samples(results: Sequence[CellResult]) -> None:
    accuracy.worst_case([_ids(r.rows) for r in results], [robust(r.rows) for r in results])


def _ids(rows: pd.DataFrame) -> accuracy.SampleIds:
    return rows["sample_id"].to_numpy(dtype=np.int64)


def _labels(results: Sequence[CellResult]) -> list[str]:
    return [result.cell.attack.label for result in results]
