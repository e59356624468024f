"""The command line: one module per command, its options and its use case together."""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    """`robbench.cli.main`, which console scripts of earlier installations call."""
    if name == "main":
        return import_module("robbench.cli.app").main
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
