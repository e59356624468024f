"""A model with its logits on another scale, for tests of every room."""

import torch
from torch import nn


class Scaled(nn.Module):
    """A model whose logits are multiplied by `factor`, then moved by `shift`."""

    def __init__(self, model: nn.Module, factor: float, shift: float = 0.0) -> None:
        super().__init__()
        self.model, self.factor, self.shift = model, factor, shift

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * self.model(x) + self.shift
