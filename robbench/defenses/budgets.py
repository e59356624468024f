"""Parameters of inner attacks. Values left None come from a named attack of the threat models, so that training and
evaluation use the same ball by default."""

from typing import Any, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from robbench.attacks.latent import JointParameters, LatentParameters
from robbench.attacks.pgd import GradientParameters, LabelSource
from robbench.attacks.search.geometry import Start
from robbench.attacks.search.spaces import Box, ImageSpace, InLoop, JointSpace, LatentSpace
from robbench.core.errors import UserError
from robbench.core.schema import Strict, validate
from robbench.defenses.base import BatchNormMode, Setting, search_mode
from robbench.specs import Norm, ResolvedAttack, Space, resolve_attack

GradientP = TypeVar("GradientP", bound=GradientParameters)


class ImageSearch(Strict):
    """Inner PGD.

    Attributes:
        attack: named attack whose settings replace those that are None.
        norm: of the ball.
        epsilon, step_size: in [0,1] pixels.
        steps: gradient steps.
        start: where the search starts.
        attack_bn: mode of the classifier's modules in the attack.
        label_source: label in the attack's loss, the true one or the prediction on the clean batch (one more forward,
            in mode `attack_bn`).
        box: whether every iterate is clipped to [0,1], or only the final image.
    """

    attack: str = "pgd10"
    norm: Norm | None = None
    epsilon: float | None = None
    step_size: float | None = Field(default=None, ge=0)
    steps: int | None = Field(default=None, gt=0)
    start: Start | None = None
    attack_bn: BatchNormMode = "eval"
    label_source: LabelSource = "true"
    box: Box = "each-step"


class LatentSearch(Strict):
    """Inner A-LA.

    Attributes:
        eta, step_size: in raw z units.
        attack, norm, steps, start, label_source, attack_bn: see `ImageSearch`.
    """

    attack: str = "a-la"
    norm: Norm | None = None
    eta: float | None = None
    step_size: float | None = Field(default=None, ge=0)
    steps: int | None = Field(default=None, gt=0)
    start: Start | None = None
    label_source: LabelSource = "true"
    attack_bn: BatchNormMode = "eval"


class JointSearch(Strict):
    """Inner JSA.

    Attributes:
        epsilon, epsilon_step: in [0,1] pixels.
        eta, eta_step: in raw z units.
        in_loop: see `JointSpace`.
        attack, steps, start, attack_bn: see `ImageSearch`.
    """

    attack: str = "jsa10"
    epsilon: float | None = None
    epsilon_step: float | None = Field(default=None, ge=0)
    eta: float | None = None
    eta_step: float | None = Field(default=None, ge=0)
    steps: int | None = Field(default=None, gt=0)
    start: Start | None = None
    in_loop: InLoop | None = None
    attack_bn: BatchNormMode = "eval"


ImageP = TypeVar("ImageP", bound=ImageSearch)
LatentP = TypeVar("LatentP", bound=LatentSearch)
JointP = TypeVar("JointP", bound=JointSearch)
SearchP = TypeVar("SearchP", bound=Strict)


def find_attack(
    name: str, space: Space, setting: Setting, epsilon: float | None = None, eta: float | None = None
) -> ResolvedAttack:
    """The named attack with the data set's budget; `UserError` when it searches another space."""
    spec = resolve_attack(name, setting.dataset, dict(setting.threat_models), epsilon, eta)
    if spec.space != space:
        raise UserError(
            f"--set attack={name}: that attack searches the {spec.space} space and this defense the {space} "
            f"space; name another (robbench list attacks)"
        )
    return spec


def resolve_image(p: ImageP, setting: Setting) -> ImageP:
    """`p` with norm, epsilon, step size, steps and start filled in."""
    spec = find_attack(p.attack, "image", setting, epsilon=p.epsilon)
    defaults, epsilon = _parameters(spec, GradientParameters), float(spec.epsilon or 0.0)
    return _fill(p, defaults, norm=spec.norm, epsilon=epsilon, step_size=defaults.step(epsilon))


def resolve_latent(p: LatentP, setting: Setting) -> LatentP:
    """`p` with norm, eta, step size, steps and start filled in."""
    spec = find_attack(p.attack, "latent", setting, eta=p.eta)
    defaults, eta = _parameters(spec, LatentParameters), float(spec.eta or 0.0)
    return _fill(p, defaults, norm=spec.norm, eta=eta, step_size=defaults.step(eta))


def resolve_joint(p: JointP, setting: Setting) -> JointP:
    """`p` with both budgets, both step sizes, steps, start and clipping rule filled in."""
    spec = find_attack(p.attack, "joint", setting, p.epsilon, p.eta)
    defaults = _parameters(spec, JointParameters)
    epsilon, eta = float(spec.epsilon or 0.0), float(spec.eta or 0.0)
    steps = {"epsilon_step": defaults.step(epsilon), "eta_step": defaults.step(eta)}
    return _fill(p, defaults, epsilon=epsilon, eta=eta, **steps, in_loop=defaults.in_loop)


def image_space(p: ImageSearch) -> ImageSpace:
    """Search space of resolved parameters."""
    norm, epsilon, step, start = _filled_values(p, "norm", "epsilon", "step_size", "start")
    return ImageSpace(norm, epsilon, step, start, p.box)


def latent_space(p: LatentSearch, setting: Setting) -> LatentSpace:
    """Search space of resolved parameters on the setting's flow."""
    assert setting.flow is not None
    return LatentSpace(setting.flow, *_filled_values(p, "norm", "eta", "step_size", "start"))


def joint_space(p: JointSearch, setting: Setting) -> JointSpace:
    """Search space of resolved parameters on the setting's flow."""
    assert setting.flow is not None
    names = ("epsilon", "epsilon_step", "eta", "eta_step", "start", "in_loop")
    return JointSpace(setting.flow, *_filled_values(p, *names))


def attack_labels(model: nn.Module, x: Tensor, y: Tensor, p: ImageSearch | LatentSearch) -> Tensor:
    """Labels [B] in the inner attack's loss: y, or the model's predictions on x [B,C,H,W] in the attack's mode."""
    if p.label_source == "true":
        return y
    with search_mode(model, p.attack_bn), torch.no_grad():
        predictions: Tensor = model(x).argmax(1)
    return predictions


def _parameters(spec: ResolvedAttack, schema: type[GradientP]) -> GradientP:
    return validate(spec.parameters, schema, f"attack {spec.name!r} (as an inner attack of training)")


def _fill(p: SearchP, defaults: GradientParameters, **values: object) -> SearchP:
    """`p` with those fields that are None taken from `values`, steps and start from `defaults`."""
    values |= {"steps": defaults.steps, "start": defaults.start}
    return p.model_copy(update={name: value for name, value in values.items() if getattr(p, name) is None})


def _filled_values(p: Strict, *names: str) -> list[Any]:
    """Values of fields that `resolve_image` and its like have filled in."""
    values = [getattr(p, name) for name in names]
    assert None not in values
    return values
