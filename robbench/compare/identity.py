"""What two runs do not share besides their numbers: seeds, samples, versions, weights, flows, parameters of attacks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from robbench.compare.paired import spec_changes
from robbench.compare.pairing import CellPair, PairedRuns
from robbench.compare.pairs import same
from robbench.metrics.verdicts import floats
from robbench.store.columns import select_names
from robbench.store.records import CellRecord, Run

if TYPE_CHECKING:
    import pandas as pd

_NOT_COMPARED = select_names("image")  # the numbers of their rows are compared
_DISCRETE, _SCORES = select_names("class", "verdict", "step"), select_names("score")


@dataclass(frozen=True)
class Difference:
    """One setting in both runs. subject: the model or attack it belongs to, "" for the run. cells: that have it."""

    subject: str
    what: str
    a: str
    b: str
    cells: int = 0

    @property
    def text(self) -> str:
        """ "pgd20: attack spec parameters.steps 20 -> 10 (3 cells)"."""
        where = f"{self.subject}: " if self.subject else ""
        count = f" ({self.cells} cell{'s' if self.cells > 1 else ''})" if self.cells else ""
        return f"{where}{self.what} {self.a} -> {self.b}{count}"


@dataclass(frozen=True)
class OtherRows:
    """A cell with one hash in both runs, and other rows: what should be the same computation was not.

    rows: of the `n` that both have, those in which any number differs. verdicts: those with another label, prediction,
    verdict, breaking component or step. beyond: those, and those whose scores differ by more than rounding.
    """

    model: str
    attack: str
    hash: str
    n: int
    rows: int
    verdicts: int
    beyond: int


def differences(runs: PairedRuns) -> list[Difference]:
    """Every setting that differs, those of the run first; one that several cells share is there once."""
    a, b = runs.a, runs.b
    found = [
        *_pairs("", ("seed", a.seed, b.seed), ("note", a.note or "none", b.note or "none")),
        *_samples(runs),
        *_mappings("version of", a.versions, b.versions),
    ]
    for name in [name for name in a.cards if name in b.cards]:
        found += _cards(name, a, b)
    counted: dict[tuple[str, str, str, str], int] = {}
    for pair in runs.cells:
        for d in _cell(pair):
            key = d.subject, d.what, d.a, d.b
            counted[key] = counted.get(key, 0) + 1
    return found + [Difference(*key, cells) for key, cells in counted.items()]


def _samples(runs: PairedRuns) -> list[Difference]:
    if set(runs.a.sample_ids) == set(runs.b.sample_ids):
        return []
    return [Difference("", f"samples (compared: the {len(runs.ids)} of both)", str(runs.a.n), str(runs.b.n))]


def _cards(name: str, a: Run, b: Run) -> list[Difference]:
    ours, theirs = a.cards[name], b.cards[name]
    found = _pairs(
        name,
        ("weights", ours.weights.sha256[:12], theirs.weights.sha256[:12]),
        ("defense", ours.defense, theirs.defense),
    )
    if not found and ours.function_hash != theirs.function_hash:
        found = _pairs(name, ("architecture", ours.function_hash[:12], theirs.function_hash[:12]))
    return found


def _cell(pair: CellPair) -> list[Difference]:
    ours, theirs = pair.a.cell, pair.b.cell
    before, now = (r.attack.model_dump(mode="json", exclude={"label"}) for r in (ours, theirs))
    return [
        *_pairs(pair.label, *spec_changes(before, now)),
        *_pairs(
            pair.label,
            ("flow of the attack", _flow(ours, "attack_flow"), _flow(theirs, "attack_flow")),
            ("flow of the NLL", _flow(ours, "nll_flow"), _flow(theirs, "nll_flow")),
            ("engine", ours.engine, theirs.engine),
            ("precision", ours.precision, theirs.precision),
            ("search precision", ours.search_precision, theirs.search_precision),
            ("batch size", ours.batch_size, theirs.batch_size),
        ),
    ]


def _flow(record: CellRecord, which: str) -> str:
    reference = record.attack_flow if which == "attack_flow" else record.nll_flow
    return f"{reference.name} {reference.sha256[:12]}" if reference else "none"


def _pairs(subject: str, *pairs: tuple[str, object, object]) -> list[Difference]:
    return [Difference(subject, what, str(a), str(b)) for what, a, b in pairs if a != b]


def _mappings(what: str, a: Mapping[str, str], b: Mapping[str, str]) -> list[Difference]:
    names: Iterable[str] = dict.fromkeys([*a, *b])
    return _pairs("", *((f"{what} {name}", a.get(name, "none"), b.get(name, "none")) for name in names))


# --------------------------------------------------------------------------------------------- the same cells
def other_rows(runs: PairedRuns) -> list[OtherRows]:
    """The cells that have one hash in both runs and not the same rows."""
    same_cells = [pair for pair in runs.cells if pair.ok and pair.a.cell.hash == pair.b.cell.hash]
    found = [_compared(pair) for pair in same_cells if not _rows(pair)[0].equals(_rows(pair)[1])]
    return [other for other in found if other.rows]


def _rows(pair: CellPair) -> "tuple[pd.DataFrame, pd.DataFrame]":
    """The columns of both that are compared."""
    shared = [n for n in pair.rows_a.columns if n in pair.rows_b.columns and n not in _NOT_COMPARED]
    return pair.rows_a[shared], pair.rows_b[shared]


def _compared(pair: CellPair) -> OtherRows:
    a, b = _rows(pair)
    unequal = {
        name: ((a[name] != b[name]) & ~(a[name].isna() & b[name].isna())).to_numpy(dtype=np.bool_)
        for name in a.columns
    }
    none = np.zeros(len(a), np.bool_)
    verdicts = np.logical_or.reduce([none, *(unequal[name] for name in _DISCRETE if name in unequal)])
    scores = [~same(floats(a[name]), floats(b[name])) for name in _SCORES if name in unequal]
    return OtherRows(
        pair.model,
        pair.label,
        pair.a.cell.hash,
        len(a),
        int(np.logical_or.reduce([none, *unequal.values()]).sum()),
        int(verdicts.sum()),
        int(np.logical_or.reduce([verdicts, *scores]).sum()),
    )


def other_labels(runs: PairedRuns) -> int:
    """Of the common samples those with another label in the two runs: then the data are not the same after all."""
    found: set[int] = set()
    for pair in runs.cells:
        if pair.ok:
            changed = (pair.rows_a["label"] != pair.rows_b["label"]).to_numpy(dtype=np.bool_)
            found.update(int(i) for i in pair.ids[changed])
    return len(found)
