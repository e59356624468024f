"""Steps onto a hyperplane inside the box against linear programs, a root finder, and the reference package."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyautoattack import fab_projections
from scipy.optimize import brentq, linprog

from robbench.attacks.search.geometry_box import steps_to_hyperplane

NORMS = ("linf", "l2", "l1")
ORDERS = {"linf": np.inf, "l2": 2, "l1": 1}
# Few distinct values: ties, zeros of the normal and pixels on the border of the box are common.
WEIGHTS = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 2.0, -0.5]), st.floats(-3, 3, width=32))
PIXELS = st.one_of(st.sampled_from([0.0, 1.0, 0.5]), st.floats(0, 1, width=32))


@st.composite
def problems(draw):
    size = draw(st.integers(1, 7))
    normal = np.array(draw(st.lists(WEIGHTS, min_size=size, max_size=size)))
    point = np.array(draw(st.lists(PIXELS, min_size=size, max_size=size)))
    return normal, point, draw(st.one_of(st.sampled_from([0.0, 1.0, -1.0]), st.floats(-6, 6, width=32)))


def step(normal, point, gap, norm):
    as_rows = [torch.tensor(np.asarray(value), dtype=torch.float32) for value in (point, normal, gap)]
    found = steps_to_hyperplane(as_rows[0][None, None], as_rows[1][None], as_rows[2].reshape(1, 1), norm)
    return found[0, 0].double().numpy()


def farthest(normal, point, gap):
    """The corner step that closes as much of the gap as the box allows."""
    towards = np.where(normal * gap > 0, -point, 1 - point)
    return np.where(normal == 0, 0.0, towards) if gap else np.zeros_like(point)


def least_norm(normal, point, gap, norm):
    """Least norm of a feasible step, by a linear program (linf, l1) or by a root of the multiplier (l2)."""
    size, low, high = len(normal), -point, 1 - point
    if norm == "l2":
        step_at = lambda level: np.clip(-level * normal, low, high)  # noqa: E731
        reach = 1e6
        level = brentq(lambda value: normal @ step_at(value) + gap, -reach, reach, xtol=1e-12, rtol=1e-14)
        return np.linalg.norm(step_at(level))
    if norm == "linf":
        objective, upper = np.r_[np.zeros(size), 1.0], np.zeros(2 * size)
        bound = np.block([[np.eye(size), -np.ones((size, 1))], [-np.eye(size), -np.ones((size, 1))]])
        equal, box = np.r_[normal, 0.0], [*zip(low, high, strict=True), (0, None)]
    else:
        objective, upper = np.r_[np.zeros(size), np.ones(size)], np.zeros(2 * size)
        bound = np.block([[np.eye(size), -np.eye(size)], [-np.eye(size), -np.eye(size)]])
        equal, box = np.r_[normal, np.zeros(size)], [*zip(low, high, strict=True), *[(0, None)] * size]
    solved = linprog(objective, bound, upper, equal[None], [-gap], box)
    assert solved.success, solved.message
    return solved.fun


@pytest.mark.parametrize("norm", NORMS)
@settings(max_examples=150)
@example(problem=(np.array([0.0, 0.0, -1.4e-45, 0.0, 2.0]), np.array([0.0, 0.0, 1.0, 0.0, 0.0]), -3.0))
@given(problem=problems())
def test_shortest_step_or_nearest_corner(norm, problem):
    normal, point, gap = problem
    found = step(normal, point, gap, norm)
    assert (found[normal == 0] == 0).all()
    assert (point + found > -1e-6).all()
    assert (point + found < 1 + 1e-6).all()
    corner = farthest(normal, point, gap)
    if abs(normal @ corner) <= abs(gap) + 1e-6:  # the box does not reach the hyperplane, or just so
        assert abs(normal @ found - normal @ corner) < 1e-5
        if abs(normal @ corner) < abs(gap) - 1e-5:
            normalised = (
                np.abs(normal) >= np.finfo(np.float32).tiny
            )  # a denormal moves nothing, and need not move
            np.testing.assert_allclose(found[normalised], corner[normalised], atol=1e-6)
        return
    scale = max(1.0, abs(gap))
    assert abs(normal @ found + gap) < 2e-5 * scale
    if norm == "l2" and np.abs(normal[normal != 0]).min() < 1e-4:
        return  # the oracle's multipliers end at 1e6
    assert np.linalg.norm(found, ORDERS[norm]) == pytest.approx(
        least_norm(normal, point, gap, norm), abs=2e-5 * max(1.0, 1 / np.abs(normal).max())
    )


def random_problem(seed, rows=16, size=675, share=0.3):
    """Points half of whose pixels are at the border; the gap is `share` of what the box can close."""
    draw = torch.Generator().manual_seed(seed)
    points = torch.rand((2, rows, size), generator=draw)
    points = torch.where(torch.rand(points.shape, generator=draw) < 0.5, points.round(), points)
    normal = torch.randn((rows, size), generator=draw) * torch.rand((rows, size), generator=draw) ** 4
    normal[:, ::7] = 0.0
    normal[normal.abs() < 1e-6] = 0.0  # the reference never moves a coordinate below 1e-8
    sign = torch.tensor([1.0, -1.0])[:, None]
    room = torch.where(normal * sign[:, :, None] > 0, points, 1 - points)
    return points, normal, sign * share * (normal.abs() * room).sum(-1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("share", [1e-4, 0.05, 0.6, 0.99, 1.5])
def test_equals_the_reference_package(norm, share):
    points, normal, gap = random_problem(3, share=share)
    ours = steps_to_hyperplane(points, normal, gap, norm)
    reference = getattr(fab_projections, f"projection_{norm}")
    offset = (normal * points).sum(-1) - gap
    theirs = torch.stack([reference(points[i], normal, offset[i]) for i in range(2)])
    lengths = [torch.linalg.vector_norm(found, ORDERS[norm], dim=-1) for found in (ours, theirs)]
    torch.testing.assert_close(*lengths, rtol=2e-3, atol=1e-4)
    residual = [((normal.double() * found.double()).sum(-1) + gap.double()).abs() for found in (ours, theirs)]
    assert residual[0].max() <= (2e-5 * gap.abs().max() if share < 1 else residual[1].max() + 1e-4)


def relative_residual(points, normal, gap, norm):
    found = steps_to_hyperplane(points, normal, gap, norm)
    assert (points + found >= -1e-7).all()
    assert (points + found <= 1 + 1e-7).all()
    return (((normal.double() * found.double()).sum(-1) + gap.double()) / gap.double()).abs().max()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("seed", range(20))
def test_heavy_tails_are_solved_to_float32(norm, seed):
    """Normals over eight decades, rooms down to 1e-12."""
    draw = torch.Generator().manual_seed(seed)
    normal = torch.randn((1, 300), generator=draw) * 10 ** (-8 * torch.rand((1, 300), generator=draw))
    points = torch.rand((3, 1, 300), generator=draw) ** (seed % 12 + 1)
    reach = (normal.abs() * torch.where(normal > 0, points, 1 - points)).sum(-1)
    gap = reach * torch.tensor([[0.1], [0.7], [0.99]])
    assert relative_residual(points, normal, gap, norm) < 1e-5


@pytest.mark.parametrize("norm", NORMS)
def test_worst_case_falls_short_by_little(norm):
    """Breakpoints in geometric order, one met a step: the bound on Newton's steps leaves less than FAB overshoots."""
    normal, points = torch.logspace(0, -9, 60)[None], torch.logspace(-6, 0, 60).expand(3, 1, 60)
    gap = (normal * points[0]).sum() * torch.tensor([[1e-3], [0.5], [0.999]])
    assert relative_residual(points, normal, gap, norm) < 2e-3


