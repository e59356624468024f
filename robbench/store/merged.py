"""Merging runs on the same samples, and the conflicts that prevent it. No torch here.

A leaderboard has one set of samples, one seed and one engine. Two different models, attacks or results under one name
are a conflict; conflicts are reported, never resolved.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from robbench.core.errors import UserError
from robbench.store.columns import select_names
from robbench.store.records import CellRecord, CellResult, Run

if TYPE_CHECKING:
    import pandas as pd

ROUNDING = (
    1e-3  # tolerance of margins, bits/dim and sizes, relative above 1, for equal rows of different processors
)
MAJOR = ("robbench", "torch")  # packages whose major versions must agree
_EXACT, _ROUNDED = select_names("class", "verdict"), select_names("score", "distance")
Named = Sequence[tuple[str, Run]]


def merge_runs(runs: Sequence[Run], names: Sequence[str] = (), accept_versions: bool = False) -> Run:
    """The union of runs on the same samples: every cell once, models outermost, in order of first appearance.

    Cells of several runs are chosen by `choose_cells`; the folder is that of the first run. names: of the runs in
    errors (default: their folders). `UserError` for the first of their `conflicts`.
    """
    if not runs:
        raise UserError("nothing to merge; give at least one run")
    found = conflicts(runs, names, accept_versions)
    if found:
        more = f" (+{len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"these runs are no one leaderboard: {found[0]}{more}")
    notes = dict.fromkeys(run.note for run in runs if run.note)
    return replace(
        runs[0],
        cells=_sort_by_model(choose_cells(runs)),
        cards={name: card for run in reversed(runs) for name, card in run.cards.items()},
        versions=_versions(runs),
        data=next((run.data for run in runs if run.data is not None), None),
        note=". ".join(notes),
        frechet_folders=tuple(folder for run in runs for folder in run.frechet_folders or (run.folder,)),
    )


def source_of(runs: Sequence[Run], result: CellResult) -> Run:
    """The run from which a cell of their union comes."""
    return next(run for run in runs if any(other is result for other in run.cells))


def choose_cells(runs: Sequence[Run]) -> list[CellResult]:
    """Every cell of the runs once, in order of first appearance. Of the same cell in several runs, a complete one is
    chosen, else the one with most rows; then the one with most stored examples, then the first."""
    cells: dict[tuple[str, str], CellResult] = {}
    for result in (result for run in runs for result in run.cells):
        best = cells.setdefault(_key(result.cell), result)
        if _progress(result) > _progress(best):
            cells[_key(result.cell)] = result
    return list(cells.values())


def _key(cell: CellRecord) -> tuple[str, str]:
    return cell.model_name, cell.attack.label


def _progress(result: CellResult) -> tuple[bool, int, int]:
    return (
        result.cell.status == "ok",
        len(result.rows),
        int(result.rows["example"].notna().sum()) if "example" in result.rows else 0,
    )


def _sort_by_model(cells: Sequence[CellResult]) -> list[CellResult]:
    models = list(dict.fromkeys(result.cell.model_name for result in cells))
    return sorted(cells, key=lambda result: models.index(result.cell.model_name))


def _versions(runs: Sequence[Run]) -> dict[str, str]:
    """Versions of the libraries; where runs differ, all of them: "2.8.0 / 2.9.1"."""
    names = dict.fromkeys(name for run in runs for name in run.versions)
    return {
        name: " / ".join(dict.fromkeys(run.versions[name] for run in runs if name in run.versions))
        for name in names
    }


def conflicts(runs: Sequence[Run], names: Sequence[str] = (), accept_versions: bool = False) -> list[str]:
    """Reasons why runs cannot be merged, one line each with the next step.

    Different data, samples or seed; different engine or major versions (unless accepted); one name for two models, or
    for two attacks; one cell with two results.
    """
    named = list(zip(names or [str(run.folder) for run in runs], runs, strict=True))
    found = [text for other in named[1:] for text in _identity(named[0], other)]
    if not accept_versions:
        found += version_conflicts(runs, names)
    return [*found, *_models(named), *_attacks(named), *_results(named)]


def version_conflicts(runs: Sequence[Run], names: Sequence[str] = ()) -> list[str]:
    """Differences of engines, and of major versions of robbench and torch, one line each."""
    named = list(zip(names or [str(run.folder) for run in runs], runs, strict=True))
    first, run = named[0]
    step = "run one of them again, or accept it with --accept-versions, which every table then says"
    found = []
    for other, its in named[1:]:
        pairs = [(name, _major(run, name), _major(its, name)) for name in MAJOR]
        pairs.append(("engine", ", ".join(_engines(run)), ", ".join(_engines(its))))
        found += [
            f"{name} is {mine} in {first} and {theirs} in {other}; {step}"
            for name, mine, theirs in pairs
            if mine != theirs
        ]
    return found


def _major(run: Run, name: str) -> str:
    """ "2" of 2.15.0; "0.1" of 0.1.3, where the second number marks incompatible versions."""
    numbers = [*run.versions.get(name, "unknown").split("."), ""]
    return f"0.{numbers[1]}" if numbers[0] == "0" else numbers[0]


def _engines(run: Run) -> list[str]:
    return sorted({_engine(result.cell) for result in run.cells})


def _engine(cell: CellRecord) -> str:
    """The engine itself, without the packages of single attacks, which follow after a comma."""
    return cell.engine.partition(",")[0]


def _identity(first: tuple[str, Run], other: tuple[str, Run]) -> Iterator[str]:
    (name, run), (its, theirs) = first, other
    pairs = (
        ("data set", run.dataset, theirs.dataset),
        ("data set revision", run.dataset_revision[:12], theirs.dataset_revision[:12]),
        ("image shape", run.shape, theirs.shape),
        ("seed", run.seed, theirs.seed),
        ("number of samples", run.n, theirs.n),
    )
    different = [pair for pair in pairs if pair[1] != pair[2]]
    for what, mine, other_value in different:
        yield f"{what} is {mine} in {name} and {other_value} in {its}; merge only runs that agree in it"
    if not different and set(run.sample_ids) != set(theirs.sample_ids):
        alone = len(set(run.sample_ids) - set(theirs.sample_ids))
        yield (
            f"{alone} of {run.n} samples of {name} are not those of {its}; run both with one --n and --seed "
            f"of the same data"
        )


def _models(named: Named) -> Iterator[str]:
    """Two models of one name."""
    owners: dict[str, tuple[str, Run]] = {}
    for name, run in named:
        for model, card in run.cards.items():
            first, theirs = owners.setdefault(model, (name, run))
            known = theirs.cards[model]
            if known.function_hash != card.function_hash:
                yield (
                    f"model {model!r} is another one in {name} (weights {card.weights.sha256[:12]}) than in {first} "
                    f"({known.weights.sha256[:12]}); rename one in its card and run it again"
                )
            elif known.defense != card.defense:
                yield (
                    f"model {model!r} has defense {card.defense!r} in {name} and {known.defense!r} in {first}; correct "
                    f"one card"
                )


def _attacks(named: Named) -> Iterator[str]:
    """Two attacks of one label."""
    owners: dict[str, tuple[str, CellRecord]] = {}
    for name, run in named:
        reported = set()
        for cell in (result.cell for result in run.cells):
            first, known = owners.setdefault(cell.attack.label, (name, cell))
            differences = _attack_differences(known, cell)
            if differences and cell.attack.label not in reported:
                reported.add(cell.attack.label)
                yield (
                    f"attack {cell.attack.label!r} is not the same in {first} and {name}: {', '.join(differences)}; "
                    f"run it again with one setting"
                )


def _attack_differences(known: CellRecord, cell: CellRecord) -> list[str]:
    """ "parameters.steps 10 and 20"."""
    changes = changed_entries(_attack_parts(known), _attack_parts(cell))
    return [f"{key} {one} and {other}" for key, one, other in changes]


def changed_entries(
    before: Mapping[str, object], now: Mapping[str, object], at: str = ""
) -> list[tuple[str, object, object]]:
    """Entries in which two nested mappings differ, "parameters.steps" with both values (None for an absent one)."""
    found: list[tuple[str, object, object]] = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += changed_entries(old, new, f"{at}{key}.")
        elif old != new:
            found.append((f"{at}{key}", old, new))
    return found


def _attack_parts(cell: CellRecord) -> dict[str, object]:
    flows = {"attack flow": cell.attack_flow, "flow of the likelihood": cell.nll_flow}
    return {
        **cell.attack.model_dump(mode="json", exclude={"label"}),
        **{what: flow and f"{flow.name} {flow.sha256[:12]}" for what, flow in flows.items()},
        "precision": cell.precision,
        "search precision": cell.search_precision,
        "batch size": cell.batch_size,
    }


def _results(named: Named) -> Iterator[str]:
    """One cell with two addresses, or with other rows under one address."""
    owners: dict[tuple[str, str], tuple[str, CellResult]] = {}
    for name, run in named:
        for result in run.cells:
            first, known = owners.setdefault(_key(result.cell), (name, result))
            what = f"{result.cell.model_name} x {result.cell.attack.label}"
            if known.cell.hash != result.cell.hash:
                yield (
                    f"{what} has cell hash {known.cell.hash[:12]} in {first} and {result.cell.hash[:12]} in {name}: "
                    f"something they depend on differs; leave one of them out"
                )
            elif known is not result and (count := _different_rows(known.rows, result.rows)):
                yield (
                    f"{what} has {count} rows in {first} that are others in {name}; verify both, then leave one out"
                )


def _different_rows(one: "pd.DataFrame", other: "pd.DataFrame") -> int:
    """Number of shared samples with different verdicts, or numbers that differ beyond rounding."""
    shared = np.intersect1d(one["sample_id"], other["sample_id"])
    first, second = (rows[rows["sample_id"].isin(shared)].sort_values("sample_id") for rows in (one, other))
    different = np.zeros(len(shared), dtype=np.bool_)
    for name in (name for name in _EXACT if name in first):
        absent, missing = (rows[name].isna().to_numpy(dtype=np.bool_) for rows in (first, second))
        unequal = np.asarray(first[name]) != np.asarray(second[name])
        different |= (absent != missing) | (unequal & ~absent)
    for name in (name for name in _ROUNDED if name in first):
        mine, theirs = (np.asarray(rows[name], dtype=np.float64) for rows in (first, second))
        if np.isnan(mine).all() or np.isnan(theirs).all():  # of shards older than the column
            continue
        different |= ~np.isclose(mine, theirs, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)
    return int(different.sum())
