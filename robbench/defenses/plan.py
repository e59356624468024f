"""From the arguments of `robbench train` to a checked plan; bad input is refused before any computation."""

import inspect
import re
import shlex
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from robbench.attacks.codec import FlowCodec
from robbench.cards import Architecture, FlowReference
from robbench.core.device import resolve_device
from robbench.core.errors import UserError
from robbench.core.foreign import foreign_code
from robbench.core.locks import LockHeldError, file_lock
from robbench.core.places import check_output_folder
from robbench.core.schema import canonical_hash, validate
from robbench.data import Dataset, Split, load_dataset
from robbench.data.card import family
from robbench.defenses.base import Defense, Setting, build_defense, defense_kinds, find_defense
from robbench.defenses.schedule import (
    check_augmentation,
    find_recipe,
    load_recipe,
    stratified_positions,
    training_splits,
)
from robbench.defenses.selection import SplitWords
from robbench.defenses.settings import group_settings, yaml_value
from robbench.models.classifiers import ARCHITECTURES
from robbench.models.entry import ZooEntry
from robbench.models.loading import is_flow, load_flow
from robbench.models.zoo import default_flow, find_model, zoo_entries
from robbench.recipes import Recipe
from robbench.specs import ModelKind, threat_models

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
OWN_FILES = ("weights.safetensors", "golden.safetensors")
# Seed of the scored validation images where a recipe limits their number; the same for every training.
SCORED_SEED = 20260103
CHECK_EVERY = 8  # batches between checks that the flow inverts itself, which take a decode each


@dataclass(frozen=True)
class TrainRequest:
    """Arguments of `robbench train`. None means the default of data set and defense.

    Attributes:
        defense, dataset, recipe, architecture, flow: names.
        architecture_arguments: arguments of the architecture.
        seed, epochs, train_samples: of the training.
        name, out: the zoo folder that is written is `out`/`name`.
        device: "auto", "cpu", "cuda", "cuda:1".
        data_dir: folder of downloaded data sets.
        data: folder of the user's own data set, whose card has the name `dataset`.
        zoo, threat_models: extra folders.
        overrides: of `--set key=value`: parameters of the defense, or with "recipe.KEY" and "architecture.KEY" those of
            recipe and architecture. Text values are read as YAML.
        validation_samples: keep only so many validation images, drawn once for all trainings.
        note: for the card.
    """

    defense: str
    dataset: str
    recipe: str | None = None
    architecture: str | None = None
    architecture_arguments: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    epochs: int | None = None
    train_samples: int | None = None
    flow: str | None = None
    name: str | None = None
    out: Path = Path("robbench-training")
    device: str = "auto"
    data_dir: str | Path | None = None
    data: str | Path | None = None
    zoo: str | Path | None = None
    threat_models: str | Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)
    validation_samples: int | None = None
    note: str = ""

    @property
    def family(self) -> str:
        """The data set whose recipes, budgets and flow are the defaults: that of `like` in the card of `data`."""
        return family(self.dataset, None if self.data is None else Path(self.data))

    @property
    def command(self) -> str:
        """The command line that trains the same weights again (without places: output, data, device)."""
        options = {
            "--defense": self.defense,
            "--dataset": self.dataset if self.data is None else None,
            "--data": self.data,
            "--recipe": self.recipe,
            "--architecture": self.architecture,
            "--seed": self.seed,
            "--epochs": self.epochs,
            "--train-samples": self.train_samples,
            "--flow": self.flow,
            "--name": self.name,
            "--zoo": self.zoo,
            "--threat-models": self.threat_models,
        }
        words = [word for key, value in options.items() if value is not None for word in (key, str(value))]
        settings = {
            **{f"architecture.{k}": v for k, v in self.architecture_arguments.items()},
            **self.overrides,
        }
        for key, value in settings.items():
            words += ["--set", f"{key}={value if isinstance(value, str) else yaml_value(value)}"]
        return shlex.join(["robbench", "train", *words])


