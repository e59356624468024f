"""`robbench list --json` and `robbench show --json`: what there is, as objects with the keys of docs/living.md.

Numbers are numbers with every digit; what is absent is null, and never left out.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel
from pydantic_core import to_jsonable_python

from robbench import specs
from robbench.core.errors import UserError
from robbench.core.resources import dataset_root
from robbench.core.schema import validate
from robbench.data.names import BUILT_IN, dataset_names, place
from robbench.experiments import published, schema
from robbench.models.entry import DetectorEntry, ModelRequest, ZooEntry
from robbench.models.zoo import (
    detector_entries,
    find_detector_entry,
    find_model,
    is_detector,
    present_weights,
    zoo_entries,
)
from robbench.recipes import recipes
from robbench.specs import ThreatModel, listed_attacks, resolve_attack

if TYPE_CHECKING:
    from robbench.defenses import Defense

Object = dict[str, Any]


@dataclass(frozen=True)
class Folders:
    """Where to look besides what is shipped: `--threat-models`, `--zoo`, `--checkpoints`, `--data-dir`."""

    threat_models: Path | None = None
    zoo: Path | None = None
    checkpoints: Path | None = None
    data_dir: Path | None = None

    @cached_property
    def models_of_threats(self) -> dict[str, ThreatModel]:
        """The threat models by name."""
        return specs.threat_models(self.threat_models)

    @cached_property
    def entries(self) -> dict[str, ZooEntry]:
        """The models of the zoos by name."""
        return zoo_entries(self.zoo, self.checkpoints)

    @cached_property
    def detectors(self) -> dict[str, DetectorEntry]:
        """The detectors of the zoos by name."""
        return detector_entries(self.zoo)

    def has_detector(self, name: str) -> bool:
        """Whether that is the name of a detector, or the path of one's card or folder."""
        return name in self.detectors or is_detector(name)

    @cached_property
    def attacks(self) -> set[str]:
        """Names of attacks, groups and members of groups."""
        models = self.models_of_threats.values()
        return {name for model in models for name in (*model.attacks, *model.groups)}

    @cached_property
    def members(self) -> set[str]:
        """Names of the attacks that groups stand for."""
        models = self.models_of_threats.values()
        return {name for model in models for group in model.groups for name in model.members(group)}

    def entry(self, name: str) -> ZooEntry:
        """The model of that name, or of the card or folder at that path."""
        return self.entries.get(name) or find_model(
            name, self.entries, requested=ModelRequest("", checkpoints=self.checkpoints)
        )

    def owner(self, attack: str) -> ThreatModel:
        """The threat model of an attack or group."""
        models = self.models_of_threats.values()
        return next(model for model in models if attack in model.attacks or attack in model.groups)


def _fields(thing: object, *names: str) -> Object:
    """Attributes of a thing by their names; None for those it lacks."""
    return {name: getattr(thing, name, None) for name in names}


def attacks(folders: Folders) -> Iterator[Object]:
    """The attacks of all threat models; of a group's members the group alone."""
    for model in folders.models_of_threats.values():
        for name in listed_attacks({model.name: model}):
            yield _attack(name, model)


def _attack(name: str, model: ThreatModel) -> Object:
    group, spec = model.groups.get(name), model.attacks.get(name)
    return {
        "name": name,
        "target": model.target_of(name),
        "threat_model": model.name,
        **_fields(model, "space", "norm", "pixel_range"),
        "norm": getattr(spec, "norm", None) or model.norm,
        "members": list(model.members(name)) if group else None,
        "algorithm": None if group else getattr(spec, "algorithm", None),
        **_fields(group or spec, "description"),
        "reference": None if group else getattr(spec, "reference", None),
    }


def attack(name: str, folders: Folders) -> Object:
    """An attack with every parameter filled in and its numbers on every data set; of a group its members."""
    owner = folders.owner(name)
    about = _attack(name, owner)
    if name in owner.groups:
        return about
    parameters = attack_parameters(name, owner)
    models = folders.models_of_threats
    budgets = [_resolve(name, dataset, models, parameters) for dataset in owner.budgets_of(name)]
    return {**about, "parameters": parameters.model_dump(mode="json"), "budgets": budgets}


