"""The optimal perturbation is optimal: known answers, exact arithmetic, optimality conditions, rival ascents."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from robbench.core.errors import UserError
from robbench.theory.perturbation import Floats, Gaussian, universal_perturbation, worst_perturbation

PLANE = np.diag([1.0, 4.0])
EASY, HARD = False, True


@pytest.mark.parametrize(
    ("covariance", "a", "epsilon", "multiplier", "delta", "rise", "hard"),
    [
        (PLANE, (1, 1), 0.5, 3.03307963620194, (0.491864648189, 0.089828547034), 0.6362958469988, EASY),
        (PLANE, (0, 1), 0.5, 1.0, (0.372677996250, 1 / 3), 1 / 6, HARD),
        (PLANE, (0, 3), 0.5, 1.75, (0.0, 0.5), 0.40625, EASY),
        (PLANE, (0, 0), 0.5, 1.0, (0.5, 0.0), 0.125, HARD),
        (2 * np.eye(2), (3, 4), 1.0, 3.0, (0.6, 0.8), 2.75, EASY),
    ],
    ids=["easy", "hard", "orthogonal but easy", "x = mu", "spherical"],
)
def test_known_answers(
    covariance: Floats,
    a: tuple[float, ...],
    epsilon: float,
    multiplier: float,
    delta: tuple[float, ...],
    rise: float,
    hard: bool,
) -> None:
    mean = np.array([3.0, -2.0])
    model = Gaussian.from_covariance(mean, covariance)
    found = worst_perturbation(model, mean + a, epsilon)
    assert found.multiplier[0] == pytest.approx(multiplier, rel=1e-13)
    assert found.delta[0] == pytest.approx(delta, abs=1e-12)
    assert found.rise[0] == pytest.approx(rise, rel=1e-12)
    assert bool(found.hard[0]) is hard
    expected_mirror = (-delta[0], delta[1]) if hard else delta
    assert found.mirror[0] == pytest.approx(expected_mirror, abs=1e-12)


def test_other_stationary_points_are_worse() -> None:
    """Another root of the same secular equation, 2 eta = -1.1428, violates the sign condition and lowers the NLL."""
    model = Gaussian.from_covariance([0, 0], PLANE)
    low, high = -1.2, -1.0
    for _ in range(80):
        nu = (low + high) / 2
        if np.linalg.norm(1 / (nu * model.values - 1)) > 0.5:
            high = nu
        else:
            low = nu
    other = 1 / (nu * model.values - 1)
    assert nu == pytest.approx(-1.1428, abs=1e-4)
    best = worst_perturbation(model, [1.0, 1.0], 0.5).delta[0]
    for delta, objective in ((other, 0.226), (best, 1.2613)):
        assert 0.5 * ((1 + delta) ** 2 / model.values).sum() == pytest.approx(objective, abs=5e-4)


# ----------------------------------------------------------------------------- conditions (i)-(iii), any covariance
@st.composite
def problems(draw: st.DrawFn, largest: int = 200) -> tuple[Gaussian, Floats, float]:
    """A Gaussian (condition number up to 1e12, repeated eigenvalues, n to 200), points, and a radius."""
    n = draw(st.integers(1, largest))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    decades = draw(st.sampled_from([0.0, 0.5, 3.0, 12.0]))
    values = 10.0 ** (decades * generator.uniform(0, 1, n))
    if n > 1 and decades:
        values[[0, -1]] = 1.0, 10.0**decades
    repeated = draw(st.integers(0, n - 1))
    values[: repeated + 1] = values[0]
    values *= 10.0 ** draw(st.integers(-6, 6))
    basis = np.eye(n) if draw(st.booleans()) else np.linalg.qr(generator.standard_normal((n, n)))[0]
    model = Gaussian.from_spectrum(generator.standard_normal(n), values, basis)
    alpha = generator.standard_normal((3, n)) * np.sqrt(model.values)
    kind = draw(st.sampled_from(["easy", "orthogonal", "nearly orthogonal", "mean"]))
    shrink = {"easy": 1.0, "orthogonal": 0.0, "nearly orthogonal": 1e-9, "mean": 0.0}[kind]
    alpha[:, model.values == model.values[0]] *= shrink
    alpha *= kind != "mean"
    points = model.mean + alpha @ model.vectors.T
    epsilon = float(np.sqrt(model.values[0])) * 10.0 ** draw(st.floats(-3, 4))
    return model, points, epsilon


@settings(max_examples=150)
@given(problems())
def test_optimality_conditions_hold(problem: tuple[Gaussian, Floats, float]) -> None:
    model, points, epsilon = problem
    found = worst_perturbation(model, points, epsilon)
    alpha, tolerance = model.coordinates(points), 1e-12
    shift = found.delta @ model.vectors
    # (i) in the eigenbasis, against the rounding of delta = U shift, which mixes large and small components
    curvature = found.excess[:, None] * (model.values / model.values[0]) + (
        (model.values - model.values[0]) / model.values[0]
    )
    blur = tolerance * (curvature + 1) * epsilon + tolerance * np.abs(alpha)
    assert (np.abs(curvature * shift - alpha) <= blur).all()
    # (ii) and (iii)
    assert (found.excess >= 0).all()
    assert found.multiplier == pytest.approx((1 + found.excess) / model.values[0], rel=1e-15)
    assert np.linalg.norm(found.delta, axis=1) == pytest.approx(epsilon, rel=tolerance)
    assert np.linalg.norm(found.mirror, axis=1) == pytest.approx(epsilon, rel=tolerance)
    # the rise is what the shift gives, the mirror image is as good, and no shorter formula beats it
    assert found.rise == pytest.approx(_rise(model, alpha, shift), rel=1e-9)
    assert _rise(model, alpha, found.mirror @ model.vectors) == pytest.approx(found.rise, rel=1e-9)
    straight = epsilon * _unit(alpha / model.values)
    narrow = np.zeros_like(alpha)
    narrow[:, 0] = np.where(alpha[:, 0] < 0, -epsilon, epsilon)
    for rival in (straight, narrow):
        assert (_rise(model, alpha, rival) <= found.rise * (1 + tolerance)).all()


@settings(max_examples=60)
@given(problems(largest=6))
def test_root_is_bracketed_in_exact_arithmetic(problem: tuple[Gaussian, Floats, float]) -> None:
    """phi falls strictly; with rational numbers there is no rounding: epsilon^2 lies between phi beside the root, up to
    the rounding of its terms in float64, which near the hard case moves the root by more than the slack."""
    model, points, epsilon = problem
    found = worst_perturbation(model, points, epsilon)
    values = [Fraction(float(value)) for value in model.values]
    for alpha, excess in zip(model.coordinates(points), found.excess, strict=True):
        if excess == 0:
            assert _phi(alpha, values, Fraction(0)) <= Fraction(epsilon) ** 2 * (1 + Fraction(1, 10**13))
            assert not np.any(np.abs(alpha[model.values == model.values[0]]) > 1e-150 * epsilon)
            continue
        slack, rounding = Fraction(1, 10**13), Fraction(1, 10**15)
        assert _phi(alpha, values, Fraction(excess) * (1 - slack)) > Fraction(epsilon) ** 2 * (1 - rounding)
        assert _phi(alpha, values, Fraction(excess) * (1 + slack)) < Fraction(epsilon) ** 2 * (1 + rounding)


def _phi(alpha: Floats, values: list[Fraction], excess: Fraction) -> Fraction:
    total = Fraction(0)
    for component, value in zip(alpha, values, strict=True):
        if component != 0:
            total += (Fraction(float(component)) / ((1 + excess) * value / values[0] - 1)) ** 2
    return total


@settings(max_examples=25)
@example(seed=0, n=200, decades=12.0)
@given(seed=st.integers(0, 2**32), n=st.integers(1, 200), decades=st.floats(0, 12))
def test_conditions_hold_for_the_covariance_itself(seed: int, n: int, decades: float) -> None:
    """From K, not its spectrum: (nu K - I) delta = a up to the rounding of K, and nu K - I >= 0 likewise."""
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.standard_normal((n, n)))[0]
    covariance = (basis * np.geomspace(1, 10.0**-decades, n)) @ basis.T
    covariance = (covariance + covariance.T) / 2
    model = Gaussian.from_covariance(np.zeros(n), covariance)
    points, epsilon = model.sample(4, generator), 0.3
    found = worst_perturbation(model, points, epsilon)
    for point, delta, nu in zip(points, found.delta, found.multiplier, strict=True):
        residual = nu * (covariance @ delta) - delta - point
        scale = nu * np.linalg.norm(covariance, 2) * epsilon + np.linalg.norm(point)
        assert np.linalg.norm(residual) <= 1e-14 * n * scale
        lowest = np.linalg.eigvalsh(nu * covariance - np.eye(n))[0]
        assert lowest >= -1e-14 * n * nu * np.linalg.norm(covariance, 2)
    assert np.linalg.norm(found.delta, axis=1) == pytest.approx(epsilon, rel=1e-12)


@settings(max_examples=60)
@given(
    split=st.sampled_from([0.0, 2.0**-52, 1e-14, 1e-9]),
    tiny=st.floats(-200, 0),
    other=st.floats(-200, 0),
    radius=st.floats(-8, 8),
    edge=st.sampled_from([1.0, 1 - 1e-15, 1 + 1e-15, 1 - 1e-8, 1 + 1e-8]),
)
def test_edges_between_easy_and_hard(
    split: float, tiny: float, other: float, radius: float, edge: float
) -> None:
    """Nearly repeated l_min, components of x - mu down to 1e-200, and S0 within rounding of epsilon^2."""
    epsilon = 10.0**radius
    model = Gaussian.from_spectrum(np.zeros(4), [1.0, 1.0 + split, 3.0, 1e9], np.eye(4))
    alpha = epsilon * np.array([10.0**tiny, 10.0**other, 2.0 * edge, 0.0])
    found = worst_perturbation(model, [alpha, alpha * [0, 1, 1, 1], alpha * [1, 0, 1, 1]], epsilon)
    assert np.linalg.norm(found.delta, axis=1) == pytest.approx(epsilon, rel=1e-14)
    curvature = found.excess[:, None] * model.values + (model.values - 1.0)
    assert curvature * found.delta == pytest.approx(
        np.array([alpha, alpha * [0, 1, 1, 1], alpha * [1, 0, 1, 1]]), rel=1e-12, abs=1e-149 * epsilon
    )


# ------------------------------------------------------------------------------------------------- rival ascents
@pytest.mark.parametrize("kind", ["easy", "hard", "orthogonal but easy", "mean", "repeated"])
@pytest.mark.parametrize("n", [2, 5])
def test_restarted_ascent_does_no_better_and_gets_there(kind: str, n: int) -> None:
    """delta <- epsilon K^-1(a + delta)/||.|| from many starts never lowers the NLL; its best end is the optimum."""
    generator = np.random.default_rng([n, len(kind)])
    values = np.sort(generator.uniform(1, 5, n))
    if kind == "repeated":
        values[1] = values[0]
    values[-1] += 1
    basis = np.linalg.qr(generator.standard_normal((n, n)))[0]
    model = Gaussian.from_spectrum(np.zeros(n), values, basis)
    alpha = generator.standard_normal(n)
    epsilon = 0.4
    if kind in ("hard", "orthogonal but easy"):
        alpha[0] = 0.0
        reach = np.linalg.norm(alpha[1:] / (values[1:] / values[0] - 1))
        alpha *= epsilon / reach * (0.5 if kind == "hard" else 2.0)
    alpha *= kind != "mean"
    found = worst_perturbation(model, model.vectors @ alpha, epsilon)
    assert bool(found.hard[0]) is (kind in ("hard", "mean"))
    shift = epsilon * _unit(generator.standard_normal((200, n)))
    shift[:n] = epsilon * np.eye(n)
    for _ in range(3000):
        shift = epsilon * _unit((alpha + shift) / model.values)
    best = float(_rise(model, np.tile(alpha, (len(shift), 1)), shift).max())
    assert best <= found.rise[0] * (1 + 1e-12)
    assert best == pytest.approx(found.rise[0], rel=1e-7)


def test_rise_is_the_difference_of_log_densities() -> None:
    model = Gaussian.from_covariance([1.0, 2.0, 3.0], [[2.0, 0.3, 0.1], [0.3, 1.0, 0.2], [0.1, 0.2, 0.5]])
    points = model.sample(50, np.random.default_rng(0))
    found = worst_perturbation(model, points, 0.7)
    difference = model.log_density(points) - model.log_density(points + found.delta)
    assert difference == pytest.approx(found.rise, rel=1e-12)
    inverse, deviation = np.linalg.inv(model.covariance), points - model.mean
    expected = -0.5 * (
        3 * np.log(2 * np.pi)
        + np.linalg.slogdet(model.covariance)[1]
        + np.einsum("ni,ij,nj->n", deviation, inverse, deviation)
    )
    assert model.log_density(points) == pytest.approx(expected, rel=1e-12)


def test_blurred_hard_case_is_marked_and_has_two_answers() -> None:
    """In a rotated basis a is orthogonal to u_min only up to rounding: still near-equal maximisers."""
    generator = np.random.default_rng(3)
    basis = np.linalg.qr(generator.standard_normal((5, 5)))[0]
    model = Gaussian.from_covariance(np.zeros(5), (basis * [1.0, 2, 3, 4, 5]) @ basis.T)
    x = basis @ [0.0, 0.1, 0.2, 0.1, 0.3]
    found = worst_perturbation(model, x, 1.0)
    assert found.hard[0]
    assert np.linalg.norm(found.delta - found.mirror) > 0.5
    for delta in (found.delta, found.mirror):
        assert model.log_density(x) - model.log_density(x + delta) == pytest.approx(found.rise, rel=1e-11)


def test_epsilon_zero_changes_nothing() -> None:
    found = worst_perturbation(Gaussian.spherical(3, 2.0), [[1.0, 2.0, 3.0]], 0.0)
    assert (found.delta == 0).all()
    assert (found.rise == 0).all()
    assert np.isinf(found.multiplier).all()


def test_rows_do_not_depend_on_each_other() -> None:
    model = Gaussian.from_covariance([0, 0], PLANE)
    points = np.array([[1.0, 1.0], [0.0, 1.0], [0.0, 3.0], [0.0, 0.0], [1e-9, 1.0], [40.0, -3.0]])
    together = worst_perturbation(model, points, 0.5)
    for row, point in enumerate(points):
        alone = worst_perturbation(model, point, 0.5)
        assert (alone.delta[0] == together.delta[row]).all()
        assert alone.multiplier[0] == together.multiplier[row]


def test_universal_perturbation_is_best_on_average() -> None:
    generator = np.random.default_rng(0)
    basis = np.linalg.qr(generator.standard_normal((4, 4)))[0]
    model = Gaussian.from_spectrum(generator.standard_normal(4), [0.5, 1, 2, 3], basis)
    delta = universal_perturbation(model, 0.3)
    assert abs(delta @ basis[:, 0]) == pytest.approx(0.3, rel=1e-14)
    x = model.sample(400_000, generator)
    drops = model.log_density(x) - model.log_density(x + delta)
    error = drops.std() / np.sqrt(len(x))
    assert drops.mean() == pytest.approx(0.3**2 / (2 * 0.5), abs=5 * error)
    inverse = np.linalg.inv(model.covariance)
    rivals = 0.3 * _unit(generator.standard_normal((1000, 4)))
    assert np.einsum("ni,ij,nj->n", rivals, inverse, rivals).max() <= delta @ inverse @ delta * (1 + 1e-12)


# ------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        ([0, 0], [[1, 0.5], [0.4, 1]], "not symmetric"),
        ([0, 0], [[1, 2], [2, 1]], "not positive definite"),
        ([0, 0], [[1, 1], [1, 1]], "not positive definite"),
        ([0, 0], [[0, 0], [0, 0]], "not positive definite"),
        ([0, 0, 0], [[1, 0], [0, 1]], r"shape \(2, 2\)"),
        ([[0, 0]], [[1, 0], [0, 1]], "vector"),
        ([0, 0], [[1, np.nan], [np.nan, 1]], "finite"),
        ([], np.zeros((0, 0)), "empty"),
        ([0, "a"], [[1, 0], [0, 1]], "not an array of numbers"),
    ],
)
def test_bad_covariances_are_one_line(mean: object, covariance: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Gaussian.from_covariance(mean, covariance)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_bad_spectra_points_and_radii_are_user_errors() -> None:
    model = Gaussian.spherical(2, 1.0)
    with pytest.raises(UserError, match="orthonormal"):
        Gaussian.from_spectrum([0, 0], [1, 2], [[1, 1], [0, 1]])
    with pytest.raises(UserError, match="eigenvalue -1"):
        Gaussian.from_spectrum([0, 0], [1, -1], np.eye(2))
    with pytest.raises(UserError, match="2 eigenvalues"):
        Gaussian.from_spectrum([0, 0, 0], [1, 1], np.eye(3))
    with pytest.raises(UserError, match="n=0"):
        Gaussian.spherical(0, 1.0)
    with pytest.raises(UserError, match="points of shape"):
        worst_perturbation(model, np.zeros((4, 3)), 1.0)
    for epsilon in (-0.1, np.nan, np.inf, 1e200):
        with pytest.raises(UserError, match="not a radius"):
            worst_perturbation(model, [1.0, 1.0], epsilon)
        with pytest.raises(UserError, match="not a radius"):
            universal_perturbation(model, epsilon)
    with pytest.raises(UserError, match="nothing beside"):
        worst_perturbation(model, [1.0, 1.0], 1e-200)


# --------------------------------------------------------------------------------------------------------- helpers
def _rise(model: Gaussian, alpha: Floats, shift: Floats) -> Floats:
    """Rise of the NLL by `shift`, both in the eigenbasis, [N]."""
    return np.asarray(((alpha + 0.5 * shift) * shift / model.values).sum(1))


def _unit(rows: Floats) -> Floats:
    scaled = rows / np.maximum(np.abs(rows).max(1, keepdims=True), 1e-300)
    length = np.linalg.norm(scaled, axis=1, keepdims=True)
    return np.asarray(scaled / np.where(length == 0, 1, length))
