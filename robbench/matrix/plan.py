"""From what the user asked to cells with everything loaded: bad input shows before any computing."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch

from robbench.attacks import Attack, Cost, Victim, build_attack
from robbench.data import Dataset, dataset_names, load_dataset, sample_ids
from robbench.defenses import DEFENSES
from robbench.device import resolve_device, versions
from robbench.errors import UserError, unknown_name
from robbench.matrix.records import CellRecord, PlanEntry, RunFile, cell_hash, join_ids
from robbench.models.flows.base import FrozenFlow
from robbench.models.loading import LoadedModel, load_flow, load_model
from robbench.models.zoo import ZooEntry, default_flow, find_model, find_models, zoo_entries
from robbench.specs import (
    FlowReference,
    ModelCard,
    ResolvedAttack,
    refuse_unused_budgets,
    resolve_attack,
    threat_models,
)

SHARD_SIZE = 120
DEFAULT_N = 1000


@dataclass(frozen=True)
class RunRequest:
    """What `robbench run` was asked for. n: None means all of digits, 1,000 of any other data set.

    epsilons, etas: budgets instead of the data set's; one cell each. keep_examples: adversarial images kept
    a cell.
    """

    attacks: tuple[str, ...]
    defenses: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    dataset: str = "digits"
    n: int | None = None
    seed: int = 0
    device: str = "auto"
    batch_size: int = 256
    flow: str | None = None
    epsilons: tuple[float, ...] = ()
    etas: tuple[float, ...] = ()
    threat_models: Path | None = None
    zoo: Path | None = None
    data_dir: Path | None = None
    keep_examples: int = 16


@dataclass(frozen=True)
class Cell:
    """One (model, attack) of the matrix, ready to run. record: its identity, status "running"."""

    record: CellRecord
    model: LoadedModel
    attack: Attack

    @property
    def cost(self) -> Cost:
        """Most model calls a sample can need."""
        return self.attack.cost


@dataclass(frozen=True)
class Plan:
    """All cells of a run, models outermost. samples: wanted ids in the order drawn."""

    dataset: Dataset
    samples: tuple[int, ...]
    run: RunFile
    cells: tuple[Cell, ...]
    cards: dict[str, ModelCard]
    nll_flow: FrozenFlow | None
    device: torch.device
    batch_size: int
    keep_examples: int

    def blocks(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(number, sample ids) of the shards-to-be, `SHARD_SIZE` samples each."""
        for start in range(0, len(self.samples), SHARD_SIZE):
            yield start // SHARD_SIZE, self.samples[start : start + SHARD_SIZE]


def build_plan(request: RunRequest) -> Plan:
    """Resolve names, load data and models, build attacks, and try every model on a few images.

    Everything the user can get wrong raises `UserError` here.
    """
    device = resolve_device(request.device)
    if request.dataset not in dataset_names():
        raise unknown_name("data set", request.dataset, dataset_names())
    entries = zoo_entries(request.zoo)
    attacks = _resolved_attacks(request)
    chosen = _chosen_models(request, entries)
    flow_entry = _chosen_flow(request, entries)
    dataset = load_dataset(request.dataset, request.data_dir)
    samples = tuple(sample_ids(dataset.test, _count(request, dataset), request.seed))
    frozen = load_flow(flow_entry, device) if flow_entry else None
    built = [build_attack(attack, frozen) for attack in attacks]
    models = [_tried(load_model(entry, device), dataset, samples, device) for entry in chosen]
    revision = dataset.revision
    flow_card = flow_entry.card if flow_entry else None
    cells = tuple(
        Cell(_record(model.card, attack, flow_card, request, revision), model, attack)
        for model, attack in product(models, built)
    )
    return Plan(
        dataset=dataset,
        samples=samples,
        run=_run_file(dataset, revision, request.seed, samples, cells),
        cells=cells,
        cards={model.card.name: model.card for model in models},
        nll_flow=frozen,
        device=device,
        batch_size=request.batch_size,
        keep_examples=request.keep_examples,
    )


def _resolved_attacks(request: RunRequest) -> list[ResolvedAttack]:
    if not request.attacks:
        raise UserError(
            "--attacks names none; give some, as in --attacks pgd20,aa (see robbench list attacks)"
        )
    known = threat_models(request.threat_models)
    budgets = product(request.epsilons or (None,), request.etas or (None,))
    resolved = (
        resolve_attack(name, request.dataset, known, epsilon, eta)
        for (epsilon, eta), name in product(list(budgets), request.attacks)
    )
    attacks = list(resolved)
    refuse_unused_budgets(attacks, request.epsilons, request.etas)
    # A latent attack ignores --epsilon, an image attack --eta: the same cell, asked for more than once.
    return list({attack.label: attack for attack in attacks}.values())


