"""`robbench list` and `robbench show`: what there is, from cards, YAML files and registries."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel
from rich import box
from rich.table import Table
from rich.text import Text

from robbench.cli import catalog_json
from robbench.cli.base import echo_cells, echo_line, echo_text, print_json
from robbench.cli.published_show import LIST_HEADER, listed, show_table
from robbench.core.errors import UserError, printable, unknown_name
from robbench.core.schema import dump_yaml
from robbench.core.terminal import Terminal
from robbench.data.names import dataset_names
from robbench.defenses.recipes import recipes
from robbench.experiments.published import find_table, published_index
from robbench.experiments.schema import experiment_names, experiment_text, experiments
from robbench.models.entry import ZooEntry
from robbench.models.zoo import present_weights, zoo_entries
from robbench.report.data_card import HEADER, dataset_rows, dataset_text, is_data_folder
from robbench.specs import ThreatModel, listed_attacks, resolve_attack, threat_models

if TYPE_CHECKING:
    from robbench.defenses import Defense

Rows = Iterable[tuple[str, ...]]


def list_kind(
    kind: str,
    threat_model_folder: Path | None,
    zoo: Path | None,
    data_dir: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print the table of one kind: attacks, defenses, models, datasets, threat-models, recipes or published."""
    if as_json:
        print_json(catalog_json.listed_objects(kind, threat_model_folder, zoo, data_dir))
        return
    if kind == "attacks":
        header: tuple[str, ...] = ("attack", "on a", "threat model", "space", "norm", "what it is")
        rows = _attack_rows(threat_models(threat_model_folder))
    elif kind == "threat-models":
        header = ("threat model", "on a", "space", "norm", "attacks", "what it is")
        rows = _threat_model_rows(threat_models(threat_model_folder))
    elif kind == "models":
        header = ("model", "data set", "defense", "architecture", "what it is")
        rows = _model_rows(zoo_entries(zoo))
    elif kind == "recipes":
        header, rows = ("recipe", "of robbench", "data set", "what it is"), _recipe_rows()
    elif kind == "published":
        header, rows = LIST_HEADER, listed()
    elif kind == "datasets":
        header, rows = HEADER, dataset_rows(data_dir)
    else:
        header, rows = ("defense", "trains a", "what it is"), _defense_rows()
    _print_table(header, rows)


def _recipe_rows() -> Rows:
    """Papers' experiments, then training schedules."""
    for experiment in experiments().values():
        yield experiment.name, "run", experiment.dataset, experiment.title
    for recipe in recipes().values():
        yield recipe.name, "train", ", ".join(recipe.default_for) or "-", recipe.description


def _print_table(header: tuple[str, ...], rows: Rows) -> None:
    console = Terminal()
    if not console.is_terminal:  # for grep, cut and scripts: one line an entry, nothing wrapped or cut off
        for row in rows:
            echo_cells(row)
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console.print(table)


def _attack_rows(models: dict[str, ThreatModel]) -> Rows:
    for model in models.values():
        texts = {name: spec.description for name, spec in model.attacks.items()}
        texts |= {
            name: f"{len(model.members(name))} attacks. {g.description}" for name, g in model.groups.items()
        }
        for name in listed_attacks({model.name: model}):
            yield name, model.target, model.name, model.space, model.norm, texts[name]


def _threat_model_rows(models: dict[str, ThreatModel]) -> Rows:
    for model in models.values():
        names = ", ".join(listed_attacks({model.name: model}))
        yield model.name, model.target, model.space, model.norm, names, model.description


def _model_rows(entries: dict[str, ZooEntry]) -> Rows:
    for entry in entries.values():
        card = entry.card
        yield card.name, card.dataset, card.defense, card.architecture.name, card.description


def _defense_rows() -> Rows:
    from robbench.defenses import DEFENSES, FLOW_DEFENSES

    for kind, registry in (("classifier", DEFENSES), ("flow", FLOW_DEFENSES)):
        for name in registry:
            yield name, kind, _first_line(registry.get(name))


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


# ------------------------------------------------------------------------------------------------------- show
@dataclass(frozen=True)
class Shown:
    """A kind of thing with a name. names: those there are; show: prints the one meant; described: it as an object."""

    kind: str
    names: Iterable[str]
    show: Callable[[], None]
    described: Callable[[], catalog_json.Object]


