"""The contract of a defense, a training objective: a rule that turns a training batch into a loss."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from robbench.attacks.search.geometry import GeneratorNoise
from robbench.attacks.search.inner import ascend, attack_mode
from robbench.attacks.search.spaces import Codec, SearchSpace
from robbench.core.errors import UserError, unknown_name
from robbench.core.registry import Registry
from robbench.core.schema import Strict, validate
from robbench.defenses.schedule import build_optimizer, move_weights
from robbench.recipes import Recipe
from robbench.specs import ModelKind, ThreatModel

Criterion = Literal[
    "accuracy", "pgd10_accuracy", "bits_per_dim", "attacked_bits_per_dim", "hybrid_bits_per_dim"
]
BatchNormMode = Literal["eval", "train"]
BUDGETS = ("epsilon", "epsilon_step", "eta", "eta_step", "step_size")


@dataclass(frozen=True)
class Setting:
    """The training that a defense is used in.

    dataset: name, for the budgets of inner attacks. flow: frozen flow of latent and joint attacks.
    """

    dataset: str
    threat_models: Mapping[str, ThreatModel]
    flow: Codec | None = None


State = dict[str, Any]


class Optimization(ABC):
    """What moves weights in a training: its optimisers, and networks that are trained beside the model."""

    @abstractmethod
    def step(self, x: Tensor, y: Tensor, generator: torch.Generator, rate: float, epoch: int) -> float:
        """One training step; returns the batch's loss.

        x: [B,C,H,W] in [0,1]; y: [B]; generator: on the CPU; rate: learning rate; epoch: from 0. The model is in train
        mode before it.
        """

    @abstractmethod
    def state_dict(self) -> State:
        """Everything but the model's weights that the next step depends on: tensors and plain values."""

    @abstractmethod
    def load_state_dict(self, state: State) -> None:
        """Go on from a state that `state_dict` returned."""


