"""A YAML file with an accident in it is refused in one line, or means what its text says; never a traceback."""

import copy
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from fuzzing import allowed, cases, chosen, command, copied, flipped, numbers
from pydantic import BaseModel

from robbench.cards import ModelCard
from robbench.core.resources import data_root
from robbench.core.schema import load_yaml
from robbench.data.card import FolderCard
from robbench.experiments.schema import Experiment
from robbench.recipes import Recipe
from robbench.specs import ThreatModel
from robbench.store.ledger import load_run

VALUES = [
    None,
    True,
    -1,
    0,
    1e308,
    float("nan"),
    float("-inf"),
    10**400,
    "",
    " ",
    "\x00",
    "\ud800",
    "\u202e",
    "x" * 5000,
    [],
    {},
    [[[[[]]]]],
    {"a": {"b": 1}},
    "../../etc/passwd",
    "2026-13-45",
    b"bytes",
]
LINES = [
    "name: [unclosed",
    "name: other",
    "? {a: 1}",
    "<<: *nothing",
    "x: &x [*x]",
    "x: !!python/object/apply:os.getcwd []",
    "x: !!int nine",
    "x: !!timestamp 2026-99-99",
    "\tx: 1",
    "--- \nname: second",
    "%YAML 9.9",
    "x: !!binary '?'",
    "1: 2",
    "null: null",
    "x: 2026-01-01",
]


def bomb() -> str:
    """Aliases of aliases: few bytes, many nodes."""
    levels = [f"b{k}: &b{k} [{', '.join([f'*b{k - 1}'] * 9)}]" for k in range(1, 6)]
    return "\n".join(["b0: &b0 [x, x, x]", *levels, "name: *b5"])


# ---------------------------------------------------------------------------------------------------- mutations
def mutated(text: str, rng: np.random.Generator) -> bytes:
    """One accident of a dozen kinds."""
    kind = int(rng.integers(9))
    lines = text.splitlines()
    at = int(rng.integers(len(lines)))
    if kind == 0:
        lines.pop(at)
    elif kind == 1:
        lines.insert(at, lines[at])
    elif kind == 2:
        lines.insert(at, chosen(rng, LINES))
    elif kind == 3:
        return text.encode()[: int(rng.integers(len(text)))]
    elif kind == 4:
        return flipped(text.encode(), rng, int(rng.integers(1, 4)))
    elif kind == 5:
        lines[at] = " " * int(rng.integers(1, 4)) + lines[at]
    elif kind == 6 and rng.random() < 0.2:
        return f"{text}\n{bomb()}\n".encode()
    else:
        content = copy.deepcopy(yaml.safe_load(text))
        replace_one(content, rng)
        return yaml.safe_dump(content, allow_unicode=bool(rng.integers(2))).encode("utf-8", "surrogatepass")
    return ("\n".join(lines) + "\n").encode()


def replace_one(content: Any, rng: np.random.Generator) -> None:
    """Another value, key or nothing in one place of a tree."""
    places = [(parent, key) for parent, key in walked(content)]
    parent, key = places[int(rng.integers(len(places)))]
    kind = int(rng.integers(4))
    if kind == 0 and isinstance(parent, dict):
        parent[f"{key}s"] = parent.pop(key)
    elif kind == 1:
        del parent[key]
    else:
        parent[key] = chosen(rng, VALUES)


def walked(content: Any) -> list[tuple[Any, Any]]:
    found = []
    keys = (
        list(content)
        if isinstance(content, dict)
        else range(len(content))
        if isinstance(content, list)
        else []
    )
    for key in keys:
        found.append((content, key))
        found += walked(content[key])
    return found


# ------------------------------------------------------------------------------------------------------ meaning
def means(raw: Any, read: Any) -> bool:
    """Whether what was read is what an ordinary YAML reader finds in the file: nothing lost, nothing changed."""
    if isinstance(raw, dict):
        own = {str(key): value for key, value in read.items()} if isinstance(read, dict) else {}
        return all(str(key) in own and means(value, own[str(key)]) for key, value in raw.items())
    if isinstance(raw, list):
        return isinstance(read, list | tuple) and len(raw) == len(read) and all(map(means, raw, read))
    if isinstance(raw, bytes):
        return bool(raw == str(read).encode())
    if raw == read or str(raw) == str(read):
        return True
    try:
        return float(Fraction(str(raw))) == float(Fraction(str(read)))
    except (ValueError, ZeroDivisionError, OverflowError):
        return isinstance(raw, str) and isinstance(read, dict)  # a shorthand, as in `attack: pgd20`


