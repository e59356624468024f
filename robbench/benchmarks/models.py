"""Models of comparisons: classifiers of the zoo with their data, random networks with random images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from robbench.core.device import resolve_device
from robbench.core.errors import UserError
from robbench.data import Dataset, load_dataset
from robbench.models.classifiers import ARCHITECTURES
from robbench.models.entry import ModelRequest
from robbench.models.loading import LoadedModel, load_model
from robbench.models.zoo import find_model, zoo_entries


def load_classifiers(
    names: Sequence[str],
    device: str = "auto",
    zoo: Path | None = None,
    data_dir: Path | None = None,
    data: Path | None = None,
    checkpoints: Path | None = None,
) -> list[tuple[LoadedModel, Dataset, torch.device]]:
    """Classifiers with the data sets they classify, on a device; `UserError` for anything else."""
    target, entries = resolve_device(device), zoo_entries(zoo, checkpoints)
    requested = ModelRequest("", checkpoints=checkpoints)
    chosen = [find_model(name, entries, requested=requested) for name in names]
    for entry in chosen:
        if entry.card.kind != "classifier":
            raise UserError(f"--model {entry.card.name!r} is a {entry.card.kind}; name classifiers")
    found = {name: load_dataset(name, data_dir, data) for name in {entry.card.dataset for entry in chosen}}
    return [(load_model(entry, target), found[entry.card.dataset], target) for entry in chosen]


def random_classifier(
    architecture: str,
    n: int,
    input_shape: tuple[int, int, int] = (3, 32, 32),
    classes: int = 10,
    seed: int = 0,
) -> tuple[nn.Module, Tensor, Tensor]:
    """(network with random weights in eval mode, n random images [n,C,H,W] in [0,1], its predictions as labels), for
    timings without data. `UserError` for an unknown architecture."""
    build = ARCHITECTURES.get(architecture)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build(input_shape, classes).eval()
        x = torch.rand(n, *input_shape)
    with torch.no_grad():
        y = torch.cat([module(part).argmax(1) for part in torch.split(x, 64)])
    return module, x, y
