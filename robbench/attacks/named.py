"""What every named attack has, whatever it attacks: a resolved spec, checked parameters, a cost, an engine string."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib.metadata import packages_distributions, version
from typing import Any, ClassVar

from markupsafe import Markup
from pydantic import BaseModel

from robbench.core.errors import UserError
from robbench.core.registry import Registry
from robbench.core.schema import Strict, validate
from robbench.specs import ModelKind, ResolvedAttack, Semantics

Objective = tuple[tuple[Markup, ...], str]
# Part of a cell's address. 2: searches climb log-odds along one float64 direction, and norms are float64.
ENGINE_VERSION = 2


@dataclass(frozen=True)
class Cost:
    """Model calls of one sample that stays robust to the end, robbench's two scoring forwards included.

    A broken sample needs fewer; a candidate that looked broken before clipping costs one confirming forward more.
    """

    forwards: int
    backwards: int


class NamedAttack(ABC):
    """Base of `Attack` (on a classifier's decision) and `LikelihoodAttack` (on a flow's likelihood).

    target: what it attacks; a threat model with another target is refused. batch_dependent: whether a sample's result
    depends on which samples share its batch: such cells are computed in whole blocks and their batch size is part of
    their address.
    """

    Parameters: ClassVar[type[BaseModel]] = Strict
    target: ClassVar[ModelKind]
    batch_dependent: ClassVar[bool] = False

    def __init__(self, spec: ResolvedAttack) -> None:
        if spec.target != self.target:
            raise UserError(
                f"attack {spec.name!r}: its algorithm {spec.algorithm!r} attacks a {self.target} and threat model "
                f"{spec.threat_model!r} a {spec.target}; correct `target` in the threat model's YAML"
            )
        self.parameters: Any = validate(spec.parameters, self.Parameters, f"attack {spec.name!r}, parameters")
        # Defaults filled in: what is recorded and hashed is what runs, also after a default changes.
        filled = {"parameters": self.parameters.model_dump(mode="json")}
        self.spec = spec.model_copy(update={**filled, "semantics": self.declared_semantics(self.parameters)})

    @classmethod
    def declared_semantics(cls, parameters: Any) -> Semantics:
        """What the images of the attack with `parameters` (of `Parameters`) stand for: see `specs.Semantics`."""
        return "worst-case"

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        """What an attack of this class looks for and how: formulas (`robbench.core.mathml`), a line each, and words."""
        return (), f"The algorithm {spec.algorithm!r} belongs to another package."

    @property
    @abstractmethod
    def cost(self) -> Cost:
        """Model calls of a sample that stays robust."""

    @property
    def engine(self) -> str:
        """What computes the result, with version; part of a cell's address."""
        package = type(self).__module__.partition(".")[0]
        names = packages_distributions().get(package, []) if package != "robbench" else []
        foreign = "".join(f", {name} {version(name)}" for name in sorted(set(names)))
        return f"robbench engine {ENGINE_VERSION}{foreign}"


ATTACKS: Registry[type[NamedAttack]] = Registry("attack algorithm", "robbench.attacks")
