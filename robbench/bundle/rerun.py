"""A random share of the cells attacked again from their seeds, and compared with the bundle's rows per sample.

`compare.paired` decides: rounding may flip a few verdicts, a different attack or model flips many.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa
import torch

from robbench.attacks import ATTACKS
from robbench.bundle.findings import WHOLE, Finding, judge
from robbench.bundle.subjects import Subjects
from robbench.compare.paired import RULES, Rules, compare_samples, largest_count
from robbench.compare.pairs import NEAR_TIE, Pair, Shift, same
from robbench.compare.samples import CellSamples, Samples, of_run
from robbench.core.errors import UserError
from robbench.core.precision import check_precision, read_record, withdrawal
from robbench.data import Dataset
from robbench.data.corruptions import located
from robbench.models.entry import ZooEntry
from robbench.models.flows.base import FrozenFlow
from robbench.run.cells import SHARD_SIZE, Cell, CellBuilder
from robbench.run.shard_work import CleanLikelihood, ShardFailure, ShardWork
from robbench.specs import ResolvedAttack
from robbench.store.records import CellResult, Run

CHECK = "re-run"
FLIP_RATE = 0.005  # share of verdicts that another processor may flip, see `compare.paired.Rules`


@dataclass(frozen=True)
class RerunChoice:
    """share: of the cells that can be run again, rounded up. samples: per cell, None for all. seed: of the choice,
    drawn by the verifier, so that the bundle's author cannot know it. flip_rate: see `compare.paired.Rules`."""

    share: float
    samples: int | None
    seed: int
    flip_rate: float = FLIP_RATE

    @property
    def rules(self) -> Rules:
        """The default rules with this flip rate."""
        return replace(RULES["default"], flip_rate=self.flip_rate)

    def cells(self, runnable: Sequence[CellResult]) -> list[CellResult]:
        """The cells to run again, in plan order."""
        count = min(len(runnable), math.ceil(self.share * len(runnable)))
        chosen = random.Random(f"{self.seed} cells").sample(range(len(runnable)), count)
        return [runnable[number] for number in sorted(chosen)]

    def ids(self, run: Run, result: CellResult) -> tuple[int, ...]:
        """Samples of a cell to run again, in the order drawn; whole blocks where results depend on the batch."""
        ids, rng = run.sample_ids, random.Random(f"{self.seed} {result.cell.hash}")
        if self.samples is None or self.samples >= len(ids):
            return ids
        if not _batch_dependent(result):
            return tuple(ids[place] for place in sorted(rng.sample(range(len(ids)), self.samples)))
        blocks = [ids[start : start + SHARD_SIZE] for start in range(0, len(ids), SHARD_SIZE)]
        count = math.ceil(self.samples / SHARD_SIZE)
        places = sorted(rng.sample(range(len(blocks)), min(count, len(blocks))))
        return tuple(i for place in places for i in blocks[place])


def _batch_dependent(result: CellResult) -> bool:
    return ATTACKS.get(result.cell.attack.algorithm).batch_dependent


