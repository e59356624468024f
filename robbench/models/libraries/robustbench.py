"""RobustBench's models: `robustbench:NAME` with its published weights, or as a card's architecture.

Needs the package robustbench (pip install 'robbench[robustbench]'). Its models normalise inside: inputs are images in
[0,1]. A model is called DATASET/THREAT/NAME, as in "cifar10/Linf/Carmon2019Unlabeled"; NAME alone will do where only
one model of the data set has it. Weights lie where RobustBench itself puts them: models/DATASET/THREAT/NAME.pt.
"""

import contextlib
import difflib
import hashlib
import importlib
import io
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from robbench.cards import Architecture, ModelCard, Weights
from robbench.core.download import MOST_BYTES, LimitedFile, download, is_html
from robbench.core.errors import UserError
from robbench.core.resources import sha256_file, write_atomically
from robbench.models.checkpoints import unpickled
from robbench.models.entry import ModelRequest, ZooEntry
from robbench.models.libraries.robustbench_package import for_other_processes, import_robustbench
from robbench.models.sources import Scheme, built, refuse_unfit
from robbench.models.zoo import checkpoint_folders

CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}
# Entries in which RobustBench keeps a state dict (utils.load_model); these models publish the last epoch and the best.
STATE_KEYS = ("state_dict", "model")
LAST_EPOCH = ("Kireev2021Effectiveness", "Andriushchenko2020Understanding")
# Buffers that the architecture sets itself and older files lack: mean and deviation of the normalisation inside.
CONSTANTS = ("mu", "sigma", "mean", "std")
# What files of Pang2020Boosting and Diffenderfer2021Winning hold beside the network (training heads, pruning scores).
# RobustBench drops them too (utils._safe_load_state_dict); anything else that is left over is an error.
UNUSED = ("model_preact_hl1.", ".scores")
FROM_TORCHVISION = (
    "RobustBench takes its weights from torchvision; write a card with architecture torchvision:resnet50 and "
    "torchvision's weights IMAGENET1K_V1"
)


@dataclass(frozen=True)
class Published:
    """One model of RobustBench's list. threat: "Linf", "L2" or "corruptions". record: its builder and download."""

    dataset: str
    threat: str
    name: str
    record: Mapping[str, Any]

    @property
    def qualified(self) -> str:
        """As after "robustbench:", "cifar10/Linf/NAME"."""
        return f"{self.dataset}/{self.threat}/{self.name}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the images it is evaluated on."""
        if self.dataset != "imagenet":
            return (3, 32, 32)
        side = 288 if self.record.get("preprocessing") == "Crop288" else 224
        return (3, side, side)

    @property
    def timm_name(self) -> str | None:
        """What timm calls it, where RobustBench registers it there instead of in its own list."""
        import timm

        name = f"{self.name.lower().replace('-', '_')}_{self.dataset}_{self.threat.lower()}"
        return name if timm.is_model(name) else None

    @property
    def files(self) -> tuple[str, ...]:
        """Its weights files in RobustBench's folder "models"; several for an ensemble."""
        path = f"{self.qualified}.pt"
        ids = self.record["gdrive_id"]
        return tuple(f"{path}_m{i}.pt" for i in range(len(ids))) if isinstance(ids, list) else (path,)


def published_models(robustbench: Any) -> list[Published]:
    """Every model of the installed RobustBench."""
    return [
        Published(dataset.value, threat.value, name, record)
        for dataset, threats in robustbench.model_zoo.model_dicts.items()
        for threat, models in threats.items()
        for name, record in models.items()
    ]


def choose(text: str, models: list[Published], requested: ModelRequest) -> Published:
    """The model called `text`, DATASET/THREAT/NAME or NAME, for the data set that is requested.

    One's own data set takes every model for images of its shape and with its number of classes. `UserError` for an
    unknown name (with the nearest), a model of another data set, and a name that several models have.
    """
    named = [model for model in models if text in (model.name, model.qualified)]
    found = [model for model in named if _fits(model, requested)]
    if len(found) == 1:
        return found[0]
    if found:
        which = ", ".join(f"robustbench:{model.qualified}" for model in found)
        raise UserError(f"--model 'robustbench:{text}' names {len(found)} models; say which: {which}")
    if named:
        raise UserError(
            f"--model 'robustbench:{text}' was not trained on {requested.dataset}; RobustBench has "
            f"{', '.join(model.qualified for model in named)}: give that data set, or another model"
        )
    known = [model.qualified if "/" in text else model.name for model in models if _fits(model, requested)]
    near = difflib.get_close_matches(text, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(dict.fromkeys(near))}?" if near else "see https://robustbench.github.io"
    raise UserError(f"unknown RobustBench model {text!r} for {requested.dataset}; {hint}")


