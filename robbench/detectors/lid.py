"""Local intrinsic dimensionality (Ma et al. 2018)."""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.detectors.base import DETECTORS, Detector, DetectorParameters, Reference
from robbench.detectors.features import Maps, computing_layers

SMALLEST = 1e-12  # ratio of distances, so that a neighbour at distance 0 has a logarithm
LARGEST = 1e6  # estimate, where all neighbours are equally far


class LidParameters(DetectorParameters):
    """Parameters of `lid`.

    Attributes:
        reference: clean training images among which neighbours are looked for.
        k: number of neighbours.
        maps: features of convolutions flattened, or averaged over places.
        quirks: as the public code: neighbours within minibatches of clean images (the attacked images before the
            attack), of sorted distances the first left out, which of changed images is a true neighbour; all images
            that are classified correctly train the score; its scaler sees the images of the threshold.
        minibatch: size of these.
    """

    reference: int = Field(default=1000, ge=1)
    k: int = Field(default=20, ge=2)
    maps: Maps = "flatten"
    quirks: bool = False
    minibatch: int = Field(default=100, ge=3)


@DETECTORS.register("lid")
class Lid(Detector):
    """Local intrinsic dimensionality of every layer, by the distances to the k nearest of a seeded set of clean
    training images that is stored with the detector (Ma et al. 2018, who look in the minibatch: `quirks`)."""

    Parameters: ClassVar[type[DetectorParameters]] = LidParameters
    _rows: list[Tensor] | None = None

    @classmethod
    def default_layers(cls, classifier: nn.Module, images: Tensor) -> tuple[str, ...]:
        """Every layer that computes something, as in the paper."""
        if layers := computing_layers(classifier, images):
            return layers
        raise UserError("the classifier has no layer that runs once a forward; name one with --layer")

    @property
    def pointwise(self) -> bool:
        return not self.parameters.quirks

    @property
    def at_once(self) -> int:
        minibatch: int = self.parameters.minibatch
        return super().at_once if self.pointwise else minibatch

    @property
    def maps(self) -> Maps:
        found: Maps = self.parameters.maps
        return found

    def learn(self, reference: Reference) -> None:
        k, quirks, n = self.parameters.k, self.parameters.quirks, len(reference.images)
        if quirks and k >= self.parameters.minibatch:
            raise self._too_few(f"a minibatch of {self.parameters.minibatch}", "minibatch")
        if not quirks and k > n:
            raise self._too_few(f"{n} reference images", "reference")
        if not quirks:
            self.keep("reference", reference.images)

    def _too_few(self, what: str, setting: str) -> UserError:
        k = self.parameters.k
        return UserError(
            f"detector {self.name!r}: {what} has fewer than the k = {k} neighbours that it needs; "
            f"give a smaller k (--set k=10), or a larger one of those (--set {setting}=N)"
        )

    def statistic(self, place: int, features: Tensor, predicted: Tensor) -> Tensor:
        if self._rows is None or self._rows[place].device != features.device:
            with torch.inference_mode(False):  # gradients go through them later
                rows = self.rows_of(self.held("reference"))
                self._rows = [each.to(features.device) for each in rows]
        return intrinsic_dimension(features, self._rows[place], self.parameters.k)

    def evidence(self, images: Tensor, clean: Tensor | None = None) -> Tensor:
        if self.pointwise:
            return super().evidence(images)
        size, same = self.parameters.minibatch, images if clean is None else clean
        return torch.cat(
            [
                self._in_minibatch(part, around)
                for part, around in zip(torch.split(images, size), torch.split(same, size), strict=True)
            ]
        )

    def _in_minibatch(self, images: Tensor, clean: Tensor) -> Tensor:
        k = self.parameters.k
        if len(clean) <= k:
            raise self._too_few(f"a minibatch of {len(clean)}", "minibatch")
        changed, around = self.features(images)[0], self.features(clean)[0]
        pairs = zip(changed, around, strict=True)
        return torch.stack([intrinsic_dimension(row, near, k, skipped=1) for row, near in pairs], 1)

    def chosen(self, right: Tensor, broken: Tensor) -> Tensor:
        if self.pointwise:
            return super().chosen(right, broken)
        return self.scored_together(right.nonzero().squeeze(1))

    def scored_together(self, rows: Tensor) -> Tensor:
        size = self.parameters.minibatch
        whole = len(rows) // size * size
        return rows if self.pointwise or not whole else rows[:whole]

    def scaling(self, fitted: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        if self.pointwise:
            return super().scaling(fitted, others)
        seen = torch.cat([fitted, others])
        return seen.amin(0), seen.amax(0) - seen.amin(0)


def intrinsic_dimension(z: Tensor, points: Tensor, k: int, skipped: int = 0) -> Tensor:
    """-k / sum_i ln(r_i / r_k) [N] of z [N,D], for the distances r_1 <= ... <= r_k to its nearest points [M,D].

    skipped: so many of the nearest are left out. Differentiable in z; at most `LARGEST`.
    """
    distances = torch.cdist(z, points, compute_mode="donot_use_mm_for_euclid_dist")
    near = distances.topk(k + skipped, 1, largest=False).values[:, skipped:]
    ratios = near / near[:, -1:].clamp(min=torch.finfo(near.dtype).tiny)
    return k / (-ratios.clamp(min=SMALLEST).log().sum(1)).clamp(min=k / LARGEST)
