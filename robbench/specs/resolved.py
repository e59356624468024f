"""An attack with every number filled in: what a cell runs."""

import math
from typing import Any, Literal

from pydantic import model_validator

from robbench.core.schema import Strict
from robbench.specs.schema import UNBOUNDED, Measure, ModelKind, Norm, Semantics, Space

Threat = tuple[str, float | None, float | None]  # threat model, epsilon, eta
TRANSFER = "transfer"  # algorithm of attacks that search another model


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
        of_grid: whether its budget is one of the calibrated ones of its attack.
        given_budget: of a rendered attack, whether its budget was given in the place of the threat model's.
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
    of_grid: bool = False
    given_budget: bool = False

    @model_validator(mode="before")
    @classmethod
    def _corruptions_are_perturbations(cls, values: Any) -> Any:
        if isinstance(values, dict) and "semantics" not in values and values.get("space") == "corruption":
            return {**values, "semantics": "perturbation"}
        return values

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that results depend on, as JSON values: without the label and what else only tables need, and
        without the semantics where the space implies them, as for old records."""
        implied: Semantics = "perturbation" if self.space == "corruption" else "worst-case"
        left_out = {"label", "of_grid", "given_budget"} | (
            {"semantics"} if self.semantics == implied else set()
        )
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
    def threat(self) -> Threat | None:
        """What a worst case is over: a threat model and budgets.

        The budgets of rendered attacks have units of their own; a worst case is over those of a threat model with the
        budgets that it defines, and over none with another one.
        """
        if self.space != "rendered":
            return self.threat_model, self.epsilon, self.eta
        other = self.of_grid or self.given_budget
        return None if other else (self.threat_model, None, None)

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
