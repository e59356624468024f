"""The numbers of two runs side by side: every cell, and what the tables combine out of cells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from robbench.compare.changes import Change, Side
from robbench.compare.pairing import CellPair, Ids, PairedRuns
from robbench.compare.pairs import same
from robbench.metrics import all_metrics
from robbench.metrics.accuracy import NEAR_TIE
from robbench.metrics.likelihood import BITS, bits_metric
from robbench.metrics.verdicts import Floats, clean_correct, floats, right_under_attack, robust
from robbench.results import corruptions
from robbench.results.likelihood import role
from robbench.results.pairs import threat_key
from robbench.results.perturbation import distances
from robbench.results.rows import AVERAGE, CLEAN, WORST_CASE
from robbench.results.tables import ALL_THREATS
from robbench.specs import Measure, Semantics
from robbench.statistics.accuracy import Verdicts, worst_case
from robbench.statistics.likelihood import bits_per_dim
from robbench.statistics.paired import mean_difference, paired, sign_test
from robbench.store.frechet_records import FrechetRecord

if TYPE_CHECKING:
    import pandas as pd

PERCENT = "%"
POINTS = 100.0


@dataclass(frozen=True)
class Numbers:
    """Makes changes out of pairs of cells; confidence: of every interval."""

    runs: PairedRuns
    confidence: float

    def all(self) -> list[Change]:
        """Model by model clean, cells, worst cases and average (of a flow: before the attack, cells); then Fréchet
        distances."""
        found: list[Change] = []
        for pairs in self.runs.models():
            target = pairs[0].a.cell.attack.target
            found += self._classifier(pairs) if target == "classifier" else self._flow(pairs)
            found += [change for pair in pairs for change in _columns(pair)]
        return found + _frechet(self.runs)

    # ------------------------------------------------------------------------------------------- classifiers
    def _classifier(self, pairs: Sequence[CellPair]) -> list[Change]:
        changes = self._clean(pairs) + [self._attacked(pair) for pair in pairs]
        searched = [pair for pair in pairs if pair.a.cell.attack.space != corruptions.SPACE]
        strict = [pair for pair in searched if _semantics(pair) == "worst-case" and _alike(pair)]
        worst = self._worst_cases(strict) if len(strict) > 1 else []
        return changes + worst + (self._average(searched) if len(searched) > 1 else [])

    def _attacked(self, pair: CellPair) -> Change:
        """By what tables show of the attack; where they show two kinds in the two runs, by robust accuracy, which is
        the same thing in both."""
        measure: Measure = pair.a.cell.attack.measure if _alike(pair) else "robust accuracy"
        notes = () if _alike(pair) else ("robust accuracy: the tables of one run show accuracy under attack",)
        blank = replace(_blank(pair, "accuracy", PERCENT), measure=measure, notes=notes)
        if not pair.ok:
            return _one_sided(blank, pair, lambda rows: POINTS * float(_shown(pair, rows).mean()))
        margins = floats(pair.rows_a["margin"]), floats(pair.rows_b["margin"])
        a, b = _shown(pair, pair.rows_a), _shown(pair, pair.rows_b)
        return replace(self._verdicts(blank, a, b, pair.ids), near_ties=_near_ties(*margins, a != b))

    def _clean(self, pairs: Sequence[CellPair]) -> list[Change]:
        for pair in pairs:
            if pair.ok:
                blank = replace(
                    _blank(pair, "accuracy", PERCENT), attack=CLEAN, threat_model=CLEAN, measure="accuracy"
                )
                rows = pair.rows_a, pair.rows_b
                return [self._verdicts(blank, clean_correct(rows[0]), clean_correct(rows[1]), pair.ids)]
        return []

    def _worst_cases(self, pairs: Sequence[CellPair]) -> list[Change]:
        """Over all adversaries, and under each threat model with its budget that has several but not all of them."""
        groups: dict[str, list[CellPair]] = {}
        for pair in pairs:
            groups.setdefault(threat_key(pair.a.cell.attack), []).append(pair)
        several = [(name, group) for name, group in groups.items() if 1 < len(group) < len(pairs)]
        return [self._worst_case(*part) for part in [*several, (ALL_THREATS, pairs)]]

    def _worst_case(self, threat_model: str, pairs: Sequence[CellPair]) -> Change:
        blank = replace(
            _combined(pairs, WORST_CASE, threat_model, "worst_case_accuracy"), measure="robust accuracy"
        )
        done = [pair for pair in pairs if pair.ok]
        if not done:
            return blank
        ids = [pair.ids for pair in done]
        held = [
            worst_case(ids, [robust(rows) for rows in side])
            for side in ([pair.rows_a for pair in done], [pair.rows_b for pair in done])
        ]
        return self._verdicts(blank, held[0], held[1], done[0].ids)

    def _average(self, pairs: Sequence[CellPair]) -> list[Change]:
        """The unweighted mean over clean and all attacks, a number a sample."""
        blank = _combined(pairs, AVERAGE, ALL_THREATS, "average_accuracy")
        done = [pair for pair in pairs if pair.ok]
        if not done:
            return [blank]
        sides = ([pair.rows_a for pair in done], [pair.rows_b for pair in done])
        before, after = (
            _shares(
                [clean_correct(side[0]), *(_shown(pair, rows) for pair, rows in zip(done, side, strict=True))]
            )
            for side in sides
        )
        return [self._scores(blank, before, after, before != after, done[0].ids)]

    def _verdicts(self, blank: Change, a: Verdicts, b: Verdicts, ids: Ids) -> Change:
        counts = paired(a, b)
        filled = replace(
            blank,
            a=replace(blank.a, status="ok", value=POINTS * float(a.mean())),
            b=replace(blank.b, status="ok", value=POINTS * float(b.mean())),
            n=counts.n,
            p=counts.p,
            fell=_listed(ids, a & ~b),
            rose=_listed(ids, b & ~a),
        )
        return filled.with_interval(counts.difference(self.confidence))

    # ------------------------------------------------------------------------------------------------- flows
    def _flow(self, pairs: Sequence[CellPair]) -> list[Change]:
        return self._before(pairs) + [self._likelihood(pair) for pair in pairs]

    def _likelihood(self, pair: CellPair) -> Change:
        blank = _blank(pair, bits_metric(pair.a.cell.attack), BITS)
        if not pair.ok:
            return _one_sided(blank, pair, lambda rows: bits_per_dim(floats(rows["nll_after"])).mean)
        lowered = role(pair.a.cell.attack) == "out"  # of noise: the attack wants it likely
        after = floats(pair.rows_a["nll_after"]), floats(pair.rows_b["nll_after"])
        return self._scores(replace(blank, lower_is_better=not lowered), *after, ~same(*after), pair.ids)

    def _before(self, pairs: Sequence[CellPair]) -> list[Change]:
        """Bits/dim of the test images."""
        for pair in pairs:
            if pair.ok and role(pair.a.cell.attack) != "out":
                blank = replace(
                    _blank(pair, f"{bits_metric(pair.a.cell.attack)}_before", BITS),
                    attack=CLEAN,
                    threat_model=CLEAN,
                    lower_is_better=True,
                )
                before = floats(pair.rows_a["nll_before"]), floats(pair.rows_b["nll_before"])
                return [self._scores(blank, *before, ~same(*before), pair.ids)]
        return []

    def _scores(self, blank: Change, a: Floats, b: Floats, moved: Verdicts, ids: Ids) -> Change:
        """Of a number a sample: the mean difference, and which of the `moved` samples went up and down."""
        lost = np.isnan(b) & ~np.isnan(a)
        up, down = moved & (b > a), moved & (b < a)
        fell, rose = (up | lost, down) if blank.lower_is_better else (down | lost, up)
        found = mean_difference(a, b, self.confidence)
        left_out = found.n - found.n_finite
        finite = np.isfinite(a) & np.isfinite(b)
        values = [float(side[finite].mean()) if finite.any() else None for side in (a, b)]
        notes = (
            [f"mean over {found.n_finite} of {found.n} samples: the others are not finite"]
            if left_out
            else []
        )
        filled = replace(
            blank,
            a=replace(blank.a, status="ok", value=values[0]),
            b=replace(blank.b, status="ok", value=values[1]),
            n=found.n,
            p=sign_test(int(fell.sum()), int(rose.sum())),
            fell=_listed(ids, fell),
            rose=_listed(ids, rose),
            notes=(*blank.notes, *notes),
        )
        return filled.with_interval(found)


def _semantics(pair: CellPair) -> Semantics:
    return pair.a.cell.attack.semantics


def _alike(pair: CellPair) -> bool:
    """Whether the attack has the same semantics in both runs."""
    return _semantics(pair) == pair.b.cell.attack.semantics


def _shown(pair: CellPair, rows: "pd.DataFrame") -> Verdicts:
    """The verdicts of a pair's rows that count in `Numbers._attacked`."""
    perturbed = _semantics(pair) == "perturbation" and _alike(pair)
    return right_under_attack(rows) if perturbed else robust(rows)


