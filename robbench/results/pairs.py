"""Verdicts of a run, packed for a page that compares any two of them.

Its script is `templates/site/paired.js.j2`; `compare` is the reference implementation.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from robbench.metrics.verdicts import clean_correct, robust, shown_verdicts
from robbench.results.rows import ModelResults, adversaries, complete, of_kind
from robbench.results.tables import ALL_THREATS
from robbench.results.threats import group_by_threat, name_threat
from robbench.statistics import accuracy
from robbench.statistics.accuracy import Estimate, Verdicts
from robbench.statistics.paired import PairedCounts, paired
from robbench.store.records import CellResult, Run


@dataclass(frozen=True)
class PackedModel:
    """Verdicts of a classifier as texts of `pack`, None where a cell failed or is not whole.

    attacks: by label. worst: by `name_threat` over the attacks under that threat model and budget, and by "all" over
    all of them (perturbations aside, as in the tables); None as soon as one of its cells is missing.
    """

    clean: str | None
    attacks: Mapping[str, str | None]
    worst: Mapping[str, str | None]


def pack_run(run: Run) -> dict[str, PackedModel]:
    """Every classifier by name; bit k of each text is of sample `run.sample_ids[k]`."""
    order = np.argsort(np.argsort(np.asarray(run.sample_ids, dtype=np.int64)))  # rows are sorted by sample id
    return {model.name: _pack_model(run, model, order) for model in of_kind(run, "classifier")}


def _pack_model(run: Run, model: ModelResults, order: np.ndarray) -> PackedModel:
    done = complete(run, model.cells)
    verdicts = {id(result): robust(result.rows)[order] for result in done}
    searched = adversaries(model.cells)
    threats = group_by_threat(searched, lambda result: result.cell.attack)
    groups = {name_threat(threat): results for threat, results in threats.items()}
    if searched:
        groups[ALL_THREATS] = list(searched)
    return PackedModel(
        clean=pack(clean_correct(done[0].rows)[order]) if done else None,
        attacks={r.cell.attack.label: None for r in model.cells}
        | {r.cell.attack.label: pack(shown_verdicts(r)[order]) for r in done},
        worst={name: _worst(group, verdicts) for name, group in groups.items()},
    )


def _worst(results: Sequence[CellResult], verdicts: Mapping[int, Verdicts]) -> str | None:
    if any(id(result) not in verdicts for result in results):
        return None
    return pack(np.logical_and.reduce([verdicts[id(result)] for result in results]))


def pack(verdicts: Verdicts) -> str:
    """Bits of verdicts [n] in base64: sample k is bit k % 8 (counted from the lowest) of byte k // 8, the rest 0."""
    return base64.b64encode(np.packbits(verdicts, bitorder="little").tobytes()).decode("ascii")


def unpack(text: str, n: int) -> Verdicts:
    """The verdicts [n] of `pack`."""
    bits = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    verdicts: Verdicts = np.unpackbits(bits, count=n, bitorder="little").astype(np.bool_)
    return verdicts


def compare(a: str, b: str, n: int) -> tuple[PairedCounts, Estimate]:
    """What the page's script must say of two texts of `pack` over n samples: counts with the exact p-value, and the
    accuracy of b minus that of a in percentage points with its 95 % interval (`paired_interval`)."""
    counts = paired(unpack(a, n), unpack(b, n))
    return counts, counts.difference(accuracy.CONFIDENCE)