def read_or_refused(path: Path, schema: type[BaseModel]) -> bool:
    """Read a file; whether it was. Its text says the same to PyYAML's own loader then."""
    model = allowed(lambda: load_yaml(path, schema))
    if model is None:
        return False
    raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert means(raw, model.model_dump()), (path.read_text(encoding="utf-8"), model)
    return True


SCHEMAS: dict[str, tuple[int, str, type[BaseModel]]] = {
    "cards": (110, "zoo/digits-*/card.yaml", ModelCard),
    "threat models": (110, "threat_models/*.yaml", ThreatModel),
    "recipes": (70, "recipes/*.yaml", Recipe),
    "experiments": (50, "experiments/*.yaml", Experiment),
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_mutated_files(kind: str, tmp_path: Path) -> None:
    count, pattern, schema = SCHEMAS[kind]
    originals = sorted(data_root().glob(pattern))
    for number, rng in cases(count, 50 + len(kind)):
        path = tmp_path / f"{number}" / "file.yaml"
        path.parent.mkdir()
        path.write_bytes(mutated(chosen(rng, originals).read_text(encoding="utf-8"), rng))
        read_or_refused(path, schema)


COMMANDS: dict[str, tuple[str, Callable[[Path], list[tuple[object, ...]]]]] = {
    "cards": (
        "zoo/digits-at/card.yaml",
        lambda folder: [
            ("list", "models", "--zoo", folder.parent),
            ("show", "digits-at", "--zoo", folder.parent),
        ],
    ),
    "threat models": (
        "threat_models/l2.yaml",
        lambda folder: [
            ("list", "attacks", "--threat-models", folder),
            ("show", "l2", "--threat-models", folder),
        ],
    ),
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_commands_on_mutated_files(kind: str, tmp_path: Path) -> None:
    """Whatever the file, a command ends with 0 or with one line and exit code 2."""
    original, commands = COMMANDS[kind]
    text = (data_root() / original).read_text(encoding="utf-8")
    for number, rng in cases(25, 60 + len(kind)):
        path = tmp_path / f"{number}" / "own" / Path(original).name
        path.parent.mkdir(parents=True)
        path.write_bytes(mutated(text, rng))
        for arguments in commands(path.parent):
            assert command(*arguments).exit_code in (0, 2)


def test_mutated_data_cards(tmp_path: Path) -> None:
    folder = data_folder(tmp_path / "original")
    text = (folder / "card.yaml").read_text(encoding="utf-8")
    for number, rng in cases(50, 70):
        own = Path(shutil.copytree(folder, tmp_path / f"{number}"))
        (own / "card.yaml").write_bytes(mutated(text, rng))
        read_or_refused(own / "card.yaml", FolderCard)
        assert command(
            "run", "--data", own, "--model", "digits-at", "--attacks", "fgsm", "--dry-run"
        ).exit_code in (0, 2)


def data_folder(folder: Path) -> Path:
    """A data set of 40 images with its card."""
    from robbench.core.resources import sha256_file

    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 17, (40, 8, 8), dtype=np.uint8)
    np.savez(folder / "test.npz", x=images, y=np.arange(40) % 10)
    card = {
        "name": "small",
        "class_names": [str(k) for k in range(10)],
        "layout": "NHW",
        "source": "made by the tests",
        "license": "MIT",
        "note": "random",
        "splits": {"test": {"file": "test.npz", "sha256": sha256_file(folder / "test.npz")}},
        "like": "digits",
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card, sort_keys=False), encoding="utf-8")
    return folder


def test_mutated_records_of_runs(tmp_path: Path, undisturbed: Path) -> None:
    """run.yaml, the cards and the records of cells in a run folder: refused, or the numbers are what they were."""
    expected = numbers(load_run(undisturbed))
    for number, rng in cases(50, 80):
        folder = copied(undisturbed, tmp_path / "run")
        path = chosen(rng, [folder / "run.yaml", *sorted(folder.glob("cards/*.yaml"))])
        path.write_bytes(mutated(path.read_text(encoding="utf-8"), rng))
        run = allowed(lambda folder=folder: load_run(folder))
        if run is None:
            continue
        for key, value in numbers(run).items():
            assert value is None or key not in expected or value == expected[key], (number, path, key)
