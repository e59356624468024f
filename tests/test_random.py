"""Counter-based noise: keyed by sample, independent of everything else, and actually random."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from robbench.attacks.search.geometry import (
    GeneratorNoise,
    SampleNoise,
    direction,
    norm_of,
    project,
    random_start,
)
from robbench.core.random import SampleRandom


@given(ids=st.lists(st.integers(0, 10**6), min_size=1, max_size=8, unique=True), seed=st.integers(0, 9))
@settings(max_examples=30)
def test_a_row_depends_on_its_own_id_alone(ids: list[int], seed: int):
    random = SampleRandom(seed, "stream")
    together = random.uniform(ids, (3, 2))
    for row, sample in enumerate(ids):
        assert torch.equal(together[row], random.uniform([sample], (3, 2))[0])
    assert torch.equal(random.uniform(ids[::-1], (3, 2)), together.flip(0))


def test_seed_stream_restart_and_sample_all_matter():
    base = SampleRandom(0, "a").normal([5], (64,))
    others = [
        SampleRandom(1, "a").normal([5], (64,)),
        SampleRandom(0, "b").normal([5], (64,)),
        SampleRandom(0, "a").normal([6], (64,)),
        SampleRandom(0, "a").normal([5], (64,), restart=1),
    ]
    for other in others:
        assert abs(float(np.corrcoef(base[0], other[0])[0, 1])) < 0.5
        assert not torch.equal(base, other)


def test_noise_has_the_distribution_it_names():
    random = SampleRandom(0, "distribution")
    uniform = random.uniform(range(200), (50,)).flatten().numpy()
    normal = random.normal(range(200), (50,)).flatten().numpy()
    assert stats.kstest(uniform, "uniform", args=(-1, 2)).pvalue > 1e-3
    assert stats.kstest(normal, "norm").pvalue > 1e-3


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_uniform_starts_fill_the_ball(norm: str):
    """(||d|| / r)^D is uniform on [0,1] for a uniform point of a D-dimensional ball in any norm."""
    for noise in (
        SampleNoise(0, "start", torch.arange(800), 0, torch.device("cpu")),
        GeneratorNoise(800, torch.Generator().manual_seed(0)),
    ):
        points = random_start("uniform", norm, 0.3, (4,), noise)
        radii = (norm_of(points, norm) / 0.3).numpy().astype(float)
        assert radii.max() <= 1 + 1e-6
        assert stats.kstest(radii**4, "uniform").pvalue > 1e-3
        assert points.mean(0).abs().max() < 0.03


@given(
    norm=st.sampled_from(["l1", "l2", "linf"]),
    radius=st.floats(0.0, 3.0),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_projection_lands_in_the_ball_and_leaves_inner_points(norm: str, radius: float, seed: int):
    points = torch.randn(5, 2, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    projected = project(points, norm, radius)
    assert (norm_of(projected, norm) <= radius + 1e-6).all()
    inside = norm_of(points, norm) < radius - 1e-9
    torch.testing.assert_close(projected[inside], points[inside])
    torch.testing.assert_close(project(projected, norm, radius), projected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_a_zero_gradient_moves_nothing_and_gives_no_nan(norm: str):
    assert torch.equal(direction(torch.zeros(2, 3), norm), torch.zeros(2, 3))


@pytest.mark.parametrize(("norm", "size"), [("l1", 1.0), ("l2", 1.0), ("linf", 1.0)])
def test_directions_have_unit_size_in_their_norm(norm: str, size: float):
    gradient = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm_of(direction(gradient, norm), norm), torch.full((6,), size))
