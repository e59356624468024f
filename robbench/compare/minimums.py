"""Accuracies that a run must reach whatever it is compared with: `--min aa=45,clean=80`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from robbench.compare.comparison import Comparison, Side
from robbench.core.errors import UserError
from robbench.results.rows import WORST_CASE, TableRow
from robbench.results.tables import ALL_THREATS
from robbench.specs import attack_among

_ROUNDING = 1e-9  # 571 of 1000 are 57.099999999999994 %


def parse_minimums(texts: Sequence[str]) -> dict[str, float]:
    """{attack: percent} of texts like "aa=45"; `UserError` for anything else, and for an attack that is there twice."""
    found: dict[str, float] = {}
    for text in texts:
        name, _, number = (part.strip() for part in text.rpartition("="))
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not name or not 0 <= value <= 100:
            raise UserError(
                f"--min {text!r} is no minimum; give an attack and a percentage, as in --min aa=45,clean=80"
            )
        if found.setdefault(name, value) != value:
            raise UserError(
                f"--min gives {name} twice ({found[name]:g} and {value:g}); leave one of them out"
            )
    return found


def hold_to_minimums(minimums: Mapping[str, float], rows: Sequence[TableRow], run: str) -> list[Comparison]:
    """Every classifier of a run's `leaderboard` held to every minimum: an attack's label, clean, worst-case (over all
    attacks) or average, by the accuracy that tables show.

    An accuracy that is not complete fails. `UserError` for one that a model of the run does not have at all. run: its
    name in messages.
    """
    shown = {(row.model, row.attack): row for row in rows if _is_shown(row)}
    models, attacks = (dict.fromkeys(key[place] for key in shown) for place in (0, 1))
    meant: dict[str, float] = {}
    for written, value in minimums.items():
        attack = attack_among(written, attacks, f"attack of --min in {run}:")
        if meant.setdefault(attack, value) != value:
            raise UserError(
                f"--min gives {attack} twice ({meant[attack]:g} and {value:g}); leave one of them out"
            )
        for model in models:
            if (model, attack) not in shown:
                raise UserError(
                    f"--min {attack}: {run} has no {attack} of {model}; run it, or compare with --model"
                )
    return [
        _judge_minimum(shown[model, attack], value) for model in models for attack, value in meant.items()
    ]


def _is_shown(row: TableRow) -> bool:
    """Whether a row is the accuracy that a table shows of its attack."""
    combined = row.kind.accuracy and row.metric not in ("robust_accuracy", "corruption_accuracy")
    return combined and (row.attack != WORST_CASE or row.threat_model == ALL_THREATS)


def _judge_minimum(row: TableRow, minimum: float) -> Comparison:
    blank = Comparison(
        row.model, row.attack, "minimum accuracy", Side("ok", minimum), row, unit=row.unit, n=row.n
    )
    if row.status != "ok" or row.value is None:
        return blank.with_verdict(
            "fail", f"no whole number to hold to the minimum of {minimum:g}: {row.status} ({row.note})"
        )
    blank = replace(blank, difference=row.value - minimum)
    if row.value >= minimum - _ROUNDING:
        return blank.with_verdict("pass", "")
    return blank.with_verdict("fail", f"{row.value:.4g} is below the minimum of {minimum:g}")
