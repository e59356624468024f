"""A linear classifier."""

import math

from torch import nn


def softmax_regression(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """Logits as one affine map of the pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(input_shape), classes))
