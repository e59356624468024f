"""Rank ranges of the worst case of a board: which ranks a model may have, given how often models differ on samples."""

from collections.abc import Sequence

import numpy as np

from robbench.metrics.verdicts import robust
from robbench.results.rows import ModelResults, complete
from robbench.statistics.accuracy import Verdicts, worst_case
from robbench.statistics.paired import ALPHA, rank_ranges
from robbench.store.records import CellResult, Run

Range = tuple[int, int]
EXPLANATION = (
    "The worst case of this board, on the same samples, is compared between every two models by McNemar's exact test, "
    "adjusted for all pairs after Holm: the chance that any pair is wrongly called different is at most 5 %. A model's "
    "best rank is one more than the number of models that are significantly better; its worst rank leaves below it "
    "only those that are significantly worse. So 2-4 of ten models means: one is better, six are worse, two cannot be "
    "told from it. A model has a rank only where every attack of the board is complete on it, and a "
    "guarded classifier where one that knows its detector is among them."
)


def ranges(run: Run, models: Sequence[ModelResults], labels: Sequence[str]) -> dict[str, Range]:
    """(best, worst) rank by model name, 1 the best, of the worst case over the attacks `labels` (adversaries all).

    Only models on which every one of `labels` is complete have a rank: over fewer attacks a worst case looks better.
    """
    adaptive = {r.cell.attack.label for model in models for r in model.cells if r.cell.is_adaptive}
    held = {
        model.name: verdicts
        for model in models
        if (verdicts := _worst_verdicts(run, model, {*labels}, adaptive)) is not None
    }
    if not held:
        return {}
    return dict(zip(held, rank_ranges(np.stack(list(held.values())), ALPHA), strict=True))


def _worst_verdicts(run: Run, model: ModelResults, labels: set[str], adaptive: set[str]) -> Verdicts | None:
    """Whether each sample stands against all attacks; None where one is missing. adaptive: attacks on guarded
    classifiers alone, of which those need one."""
    if model.detector and not labels & adaptive:
        return None
    requested = labels if model.detector else labels - adaptive
    done: list[CellResult] = complete(run, (r for r in model.cells if r.cell.attack.label in requested))
    if not done or {r.cell.attack.label for r in done} != requested:
        return None
    return worst_case([r.rows["sample_id"].to_numpy() for r in done], [robust(r.rows) for r in done])
