"""The Fréchet distance against closed forms, scipy and pytorch-fid; streamed statistics against numpy."""

import inspect
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from robbench.core.errors import UserError
from robbench.statistics.frechet import GaussianStatistics, RunningMoments, frechet_distance, frechet_notes

SEEDS = st.integers(0, 2**32 - 1)


def gaussian(mean: object, covariance: object, n: int = 10_000) -> GaussianStatistics:
    return GaussianStatistics(n, np.asarray(mean, dtype=float), np.asarray(covariance, dtype=float))


def rotation(generator: np.random.Generator, d: int) -> np.ndarray:
    return np.linalg.qr(generator.normal(size=(d, d)))[0]


def random_gaussian(generator: np.random.Generator, d: int, rank: int) -> GaussianStatistics:
    factor = generator.normal(size=(d, rank)) * 10.0 ** generator.uniform(-3, 1)
    return gaussian(generator.normal(size=d), factor @ factor.T)


# ----------------------------------------------------------------------------------------------------- distance
variances = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e4)), min_size=1, max_size=8)


@given(variances, variances, SEEDS)
def test_diagonal_closed_form_in_any_rotation(a: list[float], b: list[float], seed: int) -> None:
    """Covariances with the same eigenvectors, also singular ones: sum of (sqrt a - sqrt b)^2."""
    d = min(len(a), len(b))
    generator = np.random.default_rng(seed)
    first, second = np.array(a[:d]), np.array(b[:d])
    turn, shift = rotation(generator, d), generator.normal(size=d)
    covariances = [turn @ np.diag(v) @ turn.T for v in (first, second)]
    x, y = (gaussian(m, (c + c.T) / 2) for m, c in zip((shift, 0 * shift), covariances, strict=True))
    expected = shift @ shift + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    scale = 1 + first.sum() + second.sum()
    # A variance below rounding of the largest is not resolved, whatever the method: its root is 1e-8 of it.
    assert frechet_distance(x, y) == pytest.approx(expected, abs=1e-6 * scale)


@given(SEEDS)
def test_rank_one_closed_form(seed: int) -> None:
    """A = u u^T, B = v v^T do not commute and are singular; the trace of the root of their product is |u.v|."""
    u, v = np.random.default_rng(seed).normal(size=(2, 6))
    x, y = gaussian(np.zeros(6), np.outer(u, u)), gaussian(np.zeros(6), np.outer(v, v))
    assert frechet_distance(x, y) == pytest.approx(u @ u + v @ v - 2 * abs(u @ v), rel=1e-9, abs=1e-9)


@given(SEEDS, st.integers(2, 7))
def test_rank_two_closed_form(seed: int, d: int) -> None:
    """tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for 2x2 M = AB, embedded in d dimensions."""
    generator = np.random.default_rng(seed)
    (a, b), basis = generator.normal(size=(2, 2, 2)), rotation(generator, d)[:, :2]
    first, second = a @ a.T, b @ b.T
    product = first @ second
    root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(first) * np.linalg.det(second)))
    expected = np.trace(first) + np.trace(second) - 2 * root
    embedded = [basis @ c @ basis.T for c in (first, second)]
    x, y = (gaussian(np.zeros(d), (c + c.T) / 2) for c in embedded)
    assert frechet_distance(x, y) == pytest.approx(expected, abs=1e-7)


@given(SEEDS, st.integers(1, 8))
def test_full_rank_against_scipy(seed: int, d: int) -> None:
    generator = np.random.default_rng(seed)
    x, y = random_gaussian(generator, d, d + 6), random_gaussian(generator, d, d + 6)
    root = np.trace(scipy.linalg.sqrtm(x.covariance @ y.covariance)).real
    shift = x.mean - y.mean
    expected = shift @ shift + np.trace(x.covariance) + np.trace(y.covariance) - 2 * root
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6, abs=1e-7)


