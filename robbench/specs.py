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
from robbench.core.errors import UserError, folded, known_name, spell_argument, unknown_name
from robbench.core.resources import data_root, existing_folder
from robbench.core.schema import Strict, load_yaml

# "rendered": variables of a renderer (a flow field, fog), in units of their own. "minimal": any image of the box, the
# nearer to the clean one the better. "corruption": given images, without search and budget.
Space = Literal["image", "latent", "joint", "rendered", "minimal", "corruption"]
UNBOUNDED: tuple[Space, ...] = ("minimal", "corruption")
Norm = Literal["linf", "l2", "l1", "l0", "none"]  # l0: values that differ; of minimal-norm attacks only
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
TRANSFER = "transfer"  # algorithm of attacks that search another model
RESERVED_ATTACKS = ("clean", "worst-case", "average")
CLEAN_IS_THERE = "clean accuracy is a column of every table and needs no attack"


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


class BestTrained(Strict):
    """ATA: accuracy in percent at each calibrated budget of the best of the models that were adversarially trained
    against the attack.

    Attributes:
        accuracies: one per budget.
        target: what the attack aimed at ("random"); None for untargeted.
        source: of the numbers.
    """

    accuracies: tuple[float, ...]
    target: str | None = None
    source: str


class AttackSpec(Strict):
    """A named attack under a threat model: an algorithm of the registry and its parameters.

    Attributes:
        algorithm: name in the registry.
        norm: of the perturbation, where it differs from the threat model's.
        budgets: by data set, where they differ from the threat model's.
        calibrated: by data set, further budgets in rising order: an attack each, called NAME-1, NAME-2, ...
        ata: by data set, the best accuracies at the calibrated budgets.
        parameters: of the algorithm.
        description, reference: texts for people.
    """

    algorithm: str
    norm: Norm | None = None
    budgets: dict[str, Budget] = Field(default_factory=dict)
    calibrated: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    ata: dict[str, BestTrained] = Field(default_factory=dict)
    parameters: dict[str, Any] = Field(default_factory=dict)
    description: str = ""
    reference: str = ""

    def at_calibrated_budgets(self) -> list["AttackSpec"]:
        """The attack at each of its calibrated budgets, smallest first."""
        longest = max((len(budgets) for budgets in self.calibrated.values()), default=0)
        return [
            self.model_copy(
                update={
                    "calibrated": {},
                    "ata": {},
                    "budgets": {
                        dataset: Budget(epsilon=budgets[place])
                        for dataset, budgets in self.calibrated.items()
                        if place < len(budgets)
                    },
                    "description": f"{self.description} Budget {place + 1} of {longest} calibrated ones.",
                }
            )
            for place in range(longest)
        ]


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
    def _with_calibrated_budgets(cls, attacks: dict[str, AttackSpec]) -> dict[str, AttackSpec]:
        found = dict(attacks)
        for name, spec in attacks.items():
            further = {
                f"{name}-{place}": one for place, one in enumerate(spec.at_calibrated_budgets(), start=1)
            }
            # Bundles hold the file as it was read, with the further attacks in it.
            if taken := [one for one, its in further.items() if found.get(one, its) != its]:
                raise ValueError(f"attack {name!r} has calibrated budgets and {taken[0]!r} exists already")
            found |= further
        return found

    @model_validator(mode="after")
    def _l0_is_minimal(self) -> Self:
        for name, attack in self.attacks.items():
            if (attack.norm or self.norm) == "l0" and self.space != "minimal":
                raise ValueError(
                    f"attack {name!r}: norm l0 is measured in space minimal alone, which has no ball"
                )
        return self

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
        epsilon, eta: budgets; None where the space has none. In space "minimal" the search is unbounded, and epsilon is
            the distance up to which an adversarial image counts in the accuracy; None for any distance.
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
    def on_surrogate(self) -> "ResolvedAttack":
        """Of a transfer attack (`from_surrogate`) the attack on its surrogate; of any other the attack itself."""
        if self.algorithm != TRANSFER:
            return self
        inner = {name: self.parameters[name] for name in ("algorithm", "parameters")}
        return self.model_copy(update=inner)

    @property
    def measure(self) -> Measure:
        """The accuracy that tables show for the attack on a classifier."""
        return "accuracy under attack" if self.semantics == "perturbation" else "robust accuracy"

    @property
    def is_adversary(self) -> bool:
        """Whether a worst case combines its robust accuracy: attacks of worst-case semantics, and rendered ones, whose
        attacker may leave the image alone. Other perturbations may move an image towards its class."""
        return self.semantics == "worst-case" or self.space == "rendered"

    @property
    def needs_flow(self) -> bool:
        """Whether the attack perturbs the latents of a normalizing flow."""
        return self.space in ("latent", "joint")

    @property
    def needs_witness(self) -> bool:
        """Whether only the perturbation, not the image, shows that an example lies in its set."""
        return self.space in ("latent", "joint", "rendered")

    @property
    def bounded(self) -> bool:
        """Whether a budget bounds the perturbation; not so for corrupted images and minimal-norm attacks."""
        return self.space not in UNBOUNDED

    def last_step(self, component: str) -> float:
        """The largest step at which a component of the attack can break a sample; NaN where it has no number of steps
        (every step then takes at least one forward)."""
        name = "square_queries" if component == "square" else "steps"
        count = self.parameters.get(name, self.parameters.get("iterations"))
        if not isinstance(count, int):
            return math.nan
        if component.startswith(
            "apgd"
        ):  # with large radii it scores one more iterate in its first two phases
            return count + 2
        searches = self.parameters.get("binary_search_steps", 1)
        return count * searches if isinstance(searches, int) else math.nan

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
    """The attacks that `names` mean (`attack_name`), every group replaced by its members."""
    members = {group: model.members(group) for model in models.values() for group in model.groups}
    meant = [attack_name(name, models) for name in names]
    return list(dict.fromkeys(attack for name in meant for attack in members.get(name, (name,))))


