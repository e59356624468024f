"""From what the user asked to cells with everything loaded: bad input shows before any computing."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import product
from pathlib import Path

import torch

from robbench.cards import ModelCard
from robbench.core.device import resolve_device, versions
from robbench.core.errors import UserError, unknown_name
from robbench.data import Dataset, load_dataset, sample_ids
from robbench.data.card import family, require_dataset
from robbench.data.corruptions import located
from robbench.defenses import DEFENSES, FLOW_DEFENSES
from robbench.models.code import has_scheme
from robbench.models.entry import ModelRequest, ZooEntry
from robbench.models.flows.base import FrozenFlow
from robbench.models.loading import load_flow
from robbench.models.zoo import default_flow, find_model, find_models, zoo_entries
from robbench.run.cells import SHARD_SIZE, Cell, CellBuilder
from robbench.run.ray_backend import BackendName, RayOptions, ray_options
from robbench.specs import (
    ModelKind,
    ResolvedAttack,
    ThreatModel,
    importance_weighted,
    refuse_unused_budgets,
    resolve_attack,
    threat_models,
    ungrouped,
)
from robbench.store.records import RunFile

DEFAULT_N = 1000


@dataclass(frozen=True)
class RunRequest:
    """What `robbench run` was asked for, each argument as the user gave it; `build_plan` checks them.

    Attributes:
        attacks: names or groups of attacks.
        defenses: names of defenses, each for all its models in the zoo.
        models: names in the zoo, model folders, or models of other libraries ("torchvision:NAME").
        dataset: name of the data set.
        n: number of test images; None for all of digits and 1,000 of any other data set.
        seed: seed of the drawn images and of every random number of the attacks.
        device: "auto", "cpu", "cuda" or "cuda:N".
        batch_size: images at once.
        flow: normalizing flow of latent attacks and of bits/dim; None for the data set's in the zoo.
        epsilons: image budgets in place of the data set's, one cell each.
        etas: latent budgets in place of the data set's, one cell each.
        steps: numbers of steps in place of the attacks' own, one cell each.
        likelihood_dtype: "float32" or "float64", in which flows score images; None for float32.
        likelihood_draws: noise draws of the importance-weighted bits/dim by which attacks on flows are scored; None
            and 1 for a single draw.
        compiled: whether attacks search classifiers with torch.compile; verdicts never do.
        threat_models: folder of further threat models.
        zoo: folder of further models.
        checkpoints: folder of weights that cards name.
        data_dir: folder of data sets in torchvision's layout.
        data: folder of a data set of one's own, whose card has the name `dataset`.
        keep_examples: number of adversarial images kept of each cell.
        backend: "local" or "ray".
        ray_address: see `RayOptions.address`.
        gpus_per_cell: see `RayOptions.gpus_per_cell`.
        own: models that were read from a class and weights, by the name in `models` that stands for them.
        resolved: attacks with every number filled in, in place of `attacks` and budgets.
        note: what every table of the run says of it.
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
    steps: tuple[int, ...] = ()
    likelihood_dtype: str | None = None
    likelihood_draws: int | None = None
    compiled: bool = False
    threat_models: Path | None = None
    zoo: Path | None = None
    checkpoints: Path | None = None
    data_dir: Path | None = None
    data: Path | None = None
    keep_examples: int = 16
    backend: BackendName = "local"
    ray_address: str | None = None
    gpus_per_cell: float | None = None
    own: Mapping[str, tuple[ZooEntry, ...]] = field(default_factory=dict)
    resolved: tuple[ResolvedAttack, ...] = ()
    note: str = ""

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data set, then the one its card says it is like: whose models and budgets are used."""
        return tuple(dict.fromkeys((self.dataset, family(self.dataset, self.data))))


@dataclass(frozen=True)
class Plan:
    """A run in which everything is loaded and nothing computed.

    Attributes:
        dataset: the data set.
        samples: requested sample ids in the order drawn.
        run: what run.yaml will say.
        cells: models outermost.
        cards: cards of the models, by name.
        nll_flow: what scores the images of attacks on classifiers in bits/dim; None for no scores.
        device: where models and flow are.
        batch_size: images at once.
        keep_examples: number of adversarial images kept of each cell.
        compiled: whether attacks search classifiers with torch.compile.
        ray: options of the Ray backend; None for the local one.
        warnings: what is suspicious of a model before it is attacked, one line each.
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

    def blocks(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(number, sample ids) of the shards-to-be, `SHARD_SIZE` samples each."""
        for start in range(0, len(self.samples), SHARD_SIZE):
            yield start // SHARD_SIZE, self.samples[start : start + SHARD_SIZE]


def build_plan(request: RunRequest) -> Plan:
    """Resolve names, load data and models, build attacks, and try every model on a few images.

    Everything the user can get wrong raises `UserError` here.
    """
    ray = ray_options(request.backend, request.ray_address, request.gpus_per_cell, request.device)
    device = resolve_device(request.device)
    require_dataset(request.dataset, request.data)
    entries = zoo_entries(request.zoo, request.checkpoints)
    data = cache(lambda: load_dataset(request.dataset, request.data_dir, request.data))
    attacks = _resolved_attacks(request)
    requested = _wanted(request, data)
    chosen = _chosen_models(request, attacks, entries, requested)
    classifiers = any(entry.card.kind == "classifier" for entry in chosen)
    if request.flow is not None and not classifiers:
        raise UserError(
            f"--flow {request.flow!r} is for latent attacks and bits/dim of classifiers, none is attacked here; "
            f"leave it out, or name the flow to attack with --model"
        )
    flow_entry = _chosen_flow(request, entries, requested) if classifiers else None
    dataset = data()
    _require_fitting_flow(flow_entry, dataset)
    attacks = located(attacks, dataset)
    samples = tuple(sample_ids(dataset.test, _count(request, dataset), request.seed))
    frozen = load_flow(flow_entry, device) if flow_entry else None
    warnings: list[str] = []
    builder = CellBuilder(
        seed=request.seed,
        batch_size=request.batch_size,
        compiled=request.compiled,
        likelihood_dtype=torch.float64 if request.likelihood_dtype == "float64" else torch.float32,
        dataset=dataset,
        samples=samples,
        device=device,
        flow=frozen,
        flow_card=flow_entry.card if flow_entry else None,
        warn=warnings.append,
    )
    cells = tuple(builder.cells(chosen, attacks))
    return Plan(
        dataset=dataset,
        samples=samples,
        run=RunFile.of(
            [cell.record for cell in cells],
            samples,
            dataset=dataset.name,
            dataset_revision=dataset.revision,
            seed=request.seed,
            shape=dataset.shape,
            class_names=dataset.class_names,
            data=dataset.card,
            versions=versions(),
            note=request.note,
        ),
        cells=cells,
        cards={entry.card.name: entry.card for entry in chosen},
        nll_flow=frozen,
        device=device,
        batch_size=request.batch_size,
        keep_examples=request.keep_examples,
        compiled=request.compiled,
        ray=ray,
        warnings=tuple(warnings),
    )


def _resolved_attacks(request: RunRequest) -> list[ResolvedAttack]:
    if request.resolved:
        return list(request.resolved)
    if not request.attacks:
        raise UserError(
            "--attacks names none; give some, as in --attacks pgd20,aa (see robbench list attacks)"
        )
    known = threat_models(request.threat_models)
    settings = product(request.epsilons or (None,), request.etas or (None,), request.steps or (None,))
    resolved = (
        resolve_attack(name, _with_budgets(name, request, known), known, epsilon, eta, steps)
        for (epsilon, eta, steps), name in product(list(settings), ungrouped(request.attacks, known))
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
    # A latent attack ignores --epsilon, an image attack --eta: the same cell, asked for more than once.
    return list({attack.label: attack for attack in attacks}.values())


def _with_budgets(attack: str, request: RunRequest, known: dict[str, ThreatModel]) -> str:
    """The data set whose budgets the attack takes: the run's, else the one it is like where its threat model has it."""
    owners = [model for model in known.values() if attack in model.attacks]
    listed = [name for name in request.datasets if any(name in model.budgets_of(attack) for model in owners)]
    return listed[0] if listed else request.dataset


def _wanted(request: RunRequest, data: Callable[[], Dataset]) -> ModelRequest:
    """What named models are requested for; the data set is loaded for those of other libraries, which must fit it."""
    if not any(has_scheme(name) for name in (*request.models, request.flow or "")):
        return ModelRequest(request.dataset, checkpoints=request.checkpoints)
    return ModelRequest(request.dataset, data().shape, data().classes, request.checkpoints)


def _chosen_models(
    request: RunRequest,
    attacks: Sequence[ResolvedAttack],
    entries: dict[str, ZooEntry],
    requested: ModelRequest,
) -> list[ZooEntry]:
    if not request.models and not request.defenses:
        raise UserError("nothing to attack; give --defense or --model (see robbench list models)")
    targets = list(dict.fromkeys(attack.target for attack in attacks))
    chosen = [
        entry for defense in request.defenses for entry in _of_defense(defense, targets, request, entries)
    ]
    named = (
        entry
        for name in request.models
        for entry in request.own.get(name) or (find_model(name, entries, targets[0], requested),)
    )
    chosen += [_of_dataset(entry, request) for entry in named]
    _require_partners(chosen, attacks)
    unique: dict[str, ZooEntry] = {}
    for entry in chosen:
        other = unique.setdefault(entry.card.name, entry)
        if other.folder.resolve() != entry.folder.resolve() or other.card != entry.card:
            raise UserError(
                f"two models are called {entry.card.name!r}: {_place(other)} and {_place(entry)}; rename one"
            )
    return list(unique.values())


def _place(entry: ZooEntry) -> Path:
    return entry.folder / entry.card.weights.file


def _of_defense(
    defense: str, targets: Sequence[ModelKind], request: RunRequest, entries: dict[str, ZooEntry]
) -> list[ZooEntry]:
    """The models of a defense that the attacks can attack."""
    trained: dict[ModelKind, set[str]] = {"classifier": {*DEFENSES}, "flow": {*FLOW_DEFENSES}}
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
    """The data set whose models of the zoo are meant: the run's where it has some, else the one it is like."""
    present = {entry.card.dataset for entry in entries.values()}
    return next((name for name in request.datasets if name in present), request.dataset)


def _of_dataset(entry: ZooEntry, request: RunRequest) -> ZooEntry:
    card = entry.card
    if card.dataset not in request.datasets:
        verb = "classifies" if card.kind == "classifier" else "models"
        step = f"say `like: {card.dataset}` in its card if the model fits" if request.data else ""
        raise UserError(
            f"--model {card.name!r} {verb} {card.dataset}, not {request.dataset}; "
            f"{step or f'give --dataset {card.dataset}'}, or another model"
        )
    return entry


def _require_partners(entries: Sequence[ZooEntry], attacks: Sequence[ResolvedAttack]) -> None:
    """`UserError` for an attack that no model is of the right kind for, and for a model no attack is for."""
    kinds, targets = {entry.card.kind for entry in entries}, {attack.target for attack in attacks}
    for attack in attacks:
        if attack.target not in kinds:
            other = ", ".join(entry.card.name for entry in entries[:3])
            raise UserError(
                f"attack {attack.name!r} {_DOES[attack.target]} and no model here is one ({other}); "
                f"name a {attack.target} (robbench list models) or another attack (robbench list attacks)"
            )
    for entry in entries:
        if entry.card.kind not in targets:
            named = ", ".join(dict.fromkeys(attack.name for attack in attacks[:3]))
            suggestion = "nll-in,nll-out,noise" if entry.card.kind == "flow" else "pgd20,aa"
            raise UserError(
                f"--model {entry.card.name!r} is a {entry.card.kind}, not a {attacks[0].target}, and none of the "
                f"attacks ({named}) is for it; add for example --attacks {suggestion}"
            )


_DOES: dict[ModelKind, str] = {
    "flow": "changes the likelihood of a flow",
    "classifier": "changes the decision of a classifier",
}


def _chosen_flow(
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


def _count(request: RunRequest, dataset: Dataset) -> int | None:
    if request.n is not None or dataset.name == "digits":
        return request.n
    return min(DEFAULT_N, len(dataset.test))


def _require_fitting_flow(flow: ZooEntry | None, dataset: Dataset) -> None:
    """`UserError` for a flow of other grey levels: bits/dim and latents of a data set that is not like its own."""
    levels = flow.card.grey_levels if flow is not None else None
    if flow is not None and levels not in (None, dataset.grey_levels):
        raise UserError(
            f"flow {flow.card.name!r} models {levels} grey levels and {dataset.name!r} has {dataset.grey_levels}; name "
            f"another --flow, or correct `like` or grey_levels in the card of the data"
        )
