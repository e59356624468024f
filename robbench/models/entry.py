"""A model that can be loaded: its card and where its files lie. No torch here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from robbench.cards import DetectorCard, ModelCard
from robbench.core.errors import UserError

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
        named: how the user named the model; "" for a model that was not named.
        guard: the detector of a guarded classifier, whose card is in `card`; the other files are the classifier's.
    """

    card: ModelCard
    folder: Path
    checkpoints: Path | None = None
    trusted: bool = True
    build: "Callable[[], nn.Module] | None" = None
    code: Path | None = None
    named: str = ""
    guard: "DetectorEntry | None" = None

    @property
    def bare(self) -> "ZooEntry":
        """Of a guarded classifier the classifier alone; of any other model the entry itself."""
        return replace(self, card=self.card.bare, guard=None)

    def restricted(self, logits: tuple[int, ...] | None) -> "ZooEntry":
        """A classifier restricted to `logits` (`ModelCard.logits`), None for all; `UserError` where its card says
        others or has fewer. A flow stays what it is."""
        if logits is None or self.card.kind == "flow" or self.card.logits == logits:
            return self
        if self.card.logits is not None:
            raise UserError(
                f"model {self.card.name!r} is restricted to other logits in its card than `classes` of the data set "
                f"says; remove one of the two"
            )
        if self.card.classes is not None and max(logits) >= self.card.classes:
            raise UserError(
                f"model {self.card.name!r} has logits 0 to {self.card.classes - 1}, and `classes` of the data set "
                f"names {max(logits)}; correct it, or name another model"
            )
        return replace(self, card=self.card.model_copy(update={"logits": logits}))


@dataclass(frozen=True)
class DetectorEntry:
    """The card of a detector and the folder that holds it and its weights."""

    card: DetectorCard
    folder: Path

    @property
    def file(self) -> Path:
        """Its weights."""
        return self.folder / self.card.weights.file


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
