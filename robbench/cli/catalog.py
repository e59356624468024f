"""`robbench list` and `robbench show`: one table of the kinds of things that have names, each from its own source."""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

from pydantic import BaseModel
from rich import box
from rich.table import Table
from rich.text import Text

from robbench.cli import catalog_json, catalog_text
from robbench.cli.base import echo_cells, echo_line, echo_text, print_json, resolve_option
from robbench.cli.catalog_json import Folders, Object
from robbench.cli.published_show import show_table
from robbench.core.errors import UserError, known_name, printable
from robbench.core.schema import dump_yaml
from robbench.core.terminal import Terminal
from robbench.data.names import dataset_names
from robbench.experiments.published import find_table, published_index
from robbench.experiments.schema import experiment_names, experiment_text, find_experiment
from robbench.models.zoo import is_model_card
from robbench.recipes import recipes
from robbench.report.data_card import HEADER, dataset_rows, dataset_text, is_data_folder
from robbench.specs import attack_name

Rows = Iterable[tuple[str, ...]]


def _never(name: str) -> bool:
    return False


@dataclass(frozen=True)
class Kind:
    """A kind of things with names.

    Attributes:
        word: what one is called.
        header: titles of the columns of `robbench list`.
        listed: all of them as objects, in the order of the list.
        rows: cells of the list, from the folders and those objects.
        names: names of those there are, members of groups too.
        show: prints the one of a name.
        described: the one of a name as an object.
        also: whether a name that `names` lacks means one nevertheless.
    """

    word: str
    header: tuple[str, ...]
    listed: Callable[[Folders], Iterable[Object]]
    rows: Callable[[Folders, Iterable[Object]], Rows]
    names: Callable[[Folders], Iterable[str]]
    show: Callable[[str, Folders], None]
    described: Callable[[str, Folders], Object]
    also: Callable[[str], bool] = _never

    def has(self, name: str, folders: Folders) -> bool:
        """Whether there is one called `name`."""
        return name in self.names(folders) or self.also(name)


def _cells(*keys: str) -> Callable[[Folders, Iterable[Object]], Rows]:
    """The values of `keys` as texts; what is absent is empty, an empty list "-"."""

    def text(value: object) -> str:
        if isinstance(value, list):
            return ", ".join(value) or "-"
        return "" if value is None else str(value)

    return lambda _, found: (tuple(text(thing[key]) for key in keys) for thing in found)


def _attack_cells(_: Folders, found: Iterable[Object]) -> Iterator[tuple[str, ...]]:
    keys = ("name", "target", "threat_model", "space", "norm")
    for attack in found:
        group = "" if attack["members"] is None else f"{len(attack['members'])} attacks. "
        yield *(attack[key] for key in keys), f"{group}{attack['description']}"


def _as_files(
    word: str,
    header: tuple[str, ...],
    keys: tuple[str, ...],
    listed: Callable[[Folders], Iterable[Object]],
    known: Callable[[Folders], Mapping[str, BaseModel]],
) -> Kind:
    """A kind whose things are shown as their YAML file."""
    return Kind(
        word,
        header,
        listed,
        _cells(*keys),
        known,
        lambda name, folders: echo_text(dump_yaml(known(folders)[name])),
        lambda name, folders: known(folders)[name].model_dump(mode="json"),
    )


