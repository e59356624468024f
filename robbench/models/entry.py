"""A model that can be loaded: its card and where its files lie. No torch here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robbench.cards import ModelCard

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ZooEntry:
    """A card and the folder that holds it and the files it names.

    Attributes:
        card: the card.
        folder: where it, its weights and its code lie.
        checkpoints: further folder to look for the weights in (--checkpoints).
        trusted: the card is shipped or the user named it, so that code it names may run.
        build: returns the module with its weights, where a library loads them.
        code: folder to import code from before `folder`.
    """

    card: ModelCard
    folder: Path
    checkpoints: Path | None = None
    trusted: bool = True
    build: "Callable[[], nn.Module] | None" = None
    code: Path | None = None


@dataclass(frozen=True)
class ModelRequest:
    """What a model is requested for. dataset: its name. shape, classes: of its images, None when it is not loaded (then
    they cannot be checked yet). checkpoints: folder named with --checkpoints."""

    dataset: str
    shape: tuple[int, int, int] | None = None
    classes: int | None = None
    checkpoints: Path | None = None


@dataclass(frozen=True)
class OwnWeights:
    """What belongs to networks that are named by their class (`--model module:Class`).

    Attributes:
        files: weights: one of each class, or several of one class.
        arguments: of the class.
        key: entry of the checkpoint that holds the weights; None to find it.
        mean: of the normalisation (x - mean) / std, a channel or one for all; empty for none.
        std: its standard deviation.
    """

    files: tuple[Path, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
