"""Typed schemas of threat models and attacks. An unknown key is an error that names the file and the key.

No torch here: listing attacks and models stays fast.
"""

import fnmatch
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from robbench.core.budget_limits import IMAGE_SHAPES, require_inside_box
from robbench.core.budget_limits import exact_text as exact_text  # part of this module's names
from robbench.core.errors import UserError, folded, known_name, spell_argument
from robbench.core.resources import data_root, existing_folder
from robbench.core.schema import Strict, load_yaml

# "corruption": given images, without search and budget.
Space = Literal["image", "latent", "joint", "corruption"]
Norm = Literal["linf", "l2", "l1", "none"]
ModelKind = Literal["classifier", "flow"]
# Meaning of an attack's images. "worst-case": the strongest of a set that contains the clean image, so that a sample
# misclassified without attack is misclassified under it. "perturbation": every image is perturbed, and its own verdict
# counts.
Semantics = Literal["worst-case", "perturbation"]
# Samples that an accuracy counts: right without attack; right without attack and under it; right on the attacked image,
# whatever the answer on the clean one.
Measure = Literal["accuracy", "robust accuracy", "accuracy under attack"]
SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Names become file names, table labels and entries of comma lists.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
RESERVED_ATTACKS = ("clean", "worst-case", "average")


# ---------------------------------------------------------------------------------------------- threat models
class Budget(Strict):
    """Budget of an attacker. epsilon: image radius in [0,1] pixels; eta: latent radius in raw z units."""

    epsilon: float | None = None
    eta: float | None = None
    note: str = ""

    @field_validator("epsilon", "eta", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("a budget is a finite number of at least 0")
        return value

    @field_validator("epsilon", "eta")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise ValueError("a budget is a finite number of at least 0")
        return value


class AttackSpec(Strict):
    """A named attack under a threat model: an algorithm of the registry and its parameters.

    Attributes:
        algorithm: name in the registry.
        budgets: by data set, where they differ from the threat model's.
        parameters: of the algorithm.
        description, reference: texts for people.
    """

    algorithm: str
    budgets: dict[str, Budget] = Field(default_factory=dict)
    parameters: dict[str, Any] = Field(default_factory=dict)
    description: str = ""
    reference: str = ""


class AttackGroup(Strict):
    """A name for several attacks of a threat model. attacks: their names, or patterns such as "c-fog-*"."""

    description: str
    attacks: tuple[str, ...]


class ThreatModel(Strict):
    """A set of allowed images (space, norm, budget per data set), and the named attacks under it.

    Attributes:
        name, description: of the threat model.
        target: attacks change a classifier's decision or a flow's likelihood.
        space, norm: of the perturbation.
        pixel_range: epsilon is stated for pixels in [0, pixel_range]; 255 as in papers on likelihoods, whatever number
            of grey levels the images have.
        budgets: by data set.
        attacks, groups: by name.
    """

    name: Name
    target: ModelKind = "classifier"
    space: Space
    norm: Norm
    pixel_range: Literal[1, 255] = 1
    description: str
    budgets: dict[str, Budget]
    attacks: dict[Name, AttackSpec]
    groups: dict[Name, AttackGroup] = Field(default_factory=dict)

    @field_validator("attacks")
    @classmethod
    def _not_reserved(cls, attacks: dict[str, AttackSpec]) -> dict[str, AttackSpec]:
        taken = [name for name in RESERVED_ATTACKS if name in attacks]
        if taken:
            raise ValueError(f"tables have a column {taken[0]!r} of their own; give the attack another name")
        return attacks

    @model_validator(mode="after")
    def _groups_have_members(self) -> Self:
        for name, group in self.groups.items():
            empty = [pattern for pattern in group.attacks if not fnmatch.filter(self.attacks, pattern)]
            if empty or not group.attacks or name in self.attacks or name in RESERVED_ATTACKS:
                raise ValueError(
                    f"group {name!r}: {empty[0] if empty else 'its name or its list'} names no attacks"
                )
        return self

    def budgets_of(self, attack: str) -> dict[str, Budget]:
        """The budget of an attack by data set."""
        return {**self.budgets, **self.attacks[attack].budgets}

    def members(self, group: str) -> tuple[str, ...]:
        """Names of the attacks of a group."""
        patterns = self.groups[group].attacks
        return tuple(dict.fromkeys(n for pattern in patterns for n in fnmatch.filter(self.attacks, pattern)))


class ResolvedAttack(Strict):
    """An attack with every number filled in for one data set; its hash is part of a cell's address.

    Attributes:
        name: of the attack.
        label: its name in tables ("pgd20", or "pgd20@0.1" with a budget of the user).
        threat_model, target, space, norm, pixel_range: see `ThreatModel`.
        epsilon, eta: budgets; None where the space has none.
        algorithm, parameters: see `AttackSpec`.
        semantics: declared by the algorithm (`NamedAttack.declared_semantics`), filled in when the attack is built. Old
            records lack it; their perturbations, except corrupted images, left misclassified images as they were, as a
            worst case does.
    """

    name: str
    label: str
    threat_model: str
    target: ModelKind = "classifier"
    space: Space
    norm: Norm
    pixel_range: Literal[1, 255] = 1
    epsilon: float | None
    eta: float | None
    algorithm: str
    parameters: dict[str, Any]
    semantics: Semantics = "worst-case"

    @model_validator(mode="before")
    @classmethod
    def _corruptions_are_perturbations(cls, values: Any) -> Any:
        if isinstance(values, dict) and "semantics" not in values and values.get("space") == "corruption":
            return {**values, "semantics": "perturbation"}
        return values

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that results depend on, as JSON values: without the label, and without the semantics where the
        space implies them, as for old records."""
        implied: Semantics = "perturbation" if self.space == "corruption" else "worst-case"
        left_out = {"label"} | ({"semantics"} if self.semantics == implied else set())
        return self.model_dump(mode="json", exclude=left_out)

    @property
    def measure(self) -> Measure:
        """The accuracy that tables show for the attack on a classifier."""
        return "accuracy under attack" if self.semantics == "perturbation" else "robust accuracy"

    @property
    def needs_flow(self) -> bool:
        """Whether the attack perturbs the latents of a normalizing flow."""
        return self.space in ("latent", "joint")

    @property
    def bounded(self) -> bool:
        """Whether a budget bounds the adversarial image, which is not so for corrupted images."""
        return self.space != "corruption"

    def last_step(self, component: str) -> float:
        """The largest step at which a component of the attack can break a sample; NaN where it has no number of steps
        (every step then takes at least one forward)."""
        name = "square_queries" if component == "square" else "steps"
        count = self.parameters.get(name, self.parameters.get("iterations"))
        if not isinstance(count, int):
            return math.nan
        # APGD with large radii scores one more iterate in each of its first two phases.
        return count + 2 if component.startswith("apgd") else count

    @property
    def radius(self) -> float:
        """epsilon for pixels in [0,1]; 0 without one."""
        return float(self.epsilon or 0.0) / self.pixel_range


def threat_models(extra_folder: str | Path | None = None) -> dict[str, ThreatModel]:
    """All shipped threat models and, with `--threat-models DIR`, the user's, by name; `UserError` for a duplicate."""
    folders = [data_root() / "threat_models"]
    if extra_folder is not None:
        extra = existing_folder(extra_folder, "--threat-models")
        if not any(extra.glob("*.yaml")):
            raise UserError(
                f"--threat-models {str(extra_folder)!r} holds no .yaml file; name the folder of yours"
            )
        folders += [] if extra.samefile(folders[0]) else [extra]
    found: dict[str, ThreatModel] = {}
    owners: dict[str, Path] = {}
    for path in (p for folder in folders for p in sorted(folder.glob("*.yaml"))):
        model = load_yaml(path, ThreatModel)
        if model.name in found:
            raise UserError(f"{path}: threat model {model.name!r} exists already; give it another name")
        for attack in (*model.attacks, *model.groups):
            if attack in owners:
                raise UserError(f"{path}: attack {attack!r} is defined in {owners[attack]} too; rename one")
            owners[attack] = path
        found[model.name] = model
    return found


def listed_attacks(models: dict[str, ThreatModel]) -> list[str]:
    """Names for `--attacks`, without the members of groups."""
    names: list[str] = []
    for model in models.values():
        grouped = {name for group in model.groups for name in model.members(group)}
        names += [*model.groups, *(name for name in model.attacks if name not in grouped)]
    return names


def expand_groups(names: Iterable[str], models: dict[str, ThreatModel]) -> list[str]:
    """`names` with every group replaced by its members; unknown names stay, and `resolve_attack` refuses them."""
    members = {group: model.members(group) for model in models.values() for group in model.groups}
    return list(dict.fromkeys(attack for name in names for attack in members.get(name, (name,))))


# Names of attacks in papers and other libraries, folded, that mean one attack here; and those that mean none, with what
# comes nearest to them here.
ALSO_CALLED = {"mifgsm": "mim"}
NEAREST_HERE = {
    "cw": ("fab-t-l2", "apgd-t-l2", "aa-l2"),
    "carlini": ("fab-t-l2", "apgd-t-l2", "aa-l2"),
    "carliniwagner": ("fab-t-l2", "apgd-t-l2", "aa-l2"),
    "deepfool": ("fab-t", "fab-t-l2"),
    "bim": ("pgd10", "pgd20", "mim"),
    "ifgsm": ("pgd10", "pgd20", "mim"),
    "autopgd": ("apgd-ce", "apgd-t", "aa"),
}


def attack_name(name: str, models: dict[str, ThreatModel]) -> str:
    """The attack or group of `models` that `name` means, as in "AutoAttack", "PGD-20", "fgsm_linf", "square-attack";
    `UserError` with up to three suggestions for one that is none, or could be several ("pgd")."""
    known = {found for model in models.values() for found in (*model.attacks, *model.groups)}
    plain = folded(name).replace("autoattack", "aa").removesuffix("attack").removesuffix("linf")
    there = {folded(found): found for found in known}
    also = dict(ALSO_CALLED)
    for shape in (plain, ALSO_CALLED.get(plain, "")):
        if folded(shape) in there:
            also[folded(name)] = there[folded(shape)]
    return known_name("attack", name, known, also=also, near=NEAREST_HERE.get(plain, ()))


def resolve_attack(
    name: str,
    dataset: str,
    models: dict[str, ThreatModel],
    epsilon: float | None = None,
    eta: float | None = None,
    steps: int | None = None,
) -> ResolvedAttack:
    """The attack called `name` with the budget of `dataset`, or with the given budgets and steps.

    dataset: "" for none. An attack that does not iterate ignores `steps`. `UserError` for a budget beyond the diameter
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
                f"{spell_argument(option, value)} is not a budget; give a finite number of at least 0 (0 is clean)"
            )
    if epsilon is not None and owner.pixel_range == 255 and 0 < epsilon < 1:
        raise UserError(
            f"{spell_argument('epsilon', exact_text(epsilon))}: attack {name!r} counts epsilon on pixels 0..255, and "
            f"this is less than one of 255; give {exact_text(round(epsilon * 255, 6))} for "
            f"{exact_text(epsilon)} of the range"
        )
    budget = owner.budgets_of(name).get(dataset, Budget())
    uses_epsilon, uses_eta = owner.space in ("image", "joint"), owner.space in ("latent", "joint")
    resolved_epsilon = _budget_value(epsilon, budget.epsilon, uses_epsilon, "epsilon", name, dataset)
    resolved_eta = _budget_value(eta, budget.eta, uses_eta, "eta", name, dataset)
    if resolved_epsilon is not None:
        given = exact_text(resolved_epsilon)
        option = f"epsilon {given}" if epsilon is None else spell_argument("epsilon", given)
        shape = IMAGE_SHAPES.get(dataset)
        require_inside_box(resolved_epsilon, owner.norm, shape, owner.pixel_range, name, option)
    label = name
    if uses_epsilon and epsilon is not None:
        label += f"@{exact_text(epsilon)}"
    if uses_eta and eta is not None:
        label += f"@eta{exact_text(eta)}"
    spec = owner.attacks[name]
    parameters = spec.parameters
    if steps is not None and "steps" in parameters:
        parameters = {**parameters, "steps": steps}
        label += f"@{steps}steps"
    return ResolvedAttack(
        name=name,
        label=label,
        threat_model=owner.name,
        target=owner.target,
        space=owner.space,
        norm=owner.norm,
        pixel_range=owner.pixel_range,
        epsilon=resolved_epsilon,
        eta=resolved_eta,
        algorithm=spec.algorithm,
        parameters=parameters,
    )


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
        ("epsilon", epsilons, any(a.epsilon is not None for a in found), "an image or joint"),
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
