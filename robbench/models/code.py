"""Code that builds a network, "module:Class": where its Python file lies, the sha256 of its source, and calling it.

The source is part of what a model computes, as its weights are: a card pins both (`architecture.sha256`,
`weights.sha256`), and the address of every row depends on both. No torch here; nothing runs before `loaded_callable`.
"""

import ast
import hashlib
import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from robbench.core.errors import UserError, nearest, unknown_name
from robbench.core.foreign import cause
from robbench.core.resources import sha256_file
from robbench.core.stops import reraise_stop
from robbench.models.entry import ZooEntry

SCHEMES = {
    "onnx": "robbench.models.libraries.onnx",
    "robustbench": "robbench.models.libraries.robustbench",
    "timm": "robbench.models.libraries.timm",
    "torchvision": "robbench.models.libraries.torchvision",
}


@dataclass(frozen=True)
class Code:
    """What "module:attribute" or "folder/file.py:attribute" names.

    Attributes:
        name: as it was given.
        module: dotted name that is imported.
        attribute: class or function in it, also dotted.
        folders: where the module is looked for before `sys.path`.
        file: its Python file; None where there is none (a built-in module, or no module at all).
    """

    name: str
    module: str
    attribute: str
    folders: tuple[Path, ...]
    file: Path | None

    @property
    def sha256(self) -> str | None:
        """Of the source: of its file; where it imports files beside it, of a list of their sha256; None without a file.

        Followed are import statements that name files in the folder from which the module is imported; of an installed
        package its own modules only, because other packages have versions.
        """
        if self.file is None:
            return None
        root = _root(self.file, self.module)
        sources = _sources(self.file, self.module, root)
        if sources == {self.file}:
            return sha256_file(self.file)
        lines = sorted(f"{sha256_file(path)}  {path.relative_to(root).as_posix()}\n" for path in sources)
        return hashlib.sha256("".join(lines).encode()).hexdigest()


def has_scheme(name: str) -> bool:
    """Whether `name` begins with a scheme and a colon, as in "torchvision:resnet50"."""
    return ":" in name and name.partition(":")[0] in SCHEMES


def is_code(name: str) -> bool:
    """Whether `name` has the form of "module:attribute" or "file.py:attribute"."""
    module, colon, attribute = name.rpartition(":")
    path = Path(module)
    stem = path.stem if path.suffix == ".py" else module
    modules, attributes = stem.split("."), attribute.split(".")
    return (
        bool(colon)
        and all(re.fullmatch(r"[\w-]+", part) for part in modules)
        and all(part.isidentifier() for part in attributes)
    )


def find_code(name: str, *folders: Path) -> Code:
    """The code called `name`, looked for in `folders`, the working directory and `sys.path`; nothing is imported.

    A path to a Python file is relative to the first of `folders`. `UserError` for a file that is not there, and for one
    that Python would not import because it is called like a module of Python's own.
    """
    module, _, attribute = name.rpartition(":")
    places = tuple(dict.fromkeys(folder.resolve() for folder in (*folders, Path.cwd())))
    if module.endswith(".py"):
        file = (places[0] / module).resolve()
        if not file.is_file():
            near = nearest(file.name, [one.name for one in file.parent.glob("*.py")])
            listed = f"; near it: {', '.join(near)}" if near else ""
            raise UserError(f"{name!r}: {file} is no file{listed}; name the Python file that has {attribute}")
        module, places = file.stem, tuple(dict.fromkeys((file.parent, *places)))
    found = next((below for folder in places if (below := _file_below(folder, module))), None)
    if found is not None and module.split(".")[0] in sys.stdlib_module_names:
        raise UserError(
            f"{name!r} means {found}, but {module.split('.')[0]} is a module of Python itself; rename the file"
        )
    return Code(name, module, attribute, places, found or _installed_file(module))


def _file_below(folder: Path, module: str) -> Path | None:
    stem = folder / module.replace(".", "/")
    return next((f for f in (stem / "__init__.py", stem.with_name(f"{stem.name}.py")) if f.is_file()), None)


def _installed_file(module: str) -> Path | None:
    """The file of an importable module; of a dotted name below its package, none of which is imported."""
    top, _, rest = module.partition(".")
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # a module without a spec, such as __main__
        return None
    if spec is None:
        return None
    if rest:
        folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
        return next((file for folder in folders if (file := _file_below(folder, rest))), None)
    return Path(spec.origin) if spec.has_location and spec.origin else None


def may_run(entry: ZooEntry) -> bool:
    """Whether the code that a card names, if any, may run: for cards that the user named or robbench ships."""
    name = entry.card.architecture.name
    return entry.trusted or ":" not in name or has_scheme(name)


