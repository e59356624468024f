"""One sample must never rule a mean, nor vanish from it unseen."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from robbench.core.errors import UserError
from robbench.models.flows import GatedCouplingFlow, Glow
from robbench.statistics.likelihood import bits_per_dim, importance_weighted_bits_per_dim

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


# ------------------------------------------------------------------------------------------ importance weighting
def test_importance_weighting_reaches_the_probability_of_the_image() -> None:
    """One pixel, v = d - 1/2 under N(0,1): P(k) is the normal's mass of [k/L - 1/2, (k+1)/L - 1/2)."""
    flow = GatedCouplingFlow((1, 1, 1), 2, couplings=1, width=1, blocks=1, preprocessing="shift").eval()
    x = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    with torch.no_grad():
        found = importance_weighted_bits_per_dim(flow, x, 400, seed=0, sample_ids=[3, 4])
    expected = [-math.log2(norm.cdf(high) - norm.cdf(high - 0.5)) for high in (0.0, 0.5)]
    assert found.tolist() == pytest.approx(expected, abs=0.01)


def test_importance_weighting_averages_probabilities_of_the_same_draws() -> None:
    torch.manual_seed(0)
    flow = Glow((1, 4, 4), 17, levels=1, steps=1, width=4).eval()
    x, ids = torch.rand(3, 1, 4, 4), [7, 1, 4]
    with torch.no_grad():
        weighted = importance_weighted_bits_per_dim(flow, x, 5, seed=2, sample_ids=ids)
        draws = flow.log_prob_draws(x, n_samples=5, seed=2, sample_ids=ids).double().numpy()
        single = importance_weighted_bits_per_dim(flow, x, 1, seed=2, sample_ids=ids)
        plain = [flow.bits_per_dim(x, n_samples=n, seed=2, sample_ids=ids) for n in (1, 5)]
        alone = importance_weighted_bits_per_dim(flow, x[1:2], 5, seed=2, sample_ids=ids[1:2])
    expected = -np.log2(np.exp(draws).mean(0)) / 16
    np.testing.assert_allclose(weighted.numpy(), expected, rtol=1e-5)
    torch.testing.assert_close(single, plain[0])
    assert (weighted <= plain[1] + 1e-6).all()  # Jensen
    torch.testing.assert_close(alone, weighted[1:2])


def test_importance_weighting_without_draws_is_refused() -> None:
    flow = Glow((1, 4, 4), 17, levels=1, steps=1, width=2).eval()
    with pytest.raises(UserError, match="n_samples=0"):
        importance_weighted_bits_per_dim(flow, torch.rand(1, 1, 4, 4), 0, seed=0, sample_ids=[0])