@dataclass(frozen=True)
class Reruns:
    """Runs cells again with the verifier's models and data.

    Attributes:
        run: the bundle's run.
        subjects: the verifier's models.
        flows: returns a flow by the sha256 of its weights; None if unavailable.
        dataset: the verifier's data set.
        device: of models and flows.
        batch_size: images per batch.
    """

    run: Run
    subjects: Subjects
    flows: Callable[[str], FrozenFlow | None]
    dataset: Dataset
    device: torch.device
    batch_size: int

    def runnable(self) -> list[CellResult]:
        """Complete cells whose model, and flow if any, is available, and whose search precision still exists."""
        return [
            result
            for result in self.run.cells
            if result.cell.status == "ok"
            and not withdrawal(result.cell.search_precision)
            and result.cell.model in self.subjects.models
            and all(
                reference is None or self.flows(reference.sha256) is not None
                for reference in (result.cell.attack_flow, result.cell.nll_flow)
            )
        ]

    def findings(self, choice: RerunChoice, say: Callable[[str], None]) -> Iterator[Finding]:
        """A finding per cell that was run again or cannot be, then one over all that were run again, which detects
        differences that are too small within one cell."""
        yield from self._withdrawn_findings()
        pairs = []
        for result in choice.cells(self.runnable()):
            say(f"Re-running {result.cell.model} x {result.cell.attack.label}")
            finding, pair = self._rerun(result, choice)
            yield finding
            if pair is not None:
                pairs.append(pair)
        if pairs:
            whole = _judge_together(pairs, choice.rules)
            if len(pairs) > 1 or whole.verdict == "unchecked":
                yield whole

    def _withdrawn_findings(self) -> Iterator[Finding]:
        """A finding for every cell with a withdrawn precision, so that a bundle cannot evade re-runs by claiming
        one."""
        for result in self.run.cells:
            if result.cell.status == "ok" and (why := withdrawal(result.cell.search_precision)):
                reason = f"cannot be run again: {why}"
                yield Finding(result.cell.model, result.cell.attack.label, CHECK, "unchecked", 0, reason)

    def _rerun(self, result: CellResult, choice: RerunChoice) -> tuple[Finding, Pair | None]:
        cell, ids = result.cell, choice.ids(self.run, result)
        try:
            built = self._build_cell(result, ids)
        except UserError as error:
            return Finding(cell.model, cell.attack.label, CHECK, "unchecked", 0, f"not re-run: {error}"), None
        rows = self._rows(built, result, ids)
        if isinstance(rows, ShardFailure):
            reason = f"not re-run: the attack failed here ({rows.error})"
            return Finding(cell.model, cell.attack.label, CHECK, "unchecked", 0, reason), None
        return self._compare(result, rows, built, choice.rules)

    def _build_cell(self, result: CellResult, ids: Sequence[int]) -> Cell:
        cell, entry = result.cell, self._flow_entry(result)
        precision, compiled = read_record(cell.search_precision)
        check_precision(precision)
        builder = CellBuilder(
            seed=self.run.seed,
            batch_size=cell.batch_size or self.batch_size,
            likelihood_dtype=torch.float64 if cell.precision == "fp64" else torch.float32,
            compiled=compiled,
            dataset=self.dataset,
            samples=tuple(ids),
            device=self.device,
            flow=self._flow(result),
            flow_card=entry.card if entry else None,
        )
        attack = located([cell.attack], self.dataset)[0]
        if (surrogate := self._surrogate(attack)) is not None:
            builder = replace(builder, surrogate=builder.try_surrogate(surrogate))
        return next(builder.cells([self.subjects.models[cell.model]], [attack]))

    def _surrogate(self, attack: ResolvedAttack) -> ZooEntry | None:
        """The verifier's model that a transfer attack searches: of the bundle's models or those the user named."""
        wanted = attack.parameters.get("function")
        entries = (*self.subjects.models.values(), *self.subjects.given.values())
        return next((e for e in entries if wanted and e.card.function_hash == wanted), None)

    def _flow_entry(self, result: CellResult) -> ZooEntry | None:
        reference = result.cell.nll_flow or result.cell.attack_flow
        return self.subjects.flows[reference.sha256] if reference is not None else None

    def _flow(self, result: CellResult) -> FrozenFlow | None:
        entry = self._flow_entry(result)
        return self.flows(entry.card.weights.sha256) if entry else None

    def _rows(self, built: Cell, result: CellResult, ids: Sequence[int]) -> pd.DataFrame | ShardFailure:
        batch_size = result.cell.batch_size or self.batch_size
        work = ShardWork(
            split=self.dataset.test,
            seed=self.run.seed,
            device=self.device,
            batch_size=batch_size,
            compiled=read_record(result.cell.search_precision)[1],
            kept=frozenset(),
            likelihood=CleanLikelihood(self._flow(result), self.device, self.run.seed, batch_size),
        )
        tables = []
        for start in range(0, len(ids), SHARD_SIZE):
            done = work.shard(built, ids[start : start + SHARD_SIZE])
            if isinstance(done, ShardFailure):
                return done
            tables.append(done.table)
        frame: pd.DataFrame = pa.concat_tables(tables).to_pandas()
        return frame

    def _compare(
        self, result: CellResult, rows: pd.DataFrame, built: Cell, rules: Rules
    ) -> tuple[Finding, Pair]:
        cell = result.cell
        if built.record.attack.semantics != cell.attack.semantics:
            rows = _without_misclassified(result, rows)
        stored = result.rows[result.rows["sample_id"].isin(rows["sample_id"])]
        reference, measured = (
            self._samples(result, part) for part in (stored, rows.sort_values("sample_id"))
        )
        problems = [
            item.reason for item in compare_samples(reference, measured, rules=rules) if item.regression
        ]
        problems += _likelihood_problems(stored, rows, rules)
        if problems and built.record.engine != cell.engine:
            problems.append(f"the bundle's engine is {cell.engine!r}, here it is {built.record.engine!r}")
        pair = Pair.of(_single_cell(reference), _single_cell(measured))
        shift = pair.shift()
        finding = judge(cell.model, cell.attack.label, CHECK, len(rows), problems, shift.near_ties)
        flips, excess = shift.lost + shift.gained, _excess_ties(shift, rules)
        if not problems and excess:
            return replace(finding, verdict="unchecked", reason=excess), pair
        if not problems and (flips or shift.moved):
            reason = f"{flips} flips, {shift.moved} searches went another way; rounding may do that"
            finding = replace(finding, reason=reason)
        return finding, pair

    def _samples(self, result: CellResult, rows: pd.DataFrame) -> Samples:
        """The samples of a run with these rows only."""
        return of_run(replace(self.run, n=len(rows), cells=[CellResult(result.cell, rows)]))


