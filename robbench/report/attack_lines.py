"""The attacks on a classifier, a line each: budget, accuracy, what broke, likelihood, distances, cost, as texts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robbench.metrics.accuracy import NEAR_TIE
from robbench.metrics.verdicts import attacked, broken
from robbench.report.flow_page import Number, score_number
from robbench.results import wording
from robbench.results.perturbation import Distances, Footnotes
from robbench.results.rows import TableRow, cell_status
from robbench.specs import ResolvedAttack
from robbench.store.records import CellResult, Run

DISTANCES = ("l2", "linf", "l2_all", "linf_all")


@dataclass(frozen=True)
class AttackLine:
    """One attack on one model, as its section's table shows it.

    Attributes:
        attack: as it was run.
        budget: in words, as "ε = 8/255".
        accuracy: row of the leaderboard.
        attacked: samples that were right before the attack.
        broken: those of them that it broke.
        components: of an ensemble, each with how many it broke, the most first.
        numbers: cells by column key.
    """

    attack: ResolvedAttack
    budget: str
    accuracy: TableRow
    attacked: int
    broken: int
    components: str
    numbers: Mapping[str, Number]


def attack_lines(
    run: Run, results: Sequence[CellResult], rows: Sequence[TableRow], scored: Distances
) -> tuple[tuple[AttackLine, ...], tuple[str, ...]]:
    """Lines of the cells of one model, and the footnotes of their Fréchet distances. rows: of `leaderboard`, of this
    model at least."""
    name, notes = results[0].cell.model_name, Footnotes()
    mine = {(row.attack, row.metric): row for row in rows if row.model == name}
    scores = [
        dict(zip(scored.columns, notes.texts(scored.of_cell(result.cell.hash)), strict=True))
        for result in results
    ]
    lines = tuple(_line(run, r, mine, score) for r, score in zip(results, scores, strict=True))
    return lines, (*scored.floor, *notes.lines)


def nll_flows(results: Sequence[CellResult]) -> tuple[str, ...]:
    """Names of the flows that scored the images of cells on classifiers."""
    return tuple(dict.fromkeys(r.cell.nll_flow.name for r in results if r.cell.nll_flow))


def _line(
    run: Run, result: CellResult, mine: Mapping[tuple[str, str], TableRow], scores: Mapping[str, str]
) -> AttackLine:
    attack, lost = result.cell.attack, broken(result.rows)
    parts = Counter(str(name) for name in lost["broken_by"])
    return AttackLine(
        attack=attack,
        budget=budget_text(attack),
        accuracy=mine[attack.label, "accuracy"],
        attacked=len(attacked(result.rows)),
        broken=len(lost),
        components=", ".join(f"{name} {count}" for name, count in sorted(parts.items(), key=_most_first)),
        numbers={
            **_numbers(run, result, mine),
            **{name: score_number(text) for name, text in scores.items()},
        },
    )


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]


def _numbers(run: Run, result: CellResult, mine: Mapping[tuple[str, str], TableRow]) -> dict[str, Number]:
    label, rows = result.cell.attack.label, result.rows
    numbers = {
        metric: _number(mine.get((label, metric)))
        for metric in ("bits_per_dim_before", "bits_per_dim_after", *DISTANCES)
    }
    for metric in DISTANCES:
        numbers[metric] = _plus_minus(numbers[metric], mine.get((label, f"{metric}_std")))
    status, reason = cell_status(run, result)
    if status != "ok":
        first = "bits_per_dim_before" if result.cell.nll_flow else DISTANCES[0]
        empty = {key: Number("-") for key in ("forwards", "backwards", "seconds", "ties")}
        return {**numbers, **empty, first: Number(status, "", reason)}
    about = "" if bool(rows["counts_exact"].all()) else "≈ "
    for key in ("forwards", "backwards"):
        mean = float(rows[key].mean())
        numbers[key] = Number(f"{about}{mean:.1f}", repr(mean))
    ties = int((rows["margin"].abs() < NEAR_TIE).sum())
    seconds = result.cell.seconds
    return numbers | {
        "seconds": Number(f"{seconds:.1f}", repr(seconds)),
        "ties": Number(str(ties), str(ties)),
    }


def _number(row: TableRow | None) -> Number:
    finite = row is not None and row.value is not None and bool(np.isfinite(row.value))
    interval = ""
    if row is not None and finite and row.lower is not None and row.upper is not None:
        interval = f"[{row.lower:.3f}, {row.upper:.3f}]"
    order = repr(row.value) if row is not None and finite else ""
    return Number(wording.number_text(row), order, more=interval)


def _plus_minus(number: Number, spread: TableRow | None) -> Number:
    if spread is None or spread.value is None:
        return number
    return Number(f"{number.text} ± {spread.value:.3f}", number.order)


def budget_text(attack: ResolvedAttack) -> str:
    """ "ε = 8/255", "ε = 0.2, η = 0.35"; "none" for an attack without a budget."""
    return budget_words(attack.epsilon, attack.eta) or "none"


def budget_words(epsilon: float | None, eta: float | None) -> str:
    """ "ε = 8/255, η = 0.35"; empty without either."""
    given = (("ε", epsilon), ("η", eta))
    return ", ".join(f"{symbol} = {_radius(value)}" for symbol, value in given if value is not None)


def _radius(value: float) -> str:
    """A radius as papers print it: k/255 when it is one, else a short decimal."""
    levels = value * 255
    whole = round(levels)
    if 0 < whole < 64 and abs(levels - whole) < 1e-6 and len(f"{value:g}") > 5:
        return f"{whole}/255"
    return f"{value:g}"
