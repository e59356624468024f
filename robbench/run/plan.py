"""From the user's request to cells with everything loaded; bad input is refused before any computation."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import torch

from robbench.cards import ModelCard
from robbench.core.device import resolve_device, versions
from robbench.core.errors import UserError, unknown_name
from robbench.data import Dataset, load_dataset, sample_ids
from robbench.data.card import require_dataset
from robbench.data.corruptions import located
from robbench.defenses import DEFENSES, FLOW_DEFENSES
from robbench.models.code import has_scheme
from robbench.models.entry import ModelRequest, ZooEntry
from robbench.models.flows.base import FrozenFlow
from robbench.models.loading import load_flow
from robbench.models.zoo import default_flow, detector_entries, find_model, find_models, zoo_entries
from robbench.run.cells import SHARD_SIZE, Cell, CellBuilder
from robbench.run.ray_backend import RayOptions, ray_options
from robbench.run.request import RunRequest
from robbench.specs import (
    ATTACKED_BY,
    ModelKind,
    ResolvedAttack,
    ThreatModel,
    expand_groups,
    from_surrogate,
    importance_weighted,
    refuse_unused_budgets,
    resolve_attack,
    threat_models,
)
from robbench.store.records import RunFile

DEFAULT_N = 1000


@dataclass(frozen=True)
class Plan:
    """A run with everything loaded and nothing computed.

    Attributes:
        dataset: the data set.
        samples: requested sample ids in the order drawn.
        run: content of run.yaml.
        cells: all (model, attack), models outermost.
        cards: cards of the models, by name.
        nll_flow: flow of the bits/dim of attacks on classifiers; None for no scores.
        device: of models and flow.
        batch_size: images per batch.
        keep_examples: number of adversarial images stored per cell.
        compiled: whether attacks search classifiers with torch.compile.
        ray: options of the Ray backend; None for the local one.
        warnings: suspicions about models before they are attacked, one line each.
        remarks: what else to tell before the run, one line each.
    """

    dataset: Dataset
    samples: tuple[int, ...]
    run: RunFile
    cells: tuple[Cell, ...]
    cards: dict[str, ModelCard]
    nll_flow: FrozenFlow | None
    device: torch.device
    batch_size: int
    keep_examples: int
    compiled: bool = False
    ray: RayOptions | None = None
    warnings: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        builder: CellBuilder,
        cells: Sequence[Cell],
        cards: Sequence[ModelCard],
        keep_examples: int,
        note: str = "",
    ) -> "Plan":
        """The plan of cells that `builder` made of the models of these cards."""
        data = builder.dataset
        run = RunFile.of(
            [cell.record for cell in cells],
            builder.samples,
            dataset=data.name,
            dataset_revision=data.revision,
            seed=builder.seed,
            shape=data.shape,
            class_names=data.class_names,
            data=data.card,
            versions=versions(),
            note=note,
        )
        return cls(
            dataset=data,
            samples=builder.samples,
            run=run,
            cells=tuple(cells),
            cards={card.name: card for card in cards},
            nll_flow=builder.flow,
            device=builder.device,
            batch_size=builder.batch_size,
            keep_examples=keep_examples,
            compiled=builder.compiled,
        )

    def blocks(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(number, sample ids) of the shards, `SHARD_SIZE` samples each."""
        for start in range(0, len(self.samples), SHARD_SIZE):
            yield start // SHARD_SIZE, self.samples[start : start + SHARD_SIZE]


