"""Optimal L2 perturbations of a Gaussian: Theorem 3.1 of paper 002 (Pope, Balaji and Feizi, "Adversarial robustness
of flow-based generative models", AISTATS 2020), corrected.

The perturbation of length at most epsilon that lowers ln N(x; mu, K) most, in closed form up to one scalar equation.
The attack maximises a convex quadratic on a ball (a trust-region problem), so the conditions below are necessary and
sufficient, including the hard case. With a = x - mu, delta is a maximiser if and only if some nu has

    (i) (nu K - I) delta = a      (ii) nu >= 1/l_min      (iii) ||delta||_2 = epsilon.

Where the paper's Theorem 3.1 is wrong in print: c must be the vector U^T(mu - x), not U^T K; the strict ball has no
maximiser; formula (2) is singular in the hard case; of several roots eta only the largest nu = 2 eta counts; in the
spherical case the admissible root is 1 - 2 eta l = MINUS ||x - mu|| / epsilon (the printed plus sign leads to the
mean); and the stationary point that is dropped is eta = 0 (delta = mu - x), not delta = 0.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robbench.core.errors import UserError

Floats = NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)
SYMMETRY = 1e-10  # largest relative |K - K^T| and |U^T U - I| accepted as rounding
NEGLIGIBLE = (
    1e-150  # components of x - mu this small relative to epsilon are 0: their squares would underflow
)
HARD = 1e-12  # below this nu l_min - 1 another maximiser is as good up to 4e-12 of the rise
MAX_ITERATIONS = 200


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, K) by the spectrum of K, float64; make one with `from_covariance`, `from_spectrum` or `spherical`.

    mean: [n]. values: eigenvalues of K, [n], ascending, positive. vectors: their orthonormal columns, [n,n].
    """

    mean: Floats
    values: Floats
    vectors: Floats

    @classmethod
    def from_covariance(cls, mean: ArrayLike, covariance: ArrayLike) -> "Gaussian":
        """From K [n,n]; `UserError` unless it is symmetric positive definite and fits the mean [n].

        Eigenvalues come with an absolute error of about 1e-16 l_max: with a condition number of 1e12 the smallest
        one has four digits, because the entries of K determine no more. `from_spectrum` keeps them all.
        """
        centre, matrix = _vector("mean", mean), _array("covariance", covariance)
        n = len(centre)
        if matrix.shape != (n, n):
            raise UserError(
                f"covariance of shape {matrix.shape} with a mean of {n} numbers; give shape ({n}, {n})"
            )
        scale = float(np.abs(matrix).max())
        skew = float(np.abs(matrix - matrix.T).max())
        if skew > SYMMETRY * scale:
            raise UserError(
                f"covariance is not symmetric: entries differ by {skew:.3g} from the transpose; "
                f"give a symmetric positive definite matrix"
            )
        values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
        if values[0] <= n * EPS * values[-1] or values[-1] <= 0:
            raise UserError(
                f"covariance is not positive definite in float64: eigenvalues from {values[0]:.3g} to "
                f"{values[-1]:.3g}; give a symmetric positive definite matrix"
            )
        return cls(centre, values, _fix_signs(vectors))

    @classmethod
    def from_spectrum(cls, mean: ArrayLike, values: ArrayLike, vectors: ArrayLike) -> "Gaussian":
        """From positive eigenvalues [n] in any order and orthonormal eigenvectors [n,n] in columns; else
        `UserError`."""
        centre, spectrum = _vector("mean", mean), _vector("eigenvalues", values)
        basis = _array("eigenvectors", vectors)
        n = len(centre)
        if len(spectrum) != n or basis.shape != (n, n):
            raise UserError(
                f"{len(spectrum)} eigenvalues and eigenvectors of shape {basis.shape} with a mean of {n} "
                f"numbers; give {n} eigenvalues and shape ({n}, {n})"
            )
        if spectrum.min() <= 0:
            raise UserError(
                f"covariance is not positive definite: eigenvalue {spectrum.min():.3g}; give positive ones"
            )
        skew = float(np.abs(basis.T @ basis - np.eye(n)).max())
        if skew > SYMMETRY:
            raise UserError(f"eigenvectors are off orthonormal by {skew:.3g}; orthonormalise them")
        order = np.argsort(spectrum, kind="stable")
        return cls(centre, spectrum[order], _fix_signs(basis[:, order]))

    @classmethod
    def spherical(cls, n: int, variance: float, mean: ArrayLike | None = None) -> "Gaussian":
        """N(mean, variance I) in n dimensions; the mean is 0 unless given."""
        check_dimension(n)
        centre = np.zeros(n) if mean is None else mean
        return cls.from_spectrum(centre, np.full(n, float(variance)), np.eye(n))

    @property
    def n(self) -> int:
        """Number of dimensions."""
        return len(self.mean)

    @property
    def covariance(self) -> Floats:
        """K, [n,n]."""
        return np.asarray((self.vectors * self.values) @ self.vectors.T)

    def log_density(self, x: ArrayLike) -> Floats:
        """ln N(x; mean, K) in nats of points [N,n] or [n], [N].

        The paper's additive constant, C = +n ln(2 pi)/2, has the wrong sign.
        """
        quadratic = (self.coordinates(x) ** 2 / self.values).sum(1)
        constant = self.n * math.log(2 * math.pi) + float(np.log(self.values).sum())
        return np.asarray(-0.5 * (constant + quadratic))

    def coordinates(self, x: ArrayLike) -> Floats:
        """U^T (x - mean), [N,n]: deviations of points [N,n] or [n] in the eigenbasis. `UserError` on shapes."""
        points = _array("points", x)
        if points.ndim not in (1, 2) or points.shape[-1] != self.n:
            raise UserError(
                f"points of shape {points.shape} for a Gaussian in {self.n} dimensions; give (N, {self.n})"
            )
        return np.asarray((np.atleast_2d(points) - self.mean) @ self.vectors)

    def sample(self, count: int, generator: np.random.Generator) -> Floats:
        """`count` draws, [count,n]."""
        noise = generator.standard_normal((count, self.n))
        return np.asarray(self.mean + (noise * np.sqrt(self.values)) @ self.vectors.T)


