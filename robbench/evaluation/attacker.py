"""`robbench.attack`: one attack as a function of model, images and labels."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from robbench.attacks import Attack, Outcome, TransferAttack, Victim, build_attack
from robbench.attacks.search.decision import margins, predictions
from robbench.attacks.search.geometry import norm_of
from robbench.attacks.search.goals import Target
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.trust.context import full_precision, own_context
from robbench.attacks.trust.suspicions import RobbenchWarning
from robbench.core.device import resolve_device
from robbench.core.errors import UserError, python_arguments
from robbench.core.foreign import no_exit
from robbench.core.stops import listening
from robbench.evaluation.inputs import Array, Inputs, read_inputs, to_tensor
from robbench.evaluation.request import Budget, GivenFlow, flow_in_use, require_seed, resolve_attacks
from robbench.evaluation.result import distance_norm
from robbench.evaluation.subject import Model, Subject, fingerprint, prepare
from robbench.models.flows.base import FrozenFlow
from robbench.models.functions import as_module
from robbench.specs import Norm, ResolvedAttack, from_surrogate


class AttackedImages(NamedTuple):
    """What `Attacker.run` returns, all on the device of x.

    Attributes:
        images: adversarial, [N,C,H,W].
        success: [N] bool, whether the model is wrong on them (a tie is wrong); of a targeted attack, sees the target.
        distances: float32 [N], from the clean images, in `Attacker.norm`.
    """

    images: Tensor
    success: Tensor
    distances: Tensor


@dataclass(frozen=True, repr=False)
class Attacker:
    """An attack with its budget, to be called on models.

    Attributes:
        spec: the attack with every number filled in.
        attack: what searches.
        seed: of its random numbers; sample i is keyed by (seed, i).
        device: where it computes.
        batch_size: images at once.
        flow: what a latent or joint attack searches through.
        surrogate: the model that a transfer attack searches; None for the attacked one.
    """

    spec: ResolvedAttack
    attack: Attack
    seed: int
    device: str
    batch_size: int
    flow: FrozenFlow | None = None
    surrogate: Model | None = None

    @property
    def norm(self) -> Norm:
        """The norm of `distances`: of the attack's ball, linf for latent, joint and rendered attacks."""
        return distance_norm(self.spec.space, self.spec.norm)

    def __call__(self, model: Model, x: Array, y: Array) -> Tensor:
        """Adversarial images [N,C,H,W] in [0,1] for images x and labels y [N], on x's device and in its dtype.

        Each is checked to lie in the attack's set; of an image that was not broken, it is the last one tried or the
        clean one. The model is left as it was found.
        """
        with self._attacking(model, x, y) as (inputs, _, outcome):
            found = _as_given(outcome.adversarial, inputs)
        self._warn(outcome)
        return found

    def run(self, model: Model, x: Array, y: Array) -> AttackedImages:
        """As a call, with the success of each image by a clean forward of it, and its distance."""
        with self._attacking(model, x, y) as (inputs, victim, outcome):
            images = _as_given(outcome.adversarial, inputs)
            back = images.detach().to("cpu", torch.float32)
            with attack_mode(victim.module), full_precision():
                victim.draws = self.attack.verdict_forwards
                logits = victim.attacked_logits(back, inputs.labels)
                success = ~(margins(logits, inputs.labels) > 0)
                if outcome.targets is not None:
                    success = (predictions(logits) == outcome.targets) & (outcome.targets != inputs.labels)
            distances = norm_of(back - inputs.images, self.norm)
        self._warn(outcome)
        return AttackedImages(images, success.to(inputs.device), distances.to(inputs.device))

    @contextmanager
    def _attacking(self, model: Model, x: Array, y: Array) -> Iterator[tuple[Inputs, Victim, Outcome]]:
        what = f"attack {self.spec.label!r}: the model ({type(model).__qualname__})"
        with python_arguments(), listening(), no_exit(what), own_context():
            inputs = _inputs(x, y)
            with prepare(model, inputs.images, self.device, self.batch_size, inputs.device) as subject:
                if self.flow is not None:
                    self.flow.to(subject.victim.device)
                with self._searching(subject, inputs):
                    outcome = self.attack.evaluate(
                        subject.victim, inputs.ids, inputs.images, inputs.labels, self.seed, self.batch_size
                    )
                yield inputs, subject.victim, outcome

    @contextmanager
    def _searching(self, subject: Subject, inputs: Inputs) -> Iterator[None]:
        """Inside, a transfer attack has its surrogate, which fits the attacked model."""
        if self.surrogate is None or not isinstance(self.attack, TransferAttack):
            yield
            return
        device = subject.victim.device
        with prepare(self.surrogate, inputs.images, device, self.batch_size, inputs.device) as other:
            if other.classes != subject.classes:
                raise UserError(
                    f"surrogate returns {other.classes} logits per image and the attacked model {subject.classes}; "
                    f"give a surrogate with the same classes"
                )
            self.attack.surrogate = other.victim.module
            try:
                yield
            finally:
                self.attack.surrogate = None

    def _warn(self, outcome: Outcome) -> None:
        for one in outcome.suspicions:
            warnings.warn(f"{self.spec.label}: {one.text}", RobbenchWarning, stacklevel=3)

    def __repr__(self) -> str:
        budgets = [
            f"{name}={value:g}"
            for name in ("epsilon", "eta")
            if (value := getattr(self.spec, name)) is not None
        ]
        return f"robbench.attack({', '.join([repr(self.spec.name), *budgets])})"