def build_plan(request: RunRequest) -> Plan:
    """Resolve names, load data and models, build attacks, and test every model on a few images; `UserError` for all
    errors of the user."""
    ray = ray_options(request.backend, request.ray_address, request.gpus_per_cell, request.device)
    device = resolve_device(request.device)
    require_dataset(request.dataset, request.data)
    entries = zoo_entries(request.zoo, request.checkpoints)
    data = cache(lambda: load_dataset(request.dataset, request.data_dir, request.data))
    attacks = _resolve_attacks(request)
    requested = _model_request(request, data)
    chosen = _choose_models(request, attacks, entries, requested)
    classifiers = any(entry.card.kind != "flow" for entry in chosen)
    if request.flow is not None and not classifiers:
        raise UserError(
            f"--flow {request.flow!r} is for latent attacks and bits/dim of classifiers, none is attacked here; "
            f"leave it out, or name the flow to attack with --model"
        )
    flow_entry = _choose_flow(request, entries, requested) if classifiers else None
    surrogate = _choose_surrogate(request, entries, requested)
    dataset = data()
    if surrogate is not None:
        surrogate = surrogate.restricted(dataset.logits)
        card = surrogate.card
        attacks = [from_surrogate(one, card.name, card.weights.sha256, card.function_hash) for one in attacks]
    chosen = [entry.restricted(dataset.logits) for entry in chosen]
    warnings: list[str] = []
    misfit = _misfit(flow_entry, dataset) if request.flow is None else ""
    flow_entry = None if misfit else flow_entry
    _require_fitting_flow(flow_entry, dataset)
    attacks = located(attacks, dataset)
    samples = tuple(sample_ids(dataset.test, _sample_count(request, dataset), request.seed))
    builder = CellBuilder(
        seed=request.seed,
        batch_size=request.batch_size,
        compiled=request.compiled,
        likelihood_dtype=torch.float64 if request.likelihood_dtype == "float64" else torch.float32,
        dataset=dataset,
        samples=samples,
        device=device,
        flow=load_flow(flow_entry, device) if flow_entry else None,
        flow_card=flow_entry.card if flow_entry else None,
        warn=warnings.append,
    )
    if surrogate is not None:
        builder = replace(builder, surrogate=builder.try_surrogate(surrogate))
    cells = list(builder.cells(chosen, attacks))
    given = {one.card.name: one.named for one in chosen if one.named and one.named not in entries}
    plan = Plan.of(builder, cells, [entry.card for entry in chosen], request.keep_examples, request.note)
    return replace(
        plan,
        run=plan.run.model_copy(update={"options": dict(request.options), "given": given}),
        ray=ray,
        warnings=tuple(warnings),
        remarks=tuple(filter(None, [misfit])),
    )


def _resolve_attacks(request: RunRequest) -> list[ResolvedAttack]:
    if request.resolved:
        return list(request.resolved)
    if not request.attacks:
        raise UserError(
            "--attacks names none; give some, as in --attacks pgd20,aa (see robbench list attacks)"
        )
    known = threat_models(request.threat_models)
    settings = product(request.epsilons or (None,), request.etas or (None,), request.steps or (None,))
    resolved = (
        resolve_attack(
            name, _dataset_with_budgets(name, request, known), known, epsilon, eta, steps, request.target
        )
        for (epsilon, eta, steps), name in product(list(settings), expand_groups(request.attacks, known))
    )
    attacks = [importance_weighted(attack, request.likelihood_draws or 1) for attack in resolved]
    refuse_unused_budgets(attacks, request.epsilons, request.etas, request.steps)
    if request.compiled and all(attack.target == "flow" for attack in attacks):
        raise UserError("--compile is for searches on classifiers and none is asked for; leave it out")
    for option, given in (("dtype", request.likelihood_dtype), ("draws", request.likelihood_draws)):
        if given is not None and all(attack.target != "flow" for attack in attacks):
            raise UserError(
                f"--likelihood-{option} {given} changes none of these attacks; leave it out, or ask for "
                f"an attack on a flow's likelihood (nll-in, nll-out, noise)"
            )
    # A latent attack ignores --epsilon, an image attack --eta: the same cell may be requested more than once.
    return list({attack.label: attack for attack in attacks}.values())


def _dataset_with_budgets(attack: str, request: RunRequest, known: dict[str, ThreatModel]) -> str:
    """The data set whose budgets the attack uses: the first of `request.datasets` that its threat model lists."""
    owners = [model for model in known.values() if attack in model.attacks]
    listed = [name for name in request.datasets if any(name in model.budgets_of(attack) for model in owners)]
    return listed[0] if listed else request.dataset