@dataclass(frozen=True, eq=False)
class Perturbation:
    """Optimal perturbations of N points.

    Attributes:
        delta: [N,n].
        mirror: another maximiser where `hard`, else equal to `delta`, [N,n].
        multiplier: nu (2 eta in the paper), [N]; inf for epsilon 0.
        excess: t = nu l_min - 1 >= 0, more digits of nu, [N].
        rise: increase of the negative log-likelihood in nats, [N].
        hard: bool [N], t < 1e-12: `mirror` is as good, up to 4e-12 of the rise.
    """

    delta: Floats
    mirror: Floats
    multiplier: Floats
    excess: Floats
    rise: Floats
    hard: NDArray[np.bool_]


def worst_perturbation(model: Gaussian, x: ArrayLike, epsilon: float) -> Perturbation:
    """The delta with ||delta||_2 <= epsilon that lowers the likelihood of x most (Theorem 3.1, corrected).

    x: points [N,n] or one point [n]. epsilon >= 0 in units of x. Covers x = mean (delta = +-epsilon u_min), the
    spherical case (delta = +epsilon (x - mean)/||x - mean||, eq. 3) and the hard case, in which x - mean has no
    component in the eigenspace of l_min and epsilon reaches beyond the regular solution. The NLL rise and the
    length of delta are accurate to about 1e-14 relative for the given spectrum; in a hard case blurred by rounding the
    result is one of the two nearly equal maximisers.
    """
    check_epsilon(epsilon)
    alpha = model.coordinates(x)
    if epsilon == 0:
        return _zero_perturbation(alpha)
    beta = alpha / epsilon
    if np.abs(beta).max() > 1 / NEGLIGIBLE:
        raise UserError(
            f"epsilon={epsilon:g} is nothing beside x - mean; give a radius of the scale of the data"
        )
    beta[np.abs(beta) < NEGLIGIBLE] = 0.0
    ratio, gap = model.values / model.values[0], (model.values - model.values[0]) / model.values[0]
    excess = _secular_root(beta, ratio, gap)
    shift = _quotient(beta, excess[:, None] * ratio + gap)
    rest = excess == 0  # hard case: the eigenspace of l_min, where beta is 0, supplies the missing length
    length = _row_norm(shift[rest])
    shift[rest, 0] = np.sqrt(np.maximum((1 - length) * (1 + length), 0.0))
    rise = ((alpha + 0.5 * epsilon * shift) * (epsilon * shift) / model.values).sum(1)
    hard = excess < HARD
    mirrored = np.where(hard[:, None] & (gap == 0), -shift, shift)
    return Perturbation(
        delta=epsilon * shift @ model.vectors.T,
        mirror=epsilon * mirrored @ model.vectors.T,
        multiplier=(1 + excess) / model.values[0],
        excess=excess,
        rise=rise,
        hard=hard,
    )


def universal_perturbation(model: Gaussian, epsilon: float) -> Floats:
    """One delta [n] for all x ~ N(mean, K): epsilon u_min(K), or its negative (paper 002, section 3.3).

    Averaging removes the linear term, so delta^T K^-1 delta is maximised; the mean NLL rises by
    epsilon^2 / (2 l_min). Refitting on x + delta shifts the mean and keeps K, so training does not help. The print's
    "delta = lambda_max(K^-1)" means the eigenvector of that eigenvalue.
    """
    check_epsilon(epsilon)
    return np.asarray(epsilon * model.vectors[:, 0])


