"""The numbers of two runs side by side: every cell, and what the tables combine out of cells."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from robbench.compare.comparison import Comparison, Side
from robbench.compare.pairing import CellPair, Ids, PairedRuns
from robbench.compare.pairs import same
from robbench.metrics import all_metrics
from robbench.metrics.accuracy import NEAR_TIE, PERCENT
from robbench.metrics.likelihood import BITS, bits_metric
from robbench.metrics.verdicts import Floats, clean_correct, floats, right_under_attack, robust
from robbench.results import corruptions
from robbench.results.likelihood import role
from robbench.results.perturbation import distances
from robbench.results.rows import AVERAGE, CLEAN, WORST_CASE
from robbench.results.tables import ALL_THREATS
from robbench.results.threats import group_by_threat, name_threat
from robbench.specs import Measure
from robbench.statistics.accuracy import Verdicts, worst_case
from robbench.statistics.likelihood import bits_per_dim
from robbench.statistics.paired import mean_difference, paired, sign_test
from robbench.store.frechet_records import FrechetRecord

if TYPE_CHECKING:
    import pandas as pd

POINTS = 100.0


@dataclass(frozen=True)
class Numbers:
    """Makes comparisons out of pairs of cells; confidence: of every interval."""

    runs: PairedRuns
    confidence: float

    def all(self) -> list[Comparison]:
        """Model by model clean, cells, worst cases and average (of a flow: before the attack, cells); then Fréchet
        distances."""
        found: list[Comparison] = []
        for pairs in self.runs.models():
            found += self._classifier(pairs) if pairs[0].a.cell.decides else self._flow(pairs)
            found += [number for pair in pairs for number in _columns(pair)]
        return found + _frechet(self.runs)

    def _classifier(self, pairs: Sequence[CellPair]) -> list[Comparison]:
        found = self._clean(pairs) + [self._compare_attacked(pair) for pair in pairs]
        searched = [pair for pair in pairs if pair.a.cell.attack.space != corruptions.SPACE]
        strict = [p for p in searched if p.a.cell.attack.is_adversary and _alike(p)]
        worst = self._worst_cases(strict) if len(strict) > 1 else []
        return found + worst + ([self._average(searched)] if len(searched) > 1 else [])

    def _compare_attacked(self, pair: CellPair) -> Comparison:
        """By what tables show of the attack; where they show two kinds in the two runs, by robust accuracy, which is
        the same thing in both."""
        measure: Measure = pair.a.cell.attack.measure if _alike(pair) else "robust accuracy"
        notes = () if _alike(pair) else ("robust accuracy: the tables of one run show accuracy under attack",)
        blank = _blank(pair, "accuracy", PERCENT, measure=measure, notes=notes)
        if not pair.ok:
            return _one_sided(blank, pair, lambda rows: POINTS * float(_shown_verdicts(pair, rows).mean()))
        a, b = _shown_verdicts(pair, pair.rows_a), _shown_verdicts(pair, pair.rows_b)
        margins = np.maximum(*(np.abs(floats(rows["margin"])) for rows in (pair.rows_a, pair.rows_b)))
        ties = int(((a != b) & (margins < NEAR_TIE)).sum())
        return replace(self._verdicts(blank, a, b, pair.ids), near_ties=ties)

    def _clean(self, pairs: Sequence[CellPair]) -> list[Comparison]:
        for pair in pairs:
            if pair.ok:
                blank = _blank(
                    pair, "accuracy", PERCENT, attack=CLEAN, threat_model=CLEAN, measure="accuracy"
                )
                return [
                    self._verdicts(blank, clean_correct(pair.rows_a), clean_correct(pair.rows_b), pair.ids)
                ]
        return []

    def _worst_cases(self, pairs: Sequence[CellPair]) -> list[Comparison]:
        """Over all adversaries, and under each threat model with its budget that has several but not all of them."""
        groups = group_by_threat(pairs, lambda pair: pair.a.cell.attack).items()
        several = [(name_threat(threat), group) for threat, group in groups if 1 < len(group) < len(pairs)]
        return [self._worst_case(*part) for part in [*several, (ALL_THREATS, pairs)]]

    def _worst_case(self, threat_model: str, pairs: Sequence[CellPair]) -> Comparison:
        blank, done = _combine(pairs, WORST_CASE, threat_model, "worst_case_accuracy")
        blank = replace(blank, measure="robust accuracy")
        if not done:
            return blank
        ids = [pair.ids for pair in done]
        a, b = (worst_case(ids, [robust(rows) for rows in side]) for side in _sides(done))
        return self._verdicts(blank, a, b, ids[0])

    def _average(self, pairs: Sequence[CellPair]) -> Comparison:
        """The unweighted mean over clean and all attacks, a number a sample."""
        blank, done = _combine(pairs, AVERAGE, ALL_THREATS, "average_accuracy")
        if not done:
            return blank
        a, b = (
            _shares(
                [clean_correct(side[0]), *(_shown_verdicts(*part) for part in zip(done, side, strict=True))]
            )
            for side in _sides(done)
        )
        return self._scores(blank, a, b, a != b, done[0].ids)

    def _flow(self, pairs: Sequence[CellPair]) -> list[Comparison]:
        return self._before(pairs) + [self._likelihood(pair) for pair in pairs]

    def _likelihood(self, pair: CellPair) -> Comparison:
        lowered = role(pair.a.cell.attack) == "out"  # of noise: the attack wants it likely
        blank = _blank(pair, bits_metric(pair.a.cell.attack), BITS, lower_is_better=not lowered)
        if not pair.ok:
            return _one_sided(blank, pair, lambda rows: bits_per_dim(floats(rows["nll_after"])).mean)
        return self._bits(blank, pair, "nll_after")

    def _before(self, pairs: Sequence[CellPair]) -> list[Comparison]:
        """Bits/dim of the test images."""
        for pair in pairs:
            if pair.ok and role(pair.a.cell.attack) != "out":
                metric, clean = (
                    f"{bits_metric(pair.a.cell.attack)}_before",
                    {"attack": CLEAN, "threat_model": CLEAN},
                )
                return [
                    self._bits(_blank(pair, metric, BITS, lower_is_better=True, **clean), pair, "nll_before")
                ]
        return []

    def _bits(self, blank: Comparison, pair: CellPair, column: str) -> Comparison:
        a, b = floats(pair.rows_a[column]), floats(pair.rows_b[column])
        return self._scores(blank, a, b, ~same(a, b), pair.ids)

    def _verdicts(self, blank: Comparison, a: Verdicts, b: Verdicts, ids: Ids) -> Comparison:
        values = POINTS * float(a.mean()), POINTS * float(b.mean())
        return _count_moves(blank, values, a & ~b, b & ~a, ids).with_interval(
            paired(a, b).difference(self.confidence)
        )

    def _scores(self, blank: Comparison, a: Floats, b: Floats, moved: Verdicts, ids: Ids) -> Comparison:
        """Of a number a sample: the mean difference, and which of the `moved` samples went up and down."""
        lost = np.isnan(b) & ~np.isnan(a)
        up, down = moved & (b > a), moved & (b < a)
        fell, rose = (up | lost, down) if blank.lower_is_better else (down | lost, up)
        found, finite = mean_difference(a, b, self.confidence), np.isfinite(a) & np.isfinite(b)
        if found.n_finite < found.n:
            note = f"mean over {found.n_finite} of {found.n} samples: the others are not finite"
            blank = replace(blank, notes=(*blank.notes, note))
        values = [float(side[finite].mean()) if finite.any() else None for side in (a, b)]
        return _count_moves(blank, values, fell, rose, ids).with_interval(found)


def _count_moves(
    blank: Comparison, values: Sequence[float | None], fell: Verdicts, rose: Verdicts, ids: Ids
) -> Comparison:
    """The comparison with both values, and the samples that became worse and better."""
    return replace(
        blank,
        a=Side("ok", values[0]),
        b=Side("ok", values[1]),
        n=len(ids),
        p=sign_test(int(fell.sum()), int(rose.sum())),
        fell=tuple(ids[fell].tolist()),
        rose=tuple(ids[rose].tolist()),
    )


def _alike(pair: CellPair) -> bool:
    """Whether the attack has the same semantics in both runs."""
    return pair.a.cell.attack.semantics == pair.b.cell.attack.semantics


def _shown_verdicts(pair: CellPair, rows: "pd.DataFrame") -> Verdicts:
    """The verdicts of a pair's rows that count in `Numbers._compare_attacked`."""
    perturbed = pair.a.cell.attack.semantics == "perturbation" and _alike(pair)
    return right_under_attack(rows) if perturbed else robust(rows)


