"""What an experiment costs before anything is trained: model calls of trainings and cells, and hours on this device.

Calls come from the defenses' losses and the attacks' own counts; seconds from freshly initialised networks of the same
architectures, each measured for a moment.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from robbench.attacks import ATTACKS
from robbench.attacks.codec import FlowCodec
from robbench.attacks.named import Cost
from robbench.attacks.victim import Victim
from robbench.cards import Architecture
from robbench.core.device import resolve_device
from robbench.core.schema import canonical_hash
from robbench.data import Dataset
from robbench.experiments.runs import ExperimentPlan, Job
from robbench.experiments.training_cost import CountingCodec, StepCost, step_cost
from robbench.models.flows.base import Flow, FrozenFlow
from robbench.models.loading import build_architecture, load_flow
from robbench.models.zoo import find_model, zoo_entries
from robbench.run.cells import SHARD_SIZE
from robbench.run.rates import Rate, classifier_rate, latent_rate, likelihood_rate, training_rate
from robbench.specs import ResolvedAttack, threat_models

T = TypeVar("T")


@dataclass(frozen=True)
class TrainingCost:
    """A job's training: model calls over all epochs, and hours; nothing where the model is there already."""

    job: Job
    forwards: int
    backwards: int
    hours: float


@dataclass(frozen=True)
class CellCost:
    """One model under one attack over all samples, none of which breaks early."""

    model: str
    attack: str
    forwards: int
    backwards: int
    hours: float


