"""The one rule by which logits decide: a sample is right where its margin is above 0."""

import torch
from torch import Tensor


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the largest other logit, [n]; at most 0 means misclassified, so that a tie is not right.

    -inf for rows of logits [n,K] that are not finite: no prediction follows from them, and an attack that leads a model
    there has broken it. Every verdict, clean or attacked, is this number's sign.
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
