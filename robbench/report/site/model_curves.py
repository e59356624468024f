"""Accuracy of a model against the size of an attack: over budgets, and over steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from robbench.core.budget_limits import exact_text
from robbench.metrics.minimal_norm import accuracy_at, distances, is_minimal
from robbench.metrics.verdicts import Floats, clean_correct, shown_verdicts
from robbench.report.attack_lines import budget_text
from robbench.report.plots import Curve, CurveFigure, dress, legend, look, svg
from robbench.report.site.model_families import same_but
from robbench.results.likelihood import steps_of
from robbench.results.reproduce import command
from robbench.results.rows import complete
from robbench.specs import ResolvedAttack
from robbench.statistics.accuracy import Estimate, accuracy
from robbench.store.records import CellResult, Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.25, 0.5, 0.75, 1.0, 1.5)  # of an attack's budget: what is proposed where none was swept
STEPS = (5, 10, 20, 50, 100)
POINTS = 25  # of a security curve
TICKS = 8  # measured budgets up to which each has its tick
Axis = Literal["epsilon", "eta", "steps"]
AXES: tuple[Axis, ...] = get_args(Axis)
Point = tuple[float, float, float, float]


@dataclass(frozen=True)
class Sweep:
    """Accuracy against one measure of the attacks. title, axis: of what. figure: None where no attack has two points;
    command: then the line that measures them, empty where no attack of the run has such a measure."""

    title: str
    axis: Axis
    figure: CurveFigure | None
    command: str


def sweeps(run: Run, results: Sequence[CellResult]) -> list[Sweep]:
    """Accuracy against epsilon (eta where only it was swept) and against steps; of one model."""
    done = complete(run, results)
    epsilon, eta, steps = (_sweep(run, done, axis) for axis in AXES)
    found = [epsilon] if epsilon.figure or not eta.figure else []
    return [*found, *([eta] if eta.figure else []), *_security_curves(done), steps]


def _security_curves(done: Sequence[CellResult]) -> list[Sweep]:
    """Accuracy against the budget in each norm, read from the distances of minimal-norm attacks."""
    groups: dict[str, list[CellResult]] = {}
    for result in done:
        if is_minimal(result.cell):
            groups.setdefault(result.cell.attack.norm, []).append(result)
    return [_security_curve(norm, results) for norm, results in groups.items()]


def _security_curve(norm: str, results: Sequence[CellResult]) -> Sweep:
    named = {
        r.cell.attack.name: distances(r) for r in results
    }  # budgets are read off, and change no distance
    budgets = _grid(np.concatenate(list(named.values())), norm)
    curves = [
        Curve(name, tuple(_point(at, accuracy_at(found, at)) for at in budgets), number)
        for number, (name, found) in enumerate(named.items())
    ]
    title = f"Accuracy against the budget in {norm.title()}, from the distances of minimal-norm attacks"
    key = f"by-distance-{norm}"
    drawn = svg(_figure(curves, "epsilon"), key, "curves", _alternative(curves, "epsilon"))
    return Sweep(title, "epsilon", CurveFigure(drawn, 0, legend(curves, key)), "")


def _grid(found: Floats, norm: str) -> list[float]:
    """Budgets from 0 to where nearly every distance that is finite is passed."""
    finite = found[np.isfinite(found)]
    last = float(np.quantile(finite, 0.98)) * 1.05 if len(finite) else 1.0
    budgets = np.linspace(0.0, last or 1.0, POINTS)
    return list(map(float, np.unique(np.ceil(budgets)) if norm == "l0" else budgets))


def _sweep(run: Run, done: Sequence[CellResult], axis: Axis) -> Sweep:
    title = f"Accuracy against {axis}"
    curves = _curves(done, axis)
    if not curves:
        return Sweep(title, axis, None, _proposal(run, done, axis))
    words = _alternative(curves, axis)
    drawn = svg(_figure(curves, axis), f"by-{axis}", "curves", words)
    return Sweep(title, axis, CurveFigure(drawn, 0, legend(curves, f"by-{axis}")), "")


def _size(attack: ResolvedAttack, axis: Axis) -> float | None:
    return {"epsilon": attack.epsilon, "eta": attack.eta, "steps": steps_of(attack)}[axis]


def families(done: Sequence[CellResult], axis: Axis) -> list[list[CellResult]]:
    """Cells of attacks that differ in `axis` alone, by it; families of at least two sizes, in order of their first."""
    found: dict[str, dict[float, CellResult]] = {}
    for result in done:
        value = _size(result.cell.attack, axis)
        if value is not None:
            found.setdefault(same_but(result, axis), {}).setdefault(value, result)
    return [[sizes[value] for value in sorted(sizes)] for sizes in found.values() if len(sizes) > 1]


def _curves(done: Sequence[CellResult], axis: Axis) -> list[Curve]:
    curves = []
    for number, family in enumerate(families(done, axis)):
        points = [
            _point(float(_size(result.cell.attack, axis) or 0), accuracy(shown_verdicts(result)))
            for result in family
        ]
        if axis != "steps" and points[0][0] > 0:
            points.insert(0, _point(0.0, accuracy(clean_correct(family[0].rows))))
        curves.append(Curve(_name(family, axis), tuple(points), number))
    return curves


def _point(x: float, estimate: Estimate) -> Point:
    return x, estimate.value, estimate.lower, estimate.upper


def _name(family: Sequence[CellResult], axis: Axis) -> str:
    """ "pgd20", or over steps "pgd10, pgd20, pgd50 (ε = 0.2)"."""
    attacks = [result.cell.attack for result in family]
    if axis != "steps":
        return ", ".join(dict.fromkeys(attack.name for attack in attacks)) + f" ({attacks[0].threat_model})"
    names = ", ".join(dict.fromkeys(attack.label for attack in attacks))
    return f"{names} ({attacks[0].threat_model}, {budget_text(attacks[0])})"


def _alternative(curves: Sequence[Curve], axis: Axis) -> str:
    """The figure's numbers in words."""
    lines = [
        f"{curve.name}: "
        + ", ".join(f"{y:.1f} [{low:.1f}, {up:.1f}] at {x:g}" for x, y, low, up in curve.points)
        for curve in curves
    ]
    return f"Accuracy in percent with its 95 % interval against {axis}. " + "; ".join(lines)


