"""How logits decide: an image is classified correctly where its margin is above 0."""

import torch
from torch import Tensor


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the largest other logit, [n]; at most 0 means misclassified, so that a tie is wrong.

    -inf for rows of logits [n,K] that are not finite: an attack that leads a model there has broken it. The sign of
    this number is every verdict, clean or attacked.
    """
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf"))
    margin = own - others.amax(1)
    return torch.where(logits.isfinite().all(1), margin, float("-inf"))


def predictions(logits: Tensor) -> Tensor:
    """Class of the largest logit, [n] int64; -1 for rows of logits [n,K] that are not finite."""
    return torch.where(logits.isfinite().all(1), logits.argmax(1), -1)


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [n] in nats; infinite for rows of logits [n,K] that are not finite."""
    values = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return torch.where(logits.isfinite().all(1), values, float("inf"))