def _blank(pair: CellPair, metric: str, unit: str, **changes: Any) -> Comparison:
    a, b = (Side(status, note=note) for status, note in (pair.status_a, pair.status_b))
    threat_model = pair.a.cell.attack.threat_model
    blank = Comparison(pair.model, pair.label, metric, a, b, threat_model=threat_model, unit=unit)
    return replace(blank, **changes)


def _one_sided(
    blank: Comparison, pair: CellPair, value: "Callable[[pd.DataFrame], float | None]"
) -> Comparison:
    """The number of the run that has one."""
    sides = [
        Side(status, value(rows) if status == "ok" else None, note)
        for (status, note), rows in ((pair.status_a, pair.rows_a), (pair.status_b, pair.rows_b))
    ]
    return replace(blank, a=sides[0], b=sides[1])


def _combine(
    pairs: Sequence[CellPair], attack: str, threat_model: str, metric: str
) -> tuple[Comparison, list[CellPair]]:
    """A number that combines the attacks that are whole in both runs, and these; without any it is not run."""
    done, others = [p for p in pairs if p.ok], [p.label for p in pairs if not p.ok]
    side = Side("ok") if done else Side("not run", note="no attack is whole in both runs")
    blank = Comparison(
        pairs[0].model,
        attack,
        metric,
        side,
        side,
        threat_model=threat_model,
        unit=PERCENT,
        combined=tuple(pair.label for pair in done),
        notes=(f"without {', '.join(others)}, not whole in both runs",) if others else (),
    )
    return blank, done