@given(SEEDS, st.integers(1, 10), st.integers(0, 10), st.integers(0, 10))
def test_a_distance_of_any_ranks(seed: int, d: int, first: int, second: int) -> None:
    """Symmetric, zero to itself, and squared scaling; also for covariances that are singular or zero."""
    generator = np.random.default_rng(seed)
    x, y = random_gaussian(generator, d, first), random_gaussian(generator, d, second)
    value = frechet_distance(x, y)
    assert value == pytest.approx(frechet_distance(y, x), rel=1e-9, abs=1e-9)
    scale = float(np.trace(x.covariance) + np.trace(y.covariance))
    assert 0 <= frechet_distance(x, x) <= 1e-12 * (1 + scale)
    tripled = [gaussian(3 * s.mean, 9 * s.covariance) for s in (x, y)]
    assert frechet_distance(*tripled) == pytest.approx(9 * value, rel=1e-6, abs=1e-9 * (1 + scale))


def test_equal_covariances_leave_the_shift() -> None:
    x = random_gaussian(np.random.default_rng(0), 5, 3)
    moved = gaussian(x.mean + np.array([3, 0, 4, 0, 0]), x.covariance)
    assert frechet_distance(x, moved) == pytest.approx(25, rel=1e-12)


def peer_distance(a: np.ndarray, b: np.ndarray) -> float:
    """pytorch-fid's own function on raw features."""
    if "disp" not in inspect.signature(scipy.linalg.sqrtm).parameters:
        pytest.skip(f"pytorch-fid calls sqrtm(disp=), which scipy {scipy.__version__} no longer has")
    from pytorch_fid.fid_score import calculate_frechet_distance

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the deprecation of `disp`; singular products
        pairs = [(f.mean(axis=0), np.cov(f, rowvar=False)) for f in (a, b)]
        return float(calculate_frechet_distance(*pairs[0], *pairs[1]))


@pytest.mark.parametrize(
    ("n", "m", "d", "tolerance"),
    [
        (500, 700, 16, 1e-9),
        (300, 2000, 64, 1e-9),
        (128, 400, 100, 1e-6),
        # fewer images than features: pytorch-fid's root of a singular product is itself off by about 1e-6
        (40, 700, 64, 1e-5),
        (40, 30, 64, 1e-5),
    ],
)
def test_against_pytorch_fid(n: int, m: int, d: int, tolerance: float) -> None:
    generator = np.random.default_rng(n + m + d)
    a = np.maximum(generator.normal(size=(n, d)) @ generator.normal(size=(d, d)) / np.sqrt(d) + 0.3, 0)
    b = generator.exponential(size=(m, d))
    value = frechet_distance(*(GaussianStatistics.from_batches(np.array_split(f, 5)) for f in (a, b)))
    assert value > 1
    assert value == pytest.approx(peer_distance(a, b), rel=0, abs=tolerance)


# ----------------------------------------------------------------------------------------------------- streaming
@given(
    SEEDS,
    st.integers(2, 60),
    st.integers(1, 6),
    st.lists(st.integers(0, 60), max_size=8),
    st.sampled_from([0.0, 1.0, -1e3, 1e6]),
)
def test_any_chunking_is_numpy_cov(seed: int, n: int, d: int, cuts: list[int], offset: float) -> None:
    features = np.random.default_rng(seed).normal(size=(n, d)) + offset
    parts = np.split(features, sorted(min(cut, n) for cut in cuts))
    streamed = GaussianStatistics.from_batches(parts)
    assert streamed.n == n
    np.testing.assert_allclose(streamed.mean, features.mean(axis=0), rtol=1e-13, atol=1e-13)
    expected = np.atleast_2d(np.cov(features, rowvar=False))
    np.testing.assert_allclose(streamed.covariance, expected, rtol=0, atol=1e-9)
    assert (streamed.covariance == streamed.covariance.T).all()


def test_a_common_offset_costs_no_digits() -> None:
    """A sum of squares would lose 12 of 16 digits here."""
    generator = np.random.default_rng(0)
    features = generator.integers(0, 1000, size=(400, 3)).astype(float)
    near = GaussianStatistics.from_batches([features])
    far = GaussianStatistics.from_batches(np.array_split(features + 2.0**40, 13))
    np.testing.assert_allclose(far.covariance, near.covariance, rtol=1e-8)


def test_float32_features_are_summed_in_float64() -> None:
    features = (np.random.default_rng(0).normal(size=(1000, 4)) + 100).astype(np.float32)
    streamed = GaussianStatistics.from_batches(np.array_split(features, 50))
    np.testing.assert_allclose(
        streamed.covariance, np.cov(features.astype(np.float64), rowvar=False), rtol=1e-11, atol=1e-12
    )
    assert streamed.mean.dtype == streamed.covariance.dtype == np.float64