def threat_models(folders: Folders) -> Iterator[Object]:
    """The threat models and the names of their attacks."""
    for model in folders.models_of_threats.values():
        about = _fields(model, "name", "target", "space", "norm", "pixel_range")
        yield {**about, "attacks": listed_attacks({model.name: model}), "description": model.description}


def attack_parameters(name: str, owner: ThreatModel) -> BaseModel:
    """The parameters of an attack, defaults filled in; `UserError` when the threat model has wrong ones."""
    from robbench.attacks import ATTACKS

    spec = owner.attacks[name]
    return validate(spec.parameters, ATTACKS.get(spec.algorithm).Parameters, f"attack {name!r}, parameters")


def _resolve(name: str, dataset: str, models: dict[str, ThreatModel], parameters: BaseModel) -> Object:
    """Budgets and step sizes on a data set; all None where the attack has no budget there by default."""
    try:
        resolved = resolve_attack(name, dataset, models)
    except UserError:
        return {"dataset": dataset, "epsilon": None, "eta": None, "step_sizes": None}
    radii = [value for value in (resolved.epsilon, resolved.eta) if value is not None]
    steps = _step_sizes(parameters, radii)
    return {"dataset": dataset, "epsilon": resolved.epsilon, "eta": resolved.eta, "step_sizes": steps}


def _step_sizes(parameters: BaseModel, radii: list[float]) -> list[float] | None:
    """Absolute step sizes, one per budget; None for an algorithm that has none or chooses its own."""
    absolute = getattr(parameters, "step_size", None)
    relative = getattr(parameters, "relative_step_size", None)
    if absolute is not None:
        return [absolute]
    if hasattr(parameters, "step") and getattr(parameters, "optimizer", "steps") == "steps":
        return [parameters.step(radius) for radius in radii]
    return [relative * radius for radius in radii] if relative is not None else None


def models(folders: Folders) -> Iterator[Object]:
    """The models of the zoos, and where they lie; then the detectors."""
    yield from map(_model, folders.entries.values())
    yield from map(_detector, folders.detectors.values())


def _model(entry: ZooEntry) -> Object:
    card, weights = entry.card, present_weights(entry)
    return {
        **_fields(card, "name", "kind", "dataset", "defense"),
        "architecture": card.architecture.name,
        "description": card.description,
        "folder": str(entry.folder),
        "weights": None if weights is None else str(weights),
        "weights_sha256": card.weights.sha256,
    }


def _detector(entry: DetectorEntry) -> Object:
    """A detector as a line of the models: no defense; in the place of an architecture the detector's name."""
    card = entry.card
    return {
        **_fields(card, "name", "kind", "dataset", "defense"),
        "architecture": card.detector,
        "description": card.description,
        "folder": str(entry.folder),
        "weights": str(entry.file) if entry.file.is_file() else None,
        "weights_sha256": card.weights.sha256,
    }


def model(name: str, folders: Folders) -> Object:
    """What the list says of a model or detector, and its whole card."""
    if folders.has_detector(name):
        found = find_detector_entry(name, folders.detectors)
        return {**_detector(found), "card": found.card.model_dump(mode="json")}
    entry = folders.entry(name)
    return {**_model(entry), "card": entry.card.model_dump(mode="json")}


def schedules(folders: Folders) -> Iterator[Object]:
    """Training schedules. of: the command they are of, "train"; kept from when experiments were listed with them."""
    for recipe in recipes().values():
        datasets = list(recipe.default_for)
        yield {"name": recipe.name, "of": "train", "datasets": datasets, "description": recipe.description}


def defenses(folders: Folders) -> Iterator[Object]:
    """The defenses, once per kind of model they train."""
    from robbench.defenses import DEFENSES, FLOW_DEFENSES

    for kind, registry in (("classifier", DEFENSES), ("flow", FLOW_DEFENSES)):
        for name in registry:
            description = (inspect.getdoc(registry.get(name)) or "").split("\n\n")[0].replace("\n", " ")
            yield {"name": name, "trains": kind, "description": description}


def defense_names(folders: Folders) -> list[str]:
    """Names of the defenses of classifiers, then of flows."""
    from robbench.defenses import DEFENSES, FLOW_DEFENSES

    return [*DEFENSES, *FLOW_DEFENSES]


def defense(name: str, folders: Folders) -> Object:
    """What a defense of that name does to every kind of model it trains."""
    from robbench.defenses import defense_kinds, find_defense

    kinds = defense_kinds(name)
    return {"name": name, "trains": [_defense(kind, find_defense(name, kind)) for kind in kinds]}


