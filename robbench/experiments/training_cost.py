"""Number of model calls of a training: a step of the defense, computed once with stand-ins that count calls."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from robbench.defenses.base import Defense, Setting, build_defense
from robbench.models.embedding import EmbeddingClassifier
from robbench.recipes import Recipe
from robbench.specs import ModelKind, ThreatModel

IMAGES = 4  # in the counted batch
SIDE, DIMENSION = 8, 4  # of its images, and of their embeddings


@dataclass(frozen=True)
class StepCost:
    """Model calls per image of one training step.

    Attributes:
        forwards, backwards: of the model, those of the step's own loss included; of its encoder, where the step trains
            encoder and classifier apart.
        last: backwards of the step's own loss, to the parameters; all of them where `further_networks`.
        encodes, decodes, decode_backwards: of a flow.
        further_networks: whether the step trains networks beside the model, so that only its time as a whole is known.
    """

    forwards: float
    backwards: float
    last: float
    encodes: float = 0.0
    decodes: float = 0.0
    decode_backwards: float = 0.0
    further_networks: bool = False


class _Counted(torch.autograd.Function):
    """The identity; counts images in forward and backward."""

    @staticmethod
    def forward(context: Any, value: Tensor, counter: Counter[str], name: str) -> Tensor:
        context.counter, context.name = counter, name
        counter[name] += len(value)
        return value.clone()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        context.counter[f"{context.name} backward"] += len(gradients[0])
        return gradients[0], None, None


def _count_calls(value: Tensor, counter: Counter[str], name: str) -> Tensor:
    found: Tensor = _Counted.apply(value, counter, name)
    return found


class _Classifier(nn.Module):
    """A linear classifier that counts its calls."""

    def __init__(self, size: int, classes: int, counter: Counter[str]) -> None:
        super().__init__()
        self.layer, self.counter = nn.Linear(size, classes), counter

    def forward(self, x: Tensor) -> Tensor:
        return _count_calls(self.layer(x.flatten(1)), self.counter, "model")


class _Density(nn.Module):
    """A flow as trainings use it (log-densities, a frozen copy of itself) that counts its calls."""

    def __init__(self, size: int, counter: Counter[str]) -> None:
        super().__init__()
        self.layer, self.counter, self.dimensions = nn.Linear(size, 1), counter, size

    def log_prob(self, x: Tensor, y: Tensor | None = None, u: Tensor | float = 0.5) -> Tensor:
        return _count_calls(self.layer(x.flatten(1)).squeeze(1), self.counter, "model")

    def freeze(self) -> "_Density":
        return self


class CountingCodec:
    """The identity as a flow's encoder and decoder; counts its calls."""

    def __init__(self, shape: tuple[int, int, int], counter: Counter[str] | None = None) -> None:
        self.shape, self.counter = shape, Counter[str]() if counter is None else counter

    def encode_flat(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return _count_calls(x.flatten(1), self.counter, "encode")

    def latents(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.encode_flat(x, y)

    def decode_flat(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        return _count_calls(z.reshape(-1, *self.shape), self.counter, "decode")

    def level_mask(self, levels: tuple[int, ...]) -> Tensor:
        return torch.ones(SIDE * SIDE)


def step_cost(
    defense: str,
    kind: ModelKind,
    parameters: Mapping[str, Any],
    dataset: str,
    threat_models: Mapping[str, ThreatModel],
) -> StepCost:
    """Calls per image of a training step of `defense` with `parameters` on `dataset`; `UserError` for invalid ones.

    A plug-in's defense is counted too, as long as it calls only the model and the flow that it is given.
    """
    shape, counter = (1, SIDE, SIDE), Counter[str]()
    setting = Setting(dataset, threat_models, CountingCodec(shape, counter))
    built = build_defense(defense, parameters, setting, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        further = type(built).optimization is not Defense.optimization
        inner = (_count_step if further else _count_loss)(built, kind, counter)
    each = {name: count / IMAGES for name, count in counter.items()}
    return StepCost(
        forwards=each["model"],
        backwards=each["model backward"],
        last=each["model backward"] - inner / IMAGES,
        encodes=each.get("encode", 0.0),
        decodes=each.get("decode", 0.0),
        decode_backwards=each.get("decode backward", 0.0),
        further_networks=further,
    )


def _count_loss(built: Defense, kind: ModelKind, counter: Counter[str]) -> int:
    """Count the calls of `built.loss` and its gradient; returns the backwards of all images before the gradient."""
    size = SIDE * SIDE
    model: nn.Module = _Classifier(size, 10, counter) if kind == "classifier" else _Density(size, counter)
    loss = built.loss(model.train(), *_batch(), torch.Generator().manual_seed(0))
    inner = counter["model backward"]
    cast(Any, loss).backward()
    return inner


def _count_step(built: Defense, kind: ModelKind, counter: Counter[str]) -> int:
    """Count the encoder passes of a step with several optimisers; returns 0, since it has no single loss."""
    x, y = _batch()
    model = EmbeddingClassifier(
        _Classifier(SIDE * SIDE, DIMENSION, counter), nn.Linear(DIMENSION, 10), DIMENSION
    )
    recipe = Recipe(
        name="count", description="", optimizer="adam", learning_rate=1e-3, batch_size=IMAGES, epochs=1
    )
    built.optimization(model.train(), recipe).step(x, y, torch.Generator().manual_seed(0), 0.0, 0)
    return 0


def _batch() -> tuple[Tensor, Tensor]:
    return torch.rand(IMAGES, 1, SIDE, SIDE), torch.arange(IMAGES)
