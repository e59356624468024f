"""Cells of a table that are settings of a training or facts of its images: read without training anything."""

import inspect
from math import prod

import torch

from robbench.core.errors import UserError
from robbench.data import Dataset, dataset_names, load_dataset
from robbench.data.base import sample_ids
from robbench.defenses.plan import TrainRequest, outline
from robbench.experiments.request import ExperimentRequest
from robbench.experiments.schema import SETTINGS, TrainedModel
from robbench.experiments.table import Value, missing_value
from robbench.models.classifiers import ARCHITECTURES
from robbench.statistics.intrinsic_dimension import IntrinsicDimension, intrinsic_dimension

IMAGES, SEED = 1000, 0  # of the estimate of a data set's dimension
PARAMETERS = {"adv_training_epsilon": "epsilon", "adv_training_iterations": "steps"}


def measure_settings(request: ExperimentRequest) -> dict[tuple[str, str], Value]:
    """The settings that the experiment's cells ask for, by model and metric."""
    asked = {
        (model, column.metric): request.experiment.models[model]
        for row, column in request.experiment.runnable
        if column.metric in SETTINGS and (model := row.model_of(column.title))
    }
    return {key: _measure(request, spec, key[1]) for key, spec in asked.items()}


def _measure(request: ExperimentRequest, spec: TrainedModel, metric: str) -> Value:
    name = spec.dataset or request.dataset
    if metric in ("data_dim", "estimated_intrinsic_dim"):
        return _of_images(request, name, metric)
    training = TrainRequest(
        spec.defense, name, spec.recipe, spec.architecture, overrides=spec.settings, zoo=request.zoo
    )
    outlined = outline(training)
    if metric == "embedding_dim":
        return _exact(_embedding(outlined.architecture.name, outlined.architecture.arguments))
    return _exact(outlined.parameters.get(PARAMETERS[metric]))


def _embedding(architecture: str, arguments: dict[str, object]) -> object:
    """Dimension of the embedding that an architecture has with `arguments`; None where it has none."""
    known = inspect.signature(ARCHITECTURES.get(architecture)).parameters
    return arguments.get("embedding", known["embedding"].default if "embedding" in known else None)


def _exact(number: object) -> Value:
    if not isinstance(number, int | float):
        return Value(status="not run", reason="neither recipe nor experiment states it")
    return Value(float(number), float(number), float(number))


def _of_images(request: ExperimentRequest, name: str, metric: str) -> Value:
    own = request.data if name == request.dataset else None
    if own is None and name not in dataset_names():
        return missing_value(f"data set {name}")
    try:
        dataset = load_dataset(name, request.data_dir, own)
    except UserError as error:  # files that are absent
        return missing_value(f"data set {name} ({str(error).partition(';')[0]})")
    if metric == "data_dim":
        size = float(prod(dataset.shape))
        return Value(size, size, size, reason="x".join(map(str, dataset.shape)))
    part, found = estimate_dimension(dataset)
    return Value(found.mackay, reason=f"mackay; levina {found.levina:.2f}; {part} images", n=found.points)


def estimate_dimension(dataset: Dataset) -> tuple[str, IntrinsicDimension]:
    """The split that the images are from (test where there are no training images), and the estimates of up to `IMAGES`
    of them drawn by seed."""
    part = "train" if len(dataset.train) else "test"
    split = dataset.train if part == "train" else dataset.test
    ids = sample_ids(split, min(IMAGES, len(split)), SEED)
    return part, intrinsic_dimension(torch.flatten(split.by_ids(ids)[0], 1).numpy())
