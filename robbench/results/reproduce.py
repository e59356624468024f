"""Command lines that compute a run's cells again."""

import math
import shlex
from collections.abc import Mapping
from typing import Any

from robbench.core.precision import PRECISION, WITHDRAWN, read_record
from robbench.results import corruptions
from robbench.specs import ResolvedAttack
from robbench.store.records import CellRecord, Run

Options = tuple[tuple[str, str], ...]  # ("--epsilon", "8"), ... as given by hand
Matrix = tuple[str, str, tuple[str, ...]]  # models, attacks, further options
# Options of `robbench run` that cells, data and samples state, or that change no number.
STATED = frozenset(
    (
        *(
            "attacks",
            "model",
            "defense",
            "dataset",
            "data",
            "n",
            "seed",
            "epsilon",
            "eta",
            "steps",
            "compile",
        ),
        *("likelihood-dtype", "likelihood-draws", "precision", "out", "device", "backend", "ray-address"),
        *("gpus-per-cell", "keep-examples", "threads", "experiment", "scale", "fid-weights"),
    )
)


def commands(run: Run) -> list[str]:
    """`robbench run` lines for all cells of a run and no others: one for models attacked alike, where every combination
    of the given budgets and steps is there, else one for each. Models and places are named as they were
    given. What was searched in a precision since withdrawn is searched in fp32."""
    cells: dict[Options, dict[str, list[CellRecord]]] = {}
    for result in run.cells:
        given, model = _given_options(result.cell.attack), result.cell.model
        cells.setdefault(given, {}).setdefault(model, []).append(result.cell)
    settings: dict[Matrix, list[Options]] = {}
    for given, of_models in cells.items():
        alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for model, group in of_models.items():
            alike.setdefault(_attacks(group), []).append(run.given.get(model, model))
        for (attacks, further), models in alike.items():
            settings.setdefault((",".join(models), attacks, further), []).append(given)
    return [
        command(run, models, attacks, *words, *further)
        for (models, attacks, further), options in settings.items()
        for words in _lists(options)
    ]


def command(run: Run, models: str, attacks: str, *options: str) -> str:
    """One `robbench run` line on the samples of a run. models, attacks: comma lists; options: ("--epsilon", "0.1")."""
    given = run.options
    data = ("--dataset", run.dataset)
    if run.data and run.data.folder:
        option = "dataset" if "dataset" in given else "data"
        data = (f"--{option}", str(given.get(option, run.data.folder)))
    sample = ("--n", str(run.n), "--seed", str(run.seed))
    words = ["robbench", "run", *data, "--model", models, "--attacks", attacks, *sample, *options]
    return shlex.join([*words, *_places(given)])


def _places(given: Mapping[str, Any]) -> list[str]:
    """The options of the last command that say where things are and how images are read: those that no cell states."""
    words: list[str] = []
    for name, value in given.items():
        if name in STATED:
            continue
        values = value if isinstance(value, list) else [value]
        words += [f"--{name}" if one is True else f"--{name}={one}" for one in values]
    return words


def _attacks(cells: list[CellRecord]) -> tuple[str, tuple[str, ...]]:
    """The comma list of the attacks of some cells, and the further options they need."""
    attacks = corruptions.shorten_group(",".join(dict.fromkeys(cell.attack.name for cell in cells)))
    further: list[str] = []
    if any(cell.precision == "fp64" for cell in cells):
        further += ["--likelihood-dtype", "float64"]
    for name, compiled in sorted({read_record(cell.search_precision) for cell in cells}):
        further += ["--precision", name] if name not in (PRECISION, *WITHDRAWN) else []
        further += ["--compile"] if compiled else []
    return attacks, tuple(further)


def _lists(options: list[Options]) -> list[list[str]]:
    """Options as comma lists where every combination is present, else one list of words per entry."""
    values: dict[str, dict[str, None]] = {}
    for given in options:
        for key, value in given:
            values.setdefault(key, {})[value] = None
    complete = math.prod(len(found) for found in values.values()) == len(options)
    if complete and all(len(given) == len(values) for given in options):
        return [[word for key, found in values.items() for word in (key, ",".join(found))]]
    return [[word for pair in given for word in pair] for given in options]


def _given_options(attack: ResolvedAttack) -> Options:
    """The options that a label shows ("pgd20@0.1", "jsa50@0.2@eta0.3", "nll-in@8@50steps")."""
    marks = attack.label.removeprefix(attack.name).split("@")[1:]
    return tuple(_option(mark) for mark in marks)


def _option(mark: str) -> tuple[str, str]:
    if mark.startswith("eta"):
        return "--eta", mark.removeprefix("eta")
    if mark.endswith("draws"):
        return "--likelihood-draws", mark.removesuffix("draws")
    if mark.endswith("steps"):
        return "--steps", mark.removesuffix("steps")
    return "--epsilon", mark
