"""Values that are computed from an object once and cached with it."""

from collections.abc import Callable
from functools import cached_property
from typing import Any, Self, TypeVar

T = TypeVar("T")


class Remembers:
    """An immutable object with a cache of computed values. A copy with other fields (`replace`) has an empty cache."""

    @cached_property
    def _computed(self) -> dict[Callable[[Self], Any], Any]:
        return {}

    def once(self, compute: Callable[[Self], T]) -> T:
        """compute(self), computed at the first call."""
        if compute not in self._computed:
            self._computed[compute] = compute(self)
        found: T = self._computed[compute]
        return found
