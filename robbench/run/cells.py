"""The cells of a run: a loaded and tested model, a built attack, and the record that identifies the pair."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from robbench.attacks import (
    Attack,
    Cost,
    LikelihoodAttack,
    NamedAttack,
    TransferAttack,
    Victim,
    build_attack,
    build_likelihood_attack,
)
from robbench.attacks.codec import FlowCodec
from robbench.attacks.search.decision import margins
from robbench.attacks.search.goals import require_class
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.trust.context import full_precision, own_context
from robbench.attacks.trust.preflight import RandomisedModelError, check_model
from robbench.attacks.trust.suspicions import Diagnostics
from robbench.cards import FlowReference, ModelCard
from robbench.core.errors import UserError
from robbench.core.foreign import cause, foreign_code
from robbench.core.precision import format_record
from robbench.core.stops import reraise_stop
from robbench.core.threads import multiply_adds, search_multiply_adds
from robbench.data import Dataset
from robbench.detectors.base import Detector
from robbench.detectors.loading import load_detector
from robbench.models.entry import ZooEntry
from robbench.models.flows.base import FrozenFlow
from robbench.models.loading import LoadedFlow, LoadedModel, load_flow_model, load_model
from robbench.specs import ATTACKED_BY, ResolvedAttack
from robbench.store.records import CellRecord, Precision, cell_hash

SHARD_SIZE = 120
AnyAttack = TypeVar("AnyAttack", bound=NamedAttack)


@dataclass(frozen=True)
class Cell(ABC):
    """One (model, attack) of a run, ready to compute. record: its identity, with status "running"."""

    record: CellRecord
    attack: NamedAttack

    @property
    def cost(self) -> Cost:
        """The largest number of model calls per sample."""
        return self.attack.cost

    @property
    @abstractmethod
    def modules(self) -> tuple[nn.Module, ...]:
        """The model, and the flow of a latent attack."""

    @abstractmethod
    def multiply_adds(self, x: Tensor, y: Tensor) -> float:
        """Multiply-adds of one model call of a search on the CPU, for an image x [1,C,H,W] with label y [1]."""


@dataclass(frozen=True)
class ClassifierCell(Cell):
    """An attack on a classifier's decisions."""

    attack: Attack
    model: LoadedModel

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        flow = self.attack.flow
        return (self.model.module, *((flow.flow,) if isinstance(flow, FlowCodec) else ()))

    def multiply_adds(self, x: Tensor, y: Tensor) -> float:
        return search_multiply_adds(self.model.module, self.attack.flow, x, y)


@dataclass(frozen=True)
class DetectionCell(ClassifierCell):
    """An attack on a classifier that a detector guards; the attack knows the detector where it is adaptive."""

    detector: Detector

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return (*super().modules, self.detector)


@dataclass(frozen=True)
class FlowCell(Cell):
    """An attack on a flow's likelihood."""

    attack: LikelihoodAttack
    model: LoadedFlow

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return self.model.flow, self.model.judge

    def multiply_adds(self, x: Tensor, y: Tensor) -> float:
        return multiply_adds(lambda: self.model.flow.log_prob(x, y))


