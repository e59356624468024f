"""How far a search is, told to whoever listens. Nothing that is computed depends on it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

# (images in model calls of the search, samples that are done with) since the last time.
Listener = Callable[[int, int], None]
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Inside, `listener` hears of every model call of a search in this thread."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell(calls: int = 0, done: int = 0) -> None:
    """So many images went through the model; so many samples need no more of it."""
    listener = _LISTENER.get()
    if listener is not None:
        listener(calls, done)