def _model_request(request: RunRequest, data: Callable[[], Dataset]) -> ModelRequest:
    """What named models must fit; for models of other libraries the data set is loaded."""
    if not any(has_scheme(name) for name in (*request.models, request.flow or "", request.surrogate or "")):
        return ModelRequest(request.dataset, checkpoints=request.checkpoints)
    classes = None if data().logits else data().classes  # of a model of more classes, some are taken
    return ModelRequest(request.dataset, data().shape, classes, request.checkpoints)


def _choose_models(
    request: RunRequest,
    attacks: Sequence[ResolvedAttack],
    entries: dict[str, ZooEntry],
    requested: ModelRequest,
) -> list[ZooEntry]:
    if not request.models and not request.defenses:
        raise UserError("nothing to attack; give --defense or --model (see robbench list models)")
    targets = list(dict.fromkeys(attack.target for attack in attacks))
    detectors = detector_entries(request.zoo)
    chosen = [
        entry
        for defense in request.defenses
        for entry in _models_of_defense(defense, targets, request, entries)
    ]
    chosen += [
        replace(_require_dataset(entry, request), named=name)
        for name in request.models
        for entry in request.own.get(name)
        or (find_model(name, entries, _sought(targets), requested, detectors),)
    ]
    _require_partners(chosen, attacks)
    unique: dict[str, ZooEntry] = {}
    for entry in chosen:
        other = unique.setdefault(entry.card.name, entry)
        if other.folder.resolve() != entry.folder.resolve() or other.card != entry.card:
            raise UserError(
                f"two models are called {entry.card.name!r}: {_place(other)} and {_place(entry)}; rename one"
            )
    return list(unique.values())


def _sought(targets: Sequence[ModelKind]) -> ModelKind:
    """Kind of the models that an unknown name is likely to mean."""
    return "flow" if targets[0] == "flow" else "classifier"


def _place(entry: ZooEntry) -> Path:
    return entry.folder / entry.card.weights.file


def _models_of_defense(
    defense: str, targets: Sequence[ModelKind], request: RunRequest, entries: dict[str, ZooEntry]
) -> list[ZooEntry]:
    """The models of a defense that the attacks can attack."""
    trained: dict[ModelKind, set[str]] = {
        "classifier": {*DEFENSES},
        "flow": {*FLOW_DEFENSES},
        "detector": set(),  # is named by itself
    }
    for entry in entries.values():
        trained[entry.card.kind].add(entry.card.defense)
    if not any(defense in names for names in trained.values()):
        raise unknown_name("defense", defense, set().union(*trained.values()))
    kinds = [kind for kind in targets if defense in trained[kind]]
    if not kinds:
        raise UserError(
            f"--defense {defense!r} trains no {' and no '.join(targets)}, which is what these attacks are for; "
            f"see robbench list defenses and robbench list attacks"
        )
    home = _home(request, entries)
    return [entry for kind in kinds for entry in find_models(defense, home, entries, kind)]


def _home(request: RunRequest, entries: dict[str, ZooEntry]) -> str:
    """The data set whose models of the zoo are used: the first of `request.datasets` that has some."""
    present = {entry.card.dataset for entry in entries.values()}
    return next((name for name in request.datasets if name in present), request.dataset)


def _require_dataset(entry: ZooEntry, request: RunRequest, option: str = "--model") -> ZooEntry:
    card = entry.card
    if card.dataset not in request.datasets:
        verb = "models" if card.kind == "flow" else "classifies"
        step = f"if the model fits, give --like {card.dataset} or say it in the card" if request.data else ""
        raise UserError(
            f"{option} {card.name!r} {verb} {card.dataset}, not {request.dataset}; "
            f"{step or f'give --dataset {card.dataset}'}, or another model"
        )
    return entry


