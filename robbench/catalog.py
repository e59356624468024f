"""`robbench list` and `robbench show`: what there is, from cards, YAML files and registries."""

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from pydantic import BaseModel
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from robbench.data.names import dataset_names
from robbench.errors import UserError, unknown_name
from robbench.models.zoo import ZooEntry, zoo_entries
from robbench.recipes import recipes
from robbench.schema import dump_yaml, validate
from robbench.specs import ThreatModel, resolve_attack, threat_models

if TYPE_CHECKING:
    from robbench.defenses import Defense

Rows = Iterable[tuple[str, ...]]


def list_kind(kind: str, threat_model_folder: Path | None, zoo: Path | None) -> None:
    """Print the table of one kind: attacks, defenses, models, datasets or threat-models."""
    if kind == "attacks":
        header: tuple[str, ...] = ("attack", "on a", "threat model", "space", "norm", "what it is")
        rows = _attack_rows(threat_models(threat_model_folder))
    elif kind == "threat-models":
        header = ("threat model", "on a", "space", "norm", "attacks", "what it is")
        rows = _threat_model_rows(threat_models(threat_model_folder))
    elif kind == "models":
        header = ("model", "data set", "defense", "architecture", "what it is")
        rows = _model_rows(zoo_entries(zoo))
    elif kind == "datasets":
        header, rows = ("data set", "where from"), _dataset_rows()
    else:
        header, rows = ("defense", "trains a", "what it is"), _defense_rows()
    _print_table(header, rows)


def _print_table(header: tuple[str, ...], rows: Rows) -> None:
    console = Console()
    if not console.is_terminal:  # for grep, cut and scripts: one line an entry, nothing wrapped or cut off
        for row in rows:
            click.echo("\t".join(row))
        return
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for title in header:
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def _attack_rows(models: dict[str, ThreatModel]) -> Rows:
    for model in models.values():
        for name, spec in model.attacks.items():
            yield name, model.target, model.name, model.space, model.norm, spec.description


def _threat_model_rows(models: dict[str, ThreatModel]) -> Rows:
    for model in models.values():
        yield model.name, model.target, model.space, model.norm, ", ".join(model.attacks), model.description


def _model_rows(entries: dict[str, ZooEntry]) -> Rows:
    for entry in entries.values():
        card = entry.card
        yield card.name, card.dataset, card.defense, card.architecture.name, card.description


def _dataset_rows() -> Rows:
    for name in dataset_names():
        yield name, _dataset_source(name)


def _dataset_source(name: str) -> str:
    from robbench.data.names import BUILT_IN

    if name == "digits":
        return "embedded (scikit-learn)"
    return "torchvision, --data-dir or download" if name in BUILT_IN else "installed package"


def _defense_rows() -> Rows:
    from robbench.defenses import DEFENSES, FLOW_DEFENSES

    for kind, registry in (("classifier", DEFENSES), ("flow", FLOW_DEFENSES)):
        for name in registry:
            yield name, kind, _first_line(registry.get(name))


def _first_line(thing: object) -> str:
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


# ------------------------------------------------------------------------------------------------------- show
def show_name(name: str, threat_model_folder: Path | None, zoo: Path | None) -> None:
    """Print everything called `name`, of any kind; `UserError` with the nearest name when nothing is."""
    models = threat_models(threat_model_folder)
    entries = zoo_entries(zoo)
    schedules = recipes()
    attacks = [attack for model in models.values() for attack in model.attacks]
    printers: list[tuple[str, Iterable[str], Callable[[], None]]] = [
        ("attack", attacks, lambda: _show_attack(name, models)),
        ("threat model", models, lambda: click.echo(dump_yaml(models[name]))),
        ("model", entries, lambda: click.echo(f"# {entries[name].folder}\n{dump_yaml(entries[name].card)}")),
        ("recipe", schedules, lambda: click.echo(dump_yaml(schedules[name]))),
        ("data set", dataset_names(), lambda: click.echo(f"{name}: {_dataset_source(name)}")),
        ("defense", _defense_choices(), lambda: _show_defense(name)),
    ]
    found = [(kind, show) for kind, names, show in printers if name in names]
    if not found:
        raise unknown_name("name", name, {known for _, names, _ in printers for known in names})
    for kind, show in found:
        click.echo(f"== {kind} {name} ==")
        show()


def _defense_choices() -> list[str]:
    from robbench.defenses import DEFENSES, FLOW_DEFENSES

    return [*DEFENSES, *FLOW_DEFENSES]


def _show_defense(name: str) -> None:
    from robbench.defenses import defense_kinds, find_defense

    for kind in defense_kinds(name):
        click.echo(f"trains a {kind}:")
        _show_defense_class(find_defense(name, kind))


def _show_defense_class(defense: "type[Defense]") -> None:
    click.echo(inspect.getdoc(defense) or "")
    if defense.Parameters.model_fields:
        click.echo("\nParameters (--set KEY=VALUE):")
    for field, info in defense.Parameters.model_fields.items():
        click.echo(f"  {field} = {info.get_default(call_default_factory=False)!r}")


def _show_attack(name: str, models: dict[str, ThreatModel]) -> None:
    """The spec with every parameter filled in, then budgets and absolute step sizes for every data set."""
    from robbench.attacks import ATTACKS

    owner = next(model for model in models.values() if name in model.attacks)
    spec = owner.attacks[name]
    schema = ATTACKS.get(spec.algorithm).Parameters
    parameters = validate(spec.parameters, schema, f"attack {name!r}, parameters")
    click.echo(f"threat model {owner.name} ({owner.space}, {owner.norm}): {owner.description.strip()}")
    click.echo(f"{spec.description}\nreference: {spec.reference or '-'}\nalgorithm: {spec.algorithm}")
    for key, value in parameters.model_dump().items():
        click.echo(f"  {key}: {value}")
    click.echo(f"{'data set':14} {'epsilon':10} {'eta':10} {'step size':18} note")
    for dataset, budget in owner.budgets.items():
        try:
            resolved = resolve_attack(name, dataset, models)
        except UserError:
            click.echo(f"{dataset:14} none by default; give --epsilon or --eta")
            continue
        radii = [value for value in (resolved.epsilon, resolved.eta) if value is not None]
        numbers = (_number(resolved.epsilon), _number(resolved.eta), _steps(parameters, radii))
        click.echo(f"{dataset:14} {numbers[0]:10} {numbers[1]:10} {numbers[2]:18} {budget.note}".rstrip())


def _steps(parameters: BaseModel, radii: list[float]) -> str:
    """Absolute step sizes, one a budget; "-" for an algorithm that has none or chooses its own."""
    absolute = getattr(parameters, "step_size", None)
    relative = getattr(parameters, "relative_step_size", None)
    if absolute is not None:
        return f"{absolute:g}"
    return ", ".join(f"{relative * radius:g}" for radius in radii) if relative is not None else "-"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
