"""Distances of adversarial images from their originals, in [0, 1] pixels."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True)
class PerturbationSize:
    """Image distances over samples.

    Attributes:
        l2_mean, linf_mean: means.
        l2_std, linf_std: standard deviations (population, ddof=0).
        n: number of samples.
    """

    l2_mean: float
    l2_std: float
    linf_mean: float
    linf_std: float
    n: int


def perturbation_size(l2: ArrayLike, linf: ArrayLike) -> PerturbationSize | None:
    """Sizes over samples from distances [n]; None without samples. ValueError for a distance that is negative or not
    finite.

    The caller leaves out samples that were misclassified before the attack, most of which are not searched.
    """
    l2_values, linf_values = _distances(l2, "l2"), _distances(linf, "linf")
    if len(l2_values) != len(linf_values):
        raise ValueError(f"{len(l2_values)} L2 and {len(linf_values)} Linf distances; need one each a sample")
    if len(l2_values) == 0:
        return None
    return PerturbationSize(
        l2_mean=float(l2_values.mean()),
        l2_std=float(l2_values.std()),
        linf_mean=float(linf_values.mean()),
        linf_std=float(linf_values.std()),
        n=len(l2_values),
    )


def _distances(values: ArrayLike, name: str) -> NDArray[np.float64]:
    # float64 before any sum: the ledger stores float32.
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all() or (array < 0).any():
        raise ValueError(
            f"{name} holds a negative or non-finite distance; distances are finite and at least 0"
        )
    return array
