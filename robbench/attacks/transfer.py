"""Transfer attacks: adversarial examples found on another model, the surrogate, and scored on the attacked one.

Any worst-case attack on classifiers searches the surrogate, by its own rules and checks. The attacked model is asked
for its verdict alone. Attacks that can stop at the first example that fools the surrogate go on instead: what lies just
beyond its boundary fools no other model.
"""

from typing import Any

import torch
from pydantic import Field, model_validator
from torch import nn

from robbench.attacks.base import Attack, Candidates, Task
from robbench.attacks.named import ATTACKS, Cost, NamedAttack, Objective
from robbench.attacks.search.progress import heard_by
from robbench.attacks.search.spaces import Codec, SearchSpace
from robbench.attacks.victim import Victim
from robbench.core.errors import UserError, spell_argument
from robbench.core.schema import Strict, validate
from robbench.specs import SHA256, ResolvedAttack


class TransferParameters(Strict):
    """Parameters of a transfer attack, as `specs.from_surrogate` fills them in.

    Attributes:
        algorithm, parameters: of the attack on the surrogate.
        surrogate: name of the surrogate.
        sha256: of its weights.
        function: `ModelCard.function_hash` of it; "" for a model given from Python.
    """

    algorithm: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    surrogate: str
    sha256: SHA256
    function: str = ""

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, values: Any) -> Any:
        if not isinstance(values, dict) or not isinstance(values.get("algorithm"), str):
            return values
        schema, given = ATTACKS.get(values["algorithm"]).Parameters, values.get("parameters") or {}
        if "early_stop" in schema.model_fields and isinstance(given, dict):
            given = {"early_stop": False, **given}
        found = validate(given, schema, f"algorithm {values['algorithm']!r}, parameters").model_dump(
            mode="json"
        )
        return {
            **values,
            "parameters": {key: found[key] for key in found if (key, found[key]) != ("target", None)},
        }


@ATTACKS.register("transfer")
class TransferAttack(Attack):
    """An attack on a surrogate, see the module. surrogate: the model to search, set by whoever has it at hand."""

    Parameters = TransferParameters

    def __init__(self, spec: ResolvedAttack, flow: Codec | None = None) -> None:
        super().__init__(spec, flow)
        self.surrogate: nn.Module | None = None
        self.inner = _searching(self.spec.on_surrogate, flow)

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        inner, name = spec.on_surrogate, spec.parameters.get("surrogate")
        formulas, words = ATTACKS.get(inner.algorithm).objective(inner)
        return (
            formulas,
            f"{words} Searched on {name}; f is that model, and the attacked one only judges the image.",
        )

    @property
    def cost(self) -> Cost:
        """Of the attacked model: the two scoring forwards."""
        return Cost(forwards=2, backwards=0)

    @property
    def engine(self) -> str:
        return self.inner.engine

    @property
    def contains_clean(self) -> bool:
        return self.inner.contains_clean

    def space(self) -> SearchSpace | None:
        return self.inner.space()

    def require_images(self, shape: tuple[int, int, int]) -> None:
        self.inner.require_images(shape)

    def search(self, victim: Victim, task: Task) -> Candidates:
        name = self.parameters.surrogate
        if self.surrogate is None:
            raise UserError(
                f"attack {self.spec.label!r} searches model {name!r}, which is not at hand; name it with "
                f"{spell_argument('surrogate')}"
            )
        other = Victim(self.surrogate, victim.device, victim.batch_size)
        try:
            with heard_by(_ignore):  # counts of the attacked model alone
                outcome = self.inner.evaluate(
                    other, task.ids, task.x.cpu(), task.y.cpu(), task.seed, task.batch_size
                )
        except UserError as error:
            raise UserError(f"surrogate {name!r}: {error}") from error
        found = Candidates.unsearched(task.x, self.spec.name)
        found.adversarial = outcome.adversarial.to(task.x.device)
        found.witness = {key: value.to(task.x.device) for key, value in outcome.witness.items()}
        found.step = torch.ones_like(found.step)  # the one query of the attacked model
        return found


def _ignore(calls: int, done: int) -> None:
    return None


def _searching(spec: ResolvedAttack, flow: Codec | None) -> Attack:
    """The attack on the surrogate; `UserError` for one whose images do not follow from surrogate and sample alone."""
    kind: type[NamedAttack] = ATTACKS.get(spec.algorithm)
    if not issubclass(kind, Attack) or kind is TransferAttack:
        raise UserError(f"attack {spec.name!r}: {spell_argument('surrogate')} is for attacks on classifiers")
    attack = kind(spec, flow)
    if attack.batch_dependent or attack.spec.semantics == "perturbation" or attack.verdict_forwards > 1:
        raise UserError(
            f"attack {spec.name!r} has no transfer version: it depends on the batch, is no worst case, or averages the "
            f"attacked model; leave out {spell_argument('surrogate')}, or name another attack, as in pgd20, aa"
        )
    return attack