def _fits(model: Published, requested: ModelRequest) -> bool:
    """Whether it is for that data set; a data set RobustBench does not have is known by its images alone."""
    if requested.dataset in CLASSES:
        return model.dataset == requested.dataset
    return requested.shape in (None, model.shape) and requested.classes in (None, CLASSES[model.dataset])


def pretrained(name: str, requested: ModelRequest) -> ZooEntry:
    """The published model `name` with its weights: from --checkpoints, the cache, or RobustBench's download."""
    where = f"--model 'robustbench:{name}'"
    model = choose(name, published_models(import_robustbench(where)), requested)
    refuse_unfit(f"robustbench:{model.qualified}", model.shape, CLASSES[model.dataset], requested)
    paths = _weights_files(model, requested.checkpoints, where)
    entry = ZooEntry(_card(model, requested.dataset, paths), paths[0].parent, requested.checkpoints)
    if len(paths) > 1:
        return replace(entry, build=partial(_ensemble, model, entry, paths))
    key = _state_key(model, unpickled(entry, paths[0]))
    weights = entry.card.weights.model_copy(update={"key": key})
    return replace(entry, card=entry.card.model_copy(update={"weights": weights}))


def _card(model: Published, dataset: str, paths: list[Path]) -> ModelCard:
    """What robbench records of it. The sha256 of an ensemble is that of its files' sha256, one a line."""
    digests = [sha256_file(path) for path in paths]
    joined = hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()
    return ModelCard(
        name=f"robustbench-{model.qualified.replace('/', '-')}",
        kind="classifier",
        description=f"RobustBench's {model.name} for {model.threat} on {model.dataset}",
        dataset=dataset,
        defense=model.name,
        architecture=Architecture(name=f"robustbench:{model.qualified}"),
        input_shape=model.shape,
        classes=CLASSES[model.dataset],
        weights=Weights(
            file=paths[0].name, sha256=digests[0] if len(digests) == 1 else joined, format="state-dict"
        ),
        license="see RobustBench's LICENSE",
        source="https://github.com/RobustBench/robustbench",
    )


def _state_key(model: Published, content: object) -> str | None:
    """The entry of a published checkpoint that holds the state dict, as RobustBench chooses it; None: all of it."""
    keys = []
    if model.name.startswith(LAST_EPOCH) and isinstance(content, Mapping) and "last" in content:
        keys, content = ["last"], content["last"]
    keys += [
        key for key in STATE_KEYS if isinstance(content, Mapping) and isinstance(content.get(key), Mapping)
    ][:1]
    return ".".join(keys) or None


def architecture(name: str, card: ModelCard) -> nn.Module:
    """RobustBench's module `name`, without weights, that takes state dicts with the names in its published files."""
    robustbench = import_robustbench(f"model {card.name!r}: architecture 'robustbench:{name}'")
    requested = ModelRequest(card.dataset, card.input_shape, card.classes)
    model = choose(name, published_models(robustbench), requested)
    network = built(card, partial(_network, model))
    rename = partial(_rename, model.timm_name is not None)
    network.register_load_state_dict_pre_hook(rename)  # type: ignore[no-untyped-call]
    return for_other_processes(network)


def _network(model: Published) -> nn.Module:
    """The module, freshly initialised; never a download."""
    import timm

    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        if model.timm_name is not None:
            made: nn.Module = timm.create_model(
                model.timm_name, num_classes=CLASSES[model.dataset], pretrained=False
            )
            return made
        if not model.record["gdrive_id"]:
            raise ValueError(FROM_TORCHVISION)
        network: nn.Module = model.record["model"]()
    return network


