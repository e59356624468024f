"""Base of all named attacks, on classifiers and on flows: a resolved spec, checked parameters, cost, engine string."""

from abc import ABC, abstractmethod
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import packages_distributions, version
from inspect import getsourcefile
from pathlib import Path
from typing import Any, ClassVar, get_args

from markupsafe import Markup
from pydantic import BaseModel

from robbench.core.errors import UserError, spell_argument
from robbench.core.registry import Registry
from robbench.core.schema import Strict, validate
from robbench.specs import ModelKind, ResolvedAttack, Semantics

Objective = tuple[tuple[Markup, ...], str]
# Part of a cell's address. 2: searches climb log-odds along one float64 direction, and norms are float64.
ENGINE_VERSION = 2


@dataclass(frozen=True)
class Cost:
    """Model calls per robust sample, robbench's two scoring forwards included.

    A broken sample needs fewer; a candidate that looked broken before clipping costs one more forward to confirm.
    """

    forwards: int
    backwards: int


class NamedAttack(ABC):
    """Base of `Attack` (on a classifier's decision) and `LikelihoodAttack` (on a flow's likelihood).

    target: what it attacks; a threat model with another target is refused. batch_dependent: whether a sample's result
    depends on the other samples of its batch; such cells are computed in whole blocks, and their address contains the
    batch size. judging: methods that decide verdicts, which no subclass may have of its own.
    """

    Parameters: ClassVar[type[BaseModel]] = Strict
    target: ClassVar[ModelKind]
    batch_dependent: ClassVar[bool] = False
    judging: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        """TypeError for a subclass with a judging method of its own, or whose `Parameters` are no schema."""
        own = [name for name in getattr(cls.__mro__[1], "judging", ()) if name in vars(cls)]
        if own:
            raise TypeError(
                f"attack {cls.__name__} overrides {own[0]}, by which robbench checks and scores what attacks find; "
                f"override search"
            )
        if not (isinstance(cls.Parameters, type) and issubclass(cls.Parameters, BaseModel)):
            raise TypeError(
                f"attack {cls.__name__} has Parameters {cls.Parameters!r}; make them a pydantic model"
            )

    def __init__(self, spec: ResolvedAttack) -> None:
        if spec.target != self.target:
            raise UserError(
                f"attack {spec.name!r}: its algorithm {spec.algorithm!r} attacks a {self.target} and threat model "
                f"{spec.threat_model!r} a {spec.target}; correct `target` in the threat model's YAML"
            )
        if "target" in spec.parameters and "target" not in self.Parameters.model_fields:
            raise UserError(
                f"attack {spec.name!r} has no targeted version; leave out {spell_argument('target')}, or name one of "
                f"PGD, APGD or C&W (pgd20, apgd-ce, apgd-t, cw-l2)"
            )
        self.parameters: Any = validate(spec.parameters, self.Parameters, f"attack {spec.name!r}, parameters")
        # Defaults filled in: what is recorded and hashed is what runs, also after a default changes.
        filled = self.parameters.model_dump(mode="json")
        if (
            filled.get("target") is None
        ):  # untargeted cells keep the address that they had before there were targets
            filled.pop("target", None)
        semantics = self.declared_semantics(self.parameters)
        if semantics not in get_args(Semantics):
            raise UserError(
                f"attack {spec.name!r}: {type(self).__name__}.declared_semantics returned {semantics!r}; "
                f"return one of: {', '.join(get_args(Semantics))}"
            )
        target = filled.get("target")
        if semantics == "perturbation" and isinstance(target, int):
            # They would stay as they are, and count as images that withstood the attack.
            raise UserError(
                f"{spell_argument('target', target)}: attack {spec.name!r} must perturb every image, and images of "
                f"class {target} itself have nowhere to go; give random or least-likely"
            )
        self.spec = spec.model_copy(update={"parameters": filled, "semantics": semantics})

    @classmethod
    def declared_semantics(cls, parameters: Any) -> Semantics:
        """Whether the attack with `parameters` is a worst case or a perturbation, see `specs.Semantics`."""
        return "worst-case"

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        """The attack's objective for people: formulas (`robbench.core.mathml`), one per line, and a text."""
        return (), f"The algorithm {spec.algorithm!r} belongs to another package."

    @property
    @abstractmethod
    def cost(self) -> Cost:
        """Model calls per robust sample."""

    @property
    def engine(self) -> str:
        """Name and version of the code that searches; part of a cell's address. Of another package also a digest of the
        modules of its classes, so that results of an edited one are not taken for its own."""
        package = type(self).__module__.partition(".")[0]
        if package == "robbench":
            return f"robbench engine {ENGINE_VERSION}"
        names = packages_distributions().get(package, [])
        foreign = "".join(f", {name} {version(name)}" for name in sorted(set(names)))
        return f"robbench engine {ENGINE_VERSION}{foreign}, code {_code_digest(type(self))}"


def _code_digest(attack: type[NamedAttack]) -> str:
    """Of the modules outside of robbench that define `attack` and its bases; of its name alone where it has no file."""
    found = sha256(attack.__qualname__.encode())
    for kind in attack.__mro__:
        if kind.__module__.partition(".")[0] not in ("robbench", "abc", "builtins"):
            with suppress(TypeError, OSError):
                found.update(Path(getsourcefile(kind) or "").read_bytes())
    return found.hexdigest()[:8]


def _is_attack(entry: object) -> bool:
    return isinstance(entry, type) and issubclass(entry, NamedAttack)


ATTACKS: Registry[type[NamedAttack]] = Registry(
    "attack algorithm", "robbench.attacks", _is_attack, "a subclass of robbench.attacks.Attack"
)
