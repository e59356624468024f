"""A call of `evaluate` as a plan: the same cells as `robbench run` has, of a model and data that only Python knows."""

import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from robbench.attacks import Attack
from robbench.cards import Architecture, ModelCard, Weights
from robbench.core.errors import UserError
from robbench.data import Dataset
from robbench.data.base import Split
from robbench.evaluation.inputs import Inputs
from robbench.evaluation.request import FlowInUse
from robbench.evaluation.subject import Subject
from robbench.models.loading import LoadedModel
from robbench.run.cells import CellBuilder
from robbench.run.plan import Plan

LEVELS = 256
EXAMPLES = 16  # adversarial images that a run folder keeps unless all are asked for


def plan_run(
    subject: Subject,
    inputs: Inputs,
    attacks: Sequence[Attack],
    flow: FlowInUse | None,
    dataset: str | None,
    name: str | None,
    seed: int,
    keep_images: bool,
) -> Plan:
    """The plan of `attacks` on a model and all its samples. name: of the model in tables, None for its class."""
    data = as_dataset(inputs, subject.classes, dataset, flow)
    card, samples = _card(subject, data, name), tuple(inputs.ids.tolist())
    builder = CellBuilder(
        seed=seed,
        batch_size=subject.victim.batch_size,
        likelihood_dtype=torch.float32,
        compiled=False,
        dataset=data,
        samples=samples,
        device=subject.victim.device,
        flow=flow.flow if flow is not None else None,
        flow_card=flow.card if flow is not None else None,
    )
    cells = tuple(builder.cells_of(LoadedModel(card, Path(), subject.victim.module), attacks))
    return Plan.of(builder, cells, [card], len(samples) if keep_images else EXAMPLES)


def as_dataset(inputs: Inputs, classes: int, dataset: str | None, flow: FlowInUse | None = None) -> Dataset:
    """The samples as a data set whose revision is over their ids, labels and pixels. dataset: what they are like.

    Pixels are grey levels where each is one of the flow's, or of 256; else float32 numbers, and the card says so.
    """
    images, levels = _as_levels(inputs.images, [flow.flow.grey_levels if flow else LEVELS, LEVELS])
    empty = Split(inputs.ids[:0], inputs.labels[:0], images[:0], levels)
    pixels = "" if images.dtype == torch.uint8 else "; their pixels are float32 numbers, not grey levels"
    return Dataset(
        name=f"{dataset}-arrays" if dataset else "arrays",
        class_names=tuple(map(str, range(classes))),
        grey_levels=levels,
        train=empty,
        validation=empty,
        test=Split(inputs.ids, inputs.labels, images, levels),
        source="robbench.evaluate",
        note=f"images given from Python{pixels}",
        like=dataset,
    )


def _as_levels(images: Tensor, tried: Sequence[int]) -> tuple[Tensor, int]:
    for levels in tried:
        grey = (images * (levels - 1)).round_()
        if levels <= LEVELS and torch.equal(grey / (levels - 1), images):
            return grey.to(torch.uint8), levels
    return images, LEVELS


def _card(subject: Subject, data: Dataset, name: str | None) -> ModelCard:
    if name is not None and (
        not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name)
    ):
        raise UserError(
            f"name={name!r} is no name of a model; give letters, digits, '.', '_' and '-', as in 'my-net'"
        )
    return ModelCard(
        name=name or re.sub(r"[^A-Za-z0-9._-]", "", subject.name).strip("._-")[:100] or "model",
        kind="classifier",
        description="a model given to robbench.evaluate from Python",
        dataset=data.name,
        defense="unknown",
        architecture=Architecture(name="python", arguments={"class": subject.name}),
        input_shape=data.shape,
        classes=subject.classes,
        weights=Weights(file="python", sha256=subject.sha256),
        license="unknown",
    )
