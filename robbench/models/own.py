"""Networks named by their class and a weights file: `--model module:Class --weights FILE`, `robbench init`.

What is found (where the weights lie in the file, the images, the classes) becomes a card that pins the weights and the
source, and is loaded like any other.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from robbench.cards import Architecture, ModelCard, Preprocessing, Weights
from robbench.core.budget_limits import IMAGE_SHAPES
from robbench.core.errors import SUGGESTED, UserError, folded, nearest
from robbench.core.foreign import cause
from robbench.core.resources import sha256_file
from robbench.core.stops import reraise_stop
from robbench.models.checkpoints import load_strictly, read_weights, state_in
from robbench.models.classifiers import Normalize
from robbench.models.code import Code, call, find_code
from robbench.models.entry import OwnWeights, ZooEntry
from robbench.models.flows.base import Flow
from robbench.models.layouts import Layout, find_layout
from robbench.models.sources import network_class

CLASSES = {name: 100 if name == "cifar100" else 10 for name in IMAGE_SHAPES}
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Images:
    """What a network classifies. dataset: its name. shape: (C,H,W). classes: their number."""

    dataset: str
    shape: Shape
    classes: int


def list_built_in_images() -> list[Images]:
    """Those of the built-in data sets, digits first: the data set of who names none."""
    names = sorted(IMAGE_SHAPES, key=lambda name: (name != "digits", name))
    return [Images(name, IMAGE_SHAPES[name], CLASSES[name]) for name in names]


@dataclass(frozen=True)
class OwnModel:
    """A network of the user's own. entry: its card and files. layout: where its weights were found."""

    entry: ZooEntry
    layout: Layout

    @property
    def text(self) -> str:
        """What was taken for what, on one line."""
        card, layout = self.entry.card, self.layout.text
        held = f" ({layout})" if layout else ""
        scaled = card.preprocessing
        norm = (
            f"mean {_list(scaled.mean)}, std {_list(scaled.std)}"
            if scaled
            else "no normalisation but the network's own (--mean, --std)"
        )
        return (
            f"model {card.name}: {card.architecture.name} with {card.weights.file}{held}, {norm}, on images "
            f"{_list(card.input_shape)} in [0,1] of {card.dataset}"
        )


def own_model(
    name: str, file: Path, own: OwnWeights, candidates: Sequence[Images], called: str = ""
) -> OwnModel:
    """The network "module:Class" with the weights in `file`.

    candidates: the images it may be for: one, or several of which exactly one must fit. called: the name of its card;
    "" for one made of its file and class. `UserError` for whatever does not fit, before anything is computed.
    """
    code = find_code(name)
    where = f"--model {name!r}"
    weights = _weights_file(file)
    built = network_class(code, where)
    _require_arguments(built, code, own.arguments, where, candidates)
    architecture = Architecture(
        name=f"{code.module}:{code.attribute}", arguments=dict(own.arguments), sha256=code.sha256
    )
    card = ModelCard(
        name=called or _name(code, weights),
        kind="classifier",
        description=f"{architecture.name} with the weights {weights.name}",
        dataset=candidates[0].dataset,
        defense="unstated",
        architecture=architecture,
        input_shape=candidates[0].shape,
        classes=candidates[0].classes,
        weights=Weights(file=weights.name, sha256=sha256_file(weights)),
        license="see its source",
    )
    step = f"correct --model-args, as in {_arguments_line(built, candidates[0])}"
    module = _network(call(built, code, own.arguments, where, step), where)
    entry = ZooEntry(card, weights.parent, code=code.folders[0])
    content = read_weights(entry, weights)
    layout = find_layout(content, module, own.key, f"--weights {str(file)!r}")
    lies = {"key": layout.key, "prefix": layout.prefix}
    entry = _change_card(entry, weights=card.weights.model_copy(update=lies))
    load_strictly(module, state_in(content, entry, weights), entry)
    images = _fitting(module.eval(), own, candidates, where)
    scaled = _preprocessing(own, images.shape[0])
    fitted = {"dataset": images.dataset, "input_shape": images.shape, "classes": images.classes}
    return OwnModel(_change_card(entry, **fitted, preprocessing=scaled), layout)


def _change_card(entry: ZooEntry, **fields: Any) -> ZooEntry:
    return replace(entry, card=entry.card.model_copy(update=fields))


def _network(built: object, where: str) -> nn.Module:
    if not isinstance(built, nn.Module):
        raise UserError(
            f"{where} returned a {type(built).__name__}, not a torch.nn.Module; name a class of modules"
        )
    if isinstance(built, Flow):
        raise UserError(
            f"{where} is a flow; write its card (docs/models.md, A flow of your own), and name that"
        )
    return built


def _weights_file(file: Path) -> Path:
    """`file` in full; `UserError` with the near names in its folder when it is none."""
    path = file.expanduser().resolve()
    if path.is_file():
        return path
    folder = path if path.is_dir() else path.parent
    names = sorted(one.name for one in folder.iterdir() if one.is_file()) if folder.is_dir() else []
    near = names[:SUGGESTED] if path.is_dir() else nearest(path.name, names)
    what = "is a folder; it holds" if path.is_dir() else "is no file; near it"
    listed = f"{what}: {', '.join(near)}" if near else what.partition(";")[0]
    raise UserError(
        f"--weights {str(file)!r} {listed}; name the file of the weights (--weights once for each)"
    )