def _blank(pair: CellPair, metric: str, unit: str) -> Change:
    attack = pair.a.cell.attack
    return Change(
        model=pair.model,
        attack=pair.label,
        threat_model=attack.threat_model,
        metric=metric,
        unit=unit,
        a=_side(pair.status_a),
        b=_side(pair.status_b),
    )


def _one_sided(blank: Change, pair: CellPair, value: "Callable[[pd.DataFrame], float | None]") -> Change:
    """The number of the run that has one."""
    sides = [
        replace(side, value=value(rows)) if side.status == "ok" else side
        for side, rows in ((blank.a, pair.rows_a), (blank.b, pair.rows_b))
    ]
    return replace(blank, a=sides[0], b=sides[1])


def _side(status: tuple[str, str]) -> Side:
    state, note = status
    return Side("failed" if state == "failed" else "ok" if state == "ok" else "not run", note=note)


def _combined(pairs: Sequence[CellPair], attack: str, threat_model: str, metric: str) -> Change:
    """A number that combines the attacks that are whole in both runs; without any it is not run in either."""
    whole, others = [p.label for p in pairs if p.ok], [p.label for p in pairs if not p.ok]
    notes = (f"without {', '.join(others)}, not whole in both runs",) if others else ()
    absent = Side("not run", note="no attack is whole in both runs")
    return Change(
        model=pairs[0].model,
        attack=attack,
        threat_model=threat_model,
        metric=metric,
        unit=PERCENT,
        a=absent if not whole else Side("ok"),
        b=absent if not whole else Side("ok"),
        combined=tuple(whole),
        notes=notes,
    )


