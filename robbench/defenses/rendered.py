"""Inner attacks of adversarial training on the variables of a renderer (Kang et al. 2019, section 4).

UAR divides by the accuracies (ATA) of models that were trained so.
"""

from robbench.attacks import build_attack
from robbench.attacks.search.rendered import RenderedSpace
from robbench.attacks.unforeseen.base import RenderedAttack
from robbench.core.errors import UserError
from robbench.defenses.base import Setting
from robbench.defenses.budgets import ImageP
from robbench.specs import resolve_attack

PIXELS_ONLY = {
    "norm": None,
    "start": None,
    "box": "each-step",
}  # parameters of pixel balls, and what "not given" is


def rendered_attack(p: ImageP, setting: Setting) -> RenderedAttack | None:
    """The attack that `p` names if it searches the variables of a renderer, with its budget and steps; else None.

    `UserError` for parameters that only a pixel ball has, and for Frank-Wolfe attacks, which have no step to take along
    a training.
    """
    models = dict(setting.threat_models)
    spec = resolve_attack(p.attack, setting.dataset, models, p.epsilon, steps=p.steps)
    if spec.space != "rendered":
        return None
    for name, absent in PIXELS_ONLY.items():
        if getattr(p, name) != absent:
            raise UserError(
                f"--set {name}={getattr(p, name)}: attack {p.attack!r} perturbs no ball of pixels and "
                f"has no {name}; leave it out"
            )
    if p.step_size is not None:
        spec = spec.model_copy(update={"parameters": {**spec.parameters, "step_size": p.step_size}})
    attack = build_attack(spec)
    if not isinstance(attack, RenderedAttack) or attack.parameters.optimizer == "frank-wolfe":
        raise UserError(
            f"--set attack={p.attack}: its search takes no gradient steps, as an inner attack of training must; name "
            f"another (robbench list attacks), as in elastic"
        )
    return attack


def fill_rendered(p: ImageP, attack: RenderedAttack) -> ImageP:
    """`p` with the attack's budget, step size and steps, as the card records them."""
    epsilon = float(attack.spec.epsilon or 0.0)
    step = attack.parameters.step(epsilon)
    return p.model_copy(update={"epsilon": epsilon, "step_size": step, "steps": attack.parameters.steps})


def rendered_space(p: ImageP, attack: RenderedAttack) -> RenderedSpace:
    """The space of the attack with the budget and the step size of `p`, which the warm-up scales."""
    renderer = attack.renderer(float(p.epsilon or 0.0))
    return RenderedSpace(renderer, float(p.step_size or 0.0), attack.step_norm)
