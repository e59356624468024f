"""Names with a colon: models that other libraries publish (`--model torchvision:resnet50`), and code a card names.

A scheme ("torchvision" in "torchvision:resnet50") is a module of robbench that defines one `SCHEME`, a `Scheme`; it is
imported when such a name is used, so that optional packages stay optional. Add one here and nothing else changes.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from robbench.cards import ModelCard
from robbench.core.errors import UserError, unknown_name
from robbench.core.foreign import cause
from robbench.core.stops import reraise_stop
from robbench.models.entry import ModelRequest, ZooEntry

if TYPE_CHECKING:
    from collections.abc import Iterator

SCHEMES = {
    "onnx": "robbench.models.libraries.onnx",
    "robustbench": "robbench.models.libraries.robustbench",
    "timm": "robbench.models.libraries.timm",
    "torchvision": "robbench.models.libraries.torchvision",
}
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


def has_scheme(name: str) -> bool:
    """Whether `name` begins with a scheme and a colon, as in "torchvision:resnet50"."""
    return ":" in name and name.partition(":")[0] in SCHEMES


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


# ------------------------------------------------------------------------------------------- architectures of cards
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


def may_run(entry: ZooEntry) -> bool:
    """Whether the code that a card names, if any, may run: for cards that the user named or robbench ships."""
    name = entry.card.architecture.name
    return entry.trusted or ":" not in name or has_scheme(name)


def _called(entry: ZooEntry) -> nn.Module:
    """What "module:callable" of a card returns. The code runs only for a card that the user named or robbench ships."""
    card, name = entry.card, entry.card.architecture.name
    if not may_run(entry):
        raise UserError(
            f"model {card.name!r}: architecture {name!r} is code, which runs only from a card that you name; "
            f"read it, then give --model {entry.folder / 'card.yaml'}"
        )
    call = _imported(entry)
    given = ", ".join(f"{key}={value!r}" for key, value in card.architecture.arguments.items())
    try:
        module = call(**card.architecture.arguments)
    except BaseException as error:  # somebody else's code can fail in any way
        reraise_stop(error)
        raise UserError(
            f"model {card.name!r}: {name}({given}) failed ({cause(error)}); "
            f"correct architecture.arguments in its card, or that code"
        ) from error
    if not isinstance(module, nn.Module):
        raise UserError(
            f"model {card.name!r}: {name}({given}) returned a {type(module).__name__}, not a torch.nn.Module; "
            f"name a class of modules or a function that returns one"
        )
    return module


def _imported(entry: ZooEntry) -> Callable[..., Any]:
    """The callable of "module:callable": in a file beside the card, else in an importable module."""
    name = entry.card.architecture.name
    module_name, _, attribute = name.partition(":")
    where = f"model {entry.card.name!r}: architecture {name!r}"
    if not all(part.isidentifier() for part in [*module_name.split("."), *attribute.split(".")]):
        raise UserError(f"{where} is no module:callable, as in my_models:ResNet; correct it")
    found: Any = _module(module_name, entry.folder, where)
    for part in attribute.split("."):
        if not hasattr(found, part):
            public = [known for known in vars(found) if callable(getattr(found, known)) and known[0] != "_"]
            raise unknown_name(f"callable of module {module_name!r} ({where})", attribute, public)
        found = getattr(found, part)
    if not callable(found):
        raise UserError(
            f"{where} is a {type(found).__name__}, which cannot be called; name a class or function"
        )
    call: Callable[..., Any] = found
    return call


def _module(name: str, folder: Path, where: str) -> Any:
    """Module `name`, imported with the card's folder in front of the import path."""
    try:
        with _import_path(folder):
            module = importlib.import_module(name)
    except BaseException as error:  # somebody else's code can fail in any way
        reraise_stop(error)
        absent = isinstance(error, ModuleNotFoundError) and error.name == name.split(".")[0]
        step = (
            f"put {name.split('.')[0]}.py beside the card, or install its package"
            if absent
            else "repair that module, or install what it needs"
        )
        raise UserError(f"{where} does not import ({cause(error)}); {step}") from error
    stem, loaded = folder.resolve() / name.replace(".", "/"), getattr(module, "__file__", None) or "elsewhere"
    beside = [path for path in (stem / "__init__.py", stem.with_suffix(".py")) if path.is_file()]
    if beside and Path(loaded).resolve() not in beside:
        raise UserError(
            f"{where} means {beside[0]}, but a module {name!r} is loaded already from {loaded}; rename one of the files"
        )
    return module


@contextmanager
def _import_path(folder: Path) -> "Iterator[None]":
    path = str(folder.resolve())
    sys.path.insert(0, path)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(path)
