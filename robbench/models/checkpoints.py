"""Weights files of cards: where they lie, their sha256, and the state dict in them. Pickled code is refused."""

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from robbench.cards import Golden, Weights
from robbench.core.download import MOST_BYTES, download, is_html, wrong_digest
from robbench.core.errors import UserError
from robbench.core.resources import cache_folder, sha256_file
from robbench.models.entry import ZooEntry
from robbench.models.layouts import describe, entry_called, find_prefixes, is_state_dict, state_dicts
from robbench.models.zoo import present_weights

NAMED = 3  # keys an error names
WRONG_CARD = "correct the card's architecture or its arguments (--model-args)"


def weights_file(entry: ZooEntry, most_bytes: int) -> Path:
    """The weights file of a card, its sha256 checked; downloaded to the cache when the card has URLs for it.

    most_bytes: a larger file is not downloaded.
    """
    card, weights = entry.card, entry.card.weights
    path = present_weights(entry)
    if path is None and weights.urls:
        path = cache_folder("checkpoints") / weights.file
        download(
            weights.urls,
            path,
            lambda temporary: wrong_digest(temporary, weights.sha256),
            f"model {card.name!r}: {weights.file}",
            most_bytes,
        )
    if path is None:
        origin = f"get it from {card.source}" if card.source else "restore it or train the model again"
        raise UserError(
            f"model {card.name!r}: {entry.folder / weights.file} is missing; {origin}, "
            f"or name the folder that holds {weights.file} with --checkpoints or ROBBENCH_CHECKPOINTS"
        )
    return checked(entry, path, weights.sha256)


def checked(entry: ZooEntry, path: Path, sha256: str) -> Path:
    """`path`, when its sha256 is the card's; `UserError` otherwise, which says so when it is a web page."""
    wrong = wrong_digest(path, sha256)
    if wrong is None:
        return path
    if is_html(path):
        step = "delete it and download the file itself, not the page that links to it"
    elif path.is_relative_to(cache_folder("checkpoints")):
        own = f"{entry.card.name}/{path.name}"
        step = (
            f"delete it to download it again, or where another card has a file of that name, call yours {own}"
        )
    else:
        step = (
            f"restore the file, or where the change is meant write `sha256: {sha256_file(path)}` in the card"
        )
    raise UserError(f"{_where(entry)}: {path} {wrong}; {step}")


def most_weights_bytes(module: nn.Module) -> int:
    """More bytes than any checkpoint of `module` has: eight times its own tensors, for an optimizer's state, averages
    and float64 beside them, and 16 MiB for names and other records."""
    tensors = [value for value in module.state_dict().values() if isinstance(value, Tensor)]
    if any(map(is_lazy, tensors)):  # a module that learns its sizes from its first images
        return MOST_BYTES
    return 8 * sum(tensor.nbytes for tensor in tensors) + (16 << 20)


def read_state(entry: ZooEntry, module: nn.Module) -> dict[str, Tensor]:
    """The state dict of a card's weights file, as the card's format, key and prefix say; on the CPU. module: what the
    weights are for, whose size limits a download."""
    path = weights_file(entry, most_weights_bytes(module))
    return state_in(read_weights(entry, path), entry, path)


def read_weights(entry: ZooEntry, path: Path) -> object:
    """What a weights file of the card's format holds."""
    safe = entry.card.weights.format == "safetensors"
    return read_safetensors(entry, path) if safe else unpickled(entry, path)


def state_in(content: object, entry: ZooEntry, path: Path) -> dict[str, Tensor]:
    """The state dict in the `content` of the file at `path`, as the card's key and prefix say."""
    where = f"{_where(entry)}: {path}"
    return _without_prefix(_chosen(content, entry.card.weights, where), entry.card.weights.prefix, where)


def read_golden(entry: ZooEntry, golden: Golden) -> dict[str, Tensor]:
    """The tensors of a card's golden file, which lies beside it; sha256 checked."""
    path = entry.folder / golden.file
    if not path.is_file():
        raise UserError(f"{_where(entry)}: {path} is missing; restore it or train the model again")
    return read_safetensors(entry, checked(entry, path, golden.sha256))


