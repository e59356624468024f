"""What a detector is trained on: images, the same with noise, and the same attacked."""

from dataclasses import dataclass

import torch
from torch import Tensor

from robbench.attacks import Attack, Victim
from robbench.attacks.search.task import Samples
from robbench.cards import TrainingAttack
from robbench.core.errors import UserError
from robbench.core.random import SampleRandom
from robbench.detectors.base import Detector

HALVINGS = 60  # of the interval of the noise's deviation
MOST_NOISE = 1e3  # deviation at which every pixel is 0 or 1


@dataclass(frozen=True)
class Triples:
    """Clean, noisy and adversarial versions [M,C,H,W] of the same images, and what the card says of them."""

    clean: Tensor
    noisy: Tensor
    adversarial: Tensor
    record: TrainingAttack


def attack_samples(
    detector: Detector, victim: Victim, attack: Attack, samples: Samples, seed: int
) -> Triples:
    """The samples that train a detector against `attack` (`Detector.chosen`), with noise of the attack's mean L2 norm.

    `UserError` when the attack broke none of them.
    """
    spec = attack.spec
    outcome = attack.evaluate(victim, samples.ids, samples.x, samples.y, seed, victim.batch_size)
    right, wrong = outcome.clean_margins > 0, ~(outcome.margins > 0)
    if not bool((right & wrong).any()):
        raise UserError(
            f"--attacks {spec.label}: it broke none of the {int(right.sum())} images that the classifier gets right, "
            f"so there is no adversarial example to train on; name a stronger attack, or another --model"
        )
    rows = detector.chosen(right, wrong)
    clean, adversarial = samples.x[rows], outcome.adversarial[rows]
    mean_l2 = _mean_l2(adversarial - clean)
    noise = SampleRandom(seed, "detector noise").normal(samples.ids[rows], clean.shape[1:])
    deviation = noise_deviation(clean, noise, mean_l2)
    record = TrainingAttack(
        name=spec.label,
        epsilon=spec.epsilon,
        eta=spec.eta,
        examples=len(rows),
        mean_l2=mean_l2,
        noise_std=deviation,
    )
    return Triples(clean, (clean + deviation * noise).clamp(0, 1), adversarial, record)


def noise_deviation(images: Tensor, noise: Tensor, mean_l2: float) -> float:
    """The factor of `noise` [N,C,H,W] at which images plus noise, clipped to [0,1], are `mean_l2` from the images in
    the mean; `UserError` where no noise takes them so far."""
    low, high = 0.0, MOST_NOISE
    if _mean_l2((images + high * noise).clamp(0, 1) - images) < mean_l2:
        raise UserError(
            f"the attack moves images by {mean_l2:.3g} in L2, farther than Gaussian noise takes them inside [0,1], so "
            f"that there is no noise like it; name a weaker attack"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        short = _mean_l2((images + middle * noise).clamp(0, 1) - images) < mean_l2
        low, high = (middle, high) if short else (low, middle)
    return high


def _mean_l2(changes: Tensor) -> float:
    return float(changes.double().flatten(1).norm(dim=1).mean())


def evidence_of_triples(detector: Detector, found: list[Triples]) -> tuple[Tensor, Tensor]:
    """Statistics [N,F] of clean and noisy, and of adversarial images."""
    negatives = [
        detector.evidence_of(images, each.clean) for each in found for images in (each.clean, each.noisy)
    ]
    positives = [detector.evidence_of(each.adversarial, each.clean) for each in found]
    return torch.cat(negatives), torch.cat(positives)