def test_the_stream_is_not_kept() -> None:
    """The batch is the caller's buffer: changing it afterwards changes nothing."""
    moments, buffer = RunningMoments(), np.arange(8.0).reshape(4, 2)
    moments.add(buffer)
    before = moments.statistics()
    buffer[:] = 1e9
    after = moments.statistics()
    assert (before.covariance == after.covariance).all()
    assert (before.mean == after.mean).all()


# ------------------------------------------------------------------------------------------------ notes, refusals
def test_few_images_are_named_with_both_numbers() -> None:
    generator = np.random.default_rng(0)
    few = GaussianStatistics.from_batches([generator.normal(size=(5, 8))])
    enough = GaussianStatistics.from_batches([generator.normal(size=(9, 8))])
    assert few.factor.shape == (8, 4)
    assert enough.factor.shape == (8, 8)
    assert frechet_notes(enough, enough) == ()
    for notes in (frechet_notes(few, enough), frechet_notes(enough, few), frechet_notes(few, few)):
        assert len(notes) == 1
        assert "5 images for 8 features" in notes[0]
        assert "rank at most 4" in notes[0]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_features_are_refused(bad: float) -> None:
    features = np.ones((5, 3))
    features[2, 1] = bad
    with pytest.raises(UserError, match="features of 1 of 5 images hold NaN or infinity"):
        GaussianStatistics.from_batches([np.ones((4, 3)), features])


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_images_are_refused(n: int) -> None:
    with pytest.raises(UserError, match=f"at least 2 images, not {n}"):
        GaussianStatistics.from_batches([np.ones((n, 3))])


def test_another_number_of_features_is_refused() -> None:
    with pytest.raises(UserError, match="4 features after 3"):
        GaussianStatistics.from_batches([np.ones((2, 3)), np.ones((2, 4))])
    with pytest.raises(UserError, match="one row of features an image"):
        GaussianStatistics.from_batches([np.ones((2, 3, 1))])


INDEFINITE = [[1.0, 2.0], [2.0, 1.0]]


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        ([0, 0], [[1.0, 0.5], [0.0, 1.0]], "not symmetric"),
        ([0, 0], [[1.0, np.nan], [np.nan, 1.0]], "NaN or infinity"),
        ([0, np.inf], np.eye(2), "NaN or infinity"),
        ([0, 0, 0], np.eye(2), "do not belong together"),
        ([0, 0], INDEFINITE, "not positive semidefinite"),
        ([0, 0], -np.eye(2), "not positive semidefinite"),
    ],
)
def test_what_is_no_covariance_is_refused(mean: object, covariance: object, message: str) -> None:
    fine = gaussian([0, 0], np.eye(2))
    with pytest.raises(UserError, match=message) as caught:
        frechet_distance(fine, gaussian(mean, covariance))
    assert "\n" not in str(caught.value)


def test_statistics_of_two_extractors_are_refused() -> None:
    with pytest.raises(UserError, match="2 and 3 features"):
        frechet_distance(gaussian([0, 0], np.eye(2)), gaussian([0, 0, 0], np.eye(3)))


# --------------------------------------------------------------------------------------------------------- files
def test_saved_statistics_come_back_bit_for_bit(tmp_path: Path) -> None:
    path = tmp_path / "a" / "statistics.npz"
    written = random_gaussian(np.random.default_rng(0), 7, 4)
    written.save(path)
    read = GaussianStatistics.load(path)
    assert read.n == written.n
    assert (read.mean == written.mean).all()
    assert (read.covariance == written.covariance).all()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "statistics.npz"
    random_gaussian(np.random.default_rng(0), 40, 40).save(path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (b"", b"no archive", whole[:-500], bytes(flipped)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"statistics\.npz cannot be read"):
            GaussianStatistics.load(path)
    np.savez(path, n=np.int64(1), mean=np.zeros(2), covariance=np.eye(2))
    with pytest.raises(UserError, match=r"statistics\.npz holds no feature statistics: .*at least 2"):
        GaussianStatistics.load(path)
    np.savez(path, n=np.int64(3), mean=np.zeros(2, np.float32), covariance=np.eye(2))
    with pytest.raises(UserError, match=r"statistics\.npz cannot be read .*float32"):
        GaussianStatistics.load(path)