@dataclass(frozen=True)
class CellBuilder:
    """Makes cells: loads and tests models, builds attacks.

    Attributes:
        seed: seed of the run.
        batch_size: images per batch.
        likelihood_dtype: precision in which flows score images.
        compiled: whether attacks search classifiers with torch.compile.
        dataset: the data set.
        samples: requested sample ids in the order drawn; models are tested on the first of them.
        device: of the models.
        flow: flow of latent attacks, and of the bits/dim of attacked images of classifiers.
        flow_card: the card of `flow`.
        surrogate: model that transfer attacks search, from `try_surrogate`; None without any.
        warn: called with every suspicion about a model before it is attacked.
    """

    seed: int
    batch_size: int
    likelihood_dtype: torch.dtype
    compiled: bool
    dataset: Dataset
    samples: tuple[int, ...]
    device: torch.device
    flow: FrozenFlow | None
    flow_card: ModelCard | None
    surrogate: LoadedModel | None = None
    warn: Callable[[str], None] = lambda _: None

    def cells(self, entries: Sequence[ZooEntry], attacks: Sequence[ResolvedAttack]) -> Iterator[Cell]:
        """Every model with every attack on models of its kind, models outermost."""
        on_classifiers = [self._attack(spec) for spec in attacks if spec.target == "classifier"]
        on_guarded = [spec for spec in attacks if spec.target in ATTACKED_BY["detector"]]
        on_flows = [_likelihood_attack(spec) for spec in attacks if spec.target == "flow"]
        for entry in entries:
            if entry.card.kind == "classifier":
                yield from self._classifier_cells(entry, on_classifiers)
            elif entry.card.kind == "detector":
                yield from self._detection_cells(entry, on_guarded)
            else:
                yield from self._flow_cells(entry, on_flows)

    def _attack(self, spec: ResolvedAttack) -> Attack:
        with _foreign_attack(spec):
            attack = _try_properties(build_attack(spec, self.flow))
            attack.require_images(self.dataset.shape)
            require_class(attack.spec.parameters.get("target"), self.dataset.classes)
            if isinstance(attack, TransferAttack) and self.surrogate is not None:
                attack.surrogate = self.surrogate.module
            return attack

    def try_surrogate(self, entry: ZooEntry) -> LoadedModel:
        """The surrogate of transfer attacks, loaded and tried; `UserError` where it does not fit the data set."""
        try:
            _require_same_shape(entry.card, self.dataset)
            return self._try_model(load_model(entry, self.device), randomised=False)
        except UserError as error:
            raise UserError(f"--surrogate {entry.card.name!r}: {error}") from error

    def _detection_cells(self, entry: ZooEntry, specs: Sequence[ResolvedAttack]) -> Iterator[Cell]:
        _require_same_shape(entry.card, self.dataset)
        model = self._try_model(load_model(entry.bare, self.device), randomised=False)
        assert entry.guard is not None
        detector = load_detector(entry.guard, model)
        _require_pointwise(entry.card.name, detector)
        guarded = replace(model, card=entry.card)
        for spec in specs:
            attack = self._attack(spec)  # one each, since an adaptive attack holds its detector
            if spec.target == "detector":
                attack.guard = detector
            flow = self.flow_card if attack.spec.bounded else None
            yield DetectionCell(self._record(entry.card, attack, flow, "fp32"), attack, guarded, detector)

    def _classifier_cells(self, entry: ZooEntry, attacks: Sequence[Attack]) -> Iterator[Cell]:
        _require_same_shape(entry.card, self.dataset)
        randomised = any(attack.verdict_forwards > 1 for attack in attacks)
        yield from self.cells_of(self._try_model(load_model(entry, self.device), randomised), attacks)

    def cells_of(self, model: LoadedModel, attacks: Sequence[Attack]) -> Iterator[ClassifierCell]:
        """A classifier with every attack."""
        for attack in attacks:
            # The likelihood of corrupted images is of no interest, and would take hours for 75 corruptions.
            flow = self.flow_card if attack.spec.bounded else None
            yield ClassifierCell(self._record(model.card, attack, flow, "fp32"), attack, model)

    def _try_model(self, model: LoadedModel, randomised: bool) -> LoadedModel:
        """The model, after it classified a block of images and passed the checks with which every attack begins, so
        that its errors show before any attack runs. randomised: whether an attack on randomised models is planned."""
        name, dataset = model.card.name, self.dataset
        x, y = dataset.test.by_ids(self.samples[:SHARD_SIZE])
        victim = Victim(model.module, self.device, SHARD_SIZE)
        try:
            with own_context(), attack_mode(model.module), full_precision():
                logits = victim.clean_logits(x)
                _require_classes(name, logits, dataset)
                check_model(victim, x)
        except RandomisedModelError as error:
            if not randomised:
                raise UserError(f"model {name!r}: {error}") from error
            return model
        except UserError as error:
            raise UserError(f"model {name!r}: {error}") from error
        except BaseException as error:  # lack of memory, and whatever a foreign model raises
            reraise_stop(error)
            raise UserError(
                f"model {name!r} fails on images {dataset.shape}: {cause(error)}; correct its architecture or weights"
            ) from error
        right = int((margins(logits, y) > 0).sum())
        seen = Diagnostics(samples=len(x), clean_right=right, classes=dataset.classes)
        for one in seen.suspicions:
            self.warn(f"model {name!r}: {one.text}")
        return model

    def _flow_cells(self, entry: ZooEntry, attacks: Sequence[LikelihoodAttack]) -> Iterator[Cell]:
        _require_same_shape(entry.card, self.dataset)
        model = load_flow_model(entry, self.device, self.likelihood_dtype)
        _try_flow(model, self.dataset, self.samples, self.device)
        precision: Precision = "fp64" if self.likelihood_dtype == torch.float64 else "fp32"
        for attack in attacks:
            yield FlowCell(self._record(model.card, attack, None, precision), attack, model)

    def _record(
        self, card: ModelCard, attack: NamedAttack, flow: ModelCard | None, precision: Precision
    ) -> CellRecord:
        spec, dataset = attack.spec, self.dataset
        search = format_record(self.compiled and attack.target != "flow")
        attack_flow = flow if spec.needs_flow else None
        batch = min(self.batch_size, SHARD_SIZE) if attack.batch_dependent else None
        return CellRecord(
            hash=cell_hash(
                card,
                spec,
                attack_flow,
                flow,
                attack.engine,
                batch,
                dataset.name,
                dataset.revision,
                self.seed,
                precision,
                search,
            ),
            model=card.name,
            defense=card.defense,
            dataset=dataset.name,
            dataset_revision=dataset.revision,
            seed=self.seed,
            attack=spec,
            model_sha256=card.weights.sha256,
            model_hash=card.function_hash,
            attack_flow=_reference(attack_flow),
            nll_flow=_reference(flow),
            detector=card.detector.reference if card.detector else None,
            precision=precision,
            search_precision=search,
            engine=attack.engine,
            batch_size=batch,
        )


