"""Loss functions of the defenses, as pure functions of logits. B: batch size, K: classes."""

import torch
from torch import Tensor
from torch.nn import functional

# MART's published code guards its logarithms and its weight with these three numbers.
MART_MARGIN, MART_LOG_GUARD, MART_WEIGHT = 1.0001, 1e-12, 1.0000001


def kl_divergence(reference: Tensor, other: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(other)) per sample, [B], in nats; gradients flow through both."""
    log_p, log_q = functional.log_softmax(reference, 1), functional.log_softmax(other, 1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def trades_loss(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Mean of CE(clean, y) + beta KL(p(x) || p(x')). clean, adversarial: logits [B,K]. Zhang et al. 2019, eq. 5."""
    return functional.cross_entropy(clean, labels) + beta * kl_divergence(clean, adversarial).mean()


def mart_loss(clean: Tensor, adversarial: Tensor, labels: Tensor, beta: float) -> Tensor:
    """Mean of BCE(p', y) + beta KL(p || p') (1 - p_y). clean, adversarial: logits [B,K]. Wang et al. 2020, eq. 11.

    BCE = -ln p'_y - ln(1.0001 - max_{k != y} p'_k + 1e-12); the weight is 1.0000001 - p_y, as in the
    published code.
    """
    probabilities = functional.softmax(adversarial, 1)
    rival = probabilities.scatter(1, labels[:, None], -1.0).amax(1)
    boosted = functional.cross_entropy(adversarial, labels, reduction="none")
    boosted = boosted - torch.log(MART_MARGIN - rival + MART_LOG_GUARD)
    own = functional.softmax(clean, 1).gather(1, labels[:, None]).squeeze(1)
    return (boosted + beta * kl_divergence(clean, adversarial) * (MART_WEIGHT - own)).mean()


def mixed_cross_entropy(logits: Tensor, labels: Tensor, partners: Tensor, weight: float) -> Tensor:
    """weight CE(., y_i) + (1 - weight) CE(., y_j) per sample, [B]. labels, partners: [B]; weight in [0,1]."""
    own = functional.cross_entropy(logits, labels, reduction="none")
    other = functional.cross_entropy(logits, partners, reduction="none")
    return weight * own + (1.0 - weight) * other
