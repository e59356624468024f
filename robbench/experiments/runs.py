"""An experiment run: trains missing models, attacks them, computes further metrics, compares with print.

Training and attacks are those of `robbench train` and `robbench run`, so that both resume after interruptions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from robbench.cards import ModelCard
from robbench.core.errors import UserError
from robbench.core.resources import write_text_atomically
from robbench.core.schema import dump_yaml
from robbench.data import Dataset, dataset_names, load_dataset
from robbench.data.corruptions import located
from robbench.defenses.plan import Outline, TrainRequest, outline, schedule_of
from robbench.experiments.guards import GuardJob, guard_jobs, guarded_zoo, train_guards
from robbench.experiments.request import IDENTITY_FILE, ExperimentRequest, check_folder, identity
from robbench.experiments.schema import (
    LEAST_TEST,
    LEAST_TRAINING,
    SETTINGS,
    AttackUse,
    Experiment,
    TrainedModel,
)
from robbench.models.entry import ZooEntry
from robbench.models.zoo import read_entry, zoo_entries
from robbench.run.request import RunRequest
from robbench.specs import ResolvedAttack, expand_groups, resolve_attack, threat_models

MODELS_FOLDER, RUN_FOLDER = "models", "run"


@dataclass(frozen=True)
class Job:
    """A model of the experiment, trained or to be trained.

    Attributes:
        name: of its folder.
        member: its name in the experiment.
        request, outlined: the training, and its outline.
        dataset: training data.
        train_samples: number of training images.
        requires: name of the job whose flow it uses.
        finished: the model where it exists; else None.
    """

    name: str
    member: str
    request: TrainRequest
    outlined: Outline
    dataset: Dataset
    train_samples: int
    requires: str | None
    finished: ZooEntry | None

    @property
    def folder(self) -> Path:
        """Folder of the model, which may not exist yet."""
        return self.finished.folder if self.finished else self.request.out / self.name


@dataclass(frozen=True)
class ExperimentPlan:
    """A planned experiment run.

    Attributes:
        request, folder: arguments, and output folder.
        jobs: models to train or to find, flows before the models that use them; none where `absent`.
        attacks: of the columns, each once.
        n: number of test images.
        absent: a data set that robbench lacks, so that nothing can be run; else "".
        uncorrupted: why corrupted images that a column needs are missing; else "".
        guards: detectors to train or to find.
    """

    request: ExperimentRequest
    folder: Path
    jobs: tuple[Job, ...]
    attacks: tuple[ResolvedAttack, ...]
    n: int
    absent: str = ""
    uncorrupted: str = ""
    guards: tuple[GuardJob, ...] = ()

    @cached_property
    def attacked(self) -> tuple[Job, ...]:
        """Jobs of the models that rows name."""
        named = {name for row in self.request.experiment.rows for name in row.models}
        return tuple(job for job in self.jobs if job.member in named)

    def names(self, member: str) -> tuple[str, ...]:
        """Folder names of a model or detector of the experiment, one per seed."""
        everything: tuple[Job | GuardJob, ...] = (*self.jobs, *self.guards)
        return tuple(job.name for job in everything if job.member == member)

    @property
    def run_folder(self) -> Path:
        """The run folder of the matrix."""
        return self.folder / RUN_FOLDER

    @property
    def wants_images(self) -> bool:
        """Whether a column needs every adversarial image."""
        return any(column.metric == "fid" and not column.needs for column in self.request.experiment.columns)

    def left_out(self, failed: Mapping[str, str]) -> dict[str, str]:
        """Reasons of attacks that cannot be run, because their flow failed to train, by label."""
        names = self.names(self.request.experiment.flow or "")
        reason = next((f"the flow {name} failed to train" for name in names if name in failed), "")
        return {attack.label: reason for attack in self.attacks if reason and attack.needs_flow}

    def run_request(self, failed: Mapping[str, str]) -> RunRequest:
        """The run of all attacks that can be run on all models whose training did not fail."""
        request, experiment, left_out = self.request, self.request.experiment, self.left_out(failed)
        flows = [job for job in self.jobs if job.member == experiment.flow]
        flow = str(flows[0].folder) if flows else experiment.flow
        if flows and flows[0].name in failed:
            flow = None
        classifiers = any(job.outlined.kind == "classifier" for job in self.attacked) or bool(self.guards)
        dtype = experiment.likelihood_dtype if any(a.target == "flow" for a in self.attacks) else None
        attacked: tuple[Job | GuardJob, ...] = (*self.attacked, *self.guards)
        kept: dict[str, Any] = {"keep_examples": 2**62} if self.wants_images else {}
        if self.guards:
            kept["zoo"] = guarded_zoo(self.guards, self.jobs)
        return RunRequest(
            attacks=(),
            resolved=tuple(attack for attack in self.attacks if attack.label not in left_out),
            models=tuple(str(job.folder) for job in attacked if job.name not in failed),
            dataset=request.dataset,
            flow=flow if classifiers else None,
            likelihood_dtype=dtype,
            note=request.note,
            **request.settings | {"n": self.n} | kept,
        )


def plan_experiment(request: ExperimentRequest, folder: Path) -> ExperimentPlan:
    """The plan of a request, checked before any computation; `UserError` for bad input. Reads `folder` and the zoo,
    writes nothing."""
    experiment = request.experiment
    check_folder(folder, identity(request))
    trained = _members(experiment, False)
    others = {name for model in trained if (name := experiment.models[model].dataset)}
    own = set() if request.data else {request.dataset}
    if unknown := sorted((others | own) - set(dataset_names())):
        return ExperimentPlan(request, folder, (), (), 0, f"data set {', '.join(unknown)}")
    if not trained:
        return ExperimentPlan(request, folder, (), (), 0)
    attacks = resolve_attacks(request)
    datasets = {name: load_dataset(name, request.data_dir) for name in sorted(others)}
    datasets[request.dataset] = load_dataset(request.dataset, request.data_dir, request.data)
    corruptions, uncorrupted = _corruptions(request, datasets[request.dataset])
    members, models = _members(experiment, bool(uncorrupted)), folder / MODELS_FOLDER
    jobs = _jobs(request, models, datasets, members)
    guards = guard_jobs(request, models, datasets[request.dataset], jobs, _computed(experiment))
    if guards:
        guarded_zoo(guards, jobs)
    total = len(datasets[request.dataset].test)
    n = request.scale.count(total, LEAST_TEST) if request.n is None else request.n
    if not 0 < n <= total:
        raise UserError(f"--n {n}: {request.dataset} has {total} test images; give 1 to {total}")
    return ExperimentPlan(request, folder, jobs, (*attacks, *corruptions), n, "", uncorrupted, guards)


def resolve_attacks(request: ExperimentRequest) -> tuple[ResolvedAttack, ...]:
    """The attacks of all columns, each once; one that changes nothing where only clean numbers are requested."""
    experiment, known = request.experiment, threat_models(request.threat_models)
    found: dict[str, ResolvedAttack] = {}
    for row, column in experiment.runnable:
        if use := experiment.attack_of(row, column):
            attack = resolve_use(use, request.family, known)
            found[attack.label] = attack
    if not found or any(column.metric == "test_loss" for _, column in experiment.runnable):
        attack = resolve_use(CLEAN_USE, request.family, known)
        found[attack.label] = attack
    return tuple(found.values())


def _members(experiment: Experiment, uncorrupted: bool) -> tuple[str, ...]:
    """Models to train, without those that only settings, or columns on missing corrupted images, are of."""
    named = _computed(experiment, *(["corruption_accuracy"] if uncorrupted else []))
    return experiment.with_flows(
        [name for name in (*experiment.models, *experiment.detectors) if name in named]
    )


def _computed(experiment: Experiment, *without: str) -> set[str]:
    """Models and detectors that cells need trained, those of metrics in `without` aside."""
    named = {name for row in experiment.rows for name in row.difference or ()}
    for row, column in experiment.runnable:
        if column.metric not in (*SETTINGS, *without):
            named.add(row.model_of(column.title) or "")
    return named


def _corruptions(request: ExperimentRequest, dataset: Dataset) -> tuple[tuple[ResolvedAttack, ...], str]:
    """The corruptions of a column, or the reason why their images are missing; both empty without such a column."""
    if all(column.metric != "corruption_accuracy" for _, column in request.experiment.runnable):
        return (), ""
    known = threat_models(request.threat_models)
    attacks = [resolve_attack(name, request.family, known) for name in expand_groups([CORRUPTIONS], known)]
    try:
        located(attacks, dataset)
    except UserError as error:
        return (), " ".join(str(error).split())
    return tuple(attacks), ""


CORRUPTIONS = "corruptions"  # the attacks whose mean accuracy "corruption_accuracy" is
CLEAN_USE = AttackUse(name="fgsm", epsilon=0.0)  # scores the clean images and searches nothing


def resolve_use(use: AttackUse, dataset: str, known: Mapping[str, object]) -> ResolvedAttack:
    """The attack with the experiment's changes, which its label shows."""
    attack = resolve_attack(use.name, dataset, dict(known), use.epsilon, use.eta, use.steps)  # type: ignore[arg-type]
    if not use.parameters:
        return attack
    changes = ",".join(f"{key}={value}" for key, value in use.parameters.items())
    return attack.model_copy(
        update={"parameters": {**attack.parameters, **use.parameters}, "label": f"{attack.label}@{changes}"}
    )