class SingleLoss(Optimization):
    """One optimiser over all weights of the model, and `Defense.loss`."""

    def __init__(self, defense: "Defense", model: nn.Module, recipe: Recipe) -> None:
        self.defense, self.model, self.recipe = defense, model, recipe
        self.optimizer = build_optimizer(recipe, model)

    def step(self, x: Tensor, y: Tensor, generator: torch.Generator, rate: float, epoch: int) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.defense.loss(self.model, x, y, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        move_weights(self.optimizer, rate, self.recipe.gradient_clip_norm)
        return float(loss.detach())

    def state_dict(self) -> State:
        return self.optimizer.state_dict()

    def load_state_dict(self, state: State) -> None:
        self.optimizer.load_state_dict(state)


class Defense(ABC):
    """Base of all defenses. Subclasses set `Parameters`, the flags below, and implement `loss`; those with more than
    one optimiser override `optimization` too.

    Defenses of classifiers register in `DEFENSES`, those of flows in `FLOW_DEFENSES`; "at" is in both. needs_flow:
    whether `Setting.flow` is required. criterion: number on the validation split that selects the best epoch (lowest
    bits/dim; hybrid: mean of clean and attacked).
    """

    Parameters: ClassVar[type[Strict]] = Strict
    needs_flow: ClassVar[bool] = False
    criterion: ClassVar[Criterion] = "accuracy"

    def __init__(self, name: str, parameters: Mapping[str, Any], setting: Setting) -> None:
        if self.needs_flow and setting.flow is None:
            raise UserError(
                f"defense {name!r} perturbs the latents of a normalizing flow and none is at hand; "
                f"name one with --flow, or train one: "
                f"robbench train --defense clean --dataset {setting.dataset}"
            )
        self.name, self.setting = name, setting
        checked = validate(dict(parameters), self.Parameters, f"defense {name!r}, --set")
        self.parameters: Any = self.resolve(checked)
        self.strength = 1.0

    @property
    def current(self) -> Any:
        """The parameters that inner attacks use: budgets and step sizes multiplied by `strength`, the warm-up factor in
        (0, 1] that the training loop sets before every epoch."""
        values = {name: getattr(self.parameters, name, None) for name in BUDGETS}
        scaled = {name: value * self.strength for name, value in values.items() if value is not None}
        return self.parameters.model_copy(update=scaled)

    def resolve(self, parameters: Any) -> Any:
        """The parameters with budgets filled in from the threat models, as the card records them."""
        return parameters

    def prepare(self, model: nn.Module, x: Tensor) -> None:  # noqa: B027  (optional hook)
        """Called once, before the first step of a new training, with its first batch x [B,C,H,W]."""

    def optimization(self, model: nn.Module, recipe: Recipe) -> Optimization:
        """What moves the weights of `model` in a training by `recipe`; `UserError` for a model that does not fit.

        Initial weights of further networks come from torch's global generator, which the loop seeds.
        """
        return SingleLoss(self, model, recipe)

    @property
    def keeps_rate(self) -> bool:
        """Whether the learning rate stays what it is at the start, whatever the recipe's schedule."""
        return False

    @property
    def note(self) -> str:
        """What the card of a trained model has to say of this training, for people."""
        return ""

    @abstractmethod
    def loss(self, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Scalar loss of a batch. model: in train mode. x: [B,C,H,W] in [0,1]; y: [B]; generator: on the
        CPU."""


def _is_defense(entry: object) -> bool:
    return isinstance(entry, type) and issubclass(entry, Defense)


_SUBCLASS = "a subclass of robbench.defenses.base.Defense"
DEFENSES: Registry[type[Defense]] = Registry("defense", "robbench.defenses", _is_defense, _SUBCLASS)
FLOW_DEFENSES: Registry[type[Defense]] = Registry(
    "flow defense", "robbench.flow_defenses", _is_defense, _SUBCLASS
)


def defense_kinds(name: str) -> tuple[ModelKind, ...]:
    """What the defense called `name` trains, classifiers first; `UserError` for unknown names."""
    kinds: dict[ModelKind, Registry[type[Defense]]] = {"classifier": DEFENSES, "flow": FLOW_DEFENSES}
    found = tuple(kind for kind, registry in kinds.items() if name in registry)
    if not found:
        raise unknown_name("defense", name, {*DEFENSES, *FLOW_DEFENSES})
    return found


def find_defense(name: str, kind: ModelKind) -> type[Defense]:
    """The class of a defense of classifiers or flows; `UserError` for unknown names."""
    return (DEFENSES if kind == "classifier" else FLOW_DEFENSES).get(name)


def build_defense(
    name: str, parameters: Mapping[str, Any], setting: Setting, kind: ModelKind = "classifier"
) -> Defense:
    """The defense called `name`; `UserError` for unknown names, unknown or malformed parameters, a missing
    flow."""
    return find_defense(name, kind)(name, parameters, setting)


@contextmanager
def search_mode(model: nn.Module, mode: BatchNormMode) -> Iterator[None]:
    """`attack_mode(model)`; with mode "train" modules are in train mode, as in the reference code of latent
    perturbation training, where every forward of the attack updates the running statistics."""
    with attack_mode(model):
        if mode == "train":
            model.train()
        yield


def perturb(
    model: nn.Module,
    space: SearchSpace,
    loss: Callable[[Tensor], Tensor],
    steps: int,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    mode: BatchNormMode = "eval",
) -> Tensor:
    """Images x' [B,C,H,W] after `steps` ascent steps on `loss` (image -> [B]), without a graph.

    Modes, `requires_grad` flags and parameter gradients of the model are not changed.
    """
    with search_mode(model, mode):
        state = space.start(x, y, GeneratorNoise(len(x), generator, x.device))
        return space.finish(ascend(space, loss, state, steps))[0]


@dataclass(frozen=True)
class Mixture:
    """A mixed batch: images `weight` x_i + (1 - weight) x_j, labels y_i and partners y_j, one weight per batch."""

    x: Tensor
    labels: Tensor
    partners: Tensor
    weight: float


def mix(x: Tensor, y: Tensor, tau: float, generator: torch.Generator) -> Mixture:
    """Mixup with one weight ~ Beta(tau, tau) and one permutation per batch (Zhang et al. 2018, section 2)."""
    weight = beta_draw(tau, generator)
    partner = torch.randperm(len(x), generator=generator).to(x.device)
    return Mixture(weight * x + (1.0 - weight) * x[partner], y, y[partner], weight)


def beta_draw(tau: float, generator: torch.Generator) -> float:
    """One draw from Beta(tau, tau), a function of the torch generator's state."""
    key = int(torch.randint(0, 2**62, (), generator=generator))
    return float(np.random.Generator(np.random.Philox(key=key)).beta(tau, tau))
