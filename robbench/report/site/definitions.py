"""What the shipped YAML files say of threat models and attacks, for runs that used them as they are shipped."""

from dataclasses import dataclass
from functools import cache

import yaml

from robbench.specs import AttackSpec, ResolvedAttack, ThreatModel, threat_models

OWN = (
    "Not among the threat models that robbench ships: the run was given a file of its own (--threat-models)."
)


@dataclass(frozen=True)
class Definition:
    """Texts of a threat model, or of an attack under one. yaml: its part of the file; note: what is not as shipped."""

    description: str
    reference: str = ""
    yaml: str = ""
    note: str = ""


@cache
def _read_shipped() -> dict[str, ThreatModel]:
    return threat_models(None)


def of_threat_model(attack: ResolvedAttack) -> Definition:
    """The threat model that `attack` stands under."""
    model = _read_shipped().get(attack.threat_model)
    spec = model.attacks.get(attack.name) if model else None
    norm = spec.norm if spec else None
    if model is None or (model.space, norm or model.norm, model.target_of(attack.name)) != (
        attack.space,
        attack.norm,
        attack.target,
    ):
        return Definition("", note=OWN)
    content = model.model_dump(mode="json", exclude_defaults=True)
    if len(content["attacks"]) > MANY:
        content["attacks"] = f"{len(content['attacks'])} attacks; robbench show {model.name}"
    return Definition(model.description, yaml=_yaml(content))


MANY = 40  # attacks of a threat model whose YAML is shortened


def of_attack(attack: ResolvedAttack) -> Definition:
    """The named attack; its description only where the run's parameters are those of the shipped file."""
    model = _read_shipped().get(attack.threat_model)
    spec = model.attacks.get(attack.name) if model else None
    if spec is None:
        return Definition("", note=OWN)
    text = _yaml({attack.name: spec.model_dump(mode="json", exclude_defaults=True)})
    changed = _list_changes(attack, spec)
    note = f"Run with {', '.join(changed)} in the place of the file's." if changed else ""
    return Definition(spec.description, spec.reference, text, note)


def _list_changes(attack: ResolvedAttack, spec: AttackSpec) -> list[str]:
    """Parameters that the run gave otherwise, as "steps = 50"."""
    given = {"algorithm": spec.algorithm, **spec.parameters}
    searched = attack.on_surrogate
    used = {"algorithm": searched.algorithm, **searched.parameters}
    changed = [key for key, value in given.items() if used.get(key) != value]
    surrogate = [] if searched is attack else [f"surrogate = {attack.parameters['surrogate']}"]
    return [*(f"{key} = {'not set' if used.get(key) is None else used[key]}" for key in changed), *surrogate]


def _yaml(content: object) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=90)