def attack(
    name: str,
    *,
    epsilon: Budget | None = None,
    eta: Budget | None = None,
    dataset: str | None = None,
    flow: GivenFlow = None,
    target: Target | None = None,
    surrogate: Model | None = None,
    seed: int = 0,
    device: str | torch.device = "auto",
    batch_size: int = 256,
) -> Attacker:
    """The attack called `name` (`robbench list attacks`), as a function of model, images and labels.

    epsilon, eta: its budget, 0.031 or "8/255", in [0,1] pixels and raw latent units; dataset: whose budget and default
    flow to use instead. target: "random" or "least-likely" wrong class, or a class number, for a targeted attack.
    flow: a flow, or the name of one in the zoo, for latent and joint attacks. surrogate: a model to search in the place
    of the attacked one (a transfer attack). seed, device, batch_size: as of
    `evaluate`. `UserError` in one line for anything that does not fit.
    """
    with python_arguments(), own_context():
        if not isinstance(name, str):
            raise UserError(
                f"name={name!r} is no name of an attack (robbench list attacks); give one, as in 'pgd20'"
            )
        specs = resolve_attacks(name, dataset, epsilon, eta, target)
        if surrogate is not None:
            specs = [_transferred(spec, surrogate) for spec in specs]
        if len(specs) != 1:
            raise UserError(
                f"robbench.attack takes one attack and one budget, and these are {len(specs)}; give one each"
            )
        resolve_device(str(device))
        found = flow_in_use(flow, dataset, specs, scored=False)
        frozen = found.flow if found is not None else None
        built = build_attack(specs[0], frozen)
        return Attacker(built.spec, built, require_seed(seed), str(device), batch_size, frozen, surrogate)


def _transferred(spec: ResolvedAttack, surrogate: Model) -> ResolvedAttack:
    if not callable(surrogate):
        raise UserError(
            f"surrogate is of type {type(surrogate).__name__}; give a model, as in surrogate=robbench.load_model(NAME)"
        )
    name = getattr(surrogate, "__name__", None) or type(surrogate).__name__
    return from_surrogate(spec, str(name), fingerprint(as_module(surrogate)))


def _inputs(x: Array, y: Array) -> Inputs:
    given = to_tensor("x", x)
    if given.dtype == torch.uint8:
        raise UserError(
            "x is uint8, which cannot hold adversarial images; give floating point pixels in [0,1], as in x / 255"
        )
    return read_inputs(x, y)


def _as_given(adversarial: Tensor, inputs: Inputs) -> Tensor:
    """Images in the caller's dtype and on the caller's device. Narrower numbers are rounded towards the clean image, so
    that an image leaves neither its ball nor the box."""
    found = adversarial.to(inputs.dtype)
    if found.dtype not in (torch.float32, torch.float64):
        clean = inputs.images
        too_far = (found.float() - clean).abs() > (adversarial - clean).abs()
        found = torch.where(too_far, torch.nextafter(found, clean.to(inputs.dtype)), found)
    return found.to(inputs.device)