# Names of attacks in papers and other libraries, folded, that mean one attack here; and those that mean none, with what
# comes nearest to them here.
ALSO_CALLED = {
    "mifgsm": "mim",
    **dict.fromkeys(("natural", "benign", "none", "noattack"), "clean"),
    **dict.fromkeys(("cw", "carlini", "carliniwagner", "carliniwagnerl2", "l2carliniwagner"), "cw-l2"),
    **dict.fromkeys(("ddn", "ddnl2"), "ddn-l2"),
    **dict.fromkeys(("boundaryl2", "l2boundary"), "boundary"),
    **dict.fromkeys(
        ("hsj", "hsja", "hopskipjump"), "hopskipjump-l2"
    ),  # of which the paper and foolbox speak first
    "hsjlinf": "hopskipjump-linf",
    "hsjl2": "hopskipjump-l2",
    **{
        f"{norm}{name}": f"{name}-{norm}"
        for name in ("deepfool", "fmn", "hopskipjump")
        for norm in ("l2", "linf", "l1", "l0")
    },
}
NEAREST_HERE = {
    "deepfool": ("deepfool-l2",),
    "fmn": ("fmn-l2",),
    **dict.fromkeys(("bim", "ifgsm"), ("pgd10",)),
    "autopgd": ("apgd-ce",),
}


def attack_name(name: str, models: dict[str, ThreatModel]) -> str:
    """The attack or group of `models` that `name` means; see `attack_among`."""
    return attack_among(
        name, (found for model in models.values() for found in (*model.attacks, *model.groups))
    )


def attack_among(name: str, known: Iterable[str], kind: str = "attack") -> str:
    """The one of `known` (attacks, groups, labels of a run, "clean") that `name` means, as in "AutoAttack", "PGD-20",
    "fgsm_linf@8/255", "natural"; `UserError` with suggestions for one that is none, or could be several ("pgd")."""
    choices = set(known)
    base, at, budget = name.partition("@")  # a budget is never read in another way: 0.1 is not 01
    if name in choices:
        return name
    same_budget = [found for found in choices if found.partition("@")[1:] == (at, budget)]
    plain = folded(base).replace("autoattack", "aa").removesuffix("attack").removesuffix("linf")
    for shape in (folded(base), ALSO_CALLED.get(folded(base)), plain, ALSO_CALLED.get(plain)):
        meant = folded(shape or "")
        if alike := [found for found in same_budget if folded(found.partition("@")[0]) == meant]:
            return known_name(kind, alike[0] if len(alike) == 1 else name, alike)
    raise unknown_name(kind, name, choices, near=NEAREST_HERE.get(plain, ()))


def without_clean(names: Iterable[str]) -> list[str]:
    """`names` without "clean", "natural" and the like: every table has it, and asking for it is no mistake.
    `UserError` where nothing else is asked for."""
    given = list(names)
    kept = [name for name in given if ALSO_CALLED.get(folded(name), folded(name)) != "clean"]
    if given and not kept:
        raise UserError(
            f"{spell_argument('attacks', ','.join(given))}: {CLEAN_IS_THERE}; name one to go with it, as in fgsm"
        )
    return kept


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
        target=owner.target,
        space=owner.space,
        norm=norm,
        pixel_range=owner.pixel_range,
        epsilon=resolved_epsilon,
        eta=resolved_eta,
        algorithm=spec.algorithm,
        parameters=parameters,
    )


def from_surrogate(attack: ResolvedAttack, surrogate: str, sha256: str, function: str = "") -> ResolvedAttack:
    """`attack` searching the model `surrogate` in the place of the attacked one. sha256: of its weights; function:
    `ModelCard.function_hash` of it. `UserError` for attacks on flows and targeted ones."""
    given = spell_argument("surrogate", surrogate)
    if attack.target == "flow":
        raise UserError(
            f"{given}: attack {attack.label!r} is on a flow's likelihood and has no transfer version; leave "
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
