"""`robbench gc`: what nothing needs any more. Only click is imported before the command runs."""

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from robbench.cli.base import FolderOrFile, echo_line, echo_text, json_option, print_json, zoo_option
from robbench.core.counting import count_noun
from robbench.core.errors import UserError

if TYPE_CHECKING:
    from robbench.store.garbage import Collection

EARLIER = (
    "Cells are results of earlier plans in the same folder, a larger matrix for example. Once removed, "
    "`robbench run` with those models and attacks computes them again."
)


@click.command("gc")
@click.argument("run_folders", metavar="[RUN...]", nargs=-1, type=FolderOrFile())
@click.option("--cache", is_flag=True, help="Also what robbench downloaded or computed into its cache.")
@click.option("--yes", is_flag=True, help="Remove what is listed; without it nothing is removed.")
@json_option
@zoo_option
def gc(run_folders: tuple[Path, ...], cache: bool, yes: bool, as_json: bool, zoo: Path | None) -> None:
    """List what runs and the cache no longer need: cells no plan names, half files, what was put aside.

    Example: robbench gc robbench-runs/digits-seed0 --yes
    """
    if not run_folders and not cache:
        raise click.UsageError("nothing to look at; name run folders, or give --cache")
    from robbench.store.garbage import remove

    with ExitStack() as locks:
        found = [_of_run(folder, locks if yes else None) for folder in _distinct(run_folders)]
        found += [_of_cache(zoo)] if cache else []
        for collection in found if yes else ():
            remove(collection)
    if as_json:
        print_json(
            {"removed": yes, "bytes": sum(c.bytes for c in found), "places": list(map(_object, found))}
        )
    else:
        _print(found, yes)


def _distinct(folders: Sequence[Path]) -> list[Path]:
    """Every folder once, however it is spelt."""
    return list({folder.resolve(): folder for folder in reversed(folders)}.values())[::-1]


def _of_run(folder: Path, locks: ExitStack | None) -> "Collection":
    """The garbage of a run. locks: takes the run's lock until all is removed; None to look only."""
    from robbench.store.folder import lock_folder, lock_is_held
    from robbench.store.garbage import find_garbage
    from robbench.store.ledger import RUN_FILE

    if locks is None and lock_is_held(folder):
        raise UserError(f"a robbench run is writing to {str(folder)!r}; wait for it, or leave it out")
    if locks is not None and (folder / RUN_FILE).exists():  # a folder that is no run gets no lock file
        locks.enter_context(lock_folder(folder, "or leave it out", "RUN"))
    return find_garbage(folder)


def _of_cache(zoo: Path | None) -> "Collection":
    from robbench.models.zoo import zoo_entries
    from robbench.store.cache_garbage import find_cache_garbage

    return find_cache_garbage(zoo_entries(zoo))


def _print(found: Sequence["Collection"], removed: bool) -> None:
    for collection in found:
        echo_line(str(collection.place.absolute()))
        for item in collection.garbage:
            place = item.path.relative_to(collection.place)
            echo_line(f"  {item.kind:10} {_size(item.bytes):>9}  {place}  {item.what}")
        for left in collection.left_alone:
            place = left.path.relative_to(collection.place)
            echo_line(f"  left alone            {place}  {left.reason}")
    if any(item.kind == "cell" for collection in found for item in collection.garbage):
        echo_text(EARLIER)
    echo_line(_summary(sum(len(c.garbage) for c in found), sum(c.bytes for c in found), removed))


def _summary(count: int, size: int, removed: bool) -> str:
    if not count:
        return "Nothing to remove."
    entries = f"{count_noun(count, 'entry', 'entries')}, {_size(size)}"
    return f"Removed {entries}." if removed else f"{entries}. Nothing was removed; give --yes to remove it."


def _size(count: int) -> str:
    from rich.filesize import decimal

    return decimal(count)


def _object(collection: "Collection") -> dict[str, Any]:
    return {
        "place": str(collection.place.absolute()),
        "bytes": collection.bytes,
        "garbage": [
            {"kind": item.kind, "path": str(item.path), "bytes": item.bytes, "what": item.what}
            for item in collection.garbage
        ],
        "left_alone": [{"path": str(left.path), "reason": left.reason} for left in collection.left_alone],
    }
