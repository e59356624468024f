"""The length of the features as a detector: high-confidence images have long ones."""

from torch import Tensor

from robbench.detectors import Detector, Reference


class FeatureNorm(Detector):
    """L2 norm of the features of a layer."""

    def learn(self, reference: Reference) -> None:
        """A norm needs no reference."""

    def statistic(self, place: int, features: Tensor, predicted: Tensor) -> Tensor:
        return features.norm(dim=1)
