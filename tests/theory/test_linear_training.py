"""Adversarial training of Gaussians and Theorem 3.2: printed numbers, simulation, and the lemma behind the bound."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi

from robbench.core.errors import UserError
from robbench.theory.bound import Guarantee, chi_quantile, lemma_margin, lemma_tail
from robbench.theory.perturbation import Gaussian, worst_perturbation
from robbench.theory.training import (
    RECURSIONS,
    Recursion,
    alpha,
    divergence,
    fit,
    mean_chi,
    random_gaussian,
    simulate_trade_off,
    spherical_trade_off,
    trained_variances,
)


@pytest.mark.parametrize("n", [1, 2, 10, 200, 5000])
def test_mean_chi_is_the_mean_of_chi(n: int) -> None:
    assert mean_chi(n) == pytest.approx(chi(n).mean(), rel=1e-9)


@pytest.mark.parametrize(
    ("n", "variance", "printed"), [(2, 5.212, 7.320), (10, 3.914, 4.729), (50, 3.337, 3.669)]
)
def test_alpha_against_monte_carlo(n: int, variance: float, printed: float) -> None:
    """Variance after one step for sigma 1.7 and epsilon .9; the paper's alpha without sigma misses it."""
    sigma, epsilon = 1.7, 0.9
    expected = sigma**2 * (1 + alpha(n, epsilon, sigma))
    assert expected == pytest.approx(variance, abs=1e-3)
    assert sigma**2 * (1 + alpha(n, epsilon, 1.0)) == pytest.approx(printed, abs=1e-3)
    model = Gaussian.spherical(n, sigma**2, mean=np.arange(n, dtype=float))
    x = model.sample(40_000, np.random.default_rng(0))
    attacked = x + worst_perturbation(model, x, epsilon).delta
    squared = ((attacked - model.mean) ** 2).mean(1)
    error = squared.std() / math.sqrt(len(squared))
    assert squared.mean() == pytest.approx(expected, abs=5 * error)
    assert abs(squared.mean() - printed) > 20 * error
    assert np.abs(attacked.mean(0) - model.mean).max() < 5 * math.sqrt(expected / len(x))


@pytest.mark.parametrize(
    ("recursion", "variance"),
    [("paper_geometric", 17.77), ("refit", 6.48), ("reperturb", 6.58), ("fixed_data", 1.333)],
)
def test_recursions_end_where_they_should(recursion: Recursion, variance: float) -> None:
    found = trained_variances(10, 0.5, 1.0, 10, recursion)
    assert found[-1] == pytest.approx(variance, abs=6e-3)
    assert found[0] == 1.0
    assert found[1] == pytest.approx(1 + alpha(10, 0.5, 1.0), rel=1e-14)


@pytest.mark.parametrize("recursion", RECURSIONS)
def test_simulated_training_follows_the_closed_form(recursion: Recursion) -> None:
    """For a spherical truth, every recursion means the procedure that its docstring names."""
    exact = spherical_trade_off(4, 0.7, 1.5, 4, recursion)
    found = simulate_trade_off(
        Gaussian.spherical(4, 1.5**2, mean=np.ones(4)), 0.7, 4, recursion, 40_000, seed=1
    )
    assert found.variance == pytest.approx(exact.variance, rel=0.02)
    assert found.natural_drop == pytest.approx(exact.natural_drop, rel=0.04, abs=2e-3)
    assert found.sensitivity == pytest.approx(exact.sensitivity, rel=0.02)
    assert (found.sensitivity_error < 0.01 * found.sensitivity).all()


def test_natural_drop_is_a_divergence_and_trades_against_sensitivity() -> None:
    curve = spherical_trade_off(10, 0.5, 1.3, 10, "refit")
    for variance, drop in zip(curve.variance, curve.natural_drop, strict=True):
        exact = divergence(Gaussian.spherical(10, 1.3**2), Gaussian.spherical(10, variance))
        assert drop == pytest.approx(exact, rel=1e-12, abs=1e-14)
    assert (np.diff(curve.natural_drop) > 0).all()
    assert (np.diff(curve.sensitivity) < 0).all()


def test_sensitivity_is_a_mean_over_attacked_samples() -> None:
    curve = spherical_trade_off(6, 0.8, 1.3, 3, "reperturb")
    x = Gaussian.spherical(6, 1.3**2).sample(100_000, np.random.default_rng(2))
    for variance, expected in zip(curve.variance, curve.sensitivity, strict=True):
        rise = worst_perturbation(Gaussian.spherical(6, variance), x, 0.8).rise
        assert rise.mean() == pytest.approx(expected, abs=5 * rise.std() / math.sqrt(len(x)))


def test_random_covariance_shows_the_trade_off() -> None:
    truth = random_gaussian(10, 1.0, seed=0)
    assert np.trace(truth.covariance) == pytest.approx(10, rel=1e-12)
    curve = simulate_trade_off(truth, 0.5, 5, "refit", 5_000, seed=0)
    assert curve.natural_drop[0] == pytest.approx(0.0, abs=1e-12)
    assert all(later > earlier for earlier, later in pairwise(curve.natural_drop))
    assert all(later < earlier for earlier, later in pairwise(curve.sensitivity))
    again = simulate_trade_off(truth, 0.5, 5, "refit", 5_000, seed=0)
    assert (again.sensitivity == curve.sensitivity).all()


def test_divergence_against_its_monte_carlo_mean() -> None:
    truth, model = random_gaussian(3, 1.0, seed=1), random_gaussian(3, 1.2, seed=2)
    x = truth.sample(200_000, np.random.default_rng(0))
    terms = truth.log_density(x) - model.log_density(x)
    assert terms.mean() == pytest.approx(divergence(truth, model), abs=5 * terms.std() / math.sqrt(len(x)))


