"""Output of `robbench theory linear`: tables, figures 2 and 3 of paper 002, and their numbers as CSV."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from robbench.core.counting import count_noun
from robbench.core.errors import UserError
from robbench.core.places import check_output_folder
from robbench.core.random import derive_seed
from robbench.core.resources import write_text_atomically
from robbench.core.spreadsheet import csv_text
from robbench.theory.bound import Guarantee
from robbench.theory.figures import perturbation_figure, save_figure, trade_off_figure
from robbench.theory.perturbation import Floats, Gaussian, Perturbation, worst_perturbation
from robbench.theory.training import (
    Recursion,
    TradeOff,
    alpha,
    check_recursion,
    random_gaussian,
    simulate_trade_off,
    spherical_trade_off,
)

PLANE = ((1.0, 0.55), (0.55, 0.6))  # covariance of figure 2 for sigma = 1
POINTS = 9
SHOWN_STEPS = 11
JUST_ABOVE = 1 + 1e-9  # the theorem needs a variance strictly above the bound

Curves = Mapping[Recursion, TradeOff]


@dataclass(frozen=True)
class LinearRequest:
    """Arguments of `robbench theory linear`, for data N(0, sigma^2 I).

    Attributes:
        n: dimensions.
        epsilon: L2 radius of the attack, in units of the data.
        sigma: standard deviation of the data.
        steps: of adversarial training.
        seed: of all simulations.
        recursions: meanings of a training step, one curve each.
        drop: of the likelihood in nats, which the guarantee bounds.
        gamma: probability that the guarantee fails.
        samples: draws of every simulation.
    """

    n: int
    epsilon: float
    sigma: float
    steps: int
    seed: int
    recursions: tuple[Recursion, ...]
    drop: float
    gamma: float
    samples: int


@dataclass(frozen=True)
class BoundRow:
    """A bound on the model variance, and its check by simulation.

    Attributes:
        bound: its name.
        required_variance: model variance that guarantees the drop.
        steps: training steps that reach it, by recursion; None where none do.
        kept: percentage of draws whose drop is smaller at that variance.
        kept_lower: lower end of its 95 % interval.
        kept_upper: upper end.
    """

    bound: str
    required_variance: float
    steps: Mapping[Recursion, int | None]
    kept: float
    kept_lower: float
    kept_upper: float


def linear_report(request: LinearRequest, folder: Path, console: Console) -> list[Path]:
    """Compute, print to `console` and write to `folder`; returns the paths. `UserError` for invalid arguments."""
    for name in request.recursions:
        check_recursion(name)
    check_output_folder(folder)
    _check_memory(request)
    guarantee = Guarantee(request.n, request.epsilon, request.sigma, request.drop, request.gamma)
    theory: Curves = {
        name: spherical_trade_off(request.n, request.epsilon, request.sigma, request.steps, name)
        for name in request.recursions
    }
    plane, points, found = _plane(request)
    truth = random_gaussian(request.n, request.sigma, derive_seed(request.seed, "covariance"))
    simulation: Curves = {
        name: simulate_trade_off(
            truth, request.epsilon, request.steps, name, request.samples, derive_seed(request.seed, name)
        )
        for name in request.recursions
    }
    bounds = [_bound_row(request, guarantee, sharp) for sharp in (False, True)]
    for table in (
        _perturbation_table(points, found, request),
        _training_table(theory, request),
        _simulation_table(theory, simulation, request),
        _bound_table(bounds, request),
    ):
        console.print(table)
    setting = f"n = {request.n}, epsilon = {request.epsilon:g}, sigma = {request.sigma:g}"
    folder.mkdir(parents=True, exist_ok=True)
    return [
        *save_figure(
            perturbation_figure(plane, points, found, request.epsilon), folder / "figure2-perturbations"
        ),
        *save_figure(trade_off_figure(theory, simulation, setting), folder / "figure3-tradeoff"),
        _csv(folder / "figure2-perturbations.csv", _perturbation_rows(points, found)),
        _csv(folder / "figure3-tradeoff.csv", _trade_off_rows(theory, simulation)),
        _csv(folder / "theorem-bound.csv", _bound_rows(bounds)),
    ]


def _check_memory(request: LinearRequest) -> None:
    """`UserError` when the arrays of the simulations are larger than this machine's memory."""
    # float64: covariance, eigenvectors and their work space; draws, attacked draws and their products; a curve each.
    numbers = 6 * request.n**2 + 4 * request.samples * request.n + 8 * request.steps * len(request.recursions)
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if 8 * numbers > present:
        raise UserError(
            f"--n {request.n}, --samples {request.samples} and --steps {request.steps} need about "
            f"{8 * numbers / 2**30:,.1f} GiB of memory, and this machine has {present / 2**30:,.1f}; "
            f"give smaller numbers"
        )


def _plane(request: LinearRequest) -> tuple[Gaussian, Floats, Perturbation]:
    """Figure 2's Gaussian, its mean and some draws, and their perturbations."""
    model = Gaussian.from_covariance([0.0, 0.0], request.sigma**2 * np.array(PLANE))
    draws = model.sample(POINTS, np.random.default_rng(derive_seed(request.seed, "points")))
    points = np.vstack([model.mean, draws])
    return model, points, worst_perturbation(model, points, request.epsilon)


