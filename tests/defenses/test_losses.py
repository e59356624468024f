"""The defenses' losses against the formulas written out in numpy, sample by sample."""

import math

import numpy as np
import pytest
import torch

from robbench.defenses import losses
from robbench.defenses.adversarial import IAT, IatParameters
from robbench.defenses.augmentation import Mixup
from robbench.defenses.base import Setting, beta_draw, mix

CLEAN = np.array([[2.0, -1.0, 0.5], [0.1, 0.2, 0.3], [-3.0, 4.0, 1.0], [1.0, 1.0, -2.0]])
ADVERSARIAL = np.array([[0.5, 0.4, 0.6], [-1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, -1.0, -2.0]])
LABELS = [0, 2, 1, 1]


def softmax(row):
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def cross_entropy(row, label):
    return -math.log(softmax(row)[label])


def kl(first, second):
    p, q = softmax(first), softmax(second)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def as_torch(rows):
    return torch.tensor(rows, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_trades_is_clean_cross_entropy_plus_mean_kl(beta):
    wanted = np.mean(
        [cross_entropy(c, y) + beta * kl(c, a) for c, a, y in zip(CLEAN, ADVERSARIAL, LABELS, strict=True)]
    )
    found = losses.trades_loss(as_torch(CLEAN), as_torch(ADVERSARIAL), torch.tensor(LABELS), beta)
    assert found.item() == pytest.approx(wanted, rel=1e-12)


def test_trades_gradients_flow_through_both_distributions():
    """d KL(p||q) / d logits of p is p (log p/q - KL); of q it is q - p."""
    clean, adversarial = as_torch(CLEAN), as_torch(ADVERSARIAL)
    losses.kl_divergence(clean, adversarial).sum().backward()
    for row, (c, a) in enumerate(zip(CLEAN, ADVERSARIAL, strict=True)):
        p, q, divergence = softmax(c), softmax(a), kl(c, a)
        through_p = [pi * (math.log(pi / qi) - divergence) for pi, qi in zip(p, q, strict=True)]
        np.testing.assert_allclose(clean.grad[row], through_p, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(adversarial.grad[row], np.subtract(q, p), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("beta", [5.0, 6.0])
def test_mart_with_its_published_constants(beta):
    total = 0.0
    for c, a, y in zip(CLEAN, ADVERSARIAL, LABELS, strict=True):
        p, q = softmax(c), softmax(a)
        rival = max(value for k, value in enumerate(q) if k != y)
        boosted = -math.log(q[y]) - math.log(1.0001 - rival + 1e-12)
        total += boosted + beta * kl(c, a) * (1.0000001 - p[y])
    found = losses.mart_loss(as_torch(CLEAN), as_torch(ADVERSARIAL), torch.tensor(LABELS), beta)
    assert found.item() == pytest.approx(total / 4, rel=1e-12)


def test_mart_stays_finite_when_a_rival_is_certain():
    adversarial = torch.tensor([[0.0, 200.0]], requires_grad=True)
    loss = losses.mart_loss(torch.tensor([[0.0, 0.0]]), adversarial, torch.tensor([0]), 6.0)
    loss.backward()
    # CE = 200, the margin term stops at -ln(1e-4) = 9.21, KL(1/2, 1/2 || 0, 1) = 100 - ln 2, weight 1/2.
    expected = 200 - math.log(1e-4) + 6 * (100 - math.log(2)) * 0.5
    assert loss.item() == pytest.approx(expected, rel=1e-3)
    assert torch.isfinite(adversarial.grad).all()


def test_mixed_cross_entropy_equals_cross_entropy_of_the_mixed_label():
    partners, weight = [1, 0, 1, 2], 0.3
    found = losses.mixed_cross_entropy(as_torch(CLEAN), torch.tensor(LABELS), torch.tensor(partners), weight)
    for row, (c, y, j) in enumerate(zip(CLEAN, LABELS, partners, strict=True)):
        target = np.zeros(3)
        target[y] += weight
        target[j] += 1 - weight
        assert found[row].item() == pytest.approx(-float(target @ np.log(softmax(c))), rel=1e-12)


# ----------------------------------------------------------------------------------- mixup and IAT on a batch
class Linear(torch.nn.Module):
    """Logits W x of two-pixel images."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 3.0], [-1.0, 1.0]]))

    def forward(self, x):
        return x.flatten(1) @ self.weight.T


IMAGES = torch.tensor([[0.1, 0.9], [0.4, 0.2], [1.0, 0.0]]).reshape(3, 1, 1, 2)
Y = torch.tensor([0, 1, 2])


def mixup_by_hand(images, weight, partner):
    w = Linear().weight.detach().numpy()
    flat, rows = images.flatten(1).numpy(), []
    for i, j in enumerate(partner):
        logits = w @ (weight * flat[i] + (1 - weight) * flat[j])
        rows.append(
            weight * cross_entropy(logits, int(Y[i])) + (1 - weight) * cross_entropy(logits, int(Y[j]))
        )
    return float(np.mean(rows))


def drawn(generator, tau=1.0):
    """What `mix` draws next, in its order: weight, permutation."""
    return beta_draw(tau, generator), torch.randperm(3, generator=generator).tolist()


def test_mixup_loss_by_hand():
    defense = Mixup("mixup", {}, Setting("digits", {}))
    weight, partner = drawn(torch.Generator().manual_seed(4))
    found = defense.loss(Linear(), IMAGES, Y, torch.Generator().manual_seed(4))
    assert 0.0 < weight < 1.0
    assert found.item() == pytest.approx(mixup_by_hand(IMAGES, weight, partner), rel=1e-5)


def test_iat_is_the_mean_of_two_independent_mixups(monkeypatch):
    worst = IMAGES.flip(3) * 0.5
    monkeypatch.setattr(IAT, "resolve", lambda self, parameters: IatParameters())
    monkeypatch.setattr(IAT, "adversarial", lambda self, model, x, y, generator: worst)
    generator = torch.Generator().manual_seed(11)
    (first, first_partner), (second, second_partner) = drawn(generator), drawn(generator)
    assert first != second
    wanted = (mixup_by_hand(IMAGES, first, first_partner) + mixup_by_hand(worst, second, second_partner)) / 2
    found = IAT("iat", {}, Setting("digits", {})).loss(Linear(), IMAGES, Y, torch.Generator().manual_seed(11))
    assert found.item() == pytest.approx(wanted, rel=1e-5)


def test_mixing_weights_follow_the_beta_distribution():
    """Beta(0.1, 0.1): 64 % of the draws have min(a, 1-a) < .01 and 81 % < .1 (IJSAT's tau)."""
    generator = torch.Generator().manual_seed(0)
    draws = np.array([beta_draw(0.1, generator) for _ in range(4000)])
    nearest = np.minimum(draws, 1 - draws)
    assert np.mean(nearest < 0.01) == pytest.approx(0.64, abs=0.03)
    assert np.mean(nearest < 0.1) == pytest.approx(0.81, abs=0.03)
    assert draws.mean() == pytest.approx(0.5, abs=0.03)


def test_one_weight_and_one_permutation_a_batch():
    mixed = mix(IMAGES, Y, 1.0, torch.Generator().manual_seed(2))
    partner = [int(label) for label in mixed.partners]  # labels are 0, 1, 2: the permutation itself
    expected = mixed.weight * IMAGES + (1 - mixed.weight) * IMAGES[partner]
    assert torch.equal(mixed.x, expected)
    assert sorted(partner) == [0, 1, 2]