def _secular_root(beta: Floats, ratio: Floats, gap: Floats) -> Floats:
    """t >= 0 with ||beta_i / (t ratio_i + gap_i)|| = 1 per row of beta [N,n]; 0 in the hard case.

    ratio = l/l_min; gap = ratio - 1, computed without cancellation; the radius is scaled to 1. The left side falls
    strictly in t, and 1/||.|| - 1 is concave: Newton's iteration from the left of the root rises to it. The bracket
    (each single term from below, all ratios 1 from above) guards against rounding.
    """
    smallest = np.where(gap == 0, beta, 0.0)
    at_zero = _row_norm(_quotient(np.where(gap == 0, 0.0, beta), gap))
    root = np.zeros(len(beta))
    rows = np.flatnonzero((np.abs(smallest) > 0).any(1) | (at_zero > 1))
    beta = beta[rows]
    single = ((np.abs(beta) - gap) / ratio).max(1, initial=0.0)
    lower, upper = np.maximum(single, _row_norm(smallest[rows])), _row_norm(beta)
    step = np.minimum(lower, upper)  # rounding may swap them where they agree
    for _ in range(MAX_ITERATIONS):
        if len(rows) == 0:
            return root
        t = step
        denominator = t[:, None] * ratio + gap
        shift = _quotient(beta, denominator)
        length = _row_norm(shift)
        lower, upper = np.where(length >= 1, t, lower), np.where(length <= 1, t, upper)
        weights = np.where(beta == 0, 0.0, ratio)
        slope = (np.square(shift / length[:, None]) * _quotient(weights, denominator)).sum(1)
        step = t + (length - 1) / slope
        middle = np.where(lower > 0, np.sqrt(lower) * np.sqrt(upper), upper / 2)
        step = np.where((step > lower) & (step < upper), step, middle)
        done = (np.abs(length - 1) <= 4 * EPS) | (upper - lower <= 2 * EPS * upper)
        root[rows[done]] = t[done]
        rows, beta, step = rows[~done], beta[~done], step[~done]
        lower, upper = lower[~done], upper[~done]
    raise RuntimeError(f"the secular equation did not converge in {MAX_ITERATIONS} steps; report this input")


def _quotient(numerator: Floats, denominator: Floats) -> Floats:
    """numerator / denominator, and 0 where the numerator is 0 (also over 0)."""
    numerator, denominator = np.broadcast_arrays(numerator, denominator)
    with np.errstate(over="ignore"):
        return np.divide(numerator, denominator, out=np.zeros(numerator.shape), where=numerator != 0)


def _row_norm(rows: Floats) -> Floats:
    """Euclidean norm of every row without overflow or underflow; inf for a row with inf."""
    largest = np.abs(rows).max(1, initial=0.0)
    scale = np.where((largest > 0) & np.isfinite(largest), largest, 1.0)
    with np.errstate(over="ignore"):
        return np.asarray(scale * np.sqrt(np.square(rows / scale[:, None]).sum(1)))


def _zero_perturbation(alpha: Floats) -> Perturbation:
    none, rows = np.zeros_like(alpha), len(alpha)
    infinite = np.full(rows, np.inf)
    return Perturbation(none, none, infinite, infinite, np.zeros(rows), np.zeros(rows, dtype=bool))


def check_epsilon(epsilon: float) -> None:
    """`UserError` unless epsilon is a number of at least 0 whose square is finite."""
    if not (epsilon >= 0 and epsilon * epsilon < math.inf):
        raise UserError(f"epsilon={epsilon:g} is not a radius; give a finite number of at least 0")


def check_dimension(n: int) -> None:
    """`UserError` unless n >= 1."""
    if n < 1:
        raise UserError(f"n={n} is not a number of dimensions; give an integer of at least 1")


def _array(name: str, values: ArrayLike) -> Floats:
    try:
        array = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: not an array of numbers ({error}); give float64 values") from error
    if array.size == 0 or not np.isfinite(array).all():
        raise UserError(f"{name} of shape {array.shape}: empty, NaN or infinite; give finite numbers")
    return array


def _vector(name: str, values: ArrayLike) -> Floats:
    array = _array(name, values)
    if array.ndim != 1:
        raise UserError(f"{name} of shape {array.shape}; give a vector of n >= 1 numbers")
    return array


def _fix_signs(vectors: Floats) -> Floats:
    """Columns with the sign that makes their first large component positive, since LAPACK's sign is arbitrary."""
    magnitude = np.abs(vectors)
    first = (magnitude >= 0.5 * magnitude.max(0)).argmax(0)
    return np.asarray(vectors * np.sign(vectors[first, np.arange(vectors.shape[1])]))
