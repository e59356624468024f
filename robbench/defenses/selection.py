"""Scores on the validation split that select the best epoch, and the measurements of a card."""

from typing import cast

import numpy as np
import torch
from torch import nn

from robbench.attacks import Victim, build_attack, build_likelihood_attack
from robbench.attacks.search.decision import margins
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.trust.context import own_context
from robbench.attacks.trust.preflight import check_model
from robbench.cards import Measurement
from robbench.data import Dataset, Split
from robbench.defenses.base import Criterion, Defense, Setting
from robbench.defenses.flow import gaussian_bits_per_dim
from robbench.models.flows.base import Flow
from robbench.models.flows.checks import frozen_like
from robbench.specs import resolve_attack
from robbench.statistics.accuracy import Estimate, accuracy

# One fixed seed, so that every epoch is scored with the same random starts and dequantisation noise.
SCORE_SEED = 20260102
EVALUATION_BATCH = 500
SplitWords = tuple[str, str]  # name of the validation images in a card, and how they were used
SELECTION_ATTACK = "pgd10"


def score(defense: Defense, model: nn.Module, split: Split, device: torch.device) -> float:
    """The criterion's value on a split, in percent or bits/dim (mean over images)."""
    criterion = defense.criterion
    if criterion == "accuracy":
        return clean_accuracy(model, split, device).value
    if criterion == "pgd10_accuracy":
        return attacked_accuracy(model, split, defense.setting, device).value
    if criterion == "bits_per_dim":
        return float(np.mean(bits_per_dim(cast(Flow, model), split, 1, device)))
    before, after = attacked_bits_per_dim(cast(Flow, model), defense, split, device)
    return float(np.mean(after if criterion == "attacked_bits_per_dim" else (before + after) / 2))


def sign(criterion: Criterion) -> float:
    """1 where higher values of the criterion are better, else -1."""
    return -1.0 if criterion.endswith("bits_per_dim") else 1.0


def clean_accuracy(model: nn.Module, split: Split, device: torch.device) -> Estimate:
    """Accuracy in percent in eval mode."""
    with attack_mode(model):
        victim = Victim(model, device, EVALUATION_BATCH)
        right = [
            margins(victim.clean_logits(split.x(part)), split.labels[part]) > 0
            for part in torch.split(torch.arange(len(split)), EVALUATION_BATCH)
        ]
    return accuracy(torch.cat(right).numpy())


def attacked_accuracy(model: nn.Module, split: Split, setting: Setting, device: torch.device) -> Estimate:
    """Accuracy in percent under PGD-10 with the data set's Linf budget."""
    spec = resolve_attack(SELECTION_ATTACK, setting.dataset, dict(setting.threat_models))
    positions = torch.arange(len(split))
    with attack_mode(model):
        outcome = build_attack(spec).evaluate(
            Victim(model, device, EVALUATION_BATCH),
            split.ids,
            split.x(positions),
            split.labels,
            SCORE_SEED,
            EVALUATION_BATCH,
        )
    return accuracy(outcome.robust.numpy())


def bits_per_dim(flow: Flow, split: Split, draws: int, device: torch.device) -> np.ndarray:
    """Bits/dim per image [N] with noise keyed by sample id, mean of `draws` draws."""
    parts = []
    with attack_mode(flow), torch.no_grad():
        for part in torch.split(torch.arange(len(split)), EVALUATION_BATCH):
            x, y = split.x(part).to(device), split.labels[part].to(device)
            bits = flow.bits_per_dim(x, y, n_samples=draws, seed=SCORE_SEED, sample_ids=split.ids[part])
            parts.append(bits.double().cpu())
    return torch.cat(parts).numpy()


def attacked_bits_per_dim(
    flow: Flow, defense: Defense, split: Split, device: torch.device
) -> tuple[np.ndarray, np.ndarray]:
    """Bits/dim per image before and after the defense's own inner attack, [N] each."""
    p, setting = defense.parameters, defense.setting
    spec = resolve_attack(p.attack, setting.dataset, dict(setting.threat_models), p.epsilon, steps=p.steps)
    own = {**spec.parameters, "step_size": p.step_size or None, "start": p.start}
    attack = build_likelihood_attack(spec.model_copy(update={"parameters": own}))
    frozen, x = frozen_like(flow).to(device), split.x(torch.arange(len(split)))
    outcome = attack.evaluate(frozen, frozen, split.ids, x, split.labels, SCORE_SEED, EVALUATION_BATCH)
    return outcome.nll_before.numpy(), outcome.nll_after.numpy()


def classifier_measurements(
    model: nn.Module,
    validation: Split,
    criterion: Criterion,
    setting: Setting,
    device: torch.device,
    command: str,
    about: SplitWords,
) -> tuple[Measurement, ...]:
    """Validation accuracy, and for adversarial defenses PGD-10 accuracy; the test split is not used. about: see
    `Plan.about`."""
    with own_context(), attack_mode(model):  # a model that attacks would refuse is not stored
        check_model(
            Victim(model, device, EVALUATION_BATCH), validation.x(torch.arange(min(64, len(validation))))
        )
    found = [_percentage("accuracy", clean_accuracy(model, validation, device), command, about)]
    if criterion == "pgd10_accuracy":
        estimate = attacked_accuracy(model, validation, setting, device)
        found.append(_percentage(f"accuracy under {SELECTION_ATTACK}", estimate, command, about))
    return tuple(found)


def _percentage(metric: str, estimate: Estimate, command: str, about: SplitWords) -> Measurement:
    return Measurement(
        metric=metric,
        value=round(estimate.value, 2),
        unit="%",
        split=about[0],
        n=estimate.n,
        lower=round(estimate.lower, 2),
        upper=round(estimate.upper, 2),
        command=command,
        note=f"95 % Wilson interval; {about[1]}",
    )


def flow_measurements(
    flow: Flow,
    dataset: Dataset,
    train: Split,
    validation: Split,
    device: torch.device,
    command: str,
    about: SplitWords,
    draws: int = 8,
) -> tuple[Measurement, ...]:
    """Bits/dim of the flow on training, validation and test images, and of a Gaussian on the test images.

    The test split is used here only, after training and selection. about: see `Plan.about`.
    """
    found = [
        _bits(name, bits_per_dim(flow, split, draws, device), name_of_split, command, note)
        for name, split, name_of_split, note in (
            ("bits/dim", train, "train", f"mean of {draws} dequantisation draws an image"),
            ("bits/dim", validation, *about),
            ("bits/dim", dataset.test, "test", f"mean of {draws} dequantisation draws an image"),
        )
    ]
    reference = gaussian_bits_per_dim(train, dataset.test)
    note = (
        "full-covariance Gaussian fitted to the same dequantised training pixels; exact expectations, float64"
    )
    return (*found, _bits("bits/dim of a Gaussian", reference, "test", command, note))


def _bits(metric: str, values: np.ndarray, split: str, command: str, note: str) -> Measurement:
    spread = 1.96 * float(values.std(ddof=1)) / len(values) ** 0.5 if len(values) > 1 else 0.0
    mean = float(values.mean())
    return Measurement(
        metric=metric,
        value=round(mean, 4),
        unit="bits/dim",
        split=split,
        n=len(values),
        lower=round(mean - spread, 4),
        upper=round(mean + spread, 4),
        command=command,
        note=f"{note}; interval: normal, over images",
    )
