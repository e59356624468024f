"""One sample must never rule a mean, nor vanish from it unseen."""

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from robbench.metrics.likelihood import bits_per_dim

values = st.lists(st.floats(width=32), min_size=1, max_size=40)


@given(values)
def test_summary_counts_every_sample_once(sample: list[float]) -> None:
    summary = bits_per_dim(np.array(sample, dtype=np.float32))
    finite = [float(np.float32(v)) for v in sample if math.isfinite(v)]
    ordered = [float(np.float32(v)) for v in sample if not math.isnan(v)]
    assert (summary.n, summary.n_finite) == (len(sample), len(finite))
    assert summary.n_infinite == sum(math.isinf(v) for v in sample)
    assert summary.n_finite + summary.n_infinite + summary.n_nan == len(sample)
    assert (summary.note == "") == (len(finite) == len(sample))
    if finite:
        assert summary.mean == pytest.approx(
            math.fsum(finite) / len(finite), rel=1e-9, abs=1e-3 * max(map(abs, finite))
        )
    else:
        assert summary.mean is None
    expected = statistics.median(ordered) if ordered else None
    if expected is None or math.isnan(expected):
        assert summary.median is None
    else:
        assert summary.median == pytest.approx(expected)


def test_one_infinity_is_left_out_and_named() -> None:
    summary = bits_per_dim([2.0, 4.0, np.inf])
    assert (summary.mean, summary.median) == (3.0, 4.0)
    assert summary.note == "mean over 2 finite of 3: 1 infinite, 0 NaN left out"


def test_mean_does_not_lose_small_values_to_float32() -> None:
    assert bits_per_dim(np.array([1e16, 1.0, 1.0, 1.0], dtype=np.float32)).mean == pytest.approx(
        (float(np.float32(1e16)) + 3) / 4, rel=1e-15
    )


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        bits_per_dim([])
