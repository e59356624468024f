"""Distances against the standard library."""

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robbench.statistics.perturbation import perturbation_size

distances = st.lists(st.floats(0, 30, width=32), min_size=1, max_size=30)


@given(distances)
def test_size_is_mean_and_population_deviation(sample: list[float]) -> None:
    size = perturbation_size(np.array(sample, dtype=np.float32), np.array(sample[::-1], dtype=np.float32))
    assert size is not None
    assert size.n == len(sample)
    assert (size.l2_mean, size.l2_std) == pytest.approx(
        (statistics.fmean(sample), statistics.pstdev(sample)), abs=1e-6
    )
    assert (size.linf_mean, size.linf_std) == pytest.approx((size.l2_mean, size.l2_std))


def test_nothing_attacked_has_no_size() -> None:
    assert perturbation_size([], []) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1])
def test_impossible_distances_are_errors(bad: float) -> None:
    with pytest.raises(ValueError, match="negative or non-finite"):
        perturbation_size([0.1, bad], [0.1, 0.1])


def test_one_distance_each_a_sample() -> None:
    with pytest.raises(ValueError, match="one each"):
        perturbation_size([0.1, 0.2], [0.1])
