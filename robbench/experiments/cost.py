"""Cost of an experiment before anything is trained: model calls of trainings and cells, and hours on this device.

Calls are counted in the defenses' losses or stated by the attacks; seconds are measured briefly on newly initialised
networks of the same architectures.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from robbench.attacks import ATTACKS
from robbench.attacks.codec import FlowCodec
from robbench.attacks.named import Cost
from robbench.cards import Architecture
from robbench.core.device import resolve_device
from robbench.data import Dataset
from robbench.defenses.base import Setting, build_defense
from robbench.experiments.runs import ExperimentPlan, Job
from robbench.experiments.training_cost import CountingCodec, StepCost, step_cost
from robbench.models.flows.base import Flow, FrozenFlow
from robbench.models.loading import build_architecture, load_flow
from robbench.models.zoo import find_model, zoo_entries
from robbench.run.cells import SHARD_SIZE
from robbench.run.rates import Rate, make_labels, measure_calls, measure_steps, measure_training
from robbench.specs import ResolvedAttack, threat_models

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingCost:
    """Model calls of a job's training over all epochs, and hours; 0 where the model exists."""

    job: Job
    forwards: int
    backwards: int
    hours: float


@dataclass(frozen=True)
class CellCost:
    """Cost of one model under one attack, if all samples stay robust.

    Attributes:
        model, attack: name and label.
        forwards, backwards: model calls over all samples.
        hours: on this device.
    """

    model: str
    attack: str
    forwards: int
    backwards: int
    hours: float