def _likelihood_attack(spec: ResolvedAttack) -> LikelihoodAttack:
    with _foreign_attack(spec):
        return _try_properties(build_likelihood_attack(spec))


def _foreign_attack(spec: ResolvedAttack) -> AbstractContextManager[None]:
    return foreign_code(f"attack {spec.label!r}", "repair the package that it comes from, or leave it out")


def _try_properties(attack: AnyAttack) -> AnyAttack:
    """The attack, after its properties that are needed later in the run were evaluated once."""
    cost, _ = attack.cost, (attack.engine, attack.batch_dependent)
    if not isinstance(cost, Cost) or not all(
        type(n) is int and n >= 0 for n in (cost.forwards, cost.backwards)
    ):
        raise UserError(
            f"attack {attack.spec.label!r} has cost {cost!r}; return a robbench.attacks.Cost of model calls, integers "
            f"of at least 0"
        )
    if isinstance(attack, Attack):
        _ = attack.verdict_forwards, attack.attacks_misclassified, attack.raises_cross_entropy
    return attack


def _require_classes(name: str, logits: Tensor, dataset: Dataset) -> None:
    if logits.shape[1] != dataset.classes:
        raise UserError(
            f"model {name!r} returns {logits.shape[1]} logits per image, {dataset.name} has {dataset.classes} "
            f"classes; give a model of this data set{', or say' if dataset.folder else ''}"
            f"{' which logits they are, as in `classes: [0, 217, 482]` in its card' if dataset.folder else ''}"
        )


def _require_same_shape(card: ModelCard, dataset: Dataset) -> None:
    if card.input_shape != dataset.shape:
        raise UserError(
            f"model {card.name!r} takes images {card.input_shape}, {dataset.name} has {dataset.shape}; "
            f"give a model of this data set"
        )


def _require_pointwise(name: str, detector: Detector) -> None:
    if not detector.pointwise:
        raise UserError(
            f"--model {name!r}: its scores depend on other images than the one that is scored, so that they say "
            f"nothing of an attack; train it again without quirks"
        )


def _try_flow(model: LoadedFlow, dataset: Dataset, samples: Sequence[int], device: torch.device) -> None:
    """`UserError` unless the flow fits the data set and gives a finite likelihood to some images of a block."""
    name, flow = model.card.name, model.judge
    if flow.grey_levels != dataset.grey_levels:
        raise UserError(
            f"model {name!r} is a flow of {flow.grey_levels} grey levels, {dataset.name} has {dataset.grey_levels}; "
            f"give a flow of this data set"
        )
    if flow.label_classes is not None and flow.label_classes < dataset.classes:
        raise UserError(
            f"model {name!r} is conditioned on {flow.label_classes} classes, {dataset.name} has {dataset.classes}; "
            f"give a flow of this data set"
        )
    ids = samples[:SHARD_SIZE]
    x, y = (part.to(device) for part in dataset.test.by_ids(ids))
    with torch.no_grad(), foreign_code(f"scoring images with model {name!r}"):
        bits = flow.bits_per_dim(x, y, seed=0, sample_ids=ids)
    if not torch.isfinite(bits).any():
        raise UserError(
            f"model {name!r} gives no finite likelihood to any of {len(ids)} test images; "
            f"restore its weights or train it again"
        )


def _reference(card: ModelCard | None) -> FlowReference | None:
    return FlowReference(name=card.name, sha256=card.weights.sha256) if card else None
