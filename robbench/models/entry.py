"""A model that can be loaded: its card and where its files lie. No torch here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from robbench.cards import ModelCard

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ZooEntry:
    """A card and the folder that holds it and the files it names.

    checkpoints: further folder to look for the weights in (--checkpoints). trusted: the card is shipped or the user
    named it, so that code it names may run. build: returns the module with its weights, where a library loads them.
    """

    card: ModelCard
    folder: Path
    checkpoints: Path | None = None
    trusted: bool = True
    build: "Callable[[], nn.Module] | None" = None


@dataclass(frozen=True)
class ModelRequest:
    """What a model is requested for. dataset: its name. shape, classes: of its images, None when it is not loaded (then
    they cannot be checked yet). checkpoints: folder named with --checkpoints."""

    dataset: str
    shape: tuple[int, int, int] | None = None
    classes: int | None = None
    checkpoints: Path | None = None