@dataclass
class ExperimentCosts:
    """The costs of a plan. Networks are built and measured once per architecture."""

    plan: ExperimentPlan
    _kept: dict[str, object] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        return resolve_device(self.plan.request.device)

    def trainings(self) -> list[TrainingCost]:
        """One entry per job, in training order."""
        return [self._training(job) for job in self.plan.jobs]

    def cells(self) -> list[CellCost]:
        """One entry per (model, attack), models outermost. What the run folder has already is not subtracted."""
        return [
            self._cell(job, attack)
            for job in self.plan.attacked
            for attack in self.plan.attacks
            if attack.target == job.outlined.kind
        ]

    # ------------------------------------------------------------------------------------------------- trainings
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
        """Of one image of one step."""
        search, last = self._search_rate(job, None), self._training_seconds(job)
        inner = step.backwards - step.last
        seconds = search.seconds(step.forwards - step.last, inner) + step.last * last
        if not (step.encodes or step.decodes):
            return seconds
        flow = self._flow_of(job)
        encode, decode = self._codec_rates(flow, job)
        return seconds + step.encodes * encode + decode.seconds(step.decodes, step.decode_backwards)

    def _training_seconds(self, job: Job) -> float:
        def measure() -> float:
            module, largest = self._network(job), job.outlined.recipe.batch_size
            largest = min(largest, job.train_samples)
            try:
                return training_rate(
                    module.train(), self._loss(job, module), job.dataset.shape, largest, self.device
                )
            finally:
                module.eval()

        return self._once(("training", job.outlined.architecture, job.dataset), measure)

    def _loss(self, job: Job, module: nn.Module) -> Callable[[Tensor], Tensor]:
        if job.outlined.kind == "flow":
            flow = cast(Flow, module)
            return lambda x: -flow.log_prob(x, _labels(x)).sum()
        return lambda x: nn.functional.cross_entropy(module(x), _labels(x))

    def _codec_rates(self, flow: FrozenFlow, job: Job) -> tuple[float, Rate]:
        """Seconds per image of encoding; of decoding, with and without the gradient to the latents."""
        largest = min(job.outlined.recipe.batch_size, job.train_samples)
        shape, device = job.dataset.shape, self.device
        pixels = Victim(nn.Flatten(), device, largest)
        encode = self._once(("encode", id(flow)), lambda: likelihood_rate(flow, shape, largest, device))
        decode = self._once(
            ("decode", id(flow)), lambda: latent_rate(pixels, FlowCodec(flow), shape, largest)
        )
        return encode.forward, decode

    # ----------------------------------------------------------------------------------------------------- cells
    def _cell(self, job: Job, attack: ResolvedAttack) -> CellCost:
        cost = self._cost(attack)
        n = self.plan.n
        seconds = self._search_rate(job, attack).seconds(cost.forwards, cost.backwards)
        flow = self._experiment_flow(job) if attack.target == "classifier" else None
        if flow is not None:  # bits/dim of the attacked image, and once of the clean one
            seconds += self._codec_rates(flow, job)[0]
        return CellCost(job.name, attack.label, n * cost.forwards, n * cost.backwards, n * seconds / 3600)

    def _cost(self, attack: ResolvedAttack) -> Cost:
        if not attack.epsilon and not attack.eta:
            return Cost(2, 0)
        found = ATTACKS.get(attack.algorithm)
        if attack.target == "flow":
            return found(attack).cost
        codec = CountingCodec((1, 8, 8)) if attack.needs_flow else None
        return found(attack, codec).cost  # type: ignore[call-arg]

    def _search_rate(self, job: Job, attack: ResolvedAttack | None) -> Rate:
        """Of one forward, and forward with backward, as a search makes them; attack None: in image space."""
        shape, request = job.dataset.shape, self.plan.request
        largest = min(request.batch_size, SHARD_SIZE, max(self.plan.n, 1))
        key = ("search", job.outlined.architecture, job.dataset)
        if job.outlined.kind == "flow":
            return self._once(key, lambda: likelihood_rate(self._frozen(job), shape, largest, self.device))
        victim = Victim(self._network(job), self.device, largest, request.precision)
        if attack is None or not attack.needs_flow:
            return self._once(key, lambda: classifier_rate(victim, shape, largest))
        flow = self._experiment_flow(job)
        assert flow is not None
        return self._once((*key, id(flow)), lambda: latent_rate(victim, FlowCodec(flow), shape, largest))

    # -------------------------------------------------------------------------------------------------- networks
    def _network(self, job: Job) -> nn.Module:
        dataset = job.dataset
        return self._once(
            ("network", job.outlined.architecture, dataset),
            lambda: _built(job.outlined.architecture, dataset, self.device),
        )

    def _frozen(self, job: Job) -> FrozenFlow:
        return self._once(
            ("frozen", job.outlined.architecture, job.dataset),
            lambda: cast(Flow, self._network(job)).freeze().to(self.device),
        )

    def _flow_of(self, job: Job) -> FrozenFlow:
        """What a job trains with: the flow of another job, as it will be, or one of the zoo."""
        owner = next((other for other in self.plan.jobs if other.name == job.requires), None)
        return (
            self._frozen(owner) if owner else self._zoo_flow(job.request.flow or f"{job.dataset.name}-glow")
        )

    def _experiment_flow(self, job: Job) -> FrozenFlow | None:
        """What latent attacks search and what scores images; None where the experiment names none."""
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
        text = canonical_hash([_plain(part) for part in key])
        if text not in self._kept:
            self._kept[text] = make()
        return cast(T, self._kept[text])


def _plain(part: object) -> object:
    if isinstance(part, Architecture):
        return part.model_dump(mode="json")
    return [part.name, part.shape] if isinstance(part, Dataset) else part


def _labels(x: Tensor) -> Tensor:
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)


def _built(architecture: Architecture, dataset: Dataset, device: torch.device) -> nn.Module:
    """A freshly initialised network in eval mode; a flow after its data-dependent initialisation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = build_architecture(architecture, dataset.shape, dataset.classes, dataset.grey_levels)
    if isinstance(module, Flow):
        few = torch.arange(min(8, len(dataset.test)))
        module.initialize(dataset.test.x(few), dataset.test.labels[few])
    return module.to(device).eval()
