"""Attacks that differ in one thing alone: their budget, their steps, the latent levels they search."""

from typing import Literal

from robbench.core.schema import canonical_hash
from robbench.store.records import CellResult

Aspect = Literal["epsilon", "eta", "steps", "levels"]


def same_but(result: CellResult, aspect: Aspect) -> str:
    """Hash of all that a cell's attack is, its name and `aspect` left out: equal for attacks that differ in no more."""
    attack, cell = result.cell.attack, result.cell
    value = attack.model_dump(mode="json", exclude={"name", "label"})
    if aspect in ("epsilon", "eta"):
        value[aspect] = None
    else:
        value["parameters"] = {k: v for k, v in attack.parameters.items() if k != aspect}
    flow = cell.attack_flow.sha256 if cell.attack_flow else None
    return canonical_hash({"attack": value, "flow": flow, "search": cell.search_precision})
