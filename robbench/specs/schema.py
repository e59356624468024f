"""Typed schemas of threat models and of the attacks under them, as their YAML files state them."""

import fnmatch
import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from robbench.core.errors import UserError
from robbench.core.resources import data_root, existing_folder
from robbench.core.schema import Strict, load_yaml

# "rendered": variables of a renderer (a flow field, fog), in units of their own. "minimal": any image of the box, the
# nearer to the clean one the better. "corruption": given images, without search and budget.
Space = Literal["image", "latent", "joint", "rendered", "minimal", "corruption"]
UNBOUNDED: tuple[Space, ...] = ("minimal", "corruption")
Norm = Literal["linf", "l2", "l1", "l0", "none"]  # l0: values that differ; of minimal-norm attacks only
# "detector": a classifier that a detector guards. Attacks on classifiers attack it too, without knowing the detector.
ModelKind = Literal["classifier", "flow", "detector"]
ATTACKED_BY: dict[ModelKind, tuple[ModelKind, ...]] = {  # targets of the attacks on a kind of model
    "classifier": ("classifier",),
    "flow": ("flow",),
    "detector": ("classifier", "detector"),
}
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
        target: what is attacked, where it differs from the threat model's.
        budgets: by data set, where they differ from the threat model's.
        calibrated: by data set, further budgets in rising order: an attack each, called NAME-1, NAME-2, ...
        ata: by data set, the best accuracies at the calibrated budgets.
        parameters: of the algorithm.
        description, reference: texts for people.
    """

    algorithm: str
    norm: Norm | None = None
    target: ModelKind | None = None
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
        target: attacks change a classifier's decision, a flow's likelihood, or the decisions of a classifier and of the
            detector that guards it.
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

    def target_of(self, attack: str) -> ModelKind:
        """What an attack or a group attacks."""
        spec = self.attacks.get(attack)
        return (spec.target if spec else None) or self.target

    def members(self, group: str) -> tuple[str, ...]:
        """Names of the attacks of a group."""
        patterns = self.groups[group].attacks
        return tuple(dict.fromkeys(n for pattern in patterns for n in fnmatch.filter(self.attacks, pattern)))


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
