"""Where in a checkpoint the weights of a network are: which entry, behind which prefix.

An entry counts when its names, without a common prefix, are exactly those of the network. Averages of weights (EMA) lie
beside the weights under the same names: where two entries fit and differ, the user says which.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn

from robbench.core.errors import UserError

DEEPEST = 2  # levels of entries in which state dicts are looked for; below are an optimizer's


@dataclass(frozen=True)
class Layout:
    """key: the entry that holds the state dict ("a.b": entry b of entry a, "a.0": the first of a list); None for the
    file itself. prefix: what every name in it begins with."""

    key: str | None
    prefix: str = ""

    @property
    def text(self) -> str:
        """In words, for a line that says what was taken; "" for a plain state dict."""
        key = "" if self.key is None else f"entry {self.key}"
        if self.key is not None and any(word in self.key.lower() for word in ("ema", "averag", "swa")):
            key += ", an average of weights"
        return ", ".join(part for part in (key, self.prefix and f"names without {self.prefix!r}") if part)


def find_layout(content: object, module: nn.Module, key: str | None, where: str) -> Layout:
    """How the weights of `module` lie in `content`, what a weights file holds. key: the entry that the user named.

    Where none fits the nearest is returned, whose strict loading says what is missing. `UserError` when several entries
    fit and differ, and when there are no state dicts.
    """
    found = state_dicts(content)
    if key is not None:
        chosen = entry_called(content, key)
        found = {key: chosen} if is_state_dict(chosen) else {}
    if not found:
        raise UserError(f"{where} {_nothing(content, key)}")
    requested = set(module.state_dict())
    fitting = {
        one: Layout(one, cut)
        for one, state in found.items()
        if (cut := _prefix(state, requested)) is not None
    }
    different = list(fitting)[:1]
    for one in fitting:
        if all(not _same(found[one], fitting[one], found[other], fitting[other]) for other in different):
            different.append(one)
    if len(different) > 1:
        lines = " or ".join(f"--weights-key {one or 'FILE'}" for one in different)
        raise UserError(
            f"{where} holds {len(different)} sets of weights that fit and differ, {' and '.join(map(str, different))} "
            f"(one may be an average of weights); say which: {lines} (`key` under weights in a card)"
        )
    if fitting:
        return fitting[different[0]]
    return max((_nearest(one, state, requested) for one, state in found.items()), key=lambda pair: pair[0])[1]


def state_dicts(content: object) -> dict[str | None, Mapping[str, Tensor]]:
    """The state dicts in a checkpoint by their key, the file itself first; an empty file is that of a network without
    weights."""
    found: dict[str | None, Mapping[str, Tensor]] = (
        {None: content} if is_state_dict(content) or content == {} else {}
    )
    return found | {name: value for name, value in entries(content) if is_state_dict(value)}


def is_state_dict(value: object) -> TypeGuard[Mapping[str, Tensor]]:
    """Whether it is names and tensors, and nothing else."""
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(key, str) and isinstance(tensor, Tensor) for key, tensor in value.items())
    )


def entries(content: object, depth: int = DEEPEST) -> Iterator[tuple[str, object]]:
    """Names and values of the entries of a checkpoint, and of the entries in them, as `entry_called` reads them."""
    if not depth:
        return
    for name, value in _parts(content):
        yield name, value
        yield from ((f"{name}.{inner}", found) for inner, found in entries(value, depth - 1))


def entry_called(content: object, key: str) -> object:
    """Entry `key` of a checkpoint, None without one; "a.b" is entry b of entry a, unless there is one of that name."""
    parts = dict(_parts(content))
    if key in parts or "." not in key:
        return parts.get(key)
    first, _, rest = key.partition(".")
    return entry_called(parts.get(first), rest)


def _parts(content: object) -> list[tuple[str, object]]:
    if isinstance(content, Mapping):
        return [(str(name), value) for name, value in content.items()]
    return (
        [(str(place), value) for place, value in enumerate(content)]
        if isinstance(content, list | tuple)
        else []
    )


def _prefix(state: Mapping[str, Tensor], requested: set[str]) -> str | None:
    """The prefix without which the names are those of the network; None when there is no such prefix."""
    counted = {name for name in requested if name.endswith("num_batches_tracked")}  # absent from old files
    for cut in ("", *find_prefixes(set(state))):
        if requested - counted <= {name.removeprefix(cut) for name in state} <= requested:
            return cut
    return None


def find_prefixes(names: set[str]) -> list[str]:
    """What all `names` begin with, up to a dot: for a.b.c and a.b.d "a." and "a.b."."""
    first = min(names, default="")
    cuts = [first[: place + 1] for place, letter in enumerate(first) if letter == "."]
    return [cut for cut in cuts if all(name.startswith(cut) for name in names)]


def _nearest(key: str | None, state: Mapping[str, Tensor], requested: set[str]) -> tuple[int, Layout]:
    """How many names are those of the network, behind the prefix for which they are most."""
    cuts = ("", *find_prefixes(set(state)))
    shared = [(len({name.removeprefix(cut) for name in state} & requested), Layout(key, cut)) for cut in cuts]
    return max(shared, key=lambda pair: pair[0])


def _same(one: Mapping[str, Tensor], its: Layout, other: Mapping[str, Tensor], others: Layout) -> bool:
    first = {name.removeprefix(its.prefix): value for name, value in one.items()}
    second = {name.removeprefix(others.prefix): value for name, value in other.items()}
    return first.keys() == second.keys() and all(
        value.shape == second[name].shape and torch.equal(value, second[name])
        for name, value in first.items()
    )


def _nothing(content: object, key: str | None) -> str:
    held = [name for name in state_dicts(content) if name is not None]
    what = "has no state dict" if key is None else f"has no state dict under {key!r}"
    step = (
        f"it has them under {', '.join(held[:3])}" if held else "torch.save the state_dict() of your network"
    )
    return f"{what} (it is {describe(content)}); {step}"


def describe(content: object) -> str:
    """What a checkpoint is: its type, and the names of its first entries."""
    if not isinstance(content, Mapping):
        return f"a {type(content).__name__}"
    names = list(map(str, content))
    return (
        f"a dict of {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" if names else "an empty dict"
    )
