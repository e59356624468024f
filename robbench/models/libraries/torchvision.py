"""torchvision's classifiers: `torchvision:NAME` with its default pretrained weights, or as a card's architecture."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torchvision.models
from torch import nn

from robbench.cards import Architecture, ModelCard, Preprocessing, Weights
from robbench.core.download import MOST_BYTES, download, wrong_digest
from robbench.core.errors import UserError, unknown_name
from robbench.core.resources import sha256_file
from robbench.models.entry import ModelRequest, ZooEntry
from robbench.models.sources import Scheme, built, refuse_unfit
from robbench.models.zoo import checkpoint_folders

# File names end in the first digits of their sha256: resnet50-11ad3fa6.pth (torch.hub.HASH_REGEX).
DIGEST = re.compile(r"-([a-f0-9]{8,})\.")
# Names inside the DenseNet files are older than the modules' (torchvision.models.densenet._load_state_dict).
OLD_DENSENET = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..+)$")


def pretrained(name: str, requested: ModelRequest) -> ZooEntry:
    """The model `name` with its default weights, from --checkpoints, torch.hub's cache or its download."""
    choice = torchvision.models.get_model_weights(_known(name)).DEFAULT
    preset = choice.transforms()
    shape, classes = (3, preset.crop_size[0], preset.crop_size[0]), len(choice.meta["categories"])
    refuse_unfit(f"torchvision:{name}", shape, classes, requested)
    megabytes = float(choice.meta.get("_file_size", MOST_BYTES / 1e6))
    path = _weights_file(name, choice.url, requested.checkpoints, most_bytes=int(2e6 * megabytes))
    card = ModelCard(
        name=f"torchvision-{name}",
        kind="classifier",
        description=f"torchvision's {name} with weights {choice.name}",
        dataset=requested.dataset,
        defense="standard",
        architecture=Architecture(name=f"torchvision:{name}", arguments=_arguments(name, shape[1])),
        input_shape=shape,
        classes=classes,
        preprocessing=Preprocessing(mean=tuple(preset.mean), std=tuple(preset.std)),
        weights=Weights(file=path.name, sha256=sha256_file(path), urls=(choice.url,), format="state-dict"),
        license="BSD-3-Clause",
        source=choice.meta.get("recipe", choice.url),
    )
    return ZooEntry(card, path.parent, requested.checkpoints)


def _known(name: str, what: str = "torchvision model") -> str:
    names = torchvision.models.list_models(
        module=torchvision.models
    )  # classifiers; not those of its submodules
    if name not in names:
        raise unknown_name(what, name, names)
    return name


def _arguments(name: str, side: int) -> dict[str, Any]:
    """What torchvision itself passes along with these weights."""
    if name in ("googlenet", "inception_v3"):
        return {"transform_input": True, "init_weights": False}
    return {"image_size": side} if name.startswith("vit_") else {}


def _weights_file(name: str, url: str, checkpoints: Path | None, most_bytes: int) -> Path:
    file = url.rpartition("/")[2]
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    found = DIGEST.search(file)
    if found is None:
        raise UserError(
            f"--model 'torchvision:{name}': {url} pins no sha256 in its name; write a card for it"
        )
    path = next(
        (p for folder in [*checkpoint_folders(checkpoints), hub] if (p := folder / file).is_file()), None
    )
    if path is None:
        path = hub / file
        right = partial(wrong_digest, sha256=found[1])
        download((url,), path, right, f"--model 'torchvision:{name}'", most_bytes)
    wrong = wrong_digest(path, found[1])
    if wrong is not None:
        raise UserError(
            f"--model 'torchvision:{name}': {path} {wrong}; delete it, it is downloaded again then"
        )
    return path


def architecture(name: str, card: ModelCard) -> nn.Module:
    """torchvision's builder `name` for `card.classes`, without weights."""
    known = _known(name, f"torchvision architecture of model {card.name!r},")
    module = built(card, partial(torchvision.models.get_model, known), weights=None, num_classes=card.classes)
    if name.startswith("densenet"):
        module.register_load_state_dict_pre_hook(_renamed)  # type: ignore[no-untyped-call]
    return module


def _renamed(_module: nn.Module, state: dict[str, Any], *_: object) -> None:
    for old in [name for name in state if OLD_DENSENET.match(name)]:
        state[OLD_DENSENET.sub(r"\1\2", old)] = state.pop(old)


SCHEME = Scheme(model=pretrained, architecture=architecture)
