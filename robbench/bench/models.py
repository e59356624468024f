"""Models and data of a comparison."""

from collections.abc import Sequence
from pathlib import Path

import torch

from robbench.data import Dataset, load_dataset
from robbench.device import resolve_device
from robbench.errors import UserError
from robbench.models.loading import LoadedModel, load_model
from robbench.models.zoo import find_model, zoo_entries


def loaded(
    names: Sequence[str], device: str = "auto", zoo: Path | None = None, data_dir: Path | None = None
) -> list[tuple[LoadedModel, Dataset, torch.device]]:
    """Classifiers with the data sets they classify, on a device; `UserError` for anything else."""
    target, entries = resolve_device(device), zoo_entries(zoo)
    chosen = [find_model(name, entries) for name in names]
    for entry in chosen:
        if entry.card.kind != "classifier":
            raise UserError(f"--model {entry.card.name!r} is a {entry.card.kind}; name classifiers")
    data = {name: load_dataset(name, data_dir) for name in {entry.card.dataset for entry in chosen}}
    return [(load_model(entry, target), data[entry.card.dataset], target) for entry in chosen]
