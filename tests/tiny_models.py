"""Small models for tests that run the matrix: they do not depend on the models robbench ships."""

from pathlib import Path
from typing import Any


def card_fields(name: str, **changes: Any) -> dict[str, Any]:
    """Fields of a digits classifier's card, without the hashes."""
    from robbench.cards import Architecture

    return {
        "name": name,
        "kind": "classifier",
        "description": "made by the tests",
        "dataset": "digits",
        "defense": "tiny",
        "architecture": Architecture(name="digits-cnn", arguments={"width": 4}),
        "input_shape": (1, 8, 8),
        "classes": 10,
        **changes,
    }


def trained_classifier(seed: int, epochs: int = 6) -> Any:
    """A digits CNN of width 4 after a few epochs of Adam: about 85 % accurate, made in under a second."""
    import torch
    from torch.nn.functional import cross_entropy

    from robbench.data import load_dataset
    from robbench.models.classifiers import digits_cnn

    split = load_dataset("digits").train
    x, y = split.x(torch.arange(len(split))), split.labels
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = digits_cnn((1, 8, 8), 10, width=4)
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(epochs):
            for rows in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
    return model


def saved_model(folder: Path, name: str, module: Any, **changes: Any) -> Path:
    """Write a zoo folder for `module`; returns it."""
    import torch

    from robbench.models.loading import save_model_folder

    save_model_folder(folder / name, card_fields(name, **changes), module, torch.rand(4, 1, 8, 8))
    return folder / name