def test_fit_is_the_maximum_likelihood_estimate() -> None:
    x = random_gaussian(3, 1.0, seed=0).sample(500, np.random.default_rng(0))
    model = fit(x)
    assert model.mean == pytest.approx(x.mean(0))
    assert model.covariance == pytest.approx(np.cov(x.T, bias=True), rel=1e-10)
    best = model.log_density(x).sum()
    for scale in (0.98, 1.02):
        assert Gaussian.from_covariance(model.mean, scale * model.covariance).log_density(x).sum() < best


# ---------------------------------------------------------------------------------------------- Theorem 3.2
@settings(max_examples=30)
@given(
    n=st.integers(1, 60),
    epsilon=st.floats(0.01, 5),
    sigma=st.floats(0.1, 5),
    drop=st.floats(0.01, 10),
    gamma=st.floats(1e-6, 0.5),
)
def test_bound_holds_and_the_sharp_one_is_smaller(
    n: int, epsilon: float, sigma: float, drop: float, gamma: float
) -> None:
    """Exact check: the drop is below `drop` up to a norm whose chi probability must reach 1 - gamma."""
    guarantee = Guarantee(n, epsilon, sigma, drop, gamma)
    loose, sharp = guarantee.required_variance(), guarantee.required_variance(sharp=True)
    assert sharp <= loose * (1 + 1e-12)
    for variance in (loose, sharp):
        reach = (2 * drop * variance - epsilon**2) / (2 * epsilon * sigma)
        assert chi(n).sf(reach) <= gamma * (1 + 1e-6)


@pytest.mark.parametrize("n", [1, 10, 100])
def test_bound_holds_empirically(n: int) -> None:
    guarantee = Guarantee(n, 0.5, 1.3, 0.4, 0.05)
    loose = guarantee.simulate(guarantee.required_variance() * (1 + 1e-9), 20_000, seed=0)
    sharp = guarantee.simulate(guarantee.required_variance(sharp=True) * (1 + 1e-9), 20_000, seed=0)
    assert loose.lower > 99.0
    assert sharp.value == pytest.approx(95.0, abs=0.8)
    assert sharp.lower < sharp.value < sharp.upper
    below = guarantee.simulate(0.9 * guarantee.required_variance(sharp=True), 20_000, seed=0)
    assert below.upper < 95.0


def test_required_steps_are_the_first_that_suffice() -> None:
    guarantee = Guarantee(10, 0.5, 1.0, 0.5, 0.05)
    for sharp in (False, True):
        needed = guarantee.required_variance(sharp)
        for recursion in RECURSIONS:
            steps = guarantee.required_steps(recursion, sharp)
            if recursion == "fixed_data":
                assert steps is None
                continue
            assert steps is not None
            curve = trained_variances(10, 0.5, 1.0, steps, recursion)
            assert curve[-1] > needed >= curve[-2]
    printed = math.log(guarantee.required_variance()) / math.log1p(alpha(10, 0.5, 1.0))
    assert guarantee.required_steps("paper_geometric") == math.floor(printed) + 1
    assert Guarantee(10, 0.5, 1.0, 100.0, 0.05).required_steps("fixed_data") == 0


@given(n=st.integers(1, 500), gamma=st.floats(1e-12, 0.999))
def test_chi_quantile(n: int, gamma: float) -> None:
    assert chi_quantile(n, gamma) == pytest.approx(chi(n).isf(gamma), rel=1e-9)


@given(n=st.integers(1, 500), t=st.floats(1, 40))
def test_lemma_8_2(n: int, t: float) -> None:
    """True for t > 1, although the printed middle step, n(1 + 2 sqrt(t/10) + t/5) < n(1 + 2t/5), needs t > 10."""
    tail, bound = lemma_tail(n, t)
    assert tail <= bound
    assert lemma_margin(t) >= lemma_margin(1.0)
    printed_step = 1 + 2 * math.sqrt(t / 10) + t / 5 < 1 + 2 * t / 5
    assert printed_step is (t > 10) or t == pytest.approx(10)


def test_lemma_margin_at_one() -> None:
    assert lemma_margin(1.0) == pytest.approx(0.1675, abs=1e-4)


# ------------------------------------------------------------------------------------------------------ bad input
def test_bad_arguments_are_user_errors() -> None:
    with pytest.raises(UserError, match="n=0"):
        mean_chi(0)
    with pytest.raises(UserError, match="epsilon=-1"):
        alpha(3, -1.0, 1.0)
    with pytest.raises(UserError, match="sigma=0"):
        alpha(3, 1.0, 0.0)
    with pytest.raises(UserError, match="float64"):
        alpha(3, 1e150, 1e-150)
    with pytest.raises(UserError, match="steps=-1"):
        trained_variances(3, 1.0, 1.0, -1, "refit")
    with pytest.raises(UserError, match="did you mean 'refit'"):
        trained_variances(3, 1.0, 1.0, 1, "refitt")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="exceeds float64"):
        trained_variances(3, 1.0, 1.0, 5000, "paper_geometric")
    with pytest.raises(UserError, match="samples=3"):
        simulate_trade_off(Gaussian.spherical(3, 1.0), 1.0, 1, "refit", 3, seed=0)
    for drop, gamma in ((0.0, 0.1), (math.nan, 0.1), (1.0, 0.0), (1.0, 1.0), (1.0, math.nan)):
        with pytest.raises(UserError, match=r"drop=|gamma="):
            Guarantee(3, 1.0, 1.0, drop, gamma)
    with pytest.raises(UserError, match="samples=0"):
        Guarantee(3, 1.0, 1.0, 1.0, 0.1).simulate(1.0, 0, seed=0)
