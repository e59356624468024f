"""Images of a model's page: examples of its attacks in turn, and one sample under attacks on single latent levels."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from robbench.metrics.verdicts import clean_correct
from robbench.report.gallery import Originals, Triple, load_triples, triples
from robbench.report.site.model_families import same_but
from robbench.results.likelihood import steps_of
from robbench.results.rows import complete
from robbench.store.records import CellResult, Run

EXAMPLES = 24
LEVEL_SAMPLES = 3
SIDE = 1  # images as stored: the page scales them up


@dataclass(frozen=True)
class LevelRow:
    """One sample under the variants of an attack. variants: in the order of `Levels.names`."""

    sample_id: int
    variants: tuple[Triple, ...]


@dataclass(frozen=True)
class Levels:
    """An attack on all latent levels and on single ones. names: (label, "all levels" or "level 1")."""

    names: tuple[tuple[str, str], ...]
    rows: tuple[LevelRow, ...]


def examples(
    run: Run, results: Sequence[CellResult], originals: Originals, order: Mapping[int, int] | None = None
) -> list[Triple]:
    """Stored examples of the attacks in turn, by `order` as in `triples`. Of more attacks than fit, those that differ
    only in steps are shown once, with the most steps."""
    done = [result for result in complete(run, results) if result.rows["example"].notna().any()]
    if len(done) > EXAMPLES:
        done = _longest(done)
    return triples(run, done, originals, EXAMPLES, SIDE, order)


def _longest(results: Sequence[CellResult]) -> list[CellResult]:
    found: dict[str, CellResult] = {}
    for result in results:
        key = same_but(result, "steps")
        if key not in found or (steps_of(result.cell.attack) or 0) > (steps_of(found[key].cell.attack) or 0):
            found[key] = result
    return list(found.values())


def levels(run: Run, results: Sequence[CellResult], originals: Originals) -> list[Levels]:
    """The attacks of which variants on other latent levels were run, with the samples whose images all of them kept."""
    groups: dict[str, list[CellResult]] = {}
    for result in complete(run, results):
        if "levels" in result.cell.attack.parameters:
            groups.setdefault(same_but(result, "levels"), []).append(result)
    found = [_levels(run, group, originals) for group in groups.values() if len(group) > 1]
    return [one for one in found if one.rows]


def _levels(run: Run, group: Sequence[CellResult], originals: Originals) -> Levels:
    kept = [_select_rows(result) for result in group]
    together = set.intersection(*[set(rows.index) for rows in kept])
    broken = {i: sum(not rows.loc[i, "robust"] for rows in kept) for i in together}
    ids = sorted(together, key=lambda i: (-broken[i], i))[:LEVEL_SAMPLES]
    rows = []
    for i in ids:
        chosen = [(result, _row(result, i)) for result in group]
        rows.append(LevelRow(i, tuple(load_triples(run, chosen, originals, SIDE))))
    names = tuple((r.cell.attack.label, _level(r.cell.attack.parameters["levels"])) for r in group)
    return Levels(names, tuple(rows))


def _select_rows(result: CellResult) -> pd.DataFrame:
    """Rows with an image, of samples right before the attack, by sample id."""
    rows = result.rows
    kept = rows[rows["example"].notna() & clean_correct(rows)]
    return kept.set_index("sample_id")


def _row(result: CellResult, sample_id: int) -> "pd.Series[float]":
    return result.rows[result.rows["sample_id"] == sample_id].iloc[0]


def _level(chosen: Sequence[int] | None) -> str:
    if not chosen:
        return "all levels"
    return f"level{'s' if len(chosen) > 1 else ''} {', '.join(map(str, chosen))}"
