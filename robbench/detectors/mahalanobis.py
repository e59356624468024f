"""Mahalanobis distance to class means with a shared covariance (Lee et al. 2018)."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from robbench.core.errors import UserError
from robbench.detectors.base import DETECTORS, Detector, DetectorParameters, Reference
from robbench.detectors.features import Maps

SINGULAR = 1e-10  # smallest eigenvalue of a covariance, relative to the largest, that counts


class MahalanobisParameters(DetectorParameters):
    """maps: features of convolutions averaged over places, or flattened. shrinkage: s in (1 - s) C + s tr(C)/D 1, for
    the covariance C [D,D] of few images or of units that never vary."""

    maps: Maps = "mean"
    shrinkage: float = Field(default=0.0, ge=0, le=1)


@DETECTORS.register("mahalanobis")
class Mahalanobis(Detector):
    """Squared Mahalanobis distance to the nearest class mean, with one covariance of all classes (Lee et al. 2018,
    without their change of the input); several layers by --layer."""

    Parameters: ClassVar[type[DetectorParameters]] = MahalanobisParameters

    @property
    def maps(self) -> Maps:
        found: Maps = self.parameters.maps
        return found

    def learn(self, reference: Reference) -> None:
        counts = torch.bincount(reference.labels, minlength=reference.classes)
        if int(counts.min()) < 2:
            raise UserError(
                f"detector {self.name!r}: class {int(counts.argmin())} has {int(counts.min())} clean training images "
                f"and its mean needs 2; use more with --set reference=N, or a data set that has them"
            )
        for place, rows in enumerate(self.rows_of(reference.images)):
            means = torch.stack([rows[reference.labels == c].mean(0) for c in range(reference.classes)])
            self.keep(f"means_{place}", means)
            self.keep(f"whitening_{place}", self._whitening(rows - means[reference.labels], place))

    def _whitening(self, centred: Tensor, place: int) -> Tensor:
        """W [D,D] with W W^T the inverse of the covariance of rows [N,D] around their means."""
        from sklearn.covariance import EmpiricalCovariance, shrunk_covariance

        fitted = EmpiricalCovariance(assume_centered=True).fit(centred.numpy()).covariance_
        covariance = torch.from_numpy(shrunk_covariance(fitted, self.parameters.shrinkage))
        values, vectors = torch.linalg.eigh(covariance)
        if not float(values[0]) > SINGULAR * float(values[-1]):
            size, rank = len(values), int((values > SINGULAR * values[-1]).sum())
            raise UserError(
                f"detector {self.name!r}: the covariance of layer {self.layers[place]!r} is singular (rank {rank} of "
                f"{size}, from {len(centred)} images); give --set shrinkage=0.01, or name another --layer"
            )
        whitening: Tensor = vectors / values.sqrt()
        return whitening

    def statistic(self, place: int, features: Tensor, predicted: Tensor) -> Tensor:
        whitening, means = self.held(f"whitening_{place}"), self.held(f"means_{place}")
        distances = torch.cdist(
            features @ whitening, means @ whitening, compute_mode="donot_use_mm_for_euclid_dist"
        )
        return distances.square().amin(1)
