"""The rooms of the package and what each may import: a room imports only rooms before it in `ROOMS`, and no module
imports, not even inside a function, one that imports it. docs/architecture.md draws the same."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import robbench

PACKAGE = Path(robbench.__file__).parent
# From the ground up. `cards` and `recipes` are single modules.
ROOMS = (
    "core", "specs", "cards", "recipes", "data", "models", "statistics", "attacks", "defenses", "detectors",
    "store", "metrics", "results", "compare", "run", "experiments", "bundle", "report", "evaluation", "theory",
    "benchmarks", "cli", "__main__",
)  # fmt: skip


def _modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = _modules()


def _imports(tree: ast.AST) -> set[str]:
    """Modules of robbench that a module imports anywhere, also where only type checkers look."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "robbench":
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            found |= {name if name in MODULES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in MODULES}
    return found


@pytest.fixture(scope="module")
def imports() -> dict[str, set[str]]:
    """What every module imports of robbench, read when a test asks and not in every process that collects tests."""
    found = {name: _imports(ast.parse(path.read_text(encoding="utf-8"))) for name, path in MODULES.items()}
    found["robbench"] = (
        set()
    )  # the package's face: `robbench.evaluate` is imported when it is first asked for
    return found


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_is_in_a_room() -> None:
    assert {_room(name) for name in MODULES} - {""} == set(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_below_it(room: str, imports: dict[str, set[str]]) -> None:
    below = {"", *ROOMS[: ROOMS.index(room) + 1]}
    upward = [
        f"{module} imports {imported}"
        for module, imported_modules in imports.items()
        if _room(module) == room
        for imported in imported_modules
        if _room(imported) not in below
    ]
    assert not upward


def test_no_module_imports_one_that_imports_it(imports: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_relative_imports_cannot_hide_an_arrow() -> None:
    for name, path in MODULES.items():
        assert not re.search(r"^\s*from \.", path.read_text(encoding="utf-8"), re.MULTILINE), name


def test_arrows_are_found_where_they_hide() -> None:
    hidden = "def f():\n    from robbench.report.badge import render\n    import robbench.cli.app\n"
    assert _imports(ast.parse(hidden)) == {"robbench.report.badge", "robbench.cli.app"}
