"""From a detector's card to a detector: its file and its classifier checked."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.core.foreign import cause, foreign_code
from robbench.core.resources import sha256_file
from robbench.core.stops import reraise_stop
from robbench.detectors.base import DETECTORS, Detector
from robbench.detectors.features import require_layers
from robbench.models.entry import DetectorEntry
from robbench.models.loading import LoadedModel


def build_detector(
    name: str,
    classifier: nn.Module,
    layers: Sequence[str],
    parameters: Mapping[str, Any],
    images: Tensor,
) -> Detector:
    """The detector called `name`, not fitted yet. layers: () for its default ones. images [N,C,H,W]: two or more to try
    the classifier on. `UserError` for unknown names, layers and parameters."""
    kind = DETECTORS.get(name)
    with foreign_code(f"detector {name!r}", "name another --layer, or correct its package"):
        found = tuple(layers) or kind.default_layers(classifier, images)
        require_layers(classifier, found, images)
        return kind(name, classifier, found, parameters)


def load_detector(entry: DetectorEntry, model: LoadedModel) -> Detector:
    """The detector of a card, on the device of its classifier `model`; `UserError` for another classifier than it was
    trained for, and for a file whose sha256 is not the card's."""
    card = entry.card
    where = f"detector {card.name!r}"
    if model.card.function_hash != card.classifier.function_hash:
        raise UserError(
            f"{where} was trained for classifier {card.classifier.name!r} (function hash "
            f"{card.classifier.function_hash[:12]}), and {model.card.name!r} is another function "
            f"({model.card.function_hash[:12]}); name that classifier, or train a detector for this one: "
            f"robbench train --detector {card.detector} --model {model.card.name}"
        )
    state = _read_state(entry)
    images = torch.zeros(2, *card.input_shape, device=_device(model.module))
    detector = build_detector(card.detector, model.module, card.layers, card.parameters, images)
    for name, value in state.items():
        detector.keep(name, value)
    detector.threshold = card.threshold
    detector.to(images.device)
    _require_scores(detector, entry)
    return detector


def _require_scores(detector: Detector, entry: DetectorEntry) -> None:
    """`UserError` unless a detector scores black images, as many as it needs at once."""
    card, n = entry.card, 2 if detector.pointwise else detector.at_once
    try:
        scores = detector.scores_of(torch.zeros(n, *card.input_shape))
    except BaseException as error:  # a detector of another package can fail in any way
        reraise_stop(error)
        raise UserError(
            f"detector {card.name!r}: {entry.file} does not fit it ({cause(error)}); restore the file, or train it "
            f"again"
        ) from error
    if scores.shape != (n,) or scores.dtype != torch.float64:
        raise UserError(
            f"detector {card.name!r}: its scores of {n} images are {list(scores.shape)} {scores.dtype}, not [{n}] "
            f"float64; correct the package that it comes from"
        )


def _read_state(entry: DetectorEntry) -> dict[str, Tensor]:
    file, card = entry.file, entry.card
    if not file.is_file():
        raise UserError(f"detector {card.name!r}: {file} is missing; restore it, or train it again")
    if (found := sha256_file(file)) != card.weights.sha256:
        raise UserError(
            f"detector {card.name!r}: {file} has sha256 {found[:12]}..., its card says "
            f"{card.weights.sha256[:12]}...; restore the file, or train it again"
        )
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"detector {card.name!r}: {file} is not a safetensors file ({error}); restore it"
        ) from error


def _device(module: nn.Module) -> torch.device:
    held = (*module.parameters(), *module.buffers())
    return held[0].device if held else torch.device("cpu")