def read_safetensors(entry: ZooEntry, path: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file."""
    if path.suffix != ".safetensors":
        raise UserError(
            f"{_where(entry)}: {path.name} is not a .safetensors file; "
            f"a pickle that torch.save wrote of a state dict is read with `format: state-dict` under weights"
        )
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{_where(entry)}: {path} is not a safetensors file ({error}); restore it") from error


def unpickled(entry: ZooEntry, path: Path) -> object:
    """What torch.save wrote, when it is tensors in plain containers; nothing else is ever constructed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about storages of old PyTorch versions
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        if found is None:
            raise _not_a_checkpoint(entry, path, error) from error
        raise UserError(
            f"{_where(entry)}: {path} holds more than tensors ({found[1]}); such a pickle can run code and is refused: "
            f"where you trust it, load it yourself and torch.save its state_dict(), in Python: "
            f"c = torch.load({path.name!r}, weights_only=False); torch.save(c.state_dict() if hasattr(c, 'state_dict') "
            f"else c['state_dict'], 'weights.pt')"
        ) from error
    except Exception as error:  # a broken pickle can fail in any way
        raise _not_a_checkpoint(entry, path, error) from error


def _not_a_checkpoint(entry: ZooEntry, path: Path, error: Exception) -> UserError:
    if "TorchScript" in str(error):
        reason = f"a TorchScript archive, which is code; torch.jit.load({path.name!r}).state_dict() has its weights"
    else:
        found = re.search(r"error:\s+([^\n]+)", str(error))  # behind PyTorch's advice to trust the file
        reason = " ".join((found[1] if found else str(error)).split())[:100] or type(error).__name__
    return UserError(
        f"{_where(entry)}: {path} is not a checkpoint that torch.save wrote ({reason}); "
        f"restore the file, or name another, and where a card has them correct format and sha256"
    )


def _chosen(content: object, weights: Weights, where: str) -> dict[str, Tensor]:
    """The state dict that `weights.key` names, or the whole content; `UserError` that suggests the right key."""
    chosen: Any = content if weights.key is None else entry_called(content, weights.key)
    if is_state_dict(chosen) or (weights.key is None and chosen == {}):  # {}: a network without weights
        return cast("dict[str, Tensor]", chosen)
    candidates = [name for name in state_dicts(content) if name is not None]
    if candidates:
        step = f"set `key: {candidates[0]}` under weights" + (
            f" (or {', '.join(candidates[1:NAMED])})" if candidates[1:] else ""
        )
    elif others := _beside_tensors(chosen):
        step = f"{len(others)} of its {len(chosen)} entries are no tensors ({_few(others)}): leave them out"
    elif is_state_dict(content):
        step = "the file is a state dict itself: remove key"
    else:
        step = "torch.save a state_dict()"
    what = "is no state dict" if weights.key is None else f"has no state dict under key {weights.key!r}"
    raise UserError(f"{where} {what} (it is {describe(content)}); {step}")


def _beside_tensors(value: Any) -> list[str]:
    """The entries that keep a dict with tensors from being a state dict; none when it has no tensors."""
    if not isinstance(value, Mapping) or not any(isinstance(tensor, Tensor) for tensor in value.values()):
        return []
    return [str(name) for name, tensor in value.items() if not isinstance(tensor, Tensor)]


def _without_prefix(state: dict[str, Tensor], prefix: str, where: str) -> dict[str, Tensor]:
    """`state` with `prefix` removed from every name; a name without it is an error, never dropped."""
    if not prefix:
        return state
    others = [name for name in state if not name.startswith(prefix)]
    if others:
        raise UserError(
            f"{where}: {len(others)} of its {len(state)} tensors do not begin with prefix {prefix!r} "
            f"({_few(others)}); correct or remove prefix under weights"
        )
    stripped = OrderedDict((name.removeprefix(prefix), value) for name, value in state.items())
    versions = getattr(state, "_metadata", None)  # by module; old files are read according to it
    if versions is not None:
        stripped._metadata = OrderedDict(  # type: ignore[attr-defined]
            (f"{name}.".removeprefix(prefix).removesuffix("."), value)
            for name, value in versions.items()
            if f"{name}.".startswith(prefix)
        )
    return stripped


def load_strictly(module: nn.Module, state: dict[str, Tensor], entry: ZooEntry) -> None:
    """Load `state` into `module`; `UserError` unless every tensor has its place and every place its tensor."""
    card = entry.card
    where = f"{_where(entry)}: its weights do not fit architecture {card.architecture.name!r}"
    own = module.state_dict(keep_vars=True)
    requested = set(own)
    if lossy := [name for name, value in state.items() if _lossy(value, own.get(name))]:
        raise UserError(
            f"{where}: {len(lossy)} tensors are complex, integer, sparse, quantized or empty where the network has "
            f"real numbers ({_few(lossy)}); save its dense, real weights"
        )
    try:
        result = module.load_state_dict(state, strict=False)  # what is left over is an error below
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(
            f"{where}: {_other_shapes(state, own) or ' '.join(str(error).split())[:200]}; {WRONG_CARD}"
        ) from error
    problems = [
        f"{len(names)} {what} ({_few(names)})"
        for names, what in (
            (result.missing_keys, "missing"),
            (result.unexpected_keys, "unexpected"),
        )
        if names
    ]
    if problems:
        step = _prefix_hint(set(state), requested, card.weights.prefix) or WRONG_CARD
        raise UserError(f"{where}: {' and '.join(problems)} of {len(requested)} tensors; {step}")


def _other_shapes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """The tensors whose shape is not the network's, counted and the first named; "" when there are none."""
    other = [name for name in state if name in own and state[name].shape != own[name].shape]
    named = [f"{n}: {list(state[n].shape)} in the file, {list(own[n].shape)} in the network" for n in other]
    return f"{len(other)} size mismatches ({_few(named, '; ')})" if other else ""


def _lossy(given: Tensor, own: Tensor | None) -> bool:
    """Whether copying `given` into a network's `own` tensor fails or loses something. Integers may become masks and
    other buffers, but not learned weights."""
    if given.layout != torch.strided or given.is_quantized or given.is_meta:
        return True
    if own is None or own.is_complex():
        return False
    integer = not given.is_floating_point() and own.is_floating_point()
    return given.is_complex() or (integer and isinstance(own, nn.Parameter))


def _prefix_hint(given: set[str], requested: set[str], prefix: str) -> str | None:
    """What to change when a common prefix explains why names differ."""
    counted = {name for name in requested if name.endswith("num_batches_tracked")}  # absent from old files
    for cut in find_prefixes(given):
        if requested - counted <= {name.removeprefix(cut) for name in given} <= requested:
            return f'set `prefix: "{prefix}{cut}"` under weights'
    for cut in find_prefixes(requested):
        if {cut + name for name in given} <= requested:
            changed = f" (prefix {prefix!r} removes it)" if prefix.endswith(cut) else ""
            return f"the architecture's names begin with {cut!r} and the file's do not{changed}; correct one of them"
    return None


def _few(names: Iterable[str], between: str = ", ") -> str:
    listed = list(names)
    return between.join(listed[:NAMED]) + (f"{between}..." if len(listed) > NAMED else "")


def _where(entry: ZooEntry) -> str:
    return f"model {entry.card.name!r}"
