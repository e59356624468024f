"""Fréchet distance between two sets of features, each modelled as a Gaussian; streamed in float64. NumPy only.

With the pool3 features of the Inception network it is FID: Heusel, Ramsauer, Unterthiner, Nessler, Hochreiter, "GANs
Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium" (2017), equation 6; the distance itself:
Dowson and Landau, J. Multivariate Analysis 12 (1982) 450-455.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from robbench.core.errors import UserError
from robbench.core.npz import read_npz
from robbench.core.resources import write_atomically

Matrix = NDArray[np.float64]

# Relative to the largest entry or eigenvalue. Sums of a million float64 products stay orders of magnitude below.
_ASYMMETRY, _NEGATIVE = 1e-8, 1e-8


@dataclass(frozen=True, eq=False)
class GaussianStatistics:
    """Mean [d] and unbiased covariance [d,d] (float64, as `numpy.cov`) of the features of `n` >= 2 images.

    Raises `UserError` for other shapes, for fewer images, and for a covariance that is not finite or not symmetric.
    """

    n: int
    mean: Matrix
    covariance: Matrix

    def __post_init__(self) -> None:
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images, not {self.n}; give more images")
        d = len(self.mean) if self.mean.ndim == 1 else 0
        if d == 0 or self.covariance.shape != (d, d):
            raise UserError(
                f"mean {self.mean.shape} and covariance {self.covariance.shape} do not belong together; "
                f"give shapes [d] and [d,d]"
            )
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise UserError("mean or covariance holds NaN or infinity; give statistics of finite features")
        asymmetry = float(np.abs(self.covariance - self.covariance.T).max())
        if asymmetry > _ASYMMETRY * float(np.abs(self.covariance).max()):
            raise UserError(
                f"covariance is not symmetric (off by {asymmetry:.3g}); give that of numpy.cov(features, rowvar=False)"
            )

    @property
    def dimension(self) -> int:
        """Number of features d."""
        return len(self.mean)

    @cached_property
    def factor(self) -> Matrix:
        """L [d,r] with L L^T = covariance and r its numerical rank; `UserError` unless positive semidefinite.

        Eigenvalues indistinguishable from 0 (at most d times the machine epsilon of the largest, as in
        `numpy.linalg.matrix_rank`) are left out, since their square roots would add up to errors of 1e-5.
        """
        values, vectors = np.linalg.eigh((self.covariance + self.covariance.T) / 2)
        largest = float(np.abs(values).max())
        if values[0] < -_NEGATIVE * largest:
            raise UserError(
                f"covariance has the eigenvalue {values[0]:.3g} and is not positive semidefinite; "
                f"give that of numpy.cov(features, rowvar=False)"
            )
        kept = values > self.dimension * np.finfo(np.float64).eps * largest
        factor: Matrix = vectors[:, kept] * np.sqrt(values[kept])
        return factor

    @property
    def note(self) -> str:
        """A remark where there are too few images for the number of features; else ""."""
        if self.n > self.dimension:
            return ""
        return (
            f"{self.n} images for {self.dimension} features: the covariance is singular (rank at most {self.n - 1}) "
            f"and the distance too large; compare only distances of equal n"
        )

    def save(self, path: Path) -> None:
        """Write n, mean and covariance to the .npz file `path`, atomically."""

        def write(temporary: Path) -> None:
            with temporary.open("wb") as stream:
                np.savez(stream, n=np.int64(self.n), mean=self.mean, covariance=self.covariance)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path) -> "GaussianStatistics":
        """Read what `save` wrote; `UserError` when the file is damaged or something else."""
        try:
            n, mean, covariance = read_npz(path, ("n", "mean", "covariance")).values()
            if n.shape != () or n.dtype != np.int64 or {mean.dtype, covariance.dtype} != {np.dtype("f8")}:
                raise ValueError(
                    f"holds n {n.dtype} {n.shape}, mean {mean.dtype}, covariance {covariance.dtype}"
                )
            return cls(int(n), mean, covariance)
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{path} cannot be read as feature statistics ({reason}); remove it") from error
        except UserError as error:
            raise UserError(f"{path} holds no feature statistics: {error}") from error

    @classmethod
    def from_batches(cls, batches: Iterable[ArrayLike]) -> "GaussianStatistics":
        """Statistics of all rows of `batches`, each [n,d], one batch in memory at a time."""
        moments = RunningMoments()
        for batch in batches:
            moments.add(batch)
        return moments.statistics()


class RunningMoments:
    """Mean and scatter matrix of a stream of features, merged batch by batch (pairwise, in float64).

    Rows are relative to the first one, and each batch is centred on its own mean before squaring, so that a large
    common offset costs no digits.
    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self) -> None:
        self.n = 0
        self._origin: Matrix = np.zeros(0)
        self._mean: Matrix = np.zeros(0)
        self._scatter: Matrix = np.zeros((0, 0))

    def add(self, features: ArrayLike) -> None:
        """Add features [n,d], n >= 0; `UserError` for NaN, infinities or another d."""
        batch = np.asarray(features, dtype=np.float64)
        if batch.ndim != 2 or batch.shape[1] == 0:
            raise UserError(f"features of shape {batch.shape}; give one row of features an image, [n,d]")
        if self.n and batch.shape[1] != len(self._mean):
            raise UserError(
                f"{batch.shape[1]} features after {len(self._mean)}; use one extractor throughout"
            )
        bad = int((~np.isfinite(batch).all(axis=1)).sum())
        if bad:
            raise UserError(
                f"features of {bad} of {len(batch)} images hold NaN or infinity; use another feature extractor"
            )
        if len(batch):
            self._merge(batch)

    def _merge(self, batch: Matrix) -> None:
        if self.n == 0:
            self._origin = batch[0].copy()
            self._mean, self._scatter = np.zeros(batch.shape[1]), np.zeros((batch.shape[1],) * 2)
        batch = batch - self._origin
        mean = batch.mean(axis=0)
        shift, total = mean - self._mean, self.n + len(batch)
        # The shift of the mean is one more row of the product: one pass over [d,d] instead of three.
        rows = np.vstack([batch - mean, shift * math.sqrt(self.n * len(batch) / total)])
        self._scatter += rows.T @ rows
        self._mean += shift * (len(batch) / total)
        self.n = total

    def statistics(self) -> GaussianStatistics:
        """Statistics of everything added so far; `UserError` for fewer than 2 images."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 images, not {self.n}; give more images")
        return GaussianStatistics(self.n, self._origin + self._mean, self._scatter / (self.n - 1))


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """|mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)), at least 0, in squared units of the features.

    The trace of the root is the sum of the singular values of L_a^T L_b for A = L_a L_a^T, B = L_b L_b^T, which avoids
    the square root of a nearly singular product and is exact for covariances without full rank. `UserError` when
    dimensions differ or a covariance is not positive semidefinite. See also `frechet_notes`.
    """
    if a.dimension != b.dimension:
        raise UserError(
            f"statistics of {a.dimension} and {b.dimension} features; compare those of one feature extractor"
        )
    shift = a.mean - b.mean
    cross = a.factor.T @ b.factor
    root_trace = float(np.linalg.svd(cross, compute_uv=False).sum()) if cross.size else 0.0
    traces = float(np.trace(a.covariance) + np.trace(b.covariance))
    # Rounding leaves about -1e-15 of the traces where both are equal.
    return max(float(shift @ shift) + traces - 2 * root_trace, 0.0)


def frechet_notes(a: GaussianStatistics, b: GaussianStatistics) -> tuple[str, ...]:
    """Remarks on `frechet_distance(a, b)`: which side has too few images for its number of features."""
    return tuple(dict.fromkeys(note for note in (a.note, b.note) if note))