def _rename(of_timm: bool, network: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Make the names in `state` those of `network`, in place, as RobustBench's utils.load_model does.

    Leading "module." and "model." go; "model." is put back where the network sits behind a normalisation layer; files
    of timm's older releases are converted where RobustBench asks timm to. What is missing then, but for CONSTANTS, and
    what is left over, but for UNUSED, stays so and is an error of whoever loads strictly.
    """
    if prefix:  # part of another module's state dict, with names that were right when it was written
        return
    own = network.state_dict()
    learned = [name for name in own if name.rpartition(".")[2] not in CONSTANTS]
    behind = all(name.startswith("model.") for name in learned)
    renamed = _without_prefixes(state)
    renamed = _converted(of_timm, network.get_submodule("model") if behind else network, renamed)
    if behind:
        renamed = {f"model.{name}": value for name, value in renamed.items()}
    unused = [n for n in renamed if n not in own and (n.startswith(UNUSED[0]) or n.endswith(UNUSED[1]))]
    constants = {name: own[name] for name in own if name not in learned}
    state.clear()
    state.update({name: value for name, value in {**constants, **renamed}.items() if name not in unused})


def _without_prefixes(state: dict[str, Any]) -> dict[str, Any]:
    from robustbench.utils import rm_substr_from_state_dict as without

    renamed: dict[str, Any] = without(without(state, "module."), "model.")
    return renamed


def _converted(of_timm: bool, network: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """`state` as timm itself converts older files: for timm's own models and its Swin transformers."""
    home = type(network).__module__
    if not of_timm and home != "timm.models.swin_transformer":
        return state
    convert = getattr(sys.modules[home], "checkpoint_filter_fn", None)
    return state if convert is None else dict(convert(state, network))


def _ensemble(model: Published, entry: ZooEntry, paths: list[Path]) -> nn.Module:
    """A model of several files, put together by RobustBench itself, each file checked to hold only tensors before."""
    for path in paths:
        unpickled(entry, path)
    robustbench = import_robustbench(f"model {entry.card.name!r}")
    root = paths[0].parents[2]
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            network: nn.Module = robustbench.utils.load_model(model.name, root, model.dataset, model.threat)
    except Exception as error:  # its code can fail in any way
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"model {entry.card.name!r}: RobustBench cannot load {len(paths)} files from {paths[0].parent} "
            f"({type(error).__name__}: {reason}); download them again"
        ) from error
    return for_other_processes(network)


def _weights_files(model: Published, checkpoints: Path | None, where: str) -> list[Path]:
    """Its files in the first folder that has them all, else in the cache, where what is missing is downloaded."""
    folders = checkpoint_folders(checkpoints)
    for folder in (each for parent in folders for each in (parent / "models", parent)):
        paths = [folder / file for file in model.files]
        if all(path.is_file() for path in paths):
            return [_no_web_page(model, number, path, where) for number, path in enumerate(paths)]
    if model.timm_name is None and not model.record["gdrive_id"]:
        raise UserError(f"{where}: {FROM_TORCHVISION}")
    paths = [folders[-1] / "models" / file for file in model.files]
    for number, path in enumerate(paths):
        if not path.is_file():
            _download(model, number, path, where)
    return paths


def _no_web_page(model: Published, number: int, path: Path, where: str) -> Path:
    if not is_html(path):
        return path
    raise UserError(
        f"{where}: {path} is an HTML page, not weights (a login, download or error page); delete it and download the "
        f"file in a browser from {_address(model, number)}"
    )


def _download(model: Published, number: int, target: Path, where: str) -> None:
    """Fetch one weights file as RobustBench does; `UserError` that says where to put it by hand when that fails."""
    if model.timm_name is not None:
        download((_address(model, number),), target, _web_page, where)
        return
    try:
        write_atomically(target, partial(_from_drive, _drive_id(model, number)))
    except Exception as error:  # the network, Google Drive and gdown fail in many ways
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{where}: {target.name} cannot be downloaded from Google Drive ({type(error).__name__}: {reason}); get it "
            f"in a browser from {_address(model, number)} and put it at {target}, or at "
            f"models/{model.files[number]} in the folder named with --checkpoints"
        ) from error


def _drive_id(model: Published, number: int) -> str:
    ids = model.record["gdrive_id"]
    return str(ids[number] if isinstance(ids, list) else ids)


def _address(model: Published, number: int) -> str:
    """Where a person finds the file."""
    if model.timm_name is None:
        return f"https://drive.google.com/file/d/{_drive_id(model, number)}/view"
    import timm

    return str(timm.get_pretrained_cfg(model.timm_name).url)


def _from_drive(drive_id: str, temporary: Path) -> None:
    gdown = importlib.import_module("gdown")
    with LimitedFile(temporary, MOST_BYTES) as stream:
        gdown.download(id=drive_id, output=stream, quiet=not sys.stderr.isatty(), use_cookies=False)
    problem = _web_page(temporary) or ("is empty" if not temporary.stat().st_size else None)
    if problem is not None:
        raise ValueError(f"what it sent {problem}")


def _web_page(path: Path) -> str | None:
    """Why `path` cannot be weights at all, or None: Drive answers with a page when a file is asked for too often."""
    return "is an HTML page, not weights" if is_html(path) else None


SCHEME = Scheme(model=pretrained, architecture=architecture)
