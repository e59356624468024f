"""Differences of two models with several trainings each: paired by seed."""

import numpy as np
import pytest
from scipy import stats

from robbench.experiments.table import Measurements, Value

NUMBERS = {
    "a-seed0": 60.0,
    "a-seed1": 64.0,
    "a-seed2": 59.0,
    "b-seed0": 58.0,
    "b-seed1": 61.0,
    "b-seed2": 58.0,
    "c": 50.0,
}


class Measured(Measurements):
    """The numbers above."""

    def _one(self, folder: str, attack: str, metric: str) -> Value:
        value = NUMBERS.get(folder)
        return Value(value, n=100) if value is not None else Value(status="failed", reason="nan")


def difference(first: str, second: str, **folders: tuple[str, ...]) -> Value:
    known = {name: tuple(f"{name}-seed{s}" for s in (0, 1, 2)) for name in ("a", "b", "d")} | {"c": ("c",)}
    return Measured(None, known | folders, {}, {}).difference((first, second), "clean", "accuracy")


def test_trainings_of_the_same_seed_are_paired() -> None:
    found = difference("a", "b")
    lower, upper = stats.t.interval(0.95, 2, 2.0, stats.sem([2.0, 3.0, 1.0]))
    assert (found.value, found.lower, found.upper) == pytest.approx((2.0, lower, upper))
    assert (found.n, found.reason) == (100, "mean of 3 trainings")


def test_other_seeds_or_one_training_have_a_difference_without_an_interval() -> None:
    for found in (difference("a", "c"), difference("a", "b", b=("b-seed0", "b-seed1"))):
        assert found.value is not None
        assert (found.lower, found.upper) == (None, None)
    assert difference("a", "c").value == pytest.approx(np.mean([60, 64, 59]) - 50)


def test_a_training_that_failed_leaves_no_difference() -> None:
    assert (difference("a", "d").status, difference("d", "c").status) == ("failed", "failed")