def _defense(kind: str, defense: "type[Defense]") -> Object:
    description = inspect.getdoc(defense) or ""
    return {"kind": kind, "description": description, "parameters": _defaults(defense.Parameters)}


def detectors(folders: Folders) -> Iterator[Object]:
    """The detectors that `robbench train --detector` trains."""
    return (
        {"name": name, "description": detector(name, folders)["summary"]} for name in detector_names(folders)
    )


def detector_names(folders: Folders) -> list[str]:
    """Names of the detectors in the registry."""
    from robbench.detectors import DETECTORS

    return list(DETECTORS)


def detector(name: str, folders: Folders) -> Object:
    """What a detector looks at, and the defaults of its parameters. summary: the first paragraph."""
    from robbench.detectors import DETECTORS

    found = DETECTORS.get(name)
    description = inspect.getdoc(found) or ""
    return {
        "name": name,
        "summary": description.split("\n\n")[0].replace("\n", " "),
        "description": description,
        "parameters": _defaults(found.Parameters),
    }


def _defaults(parameters: type[BaseModel]) -> Object:
    """Default of every parameter, null for one without."""
    defaults = {key: info.default for key, info in parameters.model_fields.items()}
    found: Object = to_jsonable_python(defaults, fallback=lambda _: None)
    return found


def datasets(folders: Folders) -> Iterator[Object]:
    """The named data sets with their published sizes."""
    return (_dataset(name, folders) for name in dataset_names())


def _dataset(name: str, folders: Folders) -> Object:
    """path: where its files lie; None where they do not, and for one inside a package."""
    about = BUILT_IN.get(name)
    path = place(name, dataset_root(folders.data_dir)) if about and about.files else None
    return {
        "name": name,
        **_fields(about, "train", "test", "license", "source"),
        "embedded": about is None or not about.files,
        "path": None if path is None else str(path),
    }


def dataset(name: str, folders: Folders) -> Object:
    """What the list says of a data set, named or in a folder, and its card where it is at hand."""
    from robbench.data import load_dataset
    from robbench.data.folder import load_folder

    if name in dataset_names():
        about = _dataset(name, folders)
        here = about["embedded"] or about["path"] is not None
        card = load_dataset(name, folders.data_dir).card if here else None
        return {**about, "card": card.model_dump(mode="json") if card else None}
    card = load_folder(Path(name)).card
    about = {"name": card.name, "train": None, "test": None, "license": card.license, "source": card.source}
    return {**about, "embedded": False, "path": name, "card": card.model_dump(mode="json")}


def experiments(folders: Folders) -> Iterator[Object]:
    """The papers' tables and figures that `robbench run --experiment` runs."""
    for experiment in schema.experiments().values():
        about = _fields(experiment, "name", "source", "published", "dataset")
        yield {**about, "description": experiment.title}


def list_published_tables(folders: Folders) -> Iterator[Object]:
    """The published tables. rows: numbers, or settings; gated: numbers that a check may fail on."""
    index = published.published_index()
    return (_describe_published(table, index) for table in index.tables)


def _describe_published(table: published.Table, index: published.Index) -> Object:
    paper, rows = index.paper_of(table), published.table_rows(table)
    return {
        **_fields(table, "name", "source", "kind"),
        "rows": len(rows) if table.has_numbers else len(published.table_settings(table)),
        "gated": sum(row.gate for row in rows),
        "paper": paper.title if paper else None,
        "description": table.what,
    }


def show_published_table(name: str, folders: Folders) -> Object:
    """A published table row by row. value: as a number; printed: with the digits it was printed with."""
    index = published.published_index()
    table = published.published_table(name, index)
    paper = index.paper_of(table)
    rows = (
        [_show_published_row(row) for row in published.table_rows(table)]
        if table.has_numbers
        else [setting.model_dump(mode="json") for setting in published.table_settings(table)]
    )
    return {
        **_describe_published(table, index),
        "citation": paper.citation if paper else None,
        "numbers": rows,
    }


def _show_published_row(row: published.PublishedRow) -> Object:
    value = None if row.value is None else float(row.value)
    printed = None if row.value is None else str(row.value)
    return {**row.model_dump(mode="json"), "value": value, "printed": printed}