@pytest.mark.parametrize("norm", NORMS)
def test_a_sample_and_a_point_do_not_depend_on_the_others(norm):
    points, normal, gap = random_problem(5)
    together = steps_to_hyperplane(points, normal, gap, norm)
    for i in (0, 7):
        for j in (0, 1):
            alone = steps_to_hyperplane(
                points[j : j + 1, i : i + 1], normal[i : i + 1], gap[j : j + 1, i : i + 1], norm
            )
            torch.testing.assert_close(alone[0, 0], together[j, i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_of_normal_and_gap_does_not_matter(norm, scale):
    points, normal, gap = random_problem(6)
    usual = steps_to_hyperplane(points, normal, gap, norm)
    torch.testing.assert_close(
        steps_to_hyperplane(points, normal * scale, gap * scale, norm), usual, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("norm", NORMS)
def test_what_is_not_finite_does_not_move(norm):
    points = torch.full((1, 4, 3), 0.5)
    normal = torch.tensor(
        [[1.0, float("nan"), 2.0], [1.0, float("inf"), 2.0], [1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]
    )
    gap = torch.tensor([[0.5, 0.5, float("nan"), 1.0]])
    found = steps_to_hyperplane(points, normal, gap, norm)[0]
    assert torch.isfinite(found).all()
    assert found[:2, 1].eq(0).all()
    torch.testing.assert_close((found[:2, ::2] * torch.tensor([1.0, 2.0])).sum(1), torch.tensor([-0.5, -0.5]))
    assert found[2:].eq(0).all()


def test_other_norms_are_refused():
    with pytest.raises(ValueError, match="norm 'none'"):
        steps_to_hyperplane(torch.zeros(1, 1, 1), torch.ones(1, 1), torch.ones(1, 1), "none")