def _sides(pairs: Sequence[CellPair]) -> "tuple[list[pd.DataFrame], list[pd.DataFrame]]":
    return [pair.rows_a for pair in pairs], [pair.rows_b for pair in pairs]


def _shares(columns: Sequence[Verdicts]) -> Floats:
    """Percentage of the columns that hold, a sample."""
    held: Floats = POINTS * np.stack(columns).mean(axis=0, dtype=np.float64)
    return held


def _columns(pair: CellPair) -> list[Comparison]:
    """The numbers that metrics show in columns of their own, over the samples of both runs; they are not judged."""
    found = []
    for metric in all_metrics() if pair.ok else ():
        if not (metric.part and metric.compared) or metric.compute is None or not metric.fits(pair.a.cell):
            continue
        sides = [replace(pair.a, rows=pair.rows_a), replace(pair.b, rows=pair.rows_b)]
        values = [number.value if number else None for number in map(metric.compute, sides)]
        if values[0] is not None and values[1] is not None:
            blank = _blank(
                pair, metric.name, metric.unit, n=len(pair.ids), lower_is_better=metric.better == "lower"
            )
            found.append(_subtract(blank, Side("ok", values[0]), Side("ok", values[1])))
    return found


def _subtract(blank: Comparison, a: Side, b: Side) -> Comparison:
    """A number without samples to pair."""
    difference = None if a.value is None or b.value is None else b.value - a.value
    return replace(blank, a=a, b=b, difference=difference)


def _frechet(runs: PairedRuns) -> list[Comparison]:
    """Fréchet distances that both runs have, of the same features; they have no interval and are not judged."""
    ours, theirs = distances(runs.a), {_frechet_key(record): record for record in distances(runs.b).records}
    kept = {(pair.model, pair.label) for pair in runs.cells} | {(None, CLEAN)}
    return [
        _frechet_number(ours.label(record), record, theirs[_frechet_key(record)])
        for record in ours.records
        if _frechet_key(record) in theirs and (record.model, record.attack) in kept
    ]


def _frechet_key(record: FrechetRecord) -> tuple[str | None, str, str]:
    return record.model, record.attack, record.extractor_hash


def _frechet_number(label: str, a: FrechetRecord, b: FrechetRecord) -> Comparison:
    other = a.samples_sha256 != b.samples_sha256 or a.n != b.n
    notes = (f"of {a.n} and {b.n} images that are not the same samples",) if other else ()
    blank = Comparison(
        a.model or "", a.attack, label, unit="distance", n=min(a.n, b.n), lower_is_better=True, notes=notes
    )
    return _subtract(blank, Side(a.status, a.value, a.reason), Side(b.status, b.value, b.reason))
