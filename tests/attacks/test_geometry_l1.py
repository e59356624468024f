"""Projection on the L1 ball cut by the box, sparse steps: certificates of optimality, brute force, the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from robbench.attacks.search.geometry import norm_of, project
from robbench.attacks.search.geometry_l1 import (
    project_l1_box,
    rounding_allowance,
    sparse_direction,
    support_size,
)


def case(seed: int, dimensions: int, scale: float, edges: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(delta, x) of 4 samples in float64; with `edges` many pixels stand at 0, 1 or share a value."""
    generator = np.random.default_rng(seed)
    x = generator.uniform(size=(4, dimensions))
    delta = scale * generator.normal(size=(4, dimensions))
    if edges:
        x = np.round(2 * x) / 2
        delta = np.round(2 * delta / scale) * scale / 2
    return torch.tensor(delta), torch.tensor(x)


def best_linear(g: np.ndarray, x: np.ndarray, radius: float) -> float:
    """max <g, w> over the set, exactly: spend the radius on the largest |g| first, up to the box."""
    room = np.where(g > 0, 1 - x, x)
    value = 0.0
    for i in np.argsort(-np.abs(g)):
        spent = min(room[i], radius)
        value, radius = value + abs(g[i]) * spent, radius - spent
    return value


@given(
    seed=st.integers(0, 10**6),
    dimensions=st.integers(1, 14),
    scale=st.sampled_from([1e-3, 0.3, 1.0, 30.0]),
    radius=st.sampled_from([0.0, 1e-3, 0.2, 1.0, 3.0, 50.0]),
    edges=st.booleans(),
)
@settings(max_examples=300)
def test_projection_satisfies_the_variational_inequality(seed, dimensions, scale, radius, edges):
    """z is the nearest point of a convex set C exactly if <delta - z, w - z> <= 0 for every w of C."""
    delta, x = case(seed, dimensions, scale, edges)
    found = project_l1_box(delta, x, torch.full((4,), radius, dtype=delta.dtype))
    for z, point, centre in zip(found.numpy(), delta.numpy(), x.numpy(), strict=True):
        assert np.abs(z).sum() <= radius + 1e-9
        assert (centre + z).min() >= -1e-12
        assert (centre + z).max() <= 1 + 1e-12
        assert best_linear(point - z, centre, radius) - (point - z) @ z <= 1e-8 * max(1.0, scale**2)


def test_projection_equals_a_generic_constrained_optimiser():
    for seed in range(5):
        delta, x = case(seed, 6, 1.0, False)
        ours = project_l1_box(delta, x, torch.full((4,), 0.8, dtype=delta.dtype)).numpy()
        for z, point, centre in zip(ours, delta.numpy(), x.numpy(), strict=True):
            split = minimize(
                lambda v, point=point: ((v[:6] - v[6:] - point) ** 2).sum(), np.full(12, 0.01),
                bounds=[(0, 1 - c) for c in centre] + [(0, c) for c in centre],
                constraints={"type": "ineq", "fun": lambda v: 0.8 - v.sum()}, method="SLSQP",
                options={"ftol": 1e-14, "maxiter": 500},
            ).x  # fmt: skip
            np.testing.assert_allclose(z, split[:6] - split[6:], atol=3e-4)


@pytest.mark.parametrize(("shape", "radius"), [((1, 8, 8), 2.0), ((3, 5, 9), 4.0), ((3, 32, 32), 12.0)])
def test_projection_equals_the_references(shape, radius):
    from pyautoattack.autopgd_base import L1_projection

    generator = torch.Generator().manual_seed(0)
    x = torch.rand(16, *shape, generator=generator)
    delta = torch.randn(16, *shape, generator=generator)
    theirs = delta + L1_projection(x, delta, radius)
    torch.testing.assert_close(project_l1_box(delta, x, torch.full((16,), radius)), theirs, atol=2e-5, rtol=0)


def test_a_radius_a_sample_and_what_the_box_does_not_touch():
    generator = torch.Generator().manual_seed(1)
    delta = 0.1 * torch.randn(5, 3, 5, 9, generator=generator)
    x = torch.full_like(delta, 0.5)
    radii = torch.tensor([0.0, 0.5, 1.0, 4.0, 1e6])
    found = project_l1_box(delta, x, radii)
    for row, radius in enumerate(radii.tolist()):
        torch.testing.assert_close(found[row], project(delta[row : row + 1], "l1", radius)[0])
    assert torch.equal(found[4], delta[4])
    assert not found[0].any()


def test_float32_uses_the_whole_radius_in_many_dimensions():
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(3, 3, 224, 224, generator=generator)
    delta = torch.randn(x.shape, generator=generator)
    found = project_l1_box(delta, x, torch.tensor([12.0, 300.0, 20000.0])).double().abs().sum((1, 2, 3))
    torch.testing.assert_close(
        found, torch.tensor([12.0, 300.0, 20000.0], dtype=torch.float64), rtol=2e-6, atol=0
    )


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dimensions", [1, 64, 3072, 150528])
@pytest.mark.parametrize("epsilon", [0.01, 0.5, 12.0])
def test_a_point_short_of_the_radius_by_the_allowance_is_inside_in_float32(norm, dimensions, epsilon):
    generator = torch.Generator().manual_seed(3)
    inside = epsilon - rounding_allowance(epsilon, dimensions)
    assert 0 < epsilon - inside <= 0.01 * epsilon
    for spread in (1.0, 1e-3):  # few and many coordinates carry the norm
        x = torch.rand(4, dimensions, generator=generator)
        delta = torch.randn(4, dimensions, generator=generator) ** (1 if spread == 1 else 9)
        delta = delta / norm_of(delta, norm)[:, None] * inside
        assert (norm_of((x + delta) - x, norm) <= epsilon).all()


@given(seed=st.integers(0, 10**6), dimensions=st.integers(1, 30), ties=st.booleans())
@settings(max_examples=100)
def test_sparse_direction_takes_the_largest_coordinates(seed, dimensions, ties):
    generator = np.random.default_rng(seed)
    gradient = generator.normal(size=(3, dimensions)).astype(np.float32)
    if ties:
        gradient = np.round(gradient)
    counts = generator.integers(1, dimensions + 1, 3)
    found = sparse_direction(torch.tensor(gradient), torch.tensor(counts)).numpy()
    for row, g, count in zip(found, gradient, counts, strict=True):
        least = np.sort(np.abs(g))[-count]
        chosen = (np.abs(g) >= least) & (g != 0)
        np.testing.assert_allclose(row, np.sign(g) * chosen / max(1, chosen.sum()), rtol=1e-6)


def test_support_size_counts_coordinates_that_moved():
    delta = torch.zeros(3, 1, 2, 3)
    delta[1, 0, 0, 0], delta[2] = 1e-30, 1.0
    assert support_size(delta).tolist() == [0.0, 1.0, 6.0]