def _require_partners(entries: Sequence[ZooEntry], attacks: Sequence[ResolvedAttack]) -> None:
    """`UserError` for an attack without a model of its kind, and for a model without an attack on its kind."""
    kinds, targets = {entry.card.kind for entry in entries}, {attack.target for attack in attacks}
    for attack in attacks:
        if not any(attack.target in ATTACKED_BY[kind] for kind in kinds):
            other = ", ".join(entry.card.name for entry in entries[:3])
            raise UserError(
                f"attack {attack.name!r} {_DOES[attack.target]} and no model here {_IS[attack.target]} ({other}); "
                f"name {_NAMED[attack.target]} (robbench list models) or another attack (robbench list attacks)"
            )
    for entry in entries:
        if targets.isdisjoint(ATTACKED_BY[entry.card.kind]):
            named = ", ".join(dict.fromkeys(attack.name for attack in attacks[:3]))
            suggestion = "nll-in,nll-out,noise" if entry.card.kind == "flow" else "pgd20,aa"
            raise UserError(
                f"--model {entry.card.name!r} is a {entry.card.kind}, not a {attacks[0].target}, and none of the "
                f"attacks ({named}) is for it; add for example --attacks {suggestion}"
            )


_IS: dict[ModelKind, str] = {"flow": "is one", "classifier": "is one", "detector": "has one"}
_NAMED: dict[ModelKind, str] = {
    "flow": "a flow",
    "classifier": "a classifier",
    "detector": "a detector that robbench train --detector wrote",
}
_DOES: dict[ModelKind, str] = {
    "detector": "evades the detector that guards a classifier",
    "flow": "changes the likelihood of a flow",
    "classifier": "changes the decision of a classifier",
}


def _choose_flow(
    request: RunRequest, entries: dict[str, ZooEntry], requested: ModelRequest
) -> ZooEntry | None:
    if request.flow is None:
        return default_flow(_home(request, entries), entries)
    entry = find_model(request.flow, entries, "flow", requested)
    if entry.card.kind != "flow":
        raise UserError(
            f"--flow {request.flow!r} is no flow but a {entry.card.kind}; see robbench list models"
        )
    if entry.card.dataset not in request.datasets:
        raise UserError(
            f"--flow {request.flow!r} models {entry.card.dataset}, not {request.dataset}; name another flow"
        )
    return entry


def _choose_surrogate(
    request: RunRequest, entries: dict[str, ZooEntry], requested: ModelRequest
) -> ZooEntry | None:
    if request.surrogate is None:
        return None
    entry = find_model(request.surrogate, entries, "classifier", requested)
    if entry.card.kind != "classifier":
        raise UserError(
            f"--surrogate {request.surrogate!r} is no classifier but a {entry.card.kind}; see robbench list models"
        )
    return _require_dataset(entry, request, "--surrogate")


def _sample_count(request: RunRequest, dataset: Dataset) -> int | None:
    if request.n is not None or dataset.name == "digits":
        return request.n
    return min(DEFAULT_N, len(dataset.test))


def _misfit(flow: ZooEntry | None, dataset: Dataset) -> str:
    """Why the flow of the zoo is not used with data that are like its own; "" where it fits."""
    card = flow.card if flow is not None else None
    if card is None or (
        card.input_shape == dataset.shape and card.grey_levels in (None, dataset.grey_levels)
    ):
        return ""
    return (
        f"no bits/dim and no latent attacks: flow {card.name!r} is for images {card.input_shape} of {card.grey_levels} "
        f"grey levels, {dataset.name} has {dataset.shape} of {dataset.grey_levels}; --flow names another"
    )


def _require_fitting_flow(flow: ZooEntry | None, dataset: Dataset) -> None:
    """`UserError` for a flow of other grey levels than the data set, whose bits/dim and latents would be
    meaningless."""
    levels = flow.card.grey_levels if flow is not None else None
    if flow is not None and levels not in (None, dataset.grey_levels):
        raise UserError(
            f"flow {flow.card.name!r} models {levels} grey levels and {dataset.name!r} has {dataset.grey_levels}; name "
            f"another --flow, or correct `like` or grey_levels in the card of the data"
        )