def _name(code: Code, weights: Path) -> str:
    """A name for tables: that of the file where it holds that of the class, else both."""
    stem = "".join(
        letter if letter.isascii() and (letter.isalnum() or letter in "._-") else "-"
        for letter in weights.stem
    )
    stem = stem.lstrip("._-") or "weights"
    attribute = code.attribute.rpartition(".")[2]
    whole = stem if folded(attribute) in folded(stem) else f"{attribute.strip('_')}-{stem}"
    return whole[:100]


def _require_arguments(
    built: Callable[..., Any], code: Code, given: Mapping[str, Any], where: str, candidates: Sequence[Images]
) -> None:
    """`UserError` that shows --model-args when the class needs arguments that are not given."""
    missing = [name for name in _list_required(built) if name not in given]
    if missing:
        raise UserError(
            f"{where}: {code.attribute} needs {', '.join(missing)}; give them as JSON: "
            f"{_arguments_line(built, candidates[0], given)}"
        )


def _list_required(built: Callable[..., Any]) -> list[str]:
    try:
        parameters = inspect.signature(built).parameters.values()
    except (TypeError, ValueError):  # built-in callables may have none
        return []
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [one.name for one in parameters if one.kind in kinds and one.default is inspect.Parameter.empty]


def _arguments_line(built: Callable[..., Any], images: Images, given: Mapping[str, Any] | None = None) -> str:
    """The option as it may be meant; names that tell nothing have 0."""
    guesses = {"num_classes": images.classes, "classes": images.classes, "n_classes": images.classes}
    guesses |= dict.fromkeys(("num_outputs", "out_features", "out_dim", "output_dim"), images.classes)
    guesses |= dict.fromkeys(("in_channels", "in_chans", "channels", "input_channels"), images.shape[0])
    guesses |= dict.fromkeys(("image_size", "img_size", "input_size", "size"), images.shape[1])
    names = [*(given or {}), *(name for name in _list_required(built) if name not in (given or {}))] or [
        "num_classes"
    ]
    values: dict[str, Any] = {name: guesses.get(name, 0) for name in names} | dict(given or {})
    if "input_shape" in values and "input_shape" not in (given or {}):
        values["input_shape"] = list(images.shape)
    return f"--model-args '{json.dumps(values, default=str)}'"


def _preprocessing(own: OwnWeights, channels: int) -> Preprocessing | None:
    if not own.mean and not own.std:
        return None
    mean, std = (values * channels if len(values) == 1 else values for values in (own.mean, own.std))
    for option, values in (("--mean", mean), ("--std", std)):
        if len(values) != channels:
            raise UserError(
                f"{option} has {len(values)} values and the images have {channels} channels; give one, or one a channel"
            )
    return Preprocessing(mean=mean, std=std)


def _fitting(module: nn.Module, own: OwnWeights, candidates: Sequence[Images], where: str) -> Images:
    """The one of `candidates` that the network classifies; `UserError` when it is none of them, or several."""
    problems = {images.dataset: _problem(module, own, images) for images in candidates}
    fitting = [images for images in candidates if problems[images.dataset] is None]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = [images.dataset for images in fitting]
        raise UserError(
            f"{where} takes the images of {', '.join(names[:-1])} and {names[-1]} alike; say which it was trained on: "
            f"--dataset {names[0]}"
        )
    first = candidates[0]
    if len(candidates) > 1:
        raise UserError(
            f"{where} fits no built-in data set (on images of {first.dataset} it {problems[first.dataset]}); "
            f"name yours with --dataset or --data, or correct --model-args"
        )
    others = [one.dataset for one in list_built_in_images() if _problem(module, own, one) is None]
    step = (
        f"it fits {', '.join(others)}, so give one of them"
        if others
        else "correct --model-args, or give another"
    )
    raise UserError(
        f"{where} on images {_list(first.shape)} of {first.dataset} {problems[first.dataset]}; {step} (--dataset)"
    )


def _problem(module: nn.Module, own: OwnWeights, images: Images) -> str | None:
    """Why the network does not classify such images, None when it does; on two grey ones."""
    x = torch.full((2, *images.shape), 0.5)
    if own.mean and len(own.mean) in (1, images.shape[0]):
        x = Normalize(own.mean, own.std)(x)
    elif own.mean:
        return f"has {len(own.mean)} means for {images.shape[0]} channels"
    try:
        with torch.no_grad():
            logits = module(x)
    except BaseException as error:  # somebody else's code can fail in any way
        reraise_stop(error)
        return f"fails ({cause(error)})"
    if not isinstance(logits, Tensor):
        return f"returns a {type(logits).__name__}, not logits [N,classes]"
    if logits.shape != (2, images.classes):
        return f"returns shape {list(logits.shape)} for two images, not [2,{images.classes}]"
    return None


def _list(values: Iterable[float]) -> str:
    return ",".join(f"{value:g}" for value in values)