@dataclass(frozen=True)
class Plan:
    """A checked request.

    Attributes:
        request: arguments of the user.
        name, kind: of the trained model.
        recipe, architecture, dataset: with defaults filled in.
        train, validation: training and validation images.
        scored: validation images that select the epoch.
        flow: the zoo flow that the defense uses.
        setting, defense, device: the objective, and where it is computed.
    """

    request: TrainRequest
    name: str
    kind: ModelKind
    recipe: Recipe
    architecture: Architecture
    dataset: Dataset
    train: Split
    validation: Split
    scored: Split
    flow: FlowReference | None
    setting: Setting
    defense: Defense
    device: torch.device

    @property
    def folder(self) -> Path:
        """The finished zoo folder."""
        return self.request.out / self.name

    @property
    def checkpoint(self) -> Path:
        """Checkpoint file, deleted when the folder is finished."""
        return self.request.out / f"{self.name}.checkpoint.pt"

    @property
    def holds_out(self) -> bool:
        """Whether training and validation images are disjoint."""
        return self.recipe.hold_out or self.request.train_samples is not None

    @property
    def about(self) -> SplitWords:
        """How a card describes the validation images."""
        if not self.holds_out:
            return "train", "images of the training: this schedule holds none out"
        chosen = self.recipe.selection == "validation"
        return "validation", f"the epoch was {'chosen' if chosen else 'not chosen'} on this split"

    @property
    def schedule(self) -> dict[str, Any]:
        """The numbers of the recipe, see `schedule_of`."""
        return schedule_of(self.recipe)

    @property
    def identity(self) -> dict[str, Any]:
        """Plain values that determine the weights; a checkpoint is resumed only where they are equal."""
        content = (
            {}
            if self.request.data is None
            else {"content": self.dataset.card.model_dump(mode="json")["splits"]}
        )
        return {
            **content,
            "defense": self.request.defense,
            "dataset": self.request.dataset,
            "images": canonical_hash([self.train.ids.tolist(), self.scored.ids.tolist()]),
            "train_samples": len(self.train),
            "seed": self.request.seed,
            "recipe": self.schedule,
            "architecture": self.architecture.model_dump(mode="json"),
            "parameters": self.defense.parameters.model_dump(mode="json"),
            "flow": None if self.flow is None else self.flow.model_dump(mode="json"),
            "device": self.device.type,
        }


@dataclass(frozen=True)
class Outline:
    """The part of a plan that needs no data and no flow. parameters: given ones of the defense."""

    kind: ModelKind
    recipe: Recipe
    architecture: Architecture
    parameters: dict[str, Any]


def outline(request: TrainRequest) -> Outline:
    """The outline of a request; `UserError` for an unknown or malformed part."""
    settings = group_settings(request.overrides)
    kind = _kind(request)
    recipe = _override(find_recipe(request.recipe, request.family, kind), request.epochs, settings["recipe"])
    check_augmentation(recipe)
    arguments = {**request.architecture_arguments, **settings["architecture"]}
    architecture = _architecture(request.architecture, arguments, recipe, kind)
    parameters = {**recipe.parameters.get(request.defense, {}), **settings["defense"]}
    return Outline(kind, recipe, architecture, parameters)


def schedule_of(recipe: Recipe) -> dict[str, Any]:
    """The numbers of a recipe as cards record them: without texts, architecture and parameters of defenses."""
    texts = {"name", "description", "reference", "default_for", "parameters", "architecture"}
    numbers = recipe.model_dump(mode="json", exclude=texts)
    if recipe.hold_out:  # as in old records, which have no hold_out
        del numbers["hold_out"]
    return numbers


def make_plan(request: TrainRequest) -> Plan:
    """The plan of a request; `UserError` for all errors of the user."""
    outlined = outline(request)
    kind, recipe, architecture = outlined.kind, outlined.recipe, outlined.architecture
    name = _model_name(request, architecture, kind)
    check_places(request.out, name)  # before data and flows are loaded
    device = resolve_device(request.device)
    dataset = load_dataset(request.dataset, request.data_dir, request.data)
    dataset.require_training("training a model")
    train, validation = training_splits(dataset, request.train_samples, recipe, request.seed)
    validation = _draw_images(validation, request.validation_samples)
    flow, codec = _flow(request, kind, dataset, device)
    setting = Setting(request.family, threat_models(request.threat_models), codec)
    with foreign_code(f"defense {request.defense!r}", "repair the package that it comes from"):
        defense = build_defense(request.defense, outlined.parameters, setting, kind)
    check_places(request.out, name)
    return Plan(
        request=request,
        name=name,
        kind=kind,
        recipe=recipe,
        architecture=architecture,
        dataset=dataset,
        train=train,
        validation=validation,
        scored=_draw_images(validation, recipe.validation_samples),
        flow=flow,
        setting=setting,
        defense=defense,
        device=device,
    )


def _kind(request: TrainRequest) -> ModelKind:
    """Kind of the model: of the named architecture or recipe, else the first kind that the defense trains."""
    kinds = defense_kinds(request.defense)
    requested = _requested_kind(request) or kinds[0]
    if requested not in kinds:
        option = "--recipe" if request.architecture is None else "--architecture"
        raise UserError(
            f"defense {request.defense!r} trains a {' or a '.join(kinds)} and {option} "
            f"{request.architecture or request.recipe!r} is for a {requested}; choose another {option} or --defense"
        )
    return requested


def _requested_kind(request: TrainRequest) -> ModelKind | None:
    if request.architecture is not None:
        return "flow" if is_flow(Architecture(name=request.architecture)) else "classifier"
    return None if request.recipe is None else load_recipe(request.recipe).kind


