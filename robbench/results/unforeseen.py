"""UAR of a model against an attack at its calibrated budgets (Kang et al. 2019, section 4).

UAR(A, M) = sum_k Acc(A, eps_k, M) / sum_k ATA(A, eps_k), in percent. Acc counts images that are right under attack. ATA
is the best accuracy of models that were adversarially trained against A at one of the budgets; it stands in the threat
model's YAML with its source, and where there is none the row says so instead of a number.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from robbench.metrics.uar import UAR
from robbench.metrics.verdicts import right_under_attack
from robbench.results.rows import ModelResults, TableRow, blank_model_row, complete, without_value
from robbench.specs import BestTrained, threat_models
from robbench.statistics import accuracy
from robbench.store.records import CellResult, Run

Family = tuple[str, str, str]  # threat model, attack without the number of its budget, rest of the label


def uar_rows(run: Run, model: ModelResults) -> list[TableRow]:
    """A row for every attack of which all calibrated budgets were requested."""
    families: dict[Family, dict[int, CellResult]] = {}
    for result in model.cells:
        place = _place(result)
        if place is not None:
            families.setdefault(place[0], {})[place[1]] = result
    rows = (_row(run, family, cells) for family, cells in families.items())
    return [row for row in rows if row is not None]


def _place(result: CellResult) -> tuple[Family, int] | None:
    """Attack and number of the calibrated budget of a cell; None for other cells, and where the budget was given."""
    attack = result.cell.attack
    family, _, number = attack.name.rpartition("-")
    rest = attack.label.removeprefix(attack.name)
    if (
        not number.isdecimal()
        or (attack.threat_model, family) not in _calibrated()
        or "@" in rest.replace("@to-", "")
    ):
        return None
    return (attack.threat_model, family, rest), int(number)


@cache
def _calibrated() -> dict[tuple[str, str], tuple[int, dict[str, BestTrained]]]:
    """Number of calibrated budgets, and ATA by data set, of the shipped attacks that have such budgets."""
    return {
        (model.name, name): (max(map(len, spec.calibrated.values())), spec.ata)
        for model in threat_models().values()
        for name, spec in model.attacks.items()
        if spec.calibrated
    }


def _row(run: Run, family: Family, cells: dict[int, CellResult]) -> TableRow | None:
    threat_model, name, rest = family
    count, known = _calibrated()[threat_model, name]
    if sorted(cells) != list(range(1, count + 1)):
        return None
    results = [cells[place] for place in sorted(cells)]
    blank = blank_model_row(run, results[0], UAR, name + rest, threat_model)
    if len(complete(run, results)) < len(results):
        return without_value(blank, run, results)
    best = known.get(run.dataset)
    if best is None:
        reason = f"ATA not available for {run.dataset}: the accuracies at the {count} budgets stand alone"
        return replace(blank, status="not run", reason=reason)
    return _with_value(run, blank, results, best)


def _with_value(run: Run, blank: TableRow, results: Sequence[CellResult], best: BestTrained) -> TableRow:
    """The row with UAR; its interval covers the model's accuracies, not ATA."""
    mean = accuracy.average([right_under_attack(result.rows) for result in results], run.seed)
    scale = 100.0 * len(results) / float(np.sum(best.accuracies))
    aim = results[0].cell.attack.parameters.get("target")
    other = aim != best.target
    remarks = (
        f"ATA: {best.source}",
        f"ATA is of attacks on {_goal(best.target)}, these are on {_goal(aim)}" if other else "",
    )
    return replace(
        blank,
        value=scale * mean.value,
        lower=scale * mean.lower,
        upper=scale * mean.upper,
        scope=f"over {len(results)} calibrated budgets",
        remarks=tuple(filter(None, remarks)),
    )


def _goal(target: object) -> str:
    return (
        "any wrong class"
        if target is None
        else "a random wrong class"
        if target == "random"
        else f"class {target}"
    )