def _figure(curves: Sequence[Curve], axis: Axis) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 3.1))
    axes = figure.add_axes((0.105, 0.15, 0.88, 0.82))
    ticks = sorted({x for curve in curves for x, *_ in curve.points})
    if axis == "steps":
        axes.set_xscale("log")
        axes.minorticks_off()
    if axis == "steps" or len(ticks) <= TICKS:
        axes.set_xticks(ticks, [f"{x:.3g}" for x in ticks])
    for curve in curves:
        x, mean, lower, upper = zip(*curve.points, strict=True)
        style = look(curve.style)
        axes.fill_between(x, lower, upper, color=style["color"], alpha=0.13, linewidth=0)
        axes.plot(x, mean, **style)
    axes.set_ylim(-2, 102)
    dress(axes, axis, "accuracy (%)")
    return figure


def _proposal(run: Run, done: Sequence[CellResult], axis: Axis) -> str:
    """A line that measures several sizes of the strongest fitting attack: the most steps."""
    fitting = [result.cell for result in done if _can_sweep(result.cell.attack, axis)]
    if not fitting:
        return ""
    cell = max(fitting, key=lambda cell: (cell.attack.space == "image", steps_of(cell.attack) or 0))
    values = STEPS if axis == "steps" else _budgets(_size(cell.attack, axis) or 0)
    options = (f"--{axis}", ",".join(exact_text(value) for value in values))
    return command(run, run.given.get(cell.model, cell.model), cell.attack.name, *options)


def _can_sweep(attack: ResolvedAttack, axis: Axis) -> bool:
    return bool(_size(attack, axis)) and (axis != "steps" or steps_of(attack) != 1)


def _budgets(budget: float) -> list[float]:
    """Parts and multiples of a budget: levels of 255 where it is some, else with three digits."""
    levels = round(budget * 255)
    if levels >= 4 and abs(levels / 255 - budget) < 1e-9 and len(f"{budget:g}") > 5:
        return list(dict.fromkeys(round(levels * share) / 255 for share in SHARES))
    return list(dict.fromkeys(float(f"{budget * share:.3g}") for share in SHARES))
