"""Which attack broke what: each alone, only it, in greedy order, and all of them together on the same samples."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from robbench.metrics.verdicts import broken, clean_correct, robust
from robbench.store.records import CellResult

INTERSECTIONS = 12  # sets of attacks shown, the largest first


@dataclass(frozen=True)
class Share:
    """One attack among others.

    Attributes:
        label: of the attack.
        broken: samples right before it and wrong after it.
        only: those that no other attack broke.
        rank: place in greedy order, from 1; None where it adds nothing to those before it.
        added: samples that it adds there.
        together: samples broken by it or any before it in that order.
    """

    label: str
    broken: int
    only: int
    rank: int | None
    added: int
    together: int


@dataclass(frozen=True)
class Intersection:
    """Samples that exactly these attacks broke. among: which of `Joint.shares` they are, in that order."""

    count: int
    among: tuple[bool, ...]


@dataclass(frozen=True)
class Joint:
    """What the attacks on a model broke, alone and together; n = wrong + held + broken.

    Attributes:
        n: samples.
        wrong: samples that are wrong before the attacks.
        held: samples that are robust under all of them.
        broken: samples broken by at least one.
        shares: the attacks, in plan order.
        intersections: the largest sets of samples that exactly the same attacks broke.
        further: how many sets are left out.
        further_samples: samples in those.
        differing: samples that are right before the attack in some cells only (near ties); they count as wrong.
    """

    n: int
    wrong: int
    held: int
    broken: int
    shares: tuple[Share, ...]
    intersections: tuple[Intersection, ...]
    further: int
    further_samples: int
    differing: int

    @property
    def greedy(self) -> list[Share]:
        """Attacks that add something, in greedy order."""
        return sorted((s for s in self.shares if s.rank is not None), key=lambda share: share.rank or 0)


def joint(results: Sequence[CellResult], limit: int = INTERSECTIONS) -> Joint:
    """Counts over finished cells of one model; ValueError unless there is one and all have the same samples."""
    if not results:
        raise ValueError("no finished cell; give at least one")
    ids = [result.rows["sample_id"].to_numpy() for result in results]
    if not all(np.array_equal(other, ids[0]) for other in ids):
        raise ValueError("the cells have different samples; use the same samples")
    right = np.stack([clean_correct(result.rows) for result in results])
    everywhere = right.all(axis=0)
    table = ~np.stack([robust(result.rows) for result in results]) & everywhere
    anywhere = table.any(axis=0)
    intersections = _intersections(table[:, anywhere])
    return Joint(
        n=table.shape[1],
        wrong=int((~everywhere).sum()),
        held=int((everywhere & ~anywhere).sum()),
        broken=int(anywhere.sum()),
        shares=_shares([result.cell.attack.label for result in results], table),
        intersections=tuple(intersections[:limit]),
        further=len(intersections[limit:]),
        further_samples=sum(found.count for found in intersections[limit:]),
        differing=int((right.any(axis=0) & ~everywhere).sum()),
    )


def _shares(labels: Sequence[str], table: NDArray[np.bool_]) -> tuple[Share, ...]:
    """table: [attacks, samples], whether an attack broke a sample."""
    alone = table.sum(axis=0) == 1
    order = {k: (rank, added, total) for rank, (k, added, total) in enumerate(_greedy(table), 1)}
    everything = int(table.any(axis=0).sum())
    return tuple(
        Share(label, int(row.sum()), int((row & alone).sum()), *order.get(k, (None, 0, everything)))
        for k, (label, row) in enumerate(zip(labels, table, strict=True))
    )


def _greedy(table: NDArray[np.bool_]) -> list[tuple[int, int, int]]:
    """(attack, samples it adds, samples broken so far): always the attack that adds the most, the first of equals."""
    left, total, found = table.copy(), 0, []
    while (gains := left.sum(axis=1)).any():
        best = int(gains.argmax())
        total += int(gains[best])
        found.append((best, int(gains[best]), total))
        left &= ~left[best]
    return found


def _intersections(table: NDArray[np.bool_]) -> list[Intersection]:
    """Every set of attacks that broke samples together and no other attack did, the largest first."""
    counts = Counter(map(tuple, table.T.tolist()))
    return [
        Intersection(count, among)
        for among, count in sorted(counts.items(), key=lambda item: (-item[1], sum(item[0]), item[0]))
    ]


@dataclass(frozen=True)
class Ensemble:
    """One ensemble and how many samples each of its components broke first, in the order they were tried."""

    label: str
    components: tuple[tuple[str, int], ...]


def ensembles(results: Sequence[CellResult]) -> list[Ensemble]:
    """The finished cells of attacks that try several components in turn."""
    return [_ensemble(result) for result in results if result.cell.attack.parameters.get("components")]


def _ensemble(result: CellResult) -> Ensemble:
    counts = Counter(str(name) for name in broken(result.rows)["broken_by"])
    planned = map(str, result.cell.attack.parameters["components"])
    names = dict.fromkeys([*planned, *sorted(counts)])
    return Ensemble(result.cell.attack.label, tuple((name, counts[name]) for name in names))
