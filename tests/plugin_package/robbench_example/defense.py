"""Label smoothing (Szegedy et al. 2016) as a defense."""

import torch
from pydantic import Field
from torch import Tensor, nn

from robbench.core.schema import Strict
from robbench.defenses.base import Defense


class LabelSmoothingParameters(Strict):
    """smoothing: probability spread evenly over all classes."""

    smoothing: float = Field(default=0.1, ge=0, le=1)


class LabelSmoothing(Defense):
    """Cross-entropy against smoothed labels."""

    Parameters = LabelSmoothingParameters

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return nn.functional.cross_entropy(model(x), y, label_smoothing=self.parameters.smoothing)
