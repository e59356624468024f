"""What two runs do not share besides their numbers: seeds, samples, versions, weights, flows, parameters of attacks."""

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np

from robbench.cards import FlowReference
from robbench.compare.paired import spec_changes
from robbench.compare.pairing import CellPair, PairedRuns
from robbench.compare.pairs import same
from robbench.core.counting import count_noun
from robbench.metrics.verdicts import floats
from robbench.store.columns import select_names
from robbench.store.records import Run

_NOT_COMPARED = select_names("image")  # the numbers of their rows are compared
_DISCRETE, _SCORES = select_names("class", "verdict", "step"), select_names("score")


@dataclass(frozen=True)
class Difference:
    """One setting in both runs.

    Attributes:
        subject: the model or attack that it belongs to; "" for the run.
        what: its name.
        a, b: its values as text.
        unlike: whether the numbers of both do not answer one question, as of other budgets or engines.
        cells: how many have it.
    """

    subject: str
    what: str
    a: str
    b: str
    unlike: bool = False
    cells: int = 0

    @property
    def text(self) -> str:
        """ "pgd20: attack spec parameters.steps 20 -> 10 (3 cells)"."""
        where = f"{self.subject}: " if self.subject else ""
        count = f" ({count_noun(self.cells, 'cell')})" if self.cells else ""
        return f"{where}{self.what} {self.a} -> {self.b}{count}"


@dataclass(frozen=True)
class OtherRows:
    """A cell with one hash in both runs, and other rows: what should be the same computation was not.

    Attributes:
        model, attack, hash: of the cell.
        n: samples that both have.
        rows: of these, those in which any number differs.
        verdicts: those with another label, prediction, verdict, breaking component or step.
        beyond: those, and those whose scores differ by more than rounding.
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
    found = _pairs("", ("seed", a.seed, b.seed), ("note", a.note or "none", b.note or "none"))
    if set(a.sample_ids) != set(b.sample_ids):
        what = f"samples (compared: the {len(runs.ids)} of both)"
        found.append(Difference("", what, str(a.n), str(b.n), unlike=True))
    libraries = dict.fromkeys([*a.versions, *b.versions])
    versions = (
        (f"version of {name}", a.versions.get(name, "none"), b.versions.get(name, "none"))
        for name in libraries
    )
    found += _pairs("", *versions)
    for name in [name for name in a.cards if name in b.cards]:
        found += _cards(name, a, b)
    counts = Counter(difference for pair in runs.cells for difference in _cell(pair))
    return found + [replace(difference, cells=cells) for difference, cells in counts.items()]


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
    fields = ("engine", "precision", "search_precision")
    unlike = _pairs(
        pair.label,
        *spec_changes(ours.attack, theirs.attack),
        ("flow of the attack", _flow(ours.attack_flow), _flow(theirs.attack_flow)),
        ("flow of the NLL", _flow(ours.nll_flow), _flow(theirs.nll_flow)),
        *((name.replace("_", " "), getattr(ours, name), getattr(theirs, name)) for name in fields),
    )
    alike = _pairs(pair.label, ("batch size", ours.batch_size, theirs.batch_size))
    return [*(replace(difference, unlike=True) for difference in unlike), *alike]


def _flow(reference: FlowReference | None) -> str:
    return f"{reference.name} {reference.sha256[:12]}" if reference else "none"


def _pairs(subject: str, *pairs: tuple[str, object, object]) -> list[Difference]:
    return [Difference(subject, what, str(a), str(b)) for what, a, b in pairs if a != b]


def other_rows(runs: PairedRuns) -> list[OtherRows]:
    """The cells that have one hash in both runs and not the same rows."""
    pairs = [pair for pair in runs.cells if pair.ok and pair.a.cell.hash == pair.b.cell.hash]
    return [found for found in map(_compare, pairs) if found.rows]


def _compare(pair: CellPair) -> OtherRows:
    """The columns of both that are compared."""
    a, b = pair.rows_a, pair.rows_b
    names = [name for name in a.columns if name in b.columns and name not in _NOT_COMPARED]
    unequal = {
        name: ((a[name] != b[name]) & ~(a[name].isna() & b[name].isna())).to_numpy(dtype=np.bool_)
        for name in names
    }
    none = np.zeros(len(a), np.bool_)
    verdicts = np.logical_or.reduce([none, *(unequal[name] for name in _DISCRETE if name in unequal)])
    scores = [~same(floats(a[name]), floats(b[name])) for name in _SCORES if name in unequal]
    counts = [
        int(np.logical_or.reduce(masks).sum())
        for masks in ([none, *unequal.values()], [verdicts], [verdicts, *scores])
    ]
    return OtherRows(pair.model, pair.label, pair.a.cell.hash, len(a), *counts)


def other_labels(runs: PairedRuns) -> int:
    """Of the common samples those with another label in the two runs: then the data are not the same after all."""
    changed = [
        pair.ids[(pair.rows_a["label"] != pair.rows_b["label"]).to_numpy()] for pair in runs.cells if pair.ok
    ]
    return len(set(np.concatenate(changed).tolist())) if changed else 0
