"""A run as tidy table rows: one number a row, with its interval, its sample count and its status."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from robbench.matrix.records import CellResult, Run
from robbench.metrics import accuracy
from robbench.metrics.likelihood import bits_per_dim
from robbench.publish import corruptions
from robbench.publish.likelihood import likelihood_rows
from robbench.publish.parity import parity_note
from robbench.publish.perturbation import distance_rows, frechet_rows
from robbench.publish.rows import (
    AVERAGE,
    CLEAN,
    COLUMNS,
    WORST_CASE,
    ModelResults,
    TableRow,
    adversaries,
    blank_row,
    cell_status,
    clean_correct,
    complete,
    floats,
    is_broken,
    models,
    right_under_attack,
    robust,
    shown,
    with_estimate,
    with_value,
    without_value,
)
from robbench.publish.wording import suspicious_note

__all__ = ["COLUMNS", "NEAR_TIE", "TableRow", "Wide", "combined_attacks", "leaderboard", "models", "wide"]

ALL_THREATS = "all"
ROBUST_ACCURACY = "robust_accuracy"  # metric of the robust accuracy of attacks whose column shows another one
NEAR_TIE = 1e-4

Threat = tuple[str, float | None, float | None]  # threat model, epsilon, eta


@dataclass(frozen=True)
class Wide:
    """The accuracies as a matrix: models down, then clean, attacks, worst cases and the average across.

    cells: by (model, column); a pair that nothing was planned for is absent.
    """

    models: tuple[tuple[str, str], ...]  # (name, defense)
    columns: tuple[str, ...]
    cells: dict[tuple[str, str], TableRow]


def wide(rows: Sequence[TableRow], per_threat_model: bool = True) -> Wide:
    """`rows` of `leaderboard` as a matrix.

    The worst case under one threat model and budget has a column only where it says something: it combines
    several attacks but not all of them, and `per_threat_model` is asked for.
    """
    accuracies = _without_corruptions([row for row in rows if row.metric.endswith("accuracy")])
    threats: dict[Threat, set[str]] = {}
    for row in accuracies:
        if row.metric == "accuracy" and row.attack != CLEAN and row.threat_model != corruptions.THREAT_MODEL:
            threats.setdefault(_threat(row), set()).add(row.attack)
    names = [name for name, _, _ in threats]
    cells: dict[tuple[str, str], TableRow] = {}
    for row in accuracies:
        partial = _is_partial_worst_case(row)
        if partial and not (per_threat_model and len(threats) > 1 and len(threats[_threat(row)]) > 1):
            continue
        cells[row.model, _column(row, names.count(row.threat_model) > 1)] = row
    columns = dict.fromkeys(column for _, column in cells)
    return Wide(
        models=tuple(dict.fromkeys((row.model, row.defense) for row in accuracies)),
        columns=tuple(sorted(columns, key=_column_group)),
        cells=cells,
    )


def _without_corruptions(rows: Sequence[TableRow]) -> list[TableRow]:
    """`rows` without the single corruptions where their mean is there; these have tables of their own."""
    if not any(row.metric == corruptions.METRIC for row in rows):
        return list(rows)
    return [
        row
        for row in rows
        if row.threat_model != corruptions.THREAT_MODEL or row.metric == corruptions.METRIC
    ]


def _threat(row: TableRow) -> Threat:
    return row.threat_model, row.epsilon, row.eta


def _is_partial_worst_case(row: TableRow) -> bool:
    return row.attack == WORST_CASE and row.threat_model != ALL_THREATS


def robust_column(label: str) -> str:
    """The column of the robust accuracy of an attack whose own column shows another one."""
    return f"{label} (robust)"


def _column(row: TableRow, with_budget: bool) -> str:
    if row.metric == ROBUST_ACCURACY:
        return robust_column(row.attack)
    if not _is_partial_worst_case(row):
        return "worst case" if row.attack == WORST_CASE else row.attack
    budgets = [f"{value:g}" for value in (row.epsilon, row.eta) if value is not None] if with_budget else []
    return "@".join([f"worst {row.threat_model}", *budgets])


def _column_group(column: str) -> int:
    """Clean, attacks, worst cases, average; the order inside a group stays."""
    if column.startswith("worst "):
        return 3 if column == "worst case" else 2
    return {CLEAN: 0, AVERAGE: 4}.get(column, 1)


def leaderboard(run: Run) -> list[TableRow]:
    """All numbers of a run. Order: models as planned; in a classifier clean, attacks, worst cases, average, then
    likelihoods and distances attack by attack; in a flow likelihoods and distances attack by attack. Last come Fréchet
    distances, where there are any."""
    rows: list[TableRow] = []
    for model in models(run):
        rows += _classifier_rows(run, model) if model.kind == "classifier" else _flow_rows(run, model)
    return rows + frechet_rows(run)


def rows_under_attack(run: Run) -> list[TableRow]:
    """`leaderboard`, with the accuracy under attack in the place of every attack's accuracy: what papers print.

    Equal to robust accuracy under an attack that stops at images that are wrong already, as attacks on the true label
    do here by default: these stay wrong.
    """
    cells = {(r.cell.model_name, r.cell.attack.label): r for r in run.cells}
    rows = []
    for row in leaderboard(run):
        result = cells.get((row.model, row.attack))
        if result is not None and row.metric == "accuracy" and row.measure == "robust accuracy":
            row = replace(row, measure="accuracy under attack")
            if row.status == "ok":
                row = with_estimate(row, accuracy.accuracy(right_under_attack(result.rows)), [row.note])
        rows.append(row)
    return rows


def _flow_rows(run: Run, model: ModelResults) -> list[TableRow]:
    return [
        row for result in model.cells for row in likelihood_rows(run, result) + distance_rows(run, result)
    ]


def _classifier_rows(run: Run, model: ModelResults) -> list[TableRow]:
    rows = accuracy_rows(run, model)
    for result in model.cells:
        rows += _scored_rows(run, result) + distance_rows(run, result)
    return rows


def accuracy_rows(run: Run, model: ModelResults) -> list[TableRow]:
    """Clean, attacks, worst cases and average of a classifier; of some attacks, when `model` holds only their cells."""
    rows = [_clean_row(run, model)]
    for result in model.cells:
        rows += [_accuracy_row(run, result), *_other_accuracy(run, result)]
    rows += corruptions.mean_rows(run, model)
    if (attacks := corruptions.searched(model)).cells:
        rows += _worst_case_rows(run, adversaries(attacks.cells))
        rows.append(_average_row(run, attacks))
    return rows


# --------------------------------------------------------------------------------------------------- accuracy
def _clean_row(run: Run, model: ModelResults) -> TableRow:
    done = complete(run, model.cells)
    blank = blank_row(
        run,
        model.first,
        attack=CLEAN,
        threat_model=CLEAN,
        metric="accuracy",
        measure="accuracy",
        unit="%",
        of_attack=False,
    )
    if not done:
        scores = [r.cell.clean for r in model.cells if r.cell.clean and r.cell.clean.samples == run.n]
        if not scores:
            return without_value(blank, run, model.cells)
        estimate = accuracy.wilson(scores[0].right, scores[0].samples)
        return with_estimate(
            blank, estimate, ["scored without an attack: no attack on this model was finished"]
        )
    clean = [clean_correct(result.rows) for result in done]
    differing = int(np.any([column != clean[0] for column in clean], axis=0).sum())
    notes = [f"clean verdicts differ between cells on {differing} samples"] if differing else []
    notes.append(_near_ties(done[0].rows["clean_margin"]))
    return with_estimate(blank, accuracy.accuracy(clean[0]), notes)


def _accuracy_row(run: Run, result: CellResult) -> TableRow:
    blank = blank_row(run, result, metric="accuracy", measure=result.cell.attack.measure, unit="%")
    if blank.status != "ok":
        return blank
    notes = [parity_note(result.cell), _near_ties(result.rows["margin"])]
    notes += map(suspicious_note, result.cell.doubts)
    return with_estimate(blank, accuracy.accuracy(shown(result)), notes)


def _other_accuracy(run: Run, result: CellResult) -> list[TableRow]:
    """Of a perturbation, whose accuracy is that under attack, the robust accuracy too. Corruptions have tables of their
    own, and 75 columns more would say little."""
    attack = result.cell.attack
    if attack.semantics != "perturbation" or attack.space == corruptions.SPACE:
        return []
    blank = blank_row(run, result, metric=ROBUST_ACCURACY, measure="robust accuracy", unit="%")
    if blank.status != "ok":
        return [blank]
    return [with_estimate(blank, accuracy.accuracy(robust(result.rows)), [])]


def _worst_case_rows(run: Run, attacks: Sequence[CellResult]) -> list[TableRow]:
    """One row a threat model and budget, then one over all attacks; none without attacks."""
    if not attacks:
        return []
    groups: dict[Threat, list[CellResult]] = {}
    for result in attacks:
        attack = result.cell.attack
        groups.setdefault((attack.threat_model, attack.epsilon, attack.eta), []).append(result)
    rows = [
        _worst_case_row(run, group, threat_model, epsilon, eta)
        for (threat_model, epsilon, eta), group in groups.items()
    ]
    return [*rows, _worst_case_row(run, attacks, ALL_THREATS, None, None)]


def _worst_case_row(
    run: Run, results: Sequence[CellResult], threat_model: str, epsilon: float | None, eta: float | None
) -> TableRow:
    blank = blank_row(
        run,
        results[0],
        attack=WORST_CASE,
        threat_model=threat_model,
        epsilon=epsilon,
        eta=eta,
        metric="worst_case_accuracy",
        measure="robust accuracy",
        unit="%",
        of_attack=False,
    )
    if len(complete(run, results)) < len(results):
        return without_value(blank, run, results)
    held = accuracy.worst_case([_ids(r.rows) for r in results], [robust(r.rows) for r in results])
    return with_estimate(blank, accuracy.accuracy(held), [_over(_labels(results))])


def _average_row(run: Run, model: ModelResults) -> TableRow:
    blank = blank_row(
        run,
        model.first,
        attack=AVERAGE,
        threat_model=ALL_THREATS,
        metric="average_accuracy",
        unit="%",
        of_attack=False,
    )
    if len(complete(run, model.cells)) < len(model.cells):
        return without_value(blank, run, model.cells)
    _same_samples(model.cells)
    columns = [clean_correct(model.first.rows), *map(shown, model.cells)]
    return with_estimate(blank, accuracy.average(columns, run.seed), [_over([CLEAN, *_labels(model.cells)])])


def _same_samples(results: Sequence[CellResult]) -> None:
    accuracy.worst_case([_ids(r.rows) for r in results], [robust(r.rows) for r in results])


# ------------------------------------------------------------------------------------------------ likelihoods
def _scored_rows(run: Run, result: CellResult) -> list[TableRow]:
    """Mean and median bits/dim before (all samples) and after (samples the attack broke); no row where no flow
    scored the images or nothing broke.

    Unbroken samples are left out because a search may stop anywhere, or hand back the clean image, once it has
    failed. An infinite or missing summary keeps status "ok" with what was measured in the note.
    """
    rows: list[TableRow] = []
    if cell_status(run, result)[0] != "ok":
        return rows
    flow = result.cell.nll_flow.name if result.cell.nll_flow else ""
    for name in ("before", "after") if result.cell.nll_flow else ():
        values = floats(result.rows[f"nll_{name}"])
        scored = values if name == "before" else values[is_broken(result.rows)]
        if not len(scored):
            continue
        summary = bits_per_dim(scored)
        metrics = {
            f"bits_per_dim_{name}": (summary.mean, summary.note),
            f"bits_per_dim_{name}_median": (summary.median, summary.median_note),
        }
        for metric, (value, note) in metrics.items():
            blank = replace(blank_row(run, result, metric=metric, unit="bits/dim"), flow=flow)
            scope = f"over the {len(scored)} samples that the attack broke" if name == "after" else ""
            rows.append(with_value(blank, value, [scope, note]))
    return rows


# ------------------------------------------------------------------------------------------------------ notes
def _ids(rows: pd.DataFrame) -> accuracy.SampleIds:
    return rows["sample_id"].to_numpy(dtype=np.int64)


def _near_ties(margin: "pd.Series[float]") -> str:
    """Samples whose verdict may depend on batch size or machine: |margin| below NEAR_TIE."""
    count = int((np.abs(margin.to_numpy()) < NEAR_TIE).sum())
    return f"{count} of {len(margin)} samples with |margin| < {NEAR_TIE:g}" if count else ""


def _labels(results: Sequence[CellResult]) -> list[str]:
    return [result.cell.attack.label for result in results]


def _over(parts: Sequence[str]) -> str:
    return f"over {', '.join(parts)}"


def combined_attacks(note: str) -> frozenset[str]:
    """What a worst case or average combines, from its note; empty for the note of any other row."""
    return frozenset(note.removeprefix("over ").split(", ")) if note.startswith("over ") else frozenset()
