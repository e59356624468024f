"""What an adaptive attack sees of a detector."""

from typing import Protocol

from torch import Tensor


class Guard(Protocol):
    """What an adaptive attack sees of a detector."""

    name: str
    threshold: float

    def scores(
        self, images: Tensor
    ) -> Tensor: ...  # float64 [N], differentiable in images [N,C,H,W], on their device
    def scores_of(self, images: Tensor) -> Tensor: ...  # without a graph, in batches, on the CPU
    def flags(self, scores: Tensor) -> Tensor: ...
