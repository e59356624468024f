"""A registry for everything that is chosen by name.

Duplicates raise; the error for an unknown name suggests the nearest one and lists all. Other packages add entries
through entry points (`robbench.attacks`, `robbench.defenses`, `robbench.models`, `robbench.datasets`).
"""

from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from robbench.core.errors import UserError, unknown_name
from robbench.core.foreign import cause
from robbench.core.stops import reraise_stop

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to entries of one kind. `kind` is the singular noun used in messages ("attack"); accepts, accepted:
    which entries other packages may add, also in words."""

    def __init__(
        self,
        kind: str,
        entry_point_group: str,
        accepts: Callable[[object], bool] = callable,
        accepted: str = "a function or class",
    ) -> None:
        self.kind, self._accepts, self._accepted = kind, accepts, accepted
        self._group = entry_point_group
        self._entries: dict[str, T] = {}
        self._loaded_entry_points = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry under `name`. Raises ValueError on a duplicate."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry called `name`; `UserError` with the nearest name and all choices otherwise."""
        self._load_entry_points()
        if name not in self._entries:
            raise unknown_name(self.kind, name, self._entries)
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._load_entry_points()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load_entry_points()
        return iter(sorted(self._entries))

    def _load_entry_points(self) -> None:
        if self._loaded_entry_points:
            return
        self._loaded_entry_points = True
        for point in entry_points(group=self._group):
            if point.name in self._entries:
                raise UserError(
                    f"entry point {point.value!r} redefines the {self.kind} {point.name!r}; rename it in its package"
                )
            try:
                entry = point.load()
            except BaseException as error:  # an import can raise anything, SystemExit too
                reraise_stop(error)
                raise UserError(
                    f"the {self.kind} {point.name!r} of the installed package entry point {point.value!r} "
                    f"does not import: {cause(error)}; repair or uninstall that package"
                ) from error
            if not self._accepts(entry):
                raise UserError(
                    f"the {self.kind} {point.name!r} of the installed package entry point {point.value!r} is a "
                    f"{type(entry).__name__}; let it name {self._accepted}"
                )
            self._entries[point.name] = entry
