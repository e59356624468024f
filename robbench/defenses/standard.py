"""Empirical risk minimisation."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from robbench.defenses.base import DEFENSES, Defense


@DEFENSES.register("standard")
class Standard(Defense):
    """Cross-entropy on the (augmented) training images: no defense, the baseline."""

    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        return functional.cross_entropy(model(x), y)