def _without_misclassified(result: CellResult, rows: pd.DataFrame) -> pd.DataFrame:
    """Re-run rows of a perturbation, without the misclassified images that an older version did not perturb."""
    right = result.rows["sample_id"][result.rows["clean_margin"] > 0]
    return rows[rows["sample_id"].isin(right)]


def _single_cell(samples: Samples) -> CellSamples:
    return next(iter(samples.cells.values()))


def _likelihood_problems(stored: pd.DataFrame, rows: pd.DataFrame, rules: Rules) -> list[str]:
    """Problems of the bits/dim and detector scores of a classifier's images, which the paired comparison does not
    cover."""
    if "margin" not in rows:
        return []
    first, second = (part.sort_values("sample_id") for part in (stored, rows))
    problems = []
    moved = rules.moved_rate or 0.0
    rates = {"nll_before": 0.0, "nll_after": moved, "clean_score": 0.0, "noisy_score": 0.0, "score": moved}
    for column, rate in ((name, rate) for name, rate in rates.items() if name in rows):
        other = ~same(*(part[column].to_numpy(dtype=np.float64) for part in (first, second)))
        if other.sum() > largest_count(len(rows), rate, rules.alpha):
            problems.append(f"{int(other.sum())} of {len(rows)} values of {column} are others")
    return problems


def _judge_together(pairs: Sequence[Pair], rules: Rules) -> Finding:
    """The finding on flips over all cells that were run again."""
    shift = Pair.join(pairs).shift()
    flips, rate = shift.lost + shift.gained, rules.flip_rate or 0.0
    allowed = largest_count(shift.n, rate, rules.alpha)
    text = (
        f"{flips} of {shift.n} verdicts flipped ({shift.lost} broken now, {shift.gained} robust now), "
        f"{allowed} are allowed"
    )
    finding = judge(WHOLE, "", CHECK, shift.n, [text] if flips > allowed else [], shift.near_ties)
    if flips > allowed:
        return finding
    if allowed >= shift.n:
        text = f"{shift.n} samples in all are too few to judge flips by: {allowed} are allowed; run more of them again"
    elif not (excess := _excess_ties(shift, rules)):
        return replace(finding, reason=text)
    else:
        text = excess
    return replace(finding, verdict="unchecked", reason=text)


def _excess_ties(shift: Shift, rules: Rules) -> str:
    """A reason where more flips are near ties than rounding explains; else ""."""
    allowed = max(1, largest_count(shift.n, rules.flip_rate or 0.0, rules.alpha))
    if shift.near_ties <= allowed:
        return ""
    return (
        f"{shift.near_ties} of {shift.n} verdicts flipped between margins below {NEAR_TIE:g}, which is more than "
        f"rounding turns: logits this small decide nothing"
    )
