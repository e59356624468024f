"""The same samples in two runs, and what changed between them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from robbench.compare.samples import CellSamples
from robbench.metrics.verdicts import floats

if TYPE_CHECKING:
    import pandas as pd

Mask = NDArray[np.bool_]
Floats = NDArray[np.float64]
Names = NDArray[np.object_]

HELD, CLEAN = "held", "clean"  # not broken; wrong before the attack
IDENTITY = "identity"  # what is no component: whether both cells are of the same thing
NEAR_TIE = 1e-3
ROUNDING = 1e-3  # of a margin or bits/dim, relative above 1; of a size, relative


@dataclass(frozen=True)
class Shift:
    """What changed in a group of samples; counts of samples unless said.

    Attributes:
        n: compared.
        lost: robust (of a perturbation: right on the attacked image) before and broken now.
        gained: the other way.
        near_ties: flips of either kind between two margins within `NEAR_TIE`, which do not count (one alone may be
            of an attack that stops at the boundary).
        unscored: score is NaN and was none before.
        handed: broken by another component.
        moved: went another way.
        up, down: of those, larger (smaller) margin or bits/dim.
        later, earlier: broken at a later (earlier) step.
        shift: median change of the changed margins.
        reference_size, size: largest perturbation before and now.
        reference_forwards, forwards, reference_backwards, backwards: model calls of the samples that hold in both runs.
        reference_step, step: median step of the samples broken in both; None without any.
    """

    n: int = 0
    lost: int = 0
    gained: int = 0
    near_ties: int = 0
    unscored: int = 0
    handed: int = 0
    moved: int = 0
    up: int = 0
    down: int = 0
    later: int = 0
    earlier: int = 0
    shift: float = 0.0
    reference_size: float = 0.0
    size: float = 0.0
    reference_forwards: int = 0
    forwards: int = 0
    reference_backwards: int = 0
    backwards: int = 0
    reference_step: float | None = None
    step: float | None = None


@dataclass(frozen=True)
class Pair:
    """Samples that two runs share: rows of `samples.COLUMNS`, equally long and in the same order, and the component
    [n] that each sample belongs to."""

    reference: "pd.DataFrame"
    measured: "pd.DataFrame"
    component: Names

    @classmethod
    def of(cls, cell: CellSamples, ours: CellSamples) -> "Pair":
        """The samples that both cells have."""
        shared = np.intersect1d(cell.rows["sample_id"], ours.rows["sample_id"])
        first, second = (select_rows(rows, shared) for rows in (cell.rows, ours.rows))
        if cell.identity.attack.semantics == "perturbation":
            name = cell.identity.components[0]
            first, second = _of_every_image(first, name), _of_every_image(second, name)
        return cls(first, second, _component(first, cell.identity.components))

    @classmethod
    def join(cls, parts: "Sequence[Pair]") -> "Pair":
        """The samples of several models together."""
        import pandas as pd

        return cls(
            pd.concat([part.reference for part in parts], ignore_index=True),
            pd.concat([part.measured for part in parts], ignore_index=True),
            np.concatenate([part.component for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.reference)

    def groups(self) -> "Iterator[tuple[str, Pair]]":
        """(component, its samples), in order of first appearance; samples wrong before the attack are in none."""
        for name in dict.fromkeys(self.component.tolist()):
            mask = self.component == name
            if name != CLEAN:
                yield name, Pair(self.reference[mask], self.measured[mask], self.component[mask])

    def inputs(self) -> list[str]:
        """What was different before the attack began: labels, or the model's margins (a flow's bits/dim)."""
        labels = int((floats(self.reference["label"]) != floats(self.measured["label"])).sum())
        before, now = floats(self.reference["before"]), floats(self.measured["before"])
        other = int((~same(before, now)).sum())
        gap = np.abs(difference(before, now)).max(initial=0.0)
        texts = [f"{labels} of {len(self)} labels differ"] if labels else []
        if other:
            texts.append(f"{other} of {len(self)} scores before the attack differ, by up to {gap:.3g}")
        return texts

    def shift(self) -> Shift:
        """What changed in these samples."""
        robust = _truth(self.reference), _truth(self.measured)
        held, broken = robust[0] & robust[1], ~robust[0] & ~robust[1]
        after = floats(self.reference["after"]), floats(self.measured["after"])
        step = floats(self.reference["step"]), floats(self.measured["step"])
        size = floats(self.reference["size"]), floats(self.measured["size"])
        tie = (robust[0] != robust[1]) & (np.maximum(np.abs(after[0]), np.abs(after[1])) < NEAR_TIE)
        flipped = (robust[0] != robust[1]) & ~tie
        handed = broken & (self.reference["broken_by"] != self.measured["broken_by"]).to_numpy(dtype=np.bool_)
        scored = ~same(*after)
        sized = np.abs(size[1] - size[0]) > ROUNDING * np.maximum(size[0], 1e-6)
        moved = flipped | handed | scored | sized | (broken & (step[0] != step[1]))
        change = difference(*after)[scored]
        return Shift(
            n=len(self),
            lost=int((flipped & robust[0]).sum()),
            gained=int((flipped & robust[1]).sum()),
            near_ties=int(tie.sum()),
            unscored=int((np.isnan(after[1]) & ~np.isnan(after[0])).sum()),
            handed=int(handed.sum()),
            moved=int(moved.sum()),
            up=int((change > 0).sum()),
            down=int((change < 0).sum()),
            later=int((broken & (step[1] > step[0])).sum()),
            earlier=int((broken & (step[1] < step[0])).sum()),
            shift=float(np.median(change)) if len(change) else 0.0,
            reference_size=float(size[0].max(initial=0.0)),
            size=float(size[1].max(initial=0.0)),
            reference_forwards=int(floats(self.reference["forwards"])[held].sum()),
            forwards=int(floats(self.measured["forwards"])[held].sum()),
            reference_backwards=int(floats(self.reference["backwards"])[held].sum()),
            backwards=int(floats(self.measured["backwards"])[held].sum()),
            reference_step=float(np.median(step[0][broken])) if broken.any() else None,
            step=float(np.median(step[1][broken])) if broken.any() else None,
        )


def select_rows(rows: "pd.DataFrame", ids: NDArray[np.int64]) -> "pd.DataFrame":
    """The rows of these samples, by sample id: those of two runs stand side by side."""
    return rows[rows["sample_id"].isin(ids)].sort_values("sample_id").reset_index(drop=True)


def _of_every_image(rows: "pd.DataFrame", name: str) -> "pd.DataFrame":
    """Rows of the perturbation `name` with the verdict on the attacked image alone, which counts also where the clean
    image is misclassified."""
    right = rows["after"] > 0
    return rows.assign(robust=right, broken_by=right.map({True: "", False: name}))


def _component(rows: "pd.DataFrame", components: Sequence[str]) -> Names:
    """Whom a sample belongs to: in an ensemble the component that broke it, `HELD` where none did; else the only
    component there is. `CLEAN` where it was wrong before."""
    broken_by = rows["broken_by"].to_numpy(dtype=np.object_)
    own: Names = np.full(len(rows), components[0] if len(components) == 1 else HELD, dtype=np.object_)
    named = np.isin(broken_by, [*components, CLEAN])
    own[named] = broken_by[named]
    return own


def _truth(rows: "pd.DataFrame") -> Mask:
    return np.asarray(rows["robust"], dtype=np.bool_)


def same(one: Floats, other: Floats) -> Mask:
    """Equal up to `ROUNDING`; two infinities of a sign, or two NaN, are the same."""
    finite = np.isfinite(one) & np.isfinite(other)
    with np.errstate(invalid="ignore"):
        near = np.abs(other - one) <= ROUNDING * np.maximum(1.0, np.abs(one))
    special = (one == other) | (np.isnan(one) & np.isnan(other))
    result: Mask = np.where(finite, near, special)
    return result


def difference(one: Floats, other: Floats) -> Floats:
    """other - one; 0 where that has no sign (NaN)."""
    with np.errstate(invalid="ignore"):
        result: Floats = np.nan_to_num(other - one, nan=0.0)
    return result
