"""Which rows of two sides correspond: lines of tables, cells of reference runs, cells of runs, by one typed key."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

from robbench.specs import ModelKind

Budget = float | Literal["none"] | None
R = TypeVar("R")
M = TypeVar("M")
_SAME_BUDGET = 1e-6  # relative: 8/255 written with seven digits is still 8/255


@dataclass(frozen=True)
class Key:
    """What a number or cell is of. None: one side does not say it, and any value of the other corresponds.

    Attributes:
        model, attack: their names in tables.
        target: what kind of model is attacked.
        dataset, metric, threat_model: as in tables.
        epsilon, eta: budgets; "none" where there is none.
    """

    model: str
    attack: str
    target: ModelKind | None = None
    dataset: str | None = None
    metric: str | None = None
    threat_model: str | None = None
    epsilon: Budget = None
    eta: Budget = None

    def matches(self, other: "Key") -> bool:
        """Whether both are of the same thing, as far as both say it."""
        named = ((self.model, other.model), (self.attack, other.attack))
        said = (
            (self.target, other.target),
            (self.dataset, other.dataset),
            (self.metric, other.metric),
            (self.threat_model, other.threat_model),
        )
        return (
            all(mine == theirs for mine, theirs in named)
            and all(None in pair or pair[0] == pair[1] for pair in said)
            and _same_budget(self.epsilon, other.epsilon)
            and _same_budget(self.eta, other.eta)
        )


def pair_rows(
    references: Iterable[R], measured: Iterable[M], key: Callable[[R | M], Key]
) -> list[tuple[R, list[M]]]:
    """Each reference, in order, with everything measured whose key matches its own: none, one, or several where the
    reference says too little."""
    places: dict[tuple[str, str], list[tuple[Key, M]]] = {}
    for row in measured:
        found = key(row)
        places.setdefault((found.model, found.attack), []).append((found, row))
    pairs = []
    for reference in references:
        own = key(reference)
        candidates = places.get((own.model, own.attack), [])
        pairs.append((reference, [row for other, row in candidates if own.matches(other)]))
    return pairs


def _same_budget(one: Budget, other: Budget) -> bool:
    if one is None or other is None or "none" in (one, other):
        return one is None or other is None or one == other
    return math.isclose(float(one), float(other), rel_tol=_SAME_BUDGET, abs_tol=1e-12)
