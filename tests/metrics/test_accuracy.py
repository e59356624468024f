"""Intervals against closed forms and SciPy, combinations against plain Python."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from robbench.statistics.accuracy import accuracy, average, bootstrap_means, wilson, worst_case

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution


def roots(successes: int, n: int) -> tuple[float, float]:
    """Wilson bounds as the roots p of (rate - p)^2 = z^2 p (1 - p) / n: the definition, not the formula."""
    rate = successes / n
    a, b, c = 1 + Z * Z / n, -(2 * rate + Z * Z / n), rate * rate
    spread = math.sqrt(max(b * b - 4 * a * c, 0))
    return 100 * (-b - spread) / (2 * a), 100 * (-b + spread) / (2 * a)


@pytest.mark.parametrize(
    ("successes", "n"), [(0, 1), (1, 1), (0, 10), (10, 10), (1, 360), (57, 100), (9999, 10000)]
)
def test_wilson_solves_its_definition_and_agrees_with_scipy(successes: int, n: int) -> None:
    estimate = wilson(successes, n)
    assert (estimate.lower, estimate.upper) == pytest.approx(roots(successes, n), abs=1e-9)
    reference = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert (estimate.lower, estimate.upper) == pytest.approx(
        (100 * reference.low, 100 * reference.high), abs=1e-9
    )


def test_wilson_known_value() -> None:
    """81 of 263: the example of Newcombe, Statistics in Medicine 17 (1998) 857, table I: 0.2553 to 0.3662."""
    estimate = wilson(81, 263)
    assert estimate.value == pytest.approx(100 * 81 / 263)
    assert (round(estimate.lower, 2), round(estimate.upper, 2)) == (25.53, 36.62)


@given(st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_bounds_contain_the_value(case: tuple[int, int]) -> None:
    estimate = wilson(*case)
    assert 0 <= estimate.lower <= estimate.value <= estimate.upper <= 100
    assert estimate.lower < estimate.upper


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_what_is_no_proportion(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="not a proportion"):
        wilson(successes, n)


def test_accuracy_refuses_integers_and_emptiness() -> None:
    with pytest.raises(ValueError, match="bool"):
        accuracy(np.array([0, 1]))
    with pytest.raises(ValueError, match="non-empty"):
        accuracy(np.array([], dtype=bool))


verdict_tables = st.integers(1, 40).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=5)
)


@given(verdict_tables)
def test_worst_case_is_the_and_over_attacks(table: list[list[bool]]) -> None:
    columns = [np.array(column) for column in table]
    ids = [np.arange(len(columns[0]))] * len(columns)
    held = worst_case(ids, columns)
    assert held.tolist() == [all(verdicts) for verdicts in zip(*table, strict=True)]
    assert accuracy(held).value <= min(accuracy(column).value for column in columns)


@pytest.mark.parametrize("other", [[1, 2, 4], [2, 1, 3], [1, 2]])
def test_worst_case_refuses_other_samples(other: list[int]) -> None:
    with pytest.raises(ValueError, match="other sample ids"):
        worst_case([np.array([1, 2, 3]), np.array(other)], [np.ones(3, bool), np.ones(len(other), bool)])


def test_worst_case_refuses_verdicts_without_ids() -> None:
    with pytest.raises(ValueError, match="one id list each"):
        worst_case([np.arange(3)], [np.ones(3, bool), np.ones(3, bool)])
    with pytest.raises(ValueError, match="2 samples instead of 3"):
        worst_case([np.arange(3)], [np.ones(2, bool)])


@settings(max_examples=30)
@given(verdict_tables, st.integers(0, 2**32))
def test_average_is_the_mean_of_the_columns_inside_its_bounds(table: list[list[bool]], seed: int) -> None:
    estimate = average([np.array(column) for column in table], seed)
    rates = [100 * sum(column) / len(column) for column in table]
    assert estimate.value == pytest.approx(sum(rates) / len(rates))
    assert estimate.lower - 1e-9 <= estimate.value <= estimate.upper + 1e-9
    assert estimate == average([np.array(column) for column in table], seed)


def test_bootstrap_follows_the_distribution_of_all_resamples() -> None:
    """Three samples have 27 equally likely resamples; their means must come out in those shares."""
    scores = np.array([0, 1, 3])
    exact: dict[float, float] = {}
    for resample in product(scores.tolist(), repeat=3):
        exact[sum(resample) / 3] = exact.get(sum(resample) / 3, 0) + 1 / 27
    drawn = bootstrap_means(scores, seed=0, resamples=200_000)
    for mean, share in exact.items():
        assert np.isclose(drawn, mean).mean() == pytest.approx(share, abs=0.005)
    assert np.unique(np.round(drawn, 9)).size == len(exact)


def test_bootstrap_is_paired() -> None:
    """Against joint resampling of ids done the long way; resampling the columns apart would be narrower."""
    rng = np.random.default_rng(5)
    clean = rng.random(200) < 0.6
    columns = [clean, clean.copy(), clean.copy()]
    estimate = average(columns, seed=1)
    picks = rng.integers(0, 200, (20_000, 200))
    means = 100 * np.stack(columns)[:, picks].mean(axis=(0, 2))
    lower, upper = np.percentile(means, [2.5, 97.5])
    assert (estimate.lower, estimate.upper) == pytest.approx((lower, upper), abs=0.8)
    apart = (upper - lower) / math.sqrt(3)
    assert estimate.upper - estimate.lower > 1.5 * apart


def test_average_refuses_columns_of_other_samples() -> None:
    with pytest.raises(ValueError, match="instead of 3"):
        average([np.ones(3, bool), np.ones(4, bool)], seed=0)
    with pytest.raises(ValueError, match="no columns"):
        average([], seed=0)
