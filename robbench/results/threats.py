"""What a worst case is over: the cells of a model under one threat model and its budgets."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from robbench.specs import ResolvedAttack, Threat

Item = TypeVar("Item")


def group_by_threat(
    items: Iterable[Item], attack_of: Callable[[Item], ResolvedAttack]
) -> dict[Threat, list[Item]]:
    """Things with an attack by its `ResolvedAttack.threat`, in their order; those that no worst case combines are left
    out."""
    groups: dict[Threat, list[Item]] = {}
    for item in items:
        if (threat := attack_of(item).threat) is not None:
            groups.setdefault(threat, []).append(item)
    return groups


def name_threat(threat: Threat) -> str:
    """A threat as a text: "linf@0.2", "joint@0.2@0.033"."""
    name, *budgets = threat
    return "@".join([name, *(f"{value:g}" for value in budgets if value is not None)])
