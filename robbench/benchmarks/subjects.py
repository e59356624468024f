"""What `robbench bench pgd` runs on: classifiers of the zoo on their data, random networks on random images."""

from collections.abc import Sequence
from pathlib import Path

from robbench.benchmarks.models import loaded, random_classifier
from robbench.benchmarks.pgd import Subject
from robbench.core.device import resolve_device
from robbench.data import sample_ids
from robbench.specs import resolve_attack, threat_models

RANDOM_EPSILON = (
    1 / 255
)  # more of it would leave no random network a robust image, and so no verdict to compare


def zoo_subjects(
    names: Sequence[str],
    n: int,
    device: str = "auto",
    zoo: Path | None = None,
    data_dir: Path | None = None,
    data: Path | None = None,
) -> list[Subject]:
    """Zoo classifiers with n test images drawn by seed 0 and the data set's own epsilon."""
    known, found = threat_models(), []
    for model, dataset, target in loaded(names, device, zoo, data_dir, data):
        x, y = dataset.test.by_ids(sample_ids(dataset.test, min(n, len(dataset.test)), 0))
        epsilon = float(resolve_attack("pgd50", model.card.dataset, known).epsilon or 0.0)
        found.append(Subject(model.card.name, model.module, x, y, epsilon, target))
    return found


def random_subjects(architectures: Sequence[str], n: int, device: str = "auto") -> list[Subject]:
    """Networks with random weights on n random 3x32x32 images, labels their own predictions."""
    target = resolve_device(device)
    return [
        Subject(f"{name} (random weights)", *random_classifier(name, n), RANDOM_EPSILON, target)
        for name in architectures
    ]