def _shares(columns: Sequence[Verdicts]) -> Floats:
    """Percentage of the columns that hold, a sample."""
    held: Floats = POINTS * np.stack(columns).mean(axis=0, dtype=np.float64)
    return held


def _listed(ids: Ids, mask: Verdicts) -> tuple[int, ...]:
    return tuple(int(i) for i in ids[mask])


def _near_ties(a: Floats, b: Floats, flipped: Verdicts) -> int:
    return int((flipped & (np.maximum(np.abs(a), np.abs(b)) < NEAR_TIE)).sum())


def _columns(pair: CellPair) -> list[Change]:
    """The numbers that metrics show in columns of their own, over the samples of both runs; they are not judged."""
    if not pair.ok:
        return []
    changes = []
    for metric in all_metrics():
        if not (metric.part and metric.compared) or metric.compute is None or not metric.fits(pair.a.cell):
            continue
        sides = [replace(pair.a, rows=pair.rows_a), replace(pair.b, rows=pair.rows_b)]
        a, b = (metric.compute(side) for side in sides)
        if a is None or b is None or a.value is None or b.value is None:
            continue
        change = replace(
            _blank(pair, metric.name, metric.unit),
            n=len(pair.rows_a),
            lower_is_better=metric.better == "lower",
        )
        sided = replace(change, a=Side("ok", a.value), b=Side("ok", b.value), difference=b.value - a.value)
        changes.append(sided)
    return changes


# --------------------------------------------------------------------------------------------------- Fréchet
def _frechet(runs: PairedRuns) -> list[Change]:
    """Fréchet distances that both runs have, of the same features; they have no interval and are not judged."""
    ours, theirs = distances(runs.a), distances(runs.b)
    found = {_frechet_key(record): record for record in theirs.records}
    kept = {(pair.model, pair.label) for pair in runs.cells} | {(None, CLEAN)}
    return [
        _frechet_change(ours.label(record), record, found[_frechet_key(record)])
        for record in ours.records
        if _frechet_key(record) in found and (record.model, record.attack) in kept
    ]


def _frechet_key(record: FrechetRecord) -> tuple[str | None, str, str]:
    return record.model, record.attack, record.extractor_hash


def _frechet_change(label: str, a: FrechetRecord, b: FrechetRecord) -> Change:
    other = a.samples_sha256 != b.samples_sha256 or a.n != b.n
    both = a.value is not None and b.value is not None
    return Change(
        model=a.model or "",
        attack=a.attack,
        threat_model="",
        metric=label,
        unit="distance",
        a=Side(a.status, a.value, a.reason),
        b=Side(b.status, b.value, b.reason),
        n=min(a.n, b.n),
        difference=b.value - a.value if both and a.value is not None and b.value is not None else None,
        lower_is_better=True,
        notes=(f"of {a.n} and {b.n} images that are not the same samples",) if other else (),
    )
