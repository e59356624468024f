"""Accuracy per class, clean, under each attack and in the worst case, and what is taken for what."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from robbench.metrics.verdicts import clean_correct, right_under_attack, robust, shown_verdicts
from robbench.results.rows import CLEAN, adversaries, cell_status, complete
from robbench.statistics.accuracy import Estimate, Verdicts, wilson
from robbench.store.records import CellResult, Run

WORST = "worst case"
LARGEST_MATRIX = 20  # classes; of more the most frequent confusions are listed instead of a matrix
PAIRS = 20  # confusions listed
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class ClassLine:
    """Accuracy per class under one attack. estimates: None for a class without samples. missing: why there are none."""

    label: str
    estimates: tuple[Estimate | None, ...]
    missing: str = ""


@dataclass(frozen=True)
class ClassTable:
    """classes: (name, samples). lines: clean, the attacks in plan order, the worst case over them."""

    classes: tuple[tuple[str, int], ...]
    lines: tuple[ClassLine, ...]


@dataclass(frozen=True)
class Confusion:
    """What a model said of each class. counts: [classes, classes], true classes down and predicted ones across."""

    label: str
    right: int
    n: int
    counts: NDArray[np.int64]

    @property
    def pairs(self) -> list[tuple[int, int, int]]:
        """(true class, predicted class, samples) of the most frequent confusions."""
        wrong = self.counts.copy()
        np.fill_diagonal(wrong, 0)
        flat = np.argsort(-wrong, axis=None, kind="stable")[:PAIRS]
        found = [(int(k) // len(wrong), int(k) % len(wrong)) for k in flat]
        return [(i, j, int(wrong[i, j])) for i, j in found if wrong[i, j]]


def class_names(run: Run, results: Sequence[CellResult]) -> list[str]:
    """Names of the classes, and numbers for those that the data set does not name."""
    columns = ("label", "clean_prediction", "prediction")
    largest = max((int(r.rows[c].max()) for r in results if len(r.rows) for c in columns), default=0)
    count = max(len(run.class_names), largest + 1)
    return [run.class_names[k] if k < len(run.class_names) else str(k) for k in range(count)]


def class_table(run: Run, results: Sequence[CellResult], names: Sequence[str]) -> ClassTable | None:
    """Accuracies a class with Wilson intervals; None without a finished cell. results: of one model."""
    done = complete(run, results)
    if not done:
        return None
    labels: Labels = done[0].rows["label"].to_numpy(dtype=np.int64)
    totals = np.bincount(labels, minlength=len(names))
    lines = [ClassLine(CLEAN, _estimates(labels, clean_correct(done[0].rows), totals))]
    for result in results:
        status, reason = cell_status(run, result)
        found = _estimates(labels, shown_verdicts(result), totals) if status == "ok" else ()
        missing = f"{status} ({reason})" if reason else status
        lines.append(ClassLine(result.cell.attack.label, found, "" if status == "ok" else missing))
    lines.append(_worst(labels, results, done, totals))
    return ClassTable(tuple(zip(names, map(int, totals), strict=True)), tuple(lines))


def _worst(
    labels: Labels, results: Sequence[CellResult], done: Sequence[CellResult], totals: Labels
) -> ClassLine:
    results = adversaries(results)
    if not results:
        return ClassLine(WORST, (), "no attack with a worst case, only perturbations")
    done = adversaries(done)
    if len(done) < len(results):
        absent = [r.cell.attack.label for r in results if r not in done]
        return ClassLine(WORST, (), f"not all attacks are done ({', '.join(absent)})")
    held = np.logical_and.reduce([robust(result.rows) for result in done])
    return ClassLine(WORST, _estimates(labels, held, totals))


def _estimates(labels: Labels, held: Verdicts, totals: Labels) -> tuple[Estimate | None, ...]:
    right = np.bincount(labels[held], minlength=len(totals))
    return tuple(wilson(int(k), int(n)) if n else None for k, n in zip(right, totals, strict=True))


def confusions(run: Run, results: Sequence[CellResult], classes: int) -> list[Confusion]:
    """Clean, then under each finished attack, in plan order. classes: how many there are."""
    done = complete(run, results)
    if not done:
        return []
    found = [_confusion(CLEAN, done[0].rows, "clean_prediction", clean_correct, classes)]
    return found + [
        _confusion(r.cell.attack.label, r.rows, "prediction", right_under_attack, classes) for r in done
    ]


def _confusion(
    label: str, rows: pd.DataFrame, column: str, verdicts: Callable[[pd.DataFrame], Verdicts], classes: int
) -> Confusion:
    predicted = rows[rows[column] >= 0]  # -1: logits that are not finite, no prediction at all
    pairs = predicted["label"].to_numpy(dtype=np.int64) * classes + predicted[column].to_numpy(dtype=np.int64)
    counts = np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    return Confusion(label, int(verdicts(rows).sum()), len(rows), counts)
