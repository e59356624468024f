"""Attacks on a flow's likelihood: tables of NLL by budget and model, as papers print them.

Numbers as in `metrics.likelihood`; importance-weighted bits/dim have tables of their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from robbench.metrics.likelihood import attacks_noise, estimate_of, outliers_note, settings
from robbench.metrics.verdicts import Floats, floats
from robbench.results.rows import (
    CellStatus,
    ModelResults,
    cell_status,
    complete,
    of_kind,
)
from robbench.specs import ResolvedAttack
from robbench.statistics.likelihood import bits_per_dim
from robbench.store.records import CellResult, Run

NOTABLE = 0.1  # relative difference of mean and median that a narrow table must show
Role = Literal["in", "noise", "out"]
ROLES: dict[Role, str] = {
    "in": "Raises the NLL of test images; it works where the number is higher.",
    "out": "Lowers the NLL of uniform-noise images; it works where the number is lower.",
    "noise": "Baseline, uniform noise on test images; an attack that raises the NLL must exceed it.",
}


@dataclass(frozen=True)
class Nll:
    """Bits/dim of the samples of one cell, or why there are none.

    Attributes:
        status: of the cell.
        note: remarks on the numbers; for another status than "ok" the reason.
        mean: over finite samples; None without any.
        lower, upper: 95 % interval of the mean; None below two finite samples.
        median: over all samples but NaN, may be infinite.
        median_note: remark on the median.
        nonfinite: number of samples that the mean leaves out.
    """

    status: CellStatus
    note: str = ""
    mean: float | None = None
    lower: float | None = None
    upper: float | None = None
    median: float | None = None
    median_note: str = ""
    nonfinite: int = 0

    @property
    def skewed(self) -> bool:
        """Whether median and mean differ notably."""
        if self.mean is None or self.median is None:
            return self.median is not None
        return not abs(self.mean - self.median) <= NOTABLE * max(abs(self.mean), abs(self.median))


def summarize(values: Floats) -> Nll:
    """Summary of per-sample bits/dim [n], n >= 1."""
    found = bits_per_dim(values)
    return Nll(
        status="ok",
        note="; ".join(note for note in (found.note, outliers_note(values, found.median)) if note),
        mean=found.mean,
        lower=found.lower,
        upper=found.upper,
        median=found.median,
        median_note=found.median_note,
        nonfinite=found.n - found.n_finite,
    )


def role(attack: ResolvedAttack) -> Role:
    """What an attack on a flow is for."""
    if attack.algorithm == "uniform-noise":
        return "noise"
    return "out" if attacks_noise(attack) else "in"


def steps_of(attack: ResolvedAttack) -> int | None:
    """Steps of an iterative attack; None for any other."""
    steps = attack.parameters.get("steps")
    return None if steps is None else int(steps)


@dataclass(frozen=True)
class NllLine:
    """One budget. epsilon: in units of the attack. steps: None for images before any attack and for an attack that does
    not iterate. cells: one per model, None where nothing was planned."""

    epsilon: float
    steps: int | None
    cells: tuple[Nll | None, ...]


@dataclass(frozen=True)
class NllTable:
    """NLL under one attack: one line per budget, one column per flow.

    Attributes:
        attack: `table_name` of the attack.
        role: purpose of the attack.
        settings: shared by all lines.
        models: (name, defense) of the columns.
        lines: by budget.
    """

    attack: str
    role: Role
    settings: str
    models: tuple[tuple[str, str], ...]
    lines: tuple[NllLine, ...]

    @property
    def sweeps_steps(self) -> bool:
        """Whether the lines have several numbers of steps."""
        return len({line.steps for line in self.lines if line.steps is not None}) > 1

    @property
    def title(self) -> str:
        """ "nll-in: epsilon of 255; 32 steps. Raises the NLL ..."."""
        return f"{self.attack}: {self.about}"

    @property
    def about(self) -> str:
        """The title without the attack's name."""
        return f"{self.settings}. {ROLES[self.role]}"

    @property
    def footnotes(self) -> list[str]:
        """Remarks on single numbers, each with its model and budget."""
        return [
            f"{name}, {self.attack}, {self.budget(line)}: "
            f"{cell.note if cell.status == 'ok' else f'{cell.status} ({cell.note})'}"
            for line in self.lines
            for (name, _), cell in zip(self.models, line.cells, strict=True)
            if cell is not None and cell.note
        ]

    def budget(self, line: NllLine) -> str:
        """ "epsilon 8", with the steps where the table has several."""
        steps = f", {line.steps} steps" if self.sweeps_steps and line.steps is not None else ""
        return f"epsilon {line.epsilon:g}{steps}"