def _jobs(
    request: ExperimentRequest, models: Path, datasets: Mapping[str, Dataset], members: Sequence[str]
) -> tuple[Job, ...]:
    jobs: dict[str, Job] = {}
    entries = zoo_entries(request.zoo)
    for member in members:
        spec = request.experiment.models[member]
        for seed in spec.seeds:
            job = _job(request, models, datasets, member, spec, seed, jobs)
            jobs[job.name] = replace(job, finished=_find_finished(job, entries, jobs))
    return tuple(jobs.values())


def _job(
    request: ExperimentRequest,
    models: Path,
    datasets: Mapping[str, Dataset],
    member: str,
    spec: TrainedModel,
    seed: int,
    jobs: Mapping[str, Job],
) -> Job:
    scale, dataset = request.scale, datasets[spec.dataset or request.dataset]
    dataset.require_training(f"experiment {request.experiment.name!r}")
    seed += request.seed
    name = member + (f"-seed{seed}" if seed or len(spec.seeds) > 1 else "") + scale.suffix
    flow = next((job for job in jobs.values() if job.member == spec.flow), None)
    train = TrainRequest(
        defense=spec.defense,
        dataset=dataset.name,
        recipe=spec.recipe,
        architecture=spec.architecture,
        seed=seed,
        train_samples=spec.train_samples,
        flow=str(flow.folder) if flow else spec.flow,
        name=name,
        out=models,
        device=request.device,
        data_dir=request.data_dir,
        data=None if spec.dataset else request.data,
        zoo=request.zoo,
        threat_models=request.threat_models,
        overrides=spec.settings,
        validation_samples=None if scale.full else scale.count(len(dataset.validation), LEAST_TEST),
        note=request.note,
    )
    full_outline = outline(train)
    held_out = len(dataset.validation) if full_outline.recipe.hold_out else 0
    full = spec.train_samples or len(dataset.train) + len(dataset.validation) - held_out
    samples = full if scale.full else scale.count(full, LEAST_TRAINING)
    if not scale.full:
        # Without a size of its own a scaled training draws from the training split only.
        samples = samples if spec.train_samples else min(samples, len(dataset.train))
        train = replace(train, train_samples=samples)
    smaller = scale.schedule(full_outline.recipe, full, samples)
    if full_outline.kind == "flow":
        smaller |= scale.flow_size(full_outline.architecture.arguments)
    train = replace(train, overrides={**spec.settings, **smaller})
    return Job(name, member, train, outline(train), dataset, samples, flow.name if flow else None, None)


