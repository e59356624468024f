"""Adversarial training of a Gaussian: paper 002, section 3.2, in closed form (spherical) and by simulation.

Errors in print: alpha lacks sigma, so that it holds only for sigma = 1 or epsilon in units of sigma; and recursion (4),
sigma^2 (1 + alpha)^m, is not the result of repeated training with a fixed epsilon. The result depends on the meaning of
"m steps", which is therefore a choice here, `Recursion`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from robbench.core.errors import UserError, unknown_name
from robbench.theory.perturbation import (
    Floats,
    Gaussian,
    check_dimension,
    check_epsilon,
    worst_perturbation,
)

Recursion = Literal["paper_geometric", "refit", "reperturb", "fixed_data"]
RECURSIONS: tuple[Recursion, ...] = get_args(Recursion)


def mean_chi(n: int) -> float:
    """E||z|| for z ~ N(0, I) in n dimensions: sqrt(2) Gamma((n+1)/2) / Gamma(n/2)."""
    check_dimension(n)
    return math.sqrt(2) * math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2))


def alpha(n: int, epsilon: float, sigma: float) -> float:
    """Relative growth of the variance by one step of adversarial training of N(mu, sigma^2 I), section 3.2.

    Cov[x + epsilon (x-mu)/||x-mu||] = sigma^2 (1 + alpha) I with
    alpha = (2/n)(epsilon/sigma) E[chi_n] + epsilon^2 / (n sigma^2). The print leaves sigma out: `alpha(n, epsilon, 1)`.
    """
    check_epsilon(epsilon)
    check_sigma(sigma)
    relative = epsilon / sigma
    growth = (2 * relative * mean_chi(n) + relative * relative) / n
    if not math.isfinite(growth):
        raise UserError(f"epsilon={epsilon:g} with sigma={sigma:g} exceeds float64; give a smaller epsilon")
    return growth


def variances(n: int, epsilon: float, sigma: float, recursion: Recursion) -> Iterator[float]:
    """v_0 = sigma^2, v_1, ...: variance of the spherical model after m steps of adversarial training; endless.

    paper_geometric: (4) of the paper, v_m = sigma^2 (1 + alpha)^m; needs an epsilon that grows with the model.
    refit: sample the model, attack, fit: v' = v + 2 epsilon sqrt(v) E[chi_n]/n + epsilon^2/n.
    reperturb: attack the samples attacked before: v_m = sigma^2 + 2 m epsilon sigma E[chi_n]/n + (m epsilon)^2/n.
    fixed_data: attack the clean data again; the direction does not depend on the model: v_m = v_1 for m >= 1.
    """
    check_recursion(recursion)
    growth, chi = alpha(n, epsilon, sigma), mean_chi(n)
    return _variances(n, epsilon, sigma, recursion, growth, chi)


def _variances(
    n: int, epsilon: float, sigma: float, recursion: Recursion, growth: float, chi: float
) -> Iterator[float]:
    variance, step = sigma**2, 0
    while True:
        yield variance
        step += 1
        if recursion == "paper_geometric":
            variance *= 1 + growth
        elif recursion == "refit":
            variance += (2 * epsilon * math.sqrt(variance) * chi + epsilon * epsilon) / n
        else:
            radius = epsilon if recursion == "fixed_data" else step * epsilon
            variance = sigma**2 + (2 * radius * sigma * chi + radius * radius) / n


def trained_variances(n: int, epsilon: float, sigma: float, steps: int, recursion: Recursion) -> Floats:
    """v_0 .. v_steps of `variances`, [steps+1]; `UserError` when they exceed float64."""
    check_steps(steps)
    found = np.fromiter(variances(n, epsilon, sigma, recursion), np.float64, count=steps + 1)
    if not np.isfinite(found).all():
        raise UserError(
            f"steps={steps} with recursion {recursion}: the variance exceeds float64; give fewer steps"
        )
    return found


def natural_drop(n: int, sigma: float, variance: Floats) -> Floats:
    """L_nat(0) - L_nat(m) in nats for model variances v_m: (n/2)[ln(v/sigma^2) + sigma^2/v - 1] (section 3.2.1)."""
    check_sigma(sigma)
    shrink = sigma**2 / variance
    return np.asarray(0.5 * n * (shrink - 1 - np.log(shrink)))


def sensitivity(n: int, epsilon: float, sigma: float, variance: Floats) -> Floats:
    """L_sen(m) in nats: mean drop of the likelihood of clean samples under the optimal attack.

    (2 epsilon sigma E[chi_n] + epsilon^2) / (2 v_m); (5) of the paper is its case sigma = 1 with geometric v_m.
    """
    check_epsilon(epsilon)
    check_sigma(sigma)
    return np.asarray((2 * epsilon * sigma * mean_chi(n) + epsilon**2) / (2 * variance))


@dataclass(frozen=True, eq=False)
class TradeOff:
    """Natural drop against sensitivity over training steps 0..m (Figure 3), all [m+1], in nats.

    variance: mean eigenvalue of the model's covariance. sensitivity_error: standard error, 0 where exact.
    """

    variance: Floats
    natural_drop: Floats
    sensitivity: Floats
    sensitivity_error: Floats


def spherical_trade_off(n: int, epsilon: float, sigma: float, steps: int, recursion: Recursion) -> TradeOff:
    """The closed form of section 3.2.1 for N(mu, sigma^2 I)."""
    variance = trained_variances(n, epsilon, sigma, steps, recursion)
    return TradeOff(
        variance,
        natural_drop(n, sigma, variance),
        sensitivity(n, epsilon, sigma, variance),
        np.zeros(steps + 1),
    )


def simulate_trade_off(
    truth: Gaussian, epsilon: float, steps: int, recursion: Recursion, samples: int, seed: int
) -> TradeOff:
    """Train on `samples` attacked draws per step, for any covariance; step 0 is the true Gaussian itself.

    The natural drop is exact given the fitted models (the Kullback-Leibler divergence from the truth); the
    sensitivity is a mean over the same `samples` clean draws at every step. paper_geometric is refit with a radius
    that grows with the model, epsilon sqrt(tr K_m / tr K_0), as (4) implies. The paper draws Figure 3 for a random
    covariance although its formulas are spherical. `UserError` unless samples > n.
    """
    check_epsilon(epsilon)
    check_steps(steps)
    check_recursion(recursion)
    if samples <= truth.n:
        raise UserError(f"samples={samples} in {truth.n} dimensions; give more samples than dimensions")
    generator = np.random.default_rng(seed)
    clean = truth.sample(samples, generator)
    model, data = truth, clean
    rows = [_assess(truth, model, clean, epsilon)]
    for _ in range(steps):
        radius = epsilon
        if recursion in ("refit", "paper_geometric"):
            data = model.sample(samples, generator)
        if recursion == "paper_geometric":
            radius = epsilon * math.sqrt(model.values.sum() / truth.values.sum())
        attacked = data + worst_perturbation(model, data, radius).delta
        if recursion == "reperturb":
            data = attacked
        model = fit(attacked)
        rows.append(_assess(truth, model, clean, epsilon))
    return TradeOff(*np.array(rows).T)


def _assess(truth: Gaussian, model: Gaussian, clean: Floats, epsilon: float) -> tuple[float, ...]:
    rise = worst_perturbation(model, clean, epsilon).rise
    error = float(rise.std(ddof=1)) / math.sqrt(len(rise))
    return float(model.values.mean()), divergence(truth, model), float(rise.mean()), error


def divergence(truth: Gaussian, model: Gaussian) -> float:
    """E[ln truth(x) - ln model(x)] for x ~ truth, in nats: the loss of natural likelihood."""
    mixed = (model.vectors.T @ truth.vectors) ** 2 @ truth.values / model.values
    shift = model.coordinates(truth.mean)[0] ** 2 / model.values
    logs = np.log(model.values) - np.log(truth.values)
    return 0.5 * float((mixed + shift + logs - 1).sum())


def fit(samples: Floats) -> Gaussian:
    """Maximum likelihood from samples [N,n]: their mean, and (1/N) sum (x-mean)(x-mean)^T.

    The covariance that paper 002 prints carries a second 1/N. `UserError` when it is singular (N <= n).
    """
    mean = samples.mean(0)
    centred = samples - mean
    return Gaussian.from_covariance(mean, centred.T @ centred / len(samples))


def random_gaussian(n: int, sigma: float, seed: int) -> Gaussian:
    """A random mean, N(0, sigma^2 I), and a random covariance: Wishart with 2n degrees of freedom, trace n sigma^2."""
    check_dimension(n)
    check_sigma(sigma)
    generator = np.random.default_rng(seed)
    mean = sigma * generator.standard_normal(n)
    factor = generator.standard_normal((n, 2 * n))
    wishart = factor @ factor.T
    return Gaussian.from_covariance(mean, wishart * (n * sigma**2 / np.trace(wishart)))


def check_sigma(sigma: float) -> None:
    """`UserError` unless sigma is a finite positive number whose square is one too."""
    if not (math.isfinite(sigma) and sigma > 0 and 0 < sigma * sigma < math.inf):
        raise UserError(f"sigma={sigma:g} is not a standard deviation; give a finite number above 0")


def check_steps(steps: int) -> None:
    """`UserError` unless steps >= 0."""
    if steps < 0:
        raise UserError(f"steps={steps} of adversarial training; give an integer of at least 0")


def check_recursion(recursion: str) -> None:
    """`UserError` for a recursion that does not exist."""
    if recursion not in RECURSIONS:
        raise unknown_name("recursion", recursion, RECURSIONS)