KINDS = {  # by what `robbench list` calls them, in the order of `robbench show`
    "attacks": Kind(
        "attack",
        ("attack", "on a", "threat model", "space", "norm", "what it is"),
        catalog_json.attacks,
        _attack_cells,
        lambda folders: folders.attacks,
        catalog_text.show_attack,
        catalog_json.attack,
    ),
    "threat-models": _as_files(
        "threat model",
        ("threat model", "on a", "space", "norm", "attacks", "what it is"),
        ("name", "target", "space", "norm", "attacks", "description"),
        catalog_json.threat_models,
        lambda folders: folders.models_of_threats,
    ),
    "models": Kind(
        "model",
        ("model", "data set", "defense", "architecture", "what it is"),
        catalog_json.models,
        _cells("name", "dataset", "defense", "architecture", "description"),
        lambda folders: {**folders.entries, **folders.detectors},
        catalog_text.show_model,
        catalog_json.model,
        is_model_card,
    ),
    "recipes": _as_files(
        "recipe",
        ("recipe", "of robbench", "data set", "what it is"),
        ("name", "of", "datasets", "description"),
        catalog_json.schedules,
        lambda _: recipes(),
    ),
    "experiments": Kind(
        "experiment",
        ("experiment", "published table", "data set", "what it is"),
        catalog_json.experiments,
        _cells("name", "published", "dataset", "description"),
        lambda _: experiment_names(),
        lambda name, _: echo_text(experiment_text(name)),
        lambda name, _: find_experiment(name).model_dump(mode="json"),
    ),
    "datasets": Kind(
        "data set",
        HEADER,
        catalog_json.datasets,
        lambda folders, _: dataset_rows(folders.data_dir),
        lambda _: dataset_names(),
        lambda name, folders: echo_text(dataset_text(name, folders.data_dir)),
        catalog_json.dataset,
        is_data_folder,
    ),
    "defenses": Kind(
        "defense",
        ("defense", "trains a", "what it is"),
        catalog_json.defenses,
        _cells("name", "trains", "description"),
        catalog_json.defense_names,
        catalog_text.show_defense,
        catalog_json.defense,
    ),
    "detectors": Kind(
        "detector",
        ("detector", "what it is"),
        catalog_json.detectors,
        _cells("name", "description"),
        catalog_json.detector_names,
        catalog_text.show_detector,
        catalog_json.detector,
    ),
    "published": Kind(  # a table answers to its name and to how it is printed, whatever the case
        "published table",
        ("table", "printed as", "rows", "gated", "paper", "what"),
        catalog_json.list_published_tables,
        _cells("name", "source", "rows", "gated", "paper", "description"),
        lambda _: [table.name for table in published_index().tables],
        lambda name, _: show_table(name),
        catalog_json.show_published_table,
        lambda name: find_table(name, published_index()) is not None,
    ),
}
TEXT_WIDTH = 40  # a table is printed where its last column gets that much of the terminal
MOVED = "recipes are training schedules only; for the papers' tables see: robbench list experiments"


def list_kind(kind: str, folders: Folders, as_json: bool = False) -> None:
    """Print the table of one of `KINDS`, as text or as a JSON list."""
    if kind == "recipes":  # for one version: scripts of before look for experiments here
        echo_line(MOVED, err=True)
    of = KINDS[kind]
    found = of.listed(folders)
    if as_json:
        print_json(list(found))
    else:
        _print_table(of.header, of.rows(folders, found))


def _print_table(header: tuple[str, ...], rows: Rows) -> None:
    console = Terminal()
    if not console.is_terminal:  # for grep, cut and scripts: one line an entry, nothing wrapped or cut off
        for row in rows:
            echo_cells(row)
        return
    cells = [tuple(printable(cell) for cell in row) for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    if sum(widths[:-1]) + len(header) + min(widths[-1], TEXT_WIDTH) > console.width:
        _print_entries(console, header, cells)
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in header[:-1]:
        table.add_column(title, no_wrap=True)
    table.add_column(header[-1], overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table)


def _print_entries(console: Terminal, header: tuple[str, ...], rows: Rows) -> None:
    """A paragraph per row, where a table would break names: its name, then every other cell that says something."""
    for name, *cells in rows:
        told = [
            f"{title} {cell}"
            for title, cell in zip(header[1:-1], cells, strict=False)
            if cell not in ("", "-")
        ]
        wrap = partial(textwrap.fill, width=console.width, subsequent_indent="    ", break_on_hyphens=False)
        first = Text(wrap(f"{name}  {', '.join(told)}"))
        first.stylize("bold", 0, len(name))
        console.print(first)
        console.print(Text(wrap(cells[-1], initial_indent="    ")))


def _of_name(name: str, folders: Folders) -> list[Kind]:
    return [kind for kind in KINDS.values() if kind.has(name, folders)]


def _meant(written: str, known: set[str], folders: Folders) -> str:
    """The one name that `written` means ("PGD-20", "CIFAR10"); `UserError` otherwise."""
    try:
        return attack_name(written, folders.models_of_threats)
    except UserError:
        return known_name("name", written, known)


def show_name(name: str, folders: Folders, as_json: bool = False) -> None:
    """Print everything called `name`, of any kind; `UserError` with the nearest name when nothing is."""
    found = _of_name(name, folders)
    if not found:
        known = {known for kind in KINDS.values() for known in kind.names(folders)} - folders.members
        name = resolve_option("show", name, lambda written: _meant(written, known, folders))
        found = _of_name(name, folders)
    if as_json:
        entries = [{"kind": kind.word, "entry": kind.described(name, folders)} for kind in found]
        print_json({"name": name, "found": entries})
        return
    for kind in found:
        echo_line(f"== {kind.word} {name} ==")
        kind.show(name, folders)