def nll_tables(run: Run) -> list[NllTable]:
    """One table per attack, in plan order; empty without flows.

    The line of epsilon 0 shows the images before the attack, which every cell scores, also where it was not run.
    """
    flows = of_kind(run, "flow")
    names = dict.fromkeys(table_name(r.cell.attack) for model in flows for r in model.cells)
    return [_table(run, name, [_only(model, name) for model in flows]) for name in names]


def table_name(attack: ResolvedAttack) -> str:
    """Name of the table of a cell: the attack, with the draws of another estimate than the default ("nll-in@8draws"),
    whose numbers are in a separate table."""
    estimate, draws = estimate_of(attack)
    mark = "" if draws == 1 else f"@{draws}draws" if estimate == "importance" else f"@mean of {draws} draws"
    return f"{attack.name}{mark}"


def _only(model: ModelResults, name: str) -> ModelResults:
    return replace(model, cells=tuple(r for r in model.cells if table_name(r.cell.attack) == name))


def _table(run: Run, name: str, flows: Sequence[ModelResults]) -> NllTable:
    flows = [model for model in flows if model.cells]
    first = flows[0].first.cell
    budgets = {budget_of(r): None for model in flows for r in model.cells}
    swept = len({steps_of(r.cell.attack) for model in flows for r in model.cells}) > 1
    lines = [NllLine(*budget, tuple(_at(run, model, budget) for model in flows)) for budget in budgets]
    if all(line.epsilon > 0 for line in lines):
        lines.append(NllLine(0.0, None, tuple(_before(run, model) for model in flows)))
    return NllTable(
        attack=name,
        role=role(first.attack),
        settings=settings(first, with_steps=not swept),
        models=tuple((model.name, model.first.cell.defense) for model in flows),
        lines=tuple(sorted(lines, key=lambda line: (line.epsilon, line.steps or 0))),
    )


def budget_of(result: CellResult) -> tuple[float, int | None]:
    """Epsilon and steps; without a budget nothing is searched, and there are no steps."""
    attack = result.cell.attack
    epsilon = float(attack.epsilon or 0.0)
    return epsilon, steps_of(attack) if epsilon > 0 else None


def _at(run: Run, model: ModelResults, budget: tuple[float, int | None]) -> Nll | None:
    found = [result for result in model.cells if budget_of(result) == budget]
    return _nll(run, found[0], "nll_after") if found else None


def _before(run: Run, model: ModelResults) -> Nll:
    done = complete(run, model.cells)
    return _nll(run, (done or model.cells)[0], "nll_before")


def _nll(run: Run, result: CellResult, column: str) -> Nll:
    status, reason = cell_status(run, result)
    return summarize(floats(result.rows[column])) if status == "ok" else Nll(status, reason)


def bits_text(value: float) -> str:
    """Four significant digits, as "2.535", "13.18", "320.4", "5812", and "2.000e+06" from 10,000 on."""
    if not math.isfinite(value):
        return f"{value}"
    if value and not 1e-3 <= abs(value) < 9999.5:
        return f"{value:.2e}"
    decimals = 3 - min(3, len(str(int(abs(value)))) - 1)
    return f"{value:.{decimals}f}"


def mean_text(cell: Nll | None) -> str:
    """ "2.535 ± 0.025", with a star for a footnote; "failed", "not run"."""
    if cell is None or cell.status != "ok":
        return "not run" if cell is None else cell.status
    star = "*" if cell.note else ""
    if cell.mean is None:
        return f"none finite{star}"
    half = "" if cell.upper is None else f" ± {_half_text(cell.upper - cell.mean, cell.mean)}"
    return f"{bits_text(cell.mean)}{half}{star}"


def _half_text(half: float, mean: float) -> str:
    """Half an interval, with as many decimals as its mean."""
    text = bits_text(mean)
    if "e" in text or abs(half) >= 9999.5:
        return f"{half:.1e}"
    return f"{half:.{len(text.partition('.')[2])}f}"


def median_text(cell: Nll | None) -> str:
    """The median; empty where there is none."""
    return "" if cell is None or cell.median is None else bits_text(cell.median)


def caption(run: Run) -> str:
    """The caption of the tables."""
    return (
        f"Mean NLL in bits/dim ± half of its 95 % interval (normal, over samples); lower is more likely. Each table "
        f"says from how many draws of the dequantisation noise the bits/dim of a sample come. "
        f"Epsilon 0: before the attack. n = {run.n}, seed {run.seed}."
        + "".join(f" {note}." for note in run.notes)
    )