def show_name(
    name: str,
    threat_model_folder: Path | None,
    zoo: Path | None,
    checkpoints: Path | None = None,
    data_dir: Path | None = None,
    as_json: bool = False,
) -> None:
    """Print everything called `name`, of any kind; `UserError` with the nearest name when nothing is."""
    models = threat_models(threat_model_folder)
    entries = zoo_entries(zoo, checkpoints)
    schedules = recipes()
    attacks = [attack for model in models.values() for attack in (*model.attacks, *model.groups)]
    kinds = [
        Shown(
            "attack",
            attacks,
            lambda: _show_attack(name, models),
            lambda: catalog_json.attack_object(name, models),
        ),
        _dumped("threat model", models, name),
        Shown(
            "model",
            entries,
            lambda: _show_model(entries[name]),
            lambda: catalog_json.model_object(entries[name]),
        ),
        _dumped("recipe", schedules, name),
        Shown(
            "experiment",
            experiment_names(),
            lambda: echo_text(experiment_text(name)),
            lambda: experiments()[name].model_dump(mode="json"),
        ),
        Shown(
            "data set",
            _data_sets(name),
            lambda: echo_text(dataset_text(name, data_dir)),
            lambda: catalog_json.dataset_object(name, data_dir),
        ),
        Shown(
            "defense",
            _defense_choices(),
            lambda: _show_defense(name),
            lambda: catalog_json.defense_object(name),
        ),
        _published_tables(name),
    ]
    found = [kind for kind in kinds if name in kind.names]
    if not found:
        members = {
            member for model in models.values() for group in model.groups for member in model.members(group)
        }
        raise unknown_name("name", name, {known for kind in kinds for known in kind.names} - members)
    if as_json:
        entries_found = [{"kind": kind.kind, "entry": kind.described()} for kind in found]
        print_json({"name": name, "found": entries_found})
        return
    for kind in found:
        echo_line(f"== {kind.kind} {name} ==")
        kind.show()


def _dumped(kind: str, known: Mapping[str, BaseModel], name: str) -> Shown:
    """Of things that are shown as their file."""
    return Shown(
        kind,
        known,
        lambda: echo_text(dump_yaml(known[name])),
        lambda: known[name].model_dump(mode="json"),
    )


def _data_sets(name: str) -> list[str]:
    """Named data sets, and `name` itself where it is the folder of one."""
    return [*dataset_names(), *([name] if is_data_folder(name) else [])]


def _show_model(entry: ZooEntry) -> None:
    """Where the card and its weights lie, then the card."""
    weights = present_weights(entry)
    get = "downloaded when first used" if entry.card.weights.urls else "name their folder with --checkpoints"
    echo_line(f"# {entry.folder}")
    echo_line(f"# weights: {weights or f'not on this machine; {get}'}")
    echo_text(dump_yaml(entry.card))


def _published_tables(name: str) -> Shown:
    """A table answers to its name and to how it is printed, whatever the case."""
    index = published_index()
    names, table = [entry.name for entry in index.tables], find_table(name, index)
    if table is None:
        return Shown("published table", names, lambda: None, dict)
    return Shown(
        "published table",
        [name, *names],
        lambda: show_table(table, index),
        lambda: catalog_json.published_object(table, index),
    )


def _defense_choices() -> list[str]:
    from robbench.defenses import DEFENSES, FLOW_DEFENSES

    return [*DEFENSES, *FLOW_DEFENSES]


def _show_defense(name: str) -> None:
    from robbench.defenses import defense_kinds, find_defense

    for kind in defense_kinds(name):
        echo_line(f"trains a {kind}:")
        _show_defense_class(find_defense(name, kind))


def _show_defense_class(defense: "type[Defense]") -> None:
    echo_text(inspect.getdoc(defense) or "")
    if defense.Parameters.model_fields:
        echo_text("\nParameters (--set KEY=VALUE):")
    for field, info in defense.Parameters.model_fields.items():
        echo_line(f"  {field} = {info.get_default(call_default_factory=False)!r}")


def _show_attack(name: str, models: dict[str, ThreatModel]) -> None:
    """The spec with every parameter filled in, then budgets and absolute step sizes for every data set."""
    grouping = next((model for model in models.values() if name in model.groups), None)
    if grouping is not None:
        members = "\n  ".join(grouping.members(name))
        echo_line(_flat(grouping.groups[name].description))
        echo_line(_flat(grouping.description))
        echo_text(f"  {members}")
        return
    owner = next(model for model in models.values() if name in model.attacks)
    spec = owner.attacks[name]
    parameters = catalog_json.attack_parameters(name, owner)
    echo_line(f"threat model {owner.name} ({owner.space}, {owner.norm}): {_flat(owner.description)}")
    echo_line(_flat(spec.description))
    echo_line(f"reference: {spec.reference or '-'}")
    echo_line(f"algorithm: {spec.algorithm}")
    for key, value in parameters.model_dump().items():
        echo_line(f"  {key}: {value}")
    echo_line(f"{'data set':14} {'epsilon':10} {'eta':10} {'step size':18} note")
    for dataset, budget in owner.budgets_of(name).items():
        try:
            resolved = resolve_attack(name, dataset, models)
        except UserError:
            echo_line(f"{dataset:14} none by default; give --epsilon or --eta")
            continue
        radii = [value for value in (resolved.epsilon, resolved.eta) if value is not None]
        numbers = (_number(resolved.epsilon), _number(resolved.eta), _steps(parameters, radii))
        echo_line(f"{dataset:14} {numbers[0]:10} {numbers[1]:10} {numbers[2]:18} {budget.note}".rstrip())


def _flat(text: str) -> str:
    """A description, whose lines in its file mean nothing, as one line."""
    return " ".join(text.split())


def _steps(parameters: BaseModel, radii: list[float]) -> str:
    """Absolute step sizes, one a budget; "-" for an algorithm that has none or chooses its own."""
    sizes = catalog_json.step_sizes(parameters, radii)
    return "-" if sizes is None else ", ".join(f"{size:g}" for size in sizes)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