def _chosen_models(request: RunRequest, entries: dict[str, ZooEntry]) -> list[ZooEntry]:
    if not request.models and not request.defenses:
        raise UserError("nothing to attack; give --defense or --model (see robbench list models)")
    known = {*DEFENSES, *(entry.card.defense for entry in entries.values())}
    chosen: list[ZooEntry] = []
    for defense in request.defenses:
        if defense not in known:
            raise unknown_name("defense", defense, known)
        if defense in DEFENSES and "classifier" not in DEFENSES.get(defense).kinds:
            raise UserError(
                f"--defense {defense!r} trains flows, which cannot be attacked; see robbench list defenses"
            )
        chosen += find_models(defense, request.dataset, entries)
    chosen += [_checked_classifier(find_model(name, entries), request.dataset) for name in request.models]
    unique: dict[str, ZooEntry] = {}
    for entry in chosen:
        other = unique.setdefault(entry.card.name, entry)
        if other.folder.resolve() != entry.folder.resolve():
            raise UserError(
                f"two models are called {entry.card.name!r}: {other.folder} and {entry.folder}; rename one"
            )
    return list(unique.values())


def _checked_classifier(entry: ZooEntry, dataset: str) -> ZooEntry:
    card = entry.card
    if card.kind != "classifier":
        raise UserError(f"--model {card.name!r} is a {card.kind}, not a classifier; see robbench list models")
    if card.dataset != dataset:
        raise UserError(
            f"--model {card.name!r} classifies {card.dataset}, not {dataset}; "
            f"give --dataset {card.dataset}, or another model"
        )
    return entry


def _chosen_flow(request: RunRequest, entries: dict[str, ZooEntry]) -> ZooEntry | None:
    if request.flow is None:
        return default_flow(request.dataset, entries)
    entry = find_model(request.flow, entries, "flow")
    if entry.card.kind != "flow":
        raise UserError(
            f"--flow {request.flow!r} is no flow but a {entry.card.kind}; see robbench list models"
        )
    if entry.card.dataset != request.dataset:
        raise UserError(
            f"--flow {request.flow!r} models {entry.card.dataset}, not {request.dataset}; name another flow"
        )
    return entry


def _count(request: RunRequest, dataset: Dataset) -> int | None:
    if request.n is not None or dataset.name == "digits":
        return request.n
    return min(DEFAULT_N, len(dataset.test))


def _tried(model: LoadedModel, dataset: Dataset, samples: Sequence[int], device: torch.device) -> LoadedModel:
    """The model, after it classified a block of images: NaN and wrong shapes show before any attack runs."""
    name = model.card.name
    if model.card.input_shape != dataset.shape:
        raise UserError(
            f"model {name!r} takes images {model.card.input_shape}, {dataset.name} has {dataset.shape}; "
            f"give a model of this data set"
        )
    x, _ = dataset.test.by_ids(samples[:SHARD_SIZE])
    try:
        logits = Victim(model.module, device, SHARD_SIZE).clean_logits(x)
    except UserError as error:
        raise UserError(f"model {name!r}: {error}") from error
    except RuntimeError as error:
        raise UserError(
            f"model {name!r} fails on images {dataset.shape}: {' '.join(str(error).split())[:160]}; "
            f"correct its architecture or weights"
        ) from error
    if logits.shape[1] != dataset.classes:
        raise UserError(
            f"model {name!r} returns {logits.shape[1]} logits an image, {dataset.name} has {dataset.classes} "
            f"classes; give a model of this data set"
        )
    return model


def _record(
    card: ModelCard, attack: Attack, flow: ModelCard | None, request: RunRequest, revision: str
) -> CellRecord:
    spec = attack.spec
    attack_flow = flow if spec.needs_flow else None
    batch = min(request.batch_size, SHARD_SIZE) if attack.batch_dependent else None
    seed, dataset = request.seed, request.dataset
    return CellRecord(
        hash=cell_hash(card, spec, attack_flow, flow, attack.engine, batch, dataset, revision, seed),
        model=card.name,
        defense=card.defense,
        dataset=dataset,
        dataset_revision=revision,
        seed=seed,
        attack=spec,
        model_sha256=card.weights.sha256,
        attack_flow=_reference(attack_flow),
        nll_flow=_reference(flow),
        engine=attack.engine,
        batch_size=batch,
    )


def _reference(card: ModelCard | None) -> FlowReference | None:
    return FlowReference(name=card.name, sha256=card.weights.sha256) if card else None


def _run_file(
    dataset: Dataset, revision: str, seed: int, samples: Sequence[int], cells: Sequence[Cell]
) -> RunFile:
    records = [cell.record for cell in cells]
    return RunFile(
        dataset=dataset.name,
        dataset_revision=revision,
        seed=seed,
        shape=dataset.shape,
        class_names=dataset.class_names,
        n=len(samples),
        models=tuple(dict.fromkeys(record.model for record in records)),
        attacks=tuple(dict.fromkeys(record.attack.label for record in records)),
        cells=tuple(
            PlanEntry(hash=r.hash, model=r.model, defense=r.defense, attack=r.attack.label) for r in records
        ),
        versions=versions(),
        samples=join_ids(samples),
    )
