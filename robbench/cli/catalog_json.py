"""`robbench list --json` and `robbench show --json`: what there is, as objects with the keys of docs/living.md.

Numbers are numbers with every digit; what is absent is null, and never left out.
"""

import inspect
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from robbench.core.errors import UserError
from robbench.core.resources import dataset_root
from robbench.core.schema import validate
from robbench.data.names import BUILT_IN, dataset_names, place
from robbench.defenses.recipes import recipes
from robbench.experiments.published import (
    Index,
    PublishedRow,
    Table,
    published_index,
    table_rows,
    table_settings,
)
from robbench.experiments.schema import experiments
from robbench.models.entry import ZooEntry
from robbench.models.zoo import present_weights, zoo_entries
from robbench.specs import ThreatModel, listed_attacks, resolve_attack, threat_models

if TYPE_CHECKING:
    from robbench.defenses import Defense

Object = dict[str, Any]


def listed_objects(
    kind: str, threat_model_folder: Path | None, zoo: Path | None, data_dir: Path | None
) -> list[Object]:
    """The entries of one kind, in the order of `robbench list`."""
    if kind == "attacks":
        return list(_attacks(threat_models(threat_model_folder)))
    if kind == "threat-models":
        return [_threat_model(model) for model in threat_models(threat_model_folder).values()]
    if kind == "models":
        return [_model(entry) for entry in zoo_entries(zoo).values()]
    if kind == "recipes":
        return list(_recipes())
    if kind == "published":
        index = published_index()
        return [_published(table, index) for table in index.tables]
    if kind == "datasets":
        return [_dataset(name, data_dir) for name in dataset_names()]
    return list(_defenses())


# -------------------------------------------------------------------------------------------------------- list
def _attacks(models: dict[str, ThreatModel]) -> Iterator[Object]:
    for model in models.values():
        for name in listed_attacks({model.name: model}):
            group = model.groups.get(name)
            spec = group or model.attacks[name]
            yield {
                "name": name,
                "target": model.target,
                "threat_model": model.name,
                "space": model.space,
                "norm": model.norm,
                "pixel_range": model.pixel_range,
                "members": list(model.members(name)) if group else None,
                "algorithm": None if group else model.attacks[name].algorithm,
                "description": spec.description,
                "reference": None if group else model.attacks[name].reference,
            }


def _threat_model(model: ThreatModel) -> Object:
    return {
        "name": model.name,
        "target": model.target,
        "space": model.space,
        "norm": model.norm,
        "pixel_range": model.pixel_range,
        "attacks": listed_attacks({model.name: model}),
        "description": model.description,
    }


def _model(entry: ZooEntry) -> Object:
    card, weights = entry.card, present_weights(entry)
    return {
        "name": card.name,
        "kind": card.kind,
        "dataset": card.dataset,
        "defense": card.defense,
        "architecture": card.architecture.name,
        "description": card.description,
        "folder": str(entry.folder),
        "weights": None if weights is None else str(weights),
        "weights_sha256": card.weights.sha256,
    }


def _recipes() -> Iterator[Object]:
    for experiment in experiments().values():
        yield {
            "name": experiment.name,
            "of": "run",
            "datasets": [experiment.dataset],
            "description": experiment.title,
        }
    for recipe in recipes().values():
        yield {
            "name": recipe.name,
            "of": "train",
            "datasets": list(recipe.default_for),
            "description": recipe.description,
        }


def _published(table: Table, index: Index) -> Object:
    paper, rows = index.paper_of(table), table_rows(table)
    return {
        "name": table.name,
        "source": table.source,
        "kind": table.kind,
        "rows": len(rows) if table.has_numbers else len(table_settings(table)),
        "gated": sum(row.gate for row in rows),
        "paper": paper.title if paper else None,
        "description": table.what,
    }


def _dataset(name: str, data_dir: Path | None) -> Object:
    """Sizes as published. path: where its files lie; None where they do not, and for one inside a package."""
    about = BUILT_IN.get(name)
    path = place(name, dataset_root(data_dir)) if about and about.files else None
    return {
        "name": name,
        "train": about.train if about else None,
        "test": about.test if about else None,
        "license": about.license if about else None,
        "source": about.source if about else None,
        "embedded": about is None or not about.files,
        "path": None if path is None else str(path),
    }


def _defenses() -> Iterator[Object]:
    from robbench.defenses import DEFENSES, FLOW_DEFENSES

    for kind, registry in (("classifier", DEFENSES), ("flow", FLOW_DEFENSES)):
        for name in registry:
            description = (inspect.getdoc(registry.get(name)) or "").split("\n\n")[0].replace("\n", " ")
            yield {"name": name, "trains": kind, "description": description}


