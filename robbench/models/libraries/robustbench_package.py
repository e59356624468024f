"""The package robustbench: imported although two modules that it imports are missing, and unpickled where it is not yet
imported. Nothing in site-packages changes, and no stand-in stays in sys.modules.
"""

import contextlib
import copyreg
import functools
import importlib
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from robbench.core.errors import UserError


@contextlib.contextmanager
def _missing_modules() -> Iterator[None]:
    """Stands in for two modules that RobustBench 1.1.1 imports and a fresh machine lacks, while it is imported.

    `autoattack` is installed as `pyautoattack` by its dependency of that name; `pkg_resources`, of which it uses one
    function to find its own files, left setuptools with version 81. Neither stays in sys.modules.
    """
    stand_ins: dict[str, ModuleType] = {}
    if not _importable("autoattack"):
        package = importlib.import_module("pyautoattack")
        stand_ins |= {
            "autoattack": package,
            "autoattack.state": importlib.import_module("pyautoattack.state"),
        }
    if not _importable("pkg_resources"):
        stand_ins["pkg_resources"] = resources = ModuleType("pkg_resources")
        resources.resource_filename = _file_beside  # type: ignore[attr-defined]
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            sys.modules.pop(name, None)


def _importable(name: str) -> bool:
    return name in sys.modules or find_spec(name) is not None


def _file_beside(module: str, name: str) -> str:
    """pkg_resources.resource_filename for an ordinary installation: the file `name` in the folder of `module`."""
    return str(Path(str(sys.modules[module].__file__)).parent / name)


@functools.cache
def providers() -> frozenset[str]:
    """Installed distributions that have a package `robustbench`: torchattacks 3.5 ships an old, altered copy."""
    return frozenset(packages_distributions().get("robustbench", ()))


def import_robustbench(where: str) -> Any:
    """The package robustbench; `UserError` that begins with `where` when it is absent or does not import."""
    if not _importable("robustbench"):
        raise UserError(f"{where} needs the package robustbench; pip install 'robbench[robustbench]'")
    if others := providers() - {"robustbench"}:
        raise UserError(
            f"{where}: the package {', '.join(sorted(others))} has put an altered copy of robustbench in its place; "
            f"pip uninstall {' '.join(sorted(others))} robustbench, then pip install 'robbench[robustbench]'"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about old names in timm and torch
            with _missing_modules():
                return importlib.import_module("robustbench")
    except Exception as error:  # it imports a dozen packages, each of which can fail in its own way
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"{where}: the package robustbench does not import ({type(error).__name__}: {reason}); "
            f"install what it was made for: pip install 'robbench[robustbench]'"
        ) from error


def for_other_processes(network: nn.Module) -> nn.Module:
    """`network`, which now also unpickles where nobody has imported RobustBench yet (a worker of --backend ray)."""
    for kind in {type(layer) for layer in network.modules()}:
        if kind.__module__.startswith("robustbench."):
            copyreg.pickle(kind, _reduced)
    return network


def _reduced(layer: nn.Module) -> tuple[Any, ...]:
    return _restored, (type(layer).__module__, type(layer).__name__), layer.__getstate__()  # type: ignore[no-untyped-call]


def _restored(module: str, name: str) -> nn.Module:
    if "robustbench" not in sys.modules:
        import_robustbench("a model of RobustBench")
    kind = getattr(importlib.import_module(module), name)
    layer: nn.Module = kind.__new__(kind)
    return layer
