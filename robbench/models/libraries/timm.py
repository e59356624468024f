"""timm's classifiers: `timm:NAME` with its pretrained weights, or as a card's architecture. Needs the package timm."""

import difflib
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import nn

from robbench.cards import Architecture, ModelCard, Preprocessing, Weights
from robbench.core.errors import UserError
from robbench.core.resources import sha256_file, write_atomically
from robbench.models.entry import ModelRequest, ZooEntry
from robbench.models.sources import Scheme, built, refuse_unfit
from robbench.models.zoo import checkpoint_folders


def pretrained(name: str, requested: ModelRequest) -> ZooEntry:
    """The model `name` with its pretrained weights: "resnet50.a1_in1k" names some, "resnet50" means timm's choice.

    timm downloads and converts them once; what it loaded is kept as timm/NAME.safetensors in the cache of checkpoints,
    and taken from there, or from the folder named with --checkpoints, from then on.
    """
    timm = _timm(f"--model 'timm:{name}'")
    config = _config(timm, name)
    data = timm.data.resolve_data_config(pretrained_cfg=config.to_dict())
    channels, height, width = map(int, data["input_size"])
    refuse_unfit(f"timm:{name}", (channels, height, width), int(config.num_classes), requested)
    source = f"https://huggingface.co/{config.hf_hub_id}" if config.hf_hub_id else config.url or "timm"
    file = f"timm/{config.architecture}.{config.tag}.safetensors"
    folder = _folder_with(name, file, source, checkpoint_folders(requested.checkpoints))
    card = ModelCard(
        name=f"timm-{name}",
        kind="classifier",
        description=f"timm's {config.architecture} with weights {config.tag}",
        dataset=requested.dataset,
        defense="standard",
        architecture=Architecture(name=f"timm:{name}"),
        input_shape=(channels, height, width),
        classes=int(config.num_classes),
        preprocessing=Preprocessing(mean=tuple(data["mean"]), std=tuple(data["std"])),
        weights=Weights(file=file, sha256=sha256_file(folder / file)),
        license=config.license or "see its source",
        source=source,
    )
    return ZooEntry(card, folder, requested.checkpoints)


def _timm(where: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"{where} needs the package timm ({error}); pip install timm") from error
    return timm


def _config(timm: Any, name: str) -> Any:
    """timm's record of pretrained weights; `UserError` for a name without."""
    architecture, _, tag = name.partition(".")
    if architecture not in (known := timm.list_models()):
        near = difflib.get_close_matches(architecture, known, n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}" if near else "see timm.list_models()"
        raise UserError(f"unknown timm model {name!r}; {hint}")
    tags = [one.partition(".")[2] for one in timm.list_pretrained(f"{architecture}.*")]
    if not tags or (tag and tag not in tags):
        listed = ", ".join(f"{architecture}.{one}" for one in tags) or f"none for {architecture}"
        raise UserError(f"--model 'timm:{name}': timm has no weights of that name; it has: {listed}")
    return timm.get_pretrained_cfg(name)


def _folder_with(name: str, file: str, source: str, folders: list[Path]) -> Path:
    """The first of `folders` that holds `file`; the last, the cache, after timm has loaded the weights into it."""
    present = next((folder for folder in folders if (folder / file).is_file()), None)
    if present is not None:
        return present
    timm = _timm(f"--model 'timm:{name}'")
    try:
        with _quiet():
            state = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the network, the hub's client and timm fail in many ways
        reason = " ".join(str(error).split())[:100]
        raise UserError(
            f"--model 'timm:{name}': timm could not load its weights from {source} ({type(error).__name__}: {reason}); "
            f"run it once where there is a network and copy {folders[-1] / file} from there, "
            f"or name the folder that holds {file} with --checkpoints or ROBBENCH_CHECKPOINTS"
        ) from error
    tensors = {key: value.contiguous().clone() for key, value in state.items()}
    write_atomically(folders[-1] / file, lambda path: path.write_bytes(save(tensors)))
    return folders[-1]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the hub client's log of retries: a failure is reported once, in one line."""
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def architecture(name: str, card: ModelCard) -> nn.Module:
    """timm's builder `name` for the channels and classes of a card, without weights."""
    timm = _timm(f"model {card.name!r}: architecture 'timm:{name}'")
    if not re.fullmatch(r"[\w.]+", name) or not timm.is_model(name):
        raise UserError(f"model {card.name!r}: timm has no architecture {name!r}; see timm.list_models()")
    builder = partial(timm.create_model, name)
    return built(card, builder, pretrained=False, num_classes=card.classes, in_chans=card.input_shape[0])


SCHEME = Scheme(model=pretrained, architecture=architecture)
