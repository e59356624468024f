"""Files of the cache that robbench can make or download again; all others are reported and stay."""

import re
from collections.abc import Callable
from pathlib import Path

from robbench.core.resources import cache_folder
from robbench.models.entry import ZooEntry
from robbench.store.garbage import TEMPORARY, Collection, add_temporaries, files_below

_STATISTICS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{32}\.npz")
_FEATURE_WEIGHTS = re.compile(r"pt_inception-[0-9-]+-[0-9a-f]{8}\.pth")
Purpose = Callable[
    [str], str | None
]  # what a file of that name is for; None where it cannot be obtained again


def find_cache_garbage(entries: dict[str, ZooEntry]) -> Collection:
    """The files of the cache that can be removed. entries: known models, whose cards give the addresses of weights."""
    found = Collection(cache_folder(""))
    purposes: dict[str, Purpose] = {
        "checkpoints": lambda name: _describe_weights(name, entries),
        "frechet": lambda name: _match(_STATISTICS, name, "statistics of training images, computed again"),
        "weights": lambda name: _match(_FEATURE_WEIGHTS, name, "weights of FID's features, downloaded again"),
    }
    for folder in sorted(found.place.glob("*")):
        if folder.name in purposes and folder.is_dir() and not folder.is_symlink():
            _add_folder(found, folder, purposes[folder.name])
        else:
            whose = "data sets" if folder.name == "data" else "not made by this robbench"
            found.leave(folder, f"{whose}; remove it yourself if nothing needs it")
    return found


def _add_folder(found: Collection, folder: Path, purpose: Purpose) -> None:
    for path in files_below(folder):
        if TEMPORARY.fullmatch(path.name):
            continue
        what = None if path.is_symlink() else purpose(path.relative_to(folder).as_posix())
        if what is None:
            found.leave(path, "no known card or command can get it again")
        else:
            found.add("cache", path, [path], f"{what} when needed")
    add_temporaries(found, [folder, *sorted(path for path in folder.rglob("*") if path.is_dir())])


def _match(pattern: re.Pattern[str], name: str, what: str) -> str | None:
    return what if pattern.fullmatch(name) else None


def _describe_weights(name: str, entries: dict[str, ZooEntry]) -> str | None:
    """The models whose cards give an address for a weights file; None for a file that the user put there."""
    cards = [entry.card for entry in entries.values()]
    users = [card.name for card in cards if card.weights.file == name and card.weights.urls]
    return f"weights of {', '.join(users)}, downloaded again" if users else None
