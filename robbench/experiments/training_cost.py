"""Number of model calls of a training: the defense's loss, computed once with stand-ins that count calls."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from robbench.defenses.base import Setting, build_defense
from robbench.specs import ModelKind, ThreatModel

IMAGES = 4  # in the counted batch
SIDE = 8


@dataclass(frozen=True)
class StepCost:
    """Model calls per image of one training step.

    Attributes:
        forwards, backwards: of the model, those of the step's own loss included.
        last: backwards of the step's own loss, to the parameters.
        encodes, decodes, decode_backwards: of a flow.
    """

    forwards: float
    backwards: float
    last: float
    encodes: float = 0.0
    decodes: float = 0.0
    decode_backwards: float = 0.0


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
        size = SIDE * SIDE
        model: nn.Module = _Classifier(size, 10, counter) if kind == "classifier" else _Density(size, counter)
        x, y = torch.rand(IMAGES, *shape), torch.arange(IMAGES)
        loss = built.loss(model.train(), x, y, torch.Generator().manual_seed(0))
        inner = counter["model backward"]
        cast(Any, loss).backward()
    each = {name: count / IMAGES for name, count in counter.items()}
    return StepCost(
        forwards=each["model"],
        backwards=each["model backward"],
        last=each["model backward"] - inner / IMAGES,
        encodes=each.get("encode", 0.0),
        decodes=each.get("decode", 0.0),
        decode_backwards=each.get("decode backward", 0.0),
    )
