"""Names with a colon: models that other libraries publish (`--model torchvision:resnet50`), and code a card names.

A scheme ("torchvision" in "torchvision:resnet50") is a module of robbench that defines one `SCHEME`, a `Scheme`; it is
imported when such a name is used, so that optional packages stay optional. Add one here and nothing else changes.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from robbench.cards import ModelCard
from robbench.core.errors import SUGGESTED, UserError
from robbench.core.foreign import cause
from robbench.core.stops import reraise_stop
from robbench.models.code import SCHEMES, Code, call, code_of, loaded_callable
from robbench.models.entry import ModelRequest, ZooEntry

# Arguments of other libraries' builders that make them read or download weights, unchecked.
LOADING = ("weights", "pretrained", "checkpoint_path")


@dataclass(frozen=True)
class Scheme:
    """How names of one scheme become models.

    model(rest, requested): the entry that `--model scheme:rest` stands for. Its card is made up, but complete: a name
    without a colon, `requested.dataset`, its own input shape and classes, `preprocessing`, and `weights` with the
    sha256 of the real file. Two ways to give the weights: (1) as a file, `entry.folder / card.weights.file`, that
    robbench reads and loads strictly into `architecture(rest, card)`; preferred, because the card in a run folder
    then loads again. (2) `entry.build`, a function that returns the whole module with its weights in it
    (preprocessing too), when the library must load them itself. Refuse here (`UserError`) what does not fit
    `requested.shape` and `requested.classes`, before any download. None: the scheme has no models, only
    architectures.

    architecture(rest, card): a module without weights for a card whose architecture is "scheme:rest"; never downloads.
    `card.architecture.arguments` are keyword arguments of the library's builder. None: the scheme has none.
    """

    model: Callable[[str, ModelRequest], ZooEntry] | None = None
    architecture: Callable[[str, ModelCard], nn.Module] | None = None


def named_model(name: str, requested: ModelRequest) -> ZooEntry:
    """The model that "scheme:rest" stands for; `UserError` for an empty rest or a scheme without models."""
    scheme, _, rest = name.partition(":")
    find = _scheme(scheme).model
    if find is None or not rest:
        raise UserError(f"--model {name!r} names no model; give {scheme}:NAME")
    return find(rest, requested)


def _scheme(name: str) -> Scheme:
    found: Scheme = importlib.import_module(SCHEMES[name]).SCHEME
    return found


def refuse_unfit(name: str, shape: tuple[int, int, int], classes: int, requested: ModelRequest) -> None:
    """`UserError` when a pretrained model's images or classes are not those of the data set it is requested for."""
    unlike = (
        requested.shape is not None and requested.shape != shape,
        requested.classes is not None and requested.classes != classes,
    )
    if any(unlike):
        raise UserError(
            f"--model {name!r} was trained on images {shape} of {classes} classes, {requested.dataset} has "
            f"{requested.shape} of {requested.classes}; give a data set of such images, "
            f"or a card with weights trained on {requested.dataset}"
        )


def built(card: ModelCard, builder: Callable[..., nn.Module], **sizes: Any) -> nn.Module:
    """`builder(**sizes, **arguments of the card)`; `UserError` when it refuses them, or when they load weights."""
    reserved = {*LOADING, *sizes} & card.architecture.arguments.keys()
    if reserved:
        raise UserError(
            f"model {card.name!r}: architecture.arguments of {card.architecture.name!r} set {min(reserved)!r}, which "
            f"follows from the rest of the card (classes, input_shape, weights); remove it"
        )
    arguments = {**sizes, **card.architecture.arguments}
    try:
        return builder(**arguments)
    except BaseException as error:  # another library's code can fail in any way
        reraise_stop(error)
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise UserError(
            f"model {card.name!r}: architecture {card.architecture.name!r} cannot be built with {given} "
            f"({cause(error)}); correct architecture.arguments in its card"
        ) from error


def build_named(entry: ZooEntry) -> nn.Module:
    """The module, without its weights, of a card whose architecture has a colon; `UserError` when it cannot be."""
    card = entry.card
    name, _, rest = card.architecture.name.partition(":")
    if name not in SCHEMES:
        return _called(entry)
    build = _scheme(name).architecture
    where = f"model {card.name!r}: architecture {card.architecture.name!r}"
    if build is None:
        raise UserError(
            f"{where} is no architecture: a card cannot name {name}: models; give --model {name}:NAME"
        )
    if not rest:
        raise UserError(f"{where} names none; give {name}:NAME")
    return build(rest, card)


def _called(entry: ZooEntry) -> nn.Module:
    """What "module:callable" of a card returns. The code runs only for a card that the user named or robbench ships."""
    card, architecture = entry.card, entry.card.architecture
    where, code = f"model {card.name!r}", code_of(entry)
    if code is None:
        raise UserError(
            f"{where}: architecture {architecture.name!r} is code, which runs only from a card that you name; "
            f"read it, then give --model {entry.folder / 'card.yaml'}"
        )
    if architecture.sha256 is not None and code.file is not None and architecture.sha256 != code.sha256:
        raise UserError(
            f"{where}: the source of {code.name} ({code.file}, and what it imports beside it) is not the one that its "
            f"card pins ({architecture.sha256[:12]}...); restore it, or where the change is meant write "
            f"`sha256: {code.sha256}` under architecture"
        )
    built = network_class(code, where)
    step = "correct architecture.arguments in its card, or that code"
    module = call(built, code, architecture.arguments, where, step)
    if not isinstance(module, nn.Module):
        raise UserError(
            f"{where}: {code.name} returned a {type(module).__name__}, not a torch.nn.Module; "
            f"name a class of modules or a function that returns one"
        )
    return module


def network_class(code: Code, where: str) -> Callable[..., Any]:
    """The class or function that `code` names, imported; `UserError` for a class that is no torch.nn.Module."""
    built = loaded_callable(code, where)
    if isinstance(built, type) and not issubclass(built, nn.Module):
        others = vars(sys.modules[code.module]).items()
        known = [name for name, one in others if isinstance(one, type) and issubclass(one, nn.Module)]
        raise UserError(
            f"{where}: {code.name} is a class, but no torch.nn.Module; name one that is"
            + (f": {', '.join(known[:SUGGESTED])}" if known else "")
        )
    return built
