"""Optional libraries of comparisons."""

import warnings
from collections.abc import Callable, Mapping
from typing import TypeVar

Peer = TypeVar("Peer")


def available(
    builds: Mapping[str, Callable[[], Peer]], install: Mapping[str, str]
) -> tuple[dict[str, Peer], dict[str, str]]:
    """(installed peers, reasons of missing ones), by name. install: command, where it is not `pip install NAME`."""
    found: dict[str, Peer] = {}
    absent: dict[str, str] = {}
    for name, build in builds.items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the libraries import and call what others deprecate
                found[name] = build()
        except ImportError as error:
            how = install.get(name, f"pip install {name}")
            absent[name] = f"not installed or does not import ({error}); {how}"
    return found, absent