@dataclass
class ExperimentCosts:
    """The costs of a plan. Networks are built and measured once per architecture."""

    plan: ExperimentPlan
    _kept: dict[tuple[object, ...], object] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Device of the measurements."""
        return resolve_device(self.plan.request.device)

    def trainings(self) -> list[TrainingCost]:
        """One entry per job, in training order."""
        return [self._training(job) for job in self.plan.jobs]

    def cells(self) -> list[CellCost]:
        """One entry per (model or detector, attack), models outermost; rows that exist already are not subtracted. The
        scores of detectors are not counted."""
        by_name = {job.name: job for job in self.plan.jobs}
        guarded = [(guard.name, by_name[guard.requires]) for guard in self.plan.guards]
        return [
            self._cell(name, job, attack)
            for name, job in (*((job.name, job) for job in self.plan.attacked), *guarded)
            for attack in self.plan.attacks
            if attack.target == job.outlined.kind
        ]

    def _training(self, job: Job) -> TrainingCost:
        if job.finished is not None:
            return TrainingCost(job, 0, 0, 0.0)
        known = threat_models(self.plan.request.threat_models)
        outlined = job.outlined
        step = step_cost(job.request.defense, outlined.kind, outlined.parameters, job.request.family, known)
        images = outlined.recipe.epochs * job.train_samples
        hours = images * self._seconds(job, step) / 3600
        return TrainingCost(job, round(images * step.forwards), round(images * step.backwards), hours)

    def _seconds(self, job: Job, step: StepCost) -> float:
        """Seconds per image of one training step."""
        if step.further_networks:
            return self._step_seconds(job)
        search, last = self._search_rate(job, None), self._training_seconds(job)
        inner = step.backwards - step.last
        seconds = search.seconds(step.forwards - step.last, inner) + step.last * last
        if not (step.encodes or step.decodes):
            return seconds
        flow = self._flow_of(job)
        encode, decode = self._codec_rates(flow, job)
        return seconds + step.encodes * encode + decode.seconds(step.decodes, step.decode_backwards)

    def _step_seconds(self, job: Job) -> float:
        """Of a whole step with several optimisers, on a network of its own."""
        request, outlined = job.request, job.outlined
        known = threat_models(self.plan.request.threat_models)
        setting = Setting(self.plan.request.family, known, None)
        defense = build_defense(request.defense, outlined.parameters, setting, outlined.kind)

        def measure() -> float:
            model = _build_network(outlined.architecture, job.dataset, self.device).train()
            with torch.random.fork_rng(devices=[]):
                step = defense.optimization(model, outlined.recipe).step
                largest = min(outlined.recipe.batch_size, job.train_samples)
                return measure_steps(step, job.dataset.shape, largest, self.device)

        return self._once((*_key("step", job), request.defense, repr(defense.parameters)), measure)

    def _training_seconds(self, job: Job) -> float:
        def measure() -> float:
            module, largest = self._network(job), job.outlined.recipe.batch_size
            largest = min(largest, job.train_samples)
            try:
                return measure_training(
                    module.train(), self._loss(job, module), job.dataset.shape, largest, self.device
                )
            finally:
                module.eval()

        return self._once(_key("training", job), measure)

    def _loss(self, job: Job, module: nn.Module) -> Callable[[Tensor], Tensor]:
        if job.outlined.kind == "flow":
            flow = cast(Flow, module)
            return lambda x: -flow.log_prob(x, make_labels(x)).sum()
        return lambda x: nn.functional.cross_entropy(module(x), make_labels(x))

    def _codec_rates(self, flow: FrozenFlow, job: Job) -> tuple[float, Rate]:
        """Seconds per image of encoding, and the rate of decoding."""
        largest = min(job.outlined.recipe.batch_size, job.train_samples)
        encode = self._calls(("encode", id(flow)), flow, None, job, largest)
        return encode.forward, self._calls(("decode", id(flow)), nn.Flatten(), flow, job, largest)

    def _calls(
        self, key: tuple[object, ...], model: nn.Module, flow: FrozenFlow | None, job: Job, largest: int
    ) -> Rate:
        """The rate of `measure_calls` on images of a job's data set. flow: decodes latents, None for none."""
        codec = FlowCodec(flow) if flow is not None else None
        return self._once(key, lambda: measure_calls(model, codec, job.dataset.shape, largest, self.device))

    def _cell(self, name: str, job: Job, attack: ResolvedAttack) -> CellCost:
        cost = self._cost(attack)
        n = self.plan.n
        seconds = self._search_rate(job, attack).seconds(cost.forwards, cost.backwards)
        flow = self._experiment_flow(job) if attack.target != "flow" else None
        if flow is not None:  # bits/dim of the attacked image, and once of the clean one
            seconds += self._codec_rates(flow, job)[0]
        return CellCost(name, attack.label, n * cost.forwards, n * cost.backwards, n * seconds / 3600)

    def _cost(self, attack: ResolvedAttack) -> Cost:
        if not attack.epsilon and not attack.eta:
            return Cost(2, 0)
        found = ATTACKS.get(attack.algorithm)
        if attack.target == "flow":
            return found(attack).cost
        codec = CountingCodec((1, 8, 8)) if attack.needs_flow else None
        return found(attack, codec).cost  # type: ignore[call-arg]

    def _search_rate(self, job: Job, attack: ResolvedAttack | None) -> Rate:
        """The rate of the model's calls in a search; attack None means in image space."""
        largest = min(self.plan.request.batch_size, SHARD_SIZE, max(self.plan.n, 1))
        model = self._frozen(job) if job.outlined.kind == "flow" else self._network(job)
        flow = self._experiment_flow(job) if attack is not None and attack.needs_flow else None
        return self._calls((*_key("search", job), id(flow)), model, flow, job, largest)

    def _network(self, job: Job) -> nn.Module:
        return self._once(
            _key("network", job), lambda: _build_network(job.outlined.architecture, job.dataset, self.device)
        )

    def _frozen(self, job: Job) -> FrozenFlow:
        return self._once(
            _key("frozen", job), lambda: cast(Flow, self._network(job)).freeze().to(self.device)
        )

    def _flow_of(self, job: Job) -> FrozenFlow:
        """The flow of a job's defense: that of another job (untrained), or one of the zoo."""
        owner = next((other for other in self.plan.jobs if other.name == job.requires), None)
        return (
            self._frozen(owner) if owner else self._zoo_flow(job.request.flow or f"{job.dataset.name}-glow")
        )

    def _experiment_flow(self, job: Job) -> FrozenFlow | None:
        """The flow of latent attacks and bits/dim; None where the experiment names none."""
        name = self.plan.request.experiment.flow
        if name is None:
            return None
        owner = next((other for other in self.plan.jobs if other.member == name), None)
        return self._frozen(owner) if owner else self._zoo_flow(name)

    def _zoo_flow(self, name: str) -> FrozenFlow:
        def load() -> FrozenFlow:
            entry = find_model(name, zoo_entries(self.plan.request.zoo), "flow")
            return load_flow(entry, self.device)

        return self._once(("zoo", name), load)

    def _once(self, key: tuple[object, ...], make: Callable[[], T]) -> T:
        if key not in self._kept:
            self._kept[key] = make()
        return cast(T, self._kept[key])


def _key(what: str, job: Job) -> tuple[object, ...]:
    """Cache key shared by all jobs of one architecture on one data set."""
    return what, job.outlined.architecture.model_dump_json(), job.dataset.name, job.dataset.shape


def _build_network(architecture: Architecture, dataset: Dataset, device: torch.device) -> nn.Module:
    """A newly initialised network in eval mode; a flow after its data-dependent initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build_architecture(architecture, dataset.shape, dataset.classes, dataset.grey_levels)
    if isinstance(module, Flow):
        few = torch.arange(min(8, len(dataset.test)))
        module.initialize(dataset.test.x(few), dataset.test.labels[few])
    return module.to(device).eval()
