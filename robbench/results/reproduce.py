"""Command lines that compute a run's cells again."""

import math
import shlex

from robbench.core.precision import PRECISION, WITHDRAWN, read_record
from robbench.results import corruptions
from robbench.specs import ResolvedAttack
from robbench.store.records import CellRecord, Run

Options = tuple[tuple[str, str], ...]  # ("--epsilon", "8"), ... as given by hand
Matrix = tuple[str, str, tuple[str, ...]]  # models, attacks, further options


def commands(run: Run) -> list[str]:
    """`robbench run` lines for all cells of a run: one where every combination of the given budgets and steps was run,
    else one per combination. Searches in a withdrawn precision become fp32."""
    cells: dict[Options, list[CellRecord]] = {}
    for result in run.cells:
        cells.setdefault(_given_options(result.cell.attack), []).append(result.cell)
    settings: dict[Matrix, list[Options]] = {}
    for given, group in cells.items():
        settings.setdefault(_matrix(group), []).append(given)
    return [
        command(run, models, attacks, *words, *further)
        for (models, attacks, further), options in settings.items()
        for words in _lists(options)
    ]


def command(run: Run, models: str, attacks: str, *options: str) -> str:
    """One `robbench run` line on the samples of a run. models, attacks: comma lists; options: ("--epsilon", "0.1")."""
    data = ("--data", run.data.folder) if run.data and run.data.folder else ("--dataset", run.dataset)
    sample = ("--n", str(run.n), "--seed", str(run.seed))
    return shlex.join(["robbench", "run", *data, "--model", models, "--attacks", attacks, *sample, *options])


def _matrix(cells: list[CellRecord]) -> Matrix:
    models, attacks = (
        ",".join(dict.fromkeys(names))
        for names in zip(*((cell.model, cell.attack.name) for cell in cells), strict=True)
    )
    attacks = corruptions.shorten_group(attacks)
    further: list[str] = []
    if any(cell.precision == "fp64" for cell in cells):
        further += ["--likelihood-dtype", "float64"]
    for name, compiled in sorted({read_record(cell.search_precision) for cell in cells}):
        further += ["--precision", name] if name not in (PRECISION, *WITHDRAWN) else []
        further += ["--compile"] if compiled else []
    return models, attacks, tuple(further)


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