# -------------------------------------------------------------------------------------------------------- show
def attack_object(name: str, models: dict[str, ThreatModel]) -> Object:
    """An attack with every parameter filled in and its numbers on every data set; of a group its members."""
    owner = next(model for model in models.values() if name in (*model.attacks, *model.groups))
    about = next(found for found in _attacks_of(owner) if found["name"] == name)
    if about["members"] is not None:
        return about
    parameters = attack_parameters(name, owner)
    budgets = [_resolved(name, dataset, models, parameters) for dataset in owner.budgets_of(name)]
    return {**about, "parameters": parameters.model_dump(mode="json"), "budgets": budgets}


def _attacks_of(model: ThreatModel) -> Iterator[Object]:
    """All attacks of a threat model, members of groups too."""
    yield from _attacks({model.name: model})
    alone = model.model_copy(update={"groups": {}})
    yield from _attacks({model.name: alone})


def attack_parameters(name: str, owner: ThreatModel) -> BaseModel:
    """The parameters of an attack, defaults filled in; `UserError` when the threat model has wrong ones."""
    from robbench.attacks import ATTACKS

    spec = owner.attacks[name]
    return validate(spec.parameters, ATTACKS.get(spec.algorithm).Parameters, f"attack {name!r}, parameters")


def step_sizes(parameters: object, radii: Iterable[float]) -> list[float] | None:
    """Absolute step sizes, one a budget; None for an algorithm that has none or chooses its own."""
    absolute = getattr(parameters, "step_size", None)
    relative = getattr(parameters, "relative_step_size", None)
    if absolute is not None:
        return [absolute]
    return [relative * radius for radius in radii] if relative is not None else None


def _resolved(name: str, dataset: str, models: dict[str, ThreatModel], parameters: object) -> Object:
    """Budgets and step sizes on a data set; all None where the attack has no budget there by default."""
    try:
        resolved = resolve_attack(name, dataset, models)
    except UserError:
        return {"dataset": dataset, "epsilon": None, "eta": None, "step_sizes": None}
    radii = [value for value in (resolved.epsilon, resolved.eta) if value is not None]
    steps = step_sizes(parameters, radii)
    return {"dataset": dataset, "epsilon": resolved.epsilon, "eta": resolved.eta, "step_sizes": steps}


def model_object(entry: ZooEntry) -> Object:
    """What the list says of a model, and its whole card."""
    return {**_model(entry), "card": entry.card.model_dump(mode="json")}


def dataset_object(name: str, data_dir: Path | None) -> Object:
    """What the list says of a data set, and its card where it is at hand."""
    from robbench.data import load_dataset
    from robbench.data.folder import load_folder

    if name not in dataset_names():
        card = load_folder(Path(name)).card
        listed = {
            "name": card.name,
            "train": None,
            "test": None,
            "license": card.license,
            "source": card.source,
        }
        return {**listed, "embedded": False, "path": name, "card": card.model_dump(mode="json")}
    about = _dataset(name, data_dir)
    here = about["embedded"] or about["path"] is not None
    return {**about, "card": load_dataset(name, data_dir).card.model_dump(mode="json") if here else None}


def defense_object(name: str) -> Object:
    """What a defense of that name does to every kind of model it trains."""
    from robbench.defenses import defense_kinds, find_defense

    return {
        "name": name,
        "trains": [_defense(kind, find_defense(name, kind)) for kind in defense_kinds(name)],
    }


def _defense(kind: str, defense: "type[Defense]") -> Object:
    defaults = {key: info.default for key, info in defense.Parameters.model_fields.items()}
    parameters = to_jsonable_python(defaults, fallback=lambda _: None)
    return {"kind": kind, "description": inspect.getdoc(defense) or "", "parameters": parameters}


def published_object(table: Table, index: Index) -> Object:
    """A published table row by row. value: as a number; printed: with the digits it was printed with."""
    paper = index.paper_of(table)
    rows = (
        [_published_row(row) for row in table_rows(table)]
        if table.has_numbers
        else [setting.model_dump(mode="json") for setting in table_settings(table)]
    )
    about = _published(table, index)
    return {**about, "citation": paper.citation if paper else None, "numbers": rows}


def _published_row(row: PublishedRow) -> Object:
    value = None if row.value is None else float(row.value)
    return {
        **row.model_dump(mode="json"),
        "value": value,
        "printed": None if row.value is None else str(row.value),
    }