def _override(recipe: Recipe, epochs: int | None, settings: Mapping[str, Any]) -> Recipe:
    changed = dict(settings) if epochs is None else {**settings, "epochs": epochs}
    origin = f"recipe {recipe.name!r} with --epochs and --set recipe.*"
    return validate({**recipe.model_dump(), **changed}, Recipe, origin)


def _architecture(
    name: str | None, arguments: Mapping[str, Any], recipe: Recipe, kind: ModelKind
) -> Architecture:
    default = recipe.architecture
    if name is None:
        if default is None or is_flow(default) != (kind == "flow"):
            raise UserError(f"recipe {recipe.name!r} names no {kind} architecture; give --architecture NAME")
        name = default.name
    base = default.arguments if default is not None and default.name == name else {}
    return Architecture(name=name, arguments={**_stated_defaults(name), **base, **arguments})


def _stated_defaults(architecture: str) -> dict[str, Any]:
    """Defaults of a flow that every card states, because bits/dim and decoded images depend on them."""
    known = inspect.signature(ARCHITECTURES.get(architecture)).parameters
    return {name: known[name].default for name in ("preprocessing", "decode_mode") if name in known}


def _model_name(request: TrainRequest, architecture: Architecture, kind: ModelKind) -> str:
    ending = request.defense
    if kind == "flow":  # the clean Glow of a data set is "<dataset>-glow": what attacks look for
        ending = architecture.name if request.defense == "clean" else f"{architecture.name}-{request.defense}"
    name = request.name or f"{request.dataset}-{ending}"
    if not NAME.fullmatch(name):
        raise UserError(
            f"--name {name!r} is not a folder name; use at most 100 letters, digits, dots, dashes and "
            f"underscores"
        )
    return name


@contextmanager
def training_lock(folder: Path) -> Iterator[None]:
    """Inside, hold OUT/.NAME.lock (the empty file stays) of the model folder OUT/NAME: two trainings of one name would
    overwrite each other's files. `UserError` while another process holds it."""
    folder.parent.mkdir(parents=True, exist_ok=True)  # `check_places` has tested that this works
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder.parent / f".{folder.name}.lock"))
        except LockHeldError as error:
            raise UserError(
                f"another robbench train is writing to {str(folder)!r}{error.process}; wait for it, or choose "
                f"another --name or --out"
            ) from error
        yield


def check_places(out: Path, name: str) -> None:
    """`UserError` when the folder is finished already, holds something else, or cannot be written."""
    folder = out / name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; choose another --name or --out")
    if (folder / "card.yaml").exists():
        raise UserError(f"{folder} holds a finished model; choose another --name or --out, or move it away")
    foreign = (
        sorted(path.name for path in folder.iterdir() if not _is_leftover(path.name))
        if folder.exists()
        else []
    )
    if foreign:
        raise UserError(
            f"{folder} holds something else ({', '.join(foreign[:3])}); choose another --name or --out"
        )
    check_output_folder(out)


def _is_leftover(name: str) -> bool:
    """Whether a training that was killed while writing its folder left this file."""
    return name in OWN_FILES or (name.startswith(".") and name.endswith(".tmp"))


def _draw_images(validation: Split, n: int | None) -> Split:
    """`n` validation images with equal class shares, None for all."""
    if n is None or n >= len(validation):
        return validation
    return validation.subset(stratified_positions(validation.labels, n, SCORED_SEED))


def _flow(
    request: TrainRequest, kind: ModelKind, dataset: Dataset, device: torch.device
) -> tuple[FlowReference | None, FlowCodec | None]:
    """The flow of a latent or joint defense; None where none is needed or found (which the defense then reports)."""
    if not find_defense(request.defense, kind).needs_flow:
        if request.flow is not None:
            raise UserError(
                f"--flow {request.flow!r}: defense {request.defense!r} uses no flow; leave --flow out"
            )
        return None, None
    entry = _flow_entry(request, dataset)
    if entry is None:
        return None, None
    reference = FlowReference(name=entry.card.name, sha256=entry.card.weights.sha256)
    return reference, FlowCodec(load_flow(entry, device), CHECK_EVERY)


def _flow_entry(request: TrainRequest, dataset: Dataset) -> ZooEntry | None:
    entries = zoo_entries(request.zoo)
    if request.flow is None:
        return default_flow(request.family, entries)
    entry = find_model(request.flow, entries, "flow")
    if entry.card.kind != "flow" or tuple(entry.card.input_shape) != dataset.shape:
        raise UserError(
            f"--flow {request.flow!r} is a {entry.card.kind} for images {tuple(entry.card.input_shape)}; "
            f"name a flow for images {dataset.shape}"
        )
    return entry