def code_of(entry: ZooEntry) -> Code | None:
    """The code that a card names and that may run; None for other architectures. `UserError` for a name of no code."""
    name = entry.card.architecture.name
    if ":" not in name or has_scheme(name) or not may_run(entry):
        return None
    if not is_code(name):
        raise UserError(
            f"model {entry.card.name!r}: architecture {name!r} is no module:callable, as in my_models:ResNet; "
            f"correct it"
        )
    return find_code(name, *([entry.code] if entry.code else []), entry.folder)


def pinned(entry: ZooEntry) -> ZooEntry:
    """`entry` with the sha256 of its source in the card, where it names code and the card has none: results depend on
    it. A card that has one keeps it, and is held to it when its code is loaded."""
    architecture = entry.card.architecture
    if architecture.sha256 is not None or (code := code_of(entry)) is None:
        return entry
    architecture = architecture.model_copy(update={"sha256": code.sha256})
    return replace(entry, card=entry.card.model_copy(update={"architecture": architecture}))


def _root(file: Path, module: str) -> Path:
    """The folder from which the module is imported."""
    levels = len(module.split(".")) + (file.name == "__init__.py")
    return file.parents[levels - 1]


def _sources(file: Path, module: str, root: Path) -> set[Path]:
    """`file` and the files below `root` that it imports, those that they import, and so on."""
    top = module.split(".")[0] if {"site-packages", "dist-packages"} & set(root.parts) else None
    found, todo = set(), [(file, module)]
    while todo:
        path, name = todo.pop()
        if path in found:
            continue
        found.add(path)
        for imported in _imported_names(path, name):
            parts = imported.split(".")
            if parts[0] in ("", "robbench") or (top is not None and parts[0] != top):
                continue
            names = (".".join(parts[:length]) for length in range(1, len(parts) + 1))
            todo += [(other, each) for each in names if (other := _file_below(root, each))]
    return found


def _imported_names(path: Path, module: str) -> Iterator[str]:
    """Absolute names that the import statements of a file may stand for; none of a file that is no Python."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    yield ".".join(package)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield base
            yield from (f"{base}.{alias.name}" if base else alias.name for alias in node.names)


def classes_in(file: Path) -> list[str]:
    """Names of the classes that a Python file defines with a base class, in the order they have; nothing runs."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.bases]


def loaded_callable(code: Code, where: str) -> Callable[..., Any]:
    """The class or function; its module is imported, which runs it. where: how messages call the model."""
    with _own_output():
        return _callable(code, where)


def call(built: Callable[..., Any], code: Code, arguments: Mapping[str, Any], where: str, step: str) -> Any:
    """What `built`, the callable of `code`, returns for `arguments`. step: what to correct when it refuses them."""
    given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    try:
        with _own_output():
            return built(**arguments)
    except BaseException as error:  # somebody else's code can fail in any way
        reraise_stop(error)
        raise UserError(f"{where}: {code.name}({given}) failed ({cause(error)}); {step}") from error


def _own_output() -> "redirect_stdout[Any]":
    return redirect_stdout(sys.stderr)  # what that code prints: stdout is for tables and JSON


def _callable(code: Code, where: str) -> Callable[..., Any]:
    found: Any = _module(code, where)
    for part in code.attribute.split("."):
        if not hasattr(found, part):
            public = [known for known in vars(found) if callable(getattr(found, known)) and known[0] != "_"]
            raise unknown_name(f"class or function of module {code.module!r} ({where}):", part, public)
        found = getattr(found, part)
    if not callable(found):
        raise UserError(
            f"{where}: {code.name!r} is a {type(found).__name__}, which cannot be called; name a class or function"
        )
    built: Callable[..., Any] = found
    return built


def _module(code: Code, where: str) -> Any:
    try:
        with _import_path(code.folders):
            module = importlib.import_module(code.module)
    except BaseException as error:  # somebody else's code can fail in any way
        reraise_stop(error)
        top = code.module.split(".")[0]
        absent = isinstance(error, ModuleNotFoundError) and error.name == top
        step = (
            f"put {top}.py beside the card or into the folder you are in, or install its package"
            if absent
            else "repair that module, or install what it needs"
        )
        raise UserError(f"{where}: {code.name!r} does not import ({cause(error)}); {step}") from error
    loaded = getattr(module, "__file__", None) or "elsewhere"
    if code.file is not None and Path(loaded).resolve() != code.file.resolve():
        raise UserError(
            f"{where}: {code.name!r} means {code.file}, but a module {code.module!r} is loaded already from {loaded}; "
            f"rename one of the files"
        )
    return module


@contextmanager
def _import_path(folders: Sequence[Path]) -> Iterator[None]:
    """`folders` in front of the import path. No bytecode is written: Python takes that of a source of the same second
    and size for the source itself."""
    places, bytecode, here = [str(folder) for folder in folders], sys.dont_write_bytecode, Path.cwd()
    sys.path[:0] = places
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.dont_write_bytecode = bytecode
        for place in places:
            if place in sys.path:  # that code may have changed it, and the working directory as well
                sys.path.remove(place)
        os.chdir(here)
