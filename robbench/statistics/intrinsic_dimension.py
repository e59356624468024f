"""How many dimensions a set of points has locally: maximum likelihood from distances to nearest neighbours.

Per point x and k, m_k(x) = (k - 2) / sum_{j<k} ln(T_k(x) / T_j(x)) with T_j the distance to the j-th neighbour (Levina
and Bickel 2005, without the bias of k - 1). "levina" is the mean of m_k over points, "mackay" the inverse of the mean
of 1 / m_k (MacKay and Ghahramani 2005); both are then averaged over k = 6..12, as hub-toolbox does, which ER-Classifier
used. scikit-dimension's MLE takes one k: with unbiased=True and comb "mean" or "mle" it is one term of that average.
"levina" has no bias on a flat manifold without border; "mackay" as coded is low by (k - 2) / (k - 1), 13 %.
"""

from dataclasses import dataclass

import numpy as np

from robbench.core.errors import UserError

NEIGHBOURS = range(6, 13)


@dataclass(frozen=True)
class IntrinsicDimension:
    """Both estimates, and the number of different points that they are of."""

    mackay: float
    levina: float
    points: int


def intrinsic_dimension(points: np.ndarray, neighbours: range = NEIGHBOURS) -> IntrinsicDimension:
    """Estimates for points [N,D], of which equal ones count once; `UserError` for too few different ones.

    neighbours: the k to average over, each at least 3.
    """
    from sklearn.neighbors import NearestNeighbors

    different, largest = np.unique(np.asarray(points, np.float64), axis=0), max(neighbours)
    if len(different) <= largest:
        raise UserError(
            f"intrinsic dimension: {len(points)} images, {len(different)} different ones; the estimate takes "
            f"{largest} neighbours of each, so give at least {largest + 1} different images"
        )
    found = NearestNeighbors(n_neighbors=largest, algorithm="brute").fit(different)
    logs = np.log(
        found.kneighbors()[0]
    )  # without arguments: neighbours of the fitted points, themselves left out
    inverse = {k: (logs[:, [k - 1]] - logs[:, : k - 1]).sum(1) / (k - 2) for k in neighbours}
    with np.errstate(
        divide="ignore"
    ):  # a point whose k neighbours are all equally far: infinitely many dimensions
        mackay = np.mean([1.0 / values.mean() for values in inverse.values()])
        levina = np.mean([(1.0 / values).mean() for values in inverse.values()])
    return IntrinsicDimension(float(mackay), float(levina), len(different))