def _bound_row(request: LinearRequest, guarantee: Guarantee, sharp: bool) -> BoundRow:
    needed = guarantee.required_variance(sharp) * JUST_ABOVE
    # With epsilon 0 nothing drops and any variance is enough: the check uses the data's own.
    kept = guarantee.simulate(needed or request.sigma**2, request.samples, derive_seed(request.seed, "bound"))
    return BoundRow(
        "chi quantile" if sharp else "Theorem 3.2",
        guarantee.required_variance(sharp),
        {name: guarantee.required_steps(name, sharp) for name in request.recursions},
        kept.value,
        kept.lower,
        kept.upper,
    )


def _table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], caption: str) -> Table:
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for position, header in enumerate(headers):
        table.add_column(header, justify="left" if position == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def _perturbation_table(points: Floats, found: Perturbation, request: LinearRequest) -> Table:
    columns = (points, found.delta, found.multiplier, found.rise, found.hard)
    rows = [
        [_pair(x), f"{'+-' if hard else ''}{_pair(delta)}", f"{nu:.4f}", f"{rise:.4f}", _case(hard)]
        for x, delta, nu, rise, hard in zip(*columns, strict=True)
    ]
    return _table(
        f"Optimal L2 perturbations of a 2-dimensional Gaussian, epsilon = {request.epsilon:g}",
        ("x", "delta", "nu", "NLL rise", "case"),
        rows,
        "nu: multiplier of the secular equation (2 eta in the paper). hard: two perturbations are equally good.",
    )


def _training_table(theory: Curves, request: LinearRequest) -> Table:
    growth = alpha(request.n, request.epsilon, request.sigma)
    printed = alpha(request.n, request.epsilon, 1.0)
    return _table(
        f"Variance after steps of adversarial training, n = {request.n}, sigma = {request.sigma:g}",
        ("steps", *theory),
        [
            [str(step), *(f"{curve.variance[step]:.4g}" for curve in theory.values())]
            for step in _shown_steps(request.steps)
        ],
        f"alpha = {growth:.4f} (the paper's formula, which lacks sigma: {printed:.4f})",
    )


def _simulation_table(theory: Curves, simulation: Curves, request: LinearRequest) -> Table:
    rows = [
        [name, covariance, *_last(curves[name])]
        for name in theory
        for covariance, curves in (("spherical", theory), ("random", simulation))
    ]
    return _table(
        f"Likelihood in nats after {count_noun(request.steps, 'step')}",
        ("training", "covariance", "variance", "natural drop", "sensitivity"),
        rows,
        f"spherical: closed form. random: of the same trace, {count_noun(request.samples, 'sample')} per step, with "
        "standard error.",
    )


def _last(curve: TradeOff) -> list[str]:
    """Variance, natural drop and sensitivity after the last step."""
    error = float(curve.sensitivity_error[-1])
    sensitivity = f"{curve.sensitivity[-1]:.3g}" + (f" +- {error:.1g}" if error else "")
    return [f"{curve.variance[-1]:.4g}", f"{curve.natural_drop[-1]:.3g}", sensitivity]


def _bound_table(bounds: Sequence[BoundRow], request: LinearRequest) -> Table:
    steps = [
        [f"steps, {name}", *("never" if row.steps[name] is None else str(row.steps[name]) for row in bounds)]
        for name in bounds[0].steps
    ]
    return _table(
        f"Drop below {request.drop:g} nats with probability {100 * (1 - request.gamma):g} %",
        ("", *(row.bound for row in bounds)),
        [
            ["variance needed", *(f"{row.required_variance:.4g}" for row in bounds)],
            *steps,
            ["kept, %", *(f"{row.kept:.2f}" for row in bounds)],
            ["95 % interval", *(f"{row.kept_lower:.2f} to {row.kept_upper:.2f}" for row in bounds)],
        ],
        f"kept: share of {request.samples} attacked samples with a smaller drop, at the variance needed",
    )


def _pair(vector: Floats) -> str:
    return "(" + ", ".join(f"{value:.3f}" for value in vector) + ")"


def _case(hard: bool) -> str:
    return "hard" if hard else "easy"


def _shown_steps(steps: int) -> list[int]:
    """At most `SHOWN_STEPS` of 0..steps, evenly spaced; the CSV has all."""
    return sorted({round(position) for position in np.linspace(0, steps, min(steps + 1, SHOWN_STEPS))})


Row = Sequence[object]


def _perturbation_rows(points: Floats, found: Perturbation) -> Iterable[Row]:
    yield ("x1", "x2", "delta1", "delta2", "mirror1", "mirror2", "multiplier", "nll_rise", "case")
    columns = np.column_stack([points, found.delta, found.mirror, found.multiplier, found.rise])
    for values, hard in zip(columns.tolist(), found.hard, strict=True):
        yield (*values, _case(hard))


def _trade_off_rows(theory: Curves, simulation: Curves) -> Iterable[Row]:
    numbers = ("variance", "natural_drop", "sensitivity")
    yield ("covariance", "recursion", "step", *numbers, "sensitivity_standard_error")
    for covariance, curves in (("spherical", theory), ("random", simulation)):
        for name, curve in curves.items():
            columns = [getattr(curve, number) for number in (*numbers, "sensitivity_error")]
            for step, values in enumerate(np.stack(columns, axis=1).tolist()):
                yield (covariance, name, step, *values)


def _bound_rows(bounds: Sequence[BoundRow]) -> Iterable[Row]:
    yield ("bound", "recursion", "required_variance", "steps", "kept", "kept_lower", "kept_upper")
    for row in bounds:
        for name, step in row.steps.items():
            yield (row.bound, name, row.required_variance, step, row.kept, row.kept_lower, row.kept_upper)


def _csv(path: Path, rows: Iterable[Row]) -> Path:
    write_text_atomically(path, csv_text(rows))
    return path
