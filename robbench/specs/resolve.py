"""From the name of an attack, a data set and a user's options to a `ResolvedAttack`."""

import math
from collections.abc import Iterable, Sequence

from robbench.core.budget_limits import IMAGE_SHAPES, exact_text, require_inside_box
from robbench.core.errors import UserError, spell_argument
from robbench.specs.names import attack_name
from robbench.specs.resolved import TRANSFER, ResolvedAttack
from robbench.specs.schema import Budget, ThreatModel


def resolve_attack(
    name: str,
    dataset: str,
    models: dict[str, ThreatModel],
    epsilon: float | None = None,
    eta: float | None = None,
    steps: int | None = None,
    target: str | int | None = None,
) -> ResolvedAttack:
    """The attack called `name` with the budget of `dataset`, or with the given budgets and steps.

    dataset: "" for none. target: "random", "least-likely" or a class, for a targeted attack. An attack that does not
    iterate ignores `steps`. `UserError` for a budget beyond the diameter
    of the box of the data set's images; where their shape is unknown, the attack checks it later.
    """
    name = attack_name(name, models)
    owner = next((m for m in models.values() if name in m.attacks), None)
    if owner is None:
        members = next(m.members(name) for m in models.values() if name in m.groups)
        raise UserError(f"attack {name!r} is a group of {len(members)}; name one of them, as in {members[0]}")
    for option, value in (("epsilon", epsilon), ("eta", eta)):
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise UserError(
                f"{spell_argument(option, value)} is not a budget; give a finite number of at least 0"
            )
    if epsilon is not None and owner.pixel_range == 255 and 0 < epsilon < 1:
        raise UserError(
            f"{spell_argument('epsilon', exact_text(epsilon))}: attack {name!r} counts epsilon on pixels 0..255, and "
            f"this is less than one of 255; give {exact_text(round(epsilon * 255, 6))} for "
            f"{exact_text(epsilon)} of the range"
        )
    budget = owner.budgets_of(name).get(dataset, Budget())
    # A minimal-norm attack searches without a budget; with one, its accuracy counts the images within it.
    counted = owner.space == "minimal" and bool(dataset or epsilon is not None)
    uses_epsilon = counted or owner.space in ("image", "joint", "rendered")
    uses_eta = owner.space in ("latent", "joint")
    resolved_epsilon = _budget_value(epsilon, budget.epsilon, uses_epsilon, "epsilon", name, dataset)
    resolved_eta = _budget_value(eta, budget.eta, uses_eta, "eta", name, dataset)
    spec = owner.attacks[name]
    norm = spec.norm or owner.norm
    if resolved_epsilon is not None and owner.space != "rendered":
        given = exact_text(resolved_epsilon)
        option = f"epsilon {given}" if epsilon is None else spell_argument("epsilon", given)
        shape = IMAGE_SHAPES.get(dataset)
        require_inside_box(resolved_epsilon, norm, shape, owner.pixel_range, name, option)
    label = name
    if uses_epsilon and epsilon is not None:
        label += f"@{exact_text(epsilon)}"
    if uses_eta and eta is not None:
        label += f"@eta{exact_text(eta)}"
    parameters = spec.parameters
    if steps is not None and "steps" in parameters:
        parameters = {**parameters, "steps": steps}
        label += f"@{steps}steps"
    if target is not None:
        parameters = {**parameters, "target": target}
        label += f"@to-{target}"
    return ResolvedAttack(
        name=name,
        label=label,
        threat_model=owner.name,
        target=owner.target_of(name),
        space=owner.space,
        norm=norm,
        pixel_range=owner.pixel_range,
        epsilon=resolved_epsilon,
        eta=resolved_eta,
        algorithm=spec.algorithm,
        parameters=parameters,
        of_grid=_is_of_grid(name, owner),
        given_budget=owner.space == "rendered" and epsilon is not None,
    )


def _is_of_grid(name: str, owner: ThreatModel) -> bool:
    """Whether `name` is an attack at one of its calibrated budgets (`AttackSpec.calibrated`)."""
    attack, _, place = name.rpartition("-")
    return attack in owner.attacks and place.isdecimal() and bool(owner.attacks[attack].calibrated)


def from_surrogate(attack: ResolvedAttack, surrogate: str, sha256: str, function: str = "") -> ResolvedAttack:
    """`attack` searching the model `surrogate` in the place of the attacked one. sha256: of its weights; function:
    `ModelCard.function_hash` of it. `UserError` for attacks on flows and targeted ones."""
    given = spell_argument("surrogate", surrogate)
    if attack.target != "classifier":
        on = "a flow's likelihood" if attack.target == "flow" else "a detector"
        raise UserError(
            f"{given}: attack {attack.label!r} is on {on} and has no transfer version; leave "
            f"{spell_argument('surrogate')} out, or name an attack on classifiers, as in pgd20, aa"
        )
    if attack.parameters.get("target") is not None:
        raise UserError(
            f"{given}: transfer attacks are untargeted; leave out {spell_argument('surrogate')} or "
            f"{spell_argument('target')}"
        )
    parameters = {
        "algorithm": attack.algorithm,
        "parameters": attack.parameters,
        "surrogate": surrogate,
        "sha256": sha256,
        "function": function,
    }
    label = f"{attack.label}@from-{surrogate}"
    return attack.model_copy(update={"algorithm": TRANSFER, "parameters": parameters, "label": label})


def importance_weighted(attack: ResolvedAttack, draws: int) -> ResolvedAttack:
    """An attack on a flow, scored by importance-weighted bits/dim over `draws` draws of dequantisation noise; with one
    draw, or on a classifier, the attack itself, so that its cells keep their address."""
    if draws == 1 or attack.target != "flow":
        return attack
    parameters = {**attack.parameters, "noise_draws": draws, "estimate": "importance"}
    return attack.model_copy(update={"parameters": parameters, "label": f"{attack.label}@{draws}draws"})


def refuse_unused_budgets(
    attacks: Iterable[ResolvedAttack],
    epsilons: Sequence[object],
    etas: Sequence[object],
    steps: Sequence[object] = (),
) -> None:
    """`UserError` for a given budget or number of steps that none of `attacks` uses."""
    found = list(attacks)
    for option, given, used, kind in (
        ("epsilon", epsilons, any(a.epsilon is not None for a in found), "an image, joint or minimal-norm"),
        ("eta", etas, any(a.eta is not None for a in found), "a latent or joint"),
        ("steps", steps, any("steps" in a.parameters for a in found), "an iterative"),
    ):
        if given and not used:
            raise UserError(
                f"{spell_argument(option)} changes none of these attacks; leave it out, or ask for {kind} attack"
            )


def _budget_value(
    given: float | None, default: float | None, used: bool, option: str, attack: str, dataset: str
) -> float | None:
    if not used:
        return None
    if given is not None:
        return given
    if default is None and not dataset:
        raise UserError(
            f"attack {attack!r} needs an {option}; give {spell_argument(option, 'VALUE')}, or "
            f"{spell_argument('dataset', 'NAME')} for that of a known data set"
        )
    if default is None:
        raise UserError(
            f"attack {attack!r} has no {option} for data set {dataset!r}; give {spell_argument(option, 'VALUE')}, "
            f"{spell_argument('like', 'NAME')} for the budgets of a known data set where yours is a folder, or add the "
            f"data set to `budgets` of its threat model"
        )
    return default