def _find_finished(job: Job, entries: Mapping[str, ZooEntry], jobs: Mapping[str, Job]) -> ZooEntry | None:
    """The trained model, in the experiment's own folder or in the zoo; `UserError` for another model of that name."""
    own = job.request.out / job.name / "card.yaml"
    # A foreign folder may name code, which models trained by this experiment never do.
    entry = replace(read_entry(own.parent), trusted=False) if own.is_file() else entries.get(job.name)
    if entry is None:
        return None
    requested, found = _expected_identity(job, jobs), _recorded_identity(entry.card)
    if different := [key for key, value in requested.items() if found.get(key) != value]:
        raise UserError(
            f"{entry.folder} is another model than the experiment's {job.name!r} (its {', '.join(different)} differ); "
            f"move it away, or give another --out or --zoo"
        )
    return entry


def _expected_identity(job: Job, jobs: Mapping[str, Job]) -> dict[str, object]:
    """What determines the weights of a job's model, as far as known before training."""
    flow = jobs[job.requires].finished if job.requires else None
    return {
        "defense": job.request.defense,
        "data set": job.dataset.name,
        "seed": job.request.seed,
        "number of training images": job.train_samples,
        "architecture": job.outlined.architecture.model_dump(mode="json"),
        "schedule": schedule_of(job.outlined.recipe),
        **{f"parameter {key}": value for key, value in job.outlined.parameters.items()},
        **({"flow": flow.card.weights.sha256} if flow else {}),
    }


def _recorded_identity(card: ModelCard) -> dict[str, object]:
    """The entries of `_expected_identity` in a card."""
    training = card.training
    found: dict[str, object] = {"defense": card.defense, "data set": card.dataset}
    found["architecture"] = card.architecture.model_dump(mode="json")
    if training is not None:
        found |= {
            "seed": training.seed,
            "number of training images": training.train_samples,
            "schedule": training.parameters.get("recipe"),
            **{f"parameter {key}": value for key, value in training.parameters.get("defense", {}).items()},
            **({"flow": training.flow.sha256} if training.flow else {}),
        }
    return found


def claim(plan: ExperimentPlan) -> None:
    """Write the identity of the experiment into its folder."""
    write_text_atomically(plan.folder / IDENTITY_FILE, dump_yaml(identity(plan.request)))


def train_absent(
    plan: ExperimentPlan, train: Callable[[TrainRequest], Path], tell: Callable[[str], None]
) -> dict[str, str]:
    """Train every missing model and detector; returns the reasons of those that failed, by name.

    train: trains a model and returns its folder. A model whose flow failed is not trained.
    """
    failed: dict[str, str] = {}
    for number, job in enumerate(plan.jobs, start=1):
        where = f"model {number} of {len(plan.jobs)}, {job.name}"
        if job.finished is not None:
            tell(f"{where}: trained already, {job.folder}")
            continue
        if job.requires in failed:
            failed[job.name] = f"its flow {job.requires} failed to train"
            continue
        recipe = job.outlined.recipe
        tell(f"{where}: {job.request.defense}, {recipe.epochs} epochs of {job.train_samples:,} images")
        try:
            train(job.request)
        except UserError as error:
            failed[job.name] = f"{error}"
            tell(f"failed: {error}")
    return failed | train_guards(plan.guards, failed, tell)
