"""The local executor: runs what the ledger does not have yet, in process, cell after cell."""

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from robbench.attacks import LikelihoodOutcome, Outcome, Victim
from robbench.attacks.victim import full_precision
from robbench.errors import AttackViolation, UserError
from robbench.matrix.cells import Cell, ClassifierCell, FlowCell
from robbench.matrix.ledger import LEDGER_SCHEMA, LIKELIHOOD_SCHEMA, Ledger
from robbench.matrix.plan import Plan
from robbench.matrix.progress import RunProgress
from robbench.matrix.records import CellRecord, Status
from robbench.metrics.likelihood import bits_per_dim
from robbench.models.flows.base import FrozenFlow
from robbench.specs import ModelKind

VALUE: dict[ModelKind, str] = {"classifier": "robust", "flow": "nll_after"}  # column that progress shows


def execute(plan: Plan, ledger: Ledger, progress: RunProgress) -> list[CellRecord]:
    """Complete every cell of `plan` in `ledger`; returns their records in plan order.

    A failing attack fails its cell and nothing else. Interrupt it at any moment: finished shards stay.
    """
    ledger.write_run(plan.run, plan.cards, [cell.record for cell in plan.cells])
    _keep_originals(plan, ledger, progress)
    likelihood = _Likelihood(plan.nll_flow, plan.device, plan.run.seed, plan.batch_size)
    executor = _Executor(plan, ledger, progress, likelihood)
    with full_precision():
        return [executor.run(number, cell) for number, cell in enumerate(plan.cells)]


def _keep_originals(plan: Plan, ledger: Ledger, progress: RunProgress) -> None:
    """The clean images beside the adversarial ones that are kept, so that a report needs no data set."""
    kept = plan.samples[: plan.keep_examples]
    images, _ = plan.dataset.test.by_ids(kept)

    def restore(path: Path, reason: str) -> None:
        moved = ledger.quarantine(path)
        progress.message(f"Quarantined: {path} {reason}; moved to {moved}, written again from the data set")

    ledger.add_originals(dict(zip(kept, images.numpy(), strict=True)), restore)


@dataclass
class _Likelihood:
    """Bits/dim under the run's flow; clean images are scored once a run, not once a cell."""

    flow: FrozenFlow | None
    device: torch.device
    seed: int
    batch_size: int
    _clean: dict[int, float] = field(default_factory=dict)

    def clean(self, ids: list[int], x: Tensor, y: Tensor) -> list[float | None]:
        """Bits/dim of clean images x [n,C,H,W], labels y [n]; None each without a flow."""
        if self.flow is None:
            return [None] * len(ids)
        missing = [row for row, i in enumerate(ids) if i not in self._clean]
        names = [ids[row] for row in missing]
        self._clean.update(zip(names, self._scores(self.flow, names, x[missing], y[missing]), strict=True))
        return [self._clean[i] for i in ids]

    def adversarial(self, ids: list[int], x: Tensor, y: Tensor) -> list[float | None]:
        """Bits/dim of adversarial images; the dequantisation noise of a sample is that of its clean image."""
        return [None] * len(ids) if self.flow is None else list(self._scores(self.flow, ids, x, y))

    def _scores(self, flow: FrozenFlow, ids: list[int], x: Tensor, y: Tensor) -> list[float]:
        scores: list[float] = []
        with torch.no_grad():
            for start in range(0, len(ids), self.batch_size):
                part = slice(start, start + self.batch_size)
                images, labels = x[part].to(self.device), y[part].to(self.device)
                bits = flow.bits_per_dim(images, labels, seed=self.seed, sample_ids=ids[part])
                scores += bits.float().cpu().tolist()
        return scores


@dataclass
class _Executor:
    plan: Plan
    ledger: Ledger
    progress: RunProgress
    likelihood: _Likelihood

    def run(self, number: int, cell: Cell) -> CellRecord:
        record = cell.record
        values = self._present(cell)
        self.progress.started(number, record, len(values))
        if len(values) < len(self.plan.samples):
            self.ledger.write_cell(record)
        failure = self._complete(number, cell, values)
        status: Status = "failed" if failure else "ok"
        changes = {"status": status, **(failure or {}), "seconds": self._seconds(record.hash)}
        record = record.model_copy(update=changes)
        self.ledger.write_cell(record)
        self.progress.ended(number, record, len(values), score_text(record, values))
        return record

    def _present(self, cell: Cell) -> dict[int, float]:
        """`VALUE` column of the wanted samples the ledger has; bad shards go to quarantine, each with a line."""
        known = frozenset(int(i) for i in self.plan.dataset.test.ids.tolist())
        column = VALUE[cell.record.attack.target]
        values: dict[int, float] = {}
        for shard in self.ledger.shards(cell.record.hash, self._quarantine, known):
            values.update(zip(shard.ids, map(float, shard.table[column].to_pylist()), strict=True))
        wanted = set(self.plan.samples)
        return {i: value for i, value in values.items() if i in wanted}

    def _quarantine(self, path: Path, reason: str) -> None:
        moved = self.ledger.quarantine(path)
        self.progress.message(
            f"Quarantined: {path} {reason}; moved to {moved}, its samples are computed again"
        )

    def _complete(self, number: int, cell: Cell, values: dict[int, float]) -> dict[str, str] | None:
        """Compute and store the missing shards; the failure (error, details) when the attack raises."""
        for block, wanted in self.plan.blocks():
            ids = [i for i in wanted if i not in values]
            if not ids:
                continue
            if cell.attack.batch_dependent:
                self._put_aside(cell.record.hash, wanted)
                ids = list(wanted)
            begun = time.monotonic()
            try:
                table = self._rows(cell, ids)
            except Exception as error:
                return {"error": _reason(error), "details": traceback.format_exc()}
            try:
                self.ledger.write_shard(cell.record.hash, block, table, time.monotonic() - begun)
            except OSError as error:
                raise UserError(
                    f"cannot write to {self.ledger.folder} ({error.strerror}); "
                    f"make room and run the same command again"
                ) from error
            column = table[VALUE[cell.record.attack.target]].to_pylist()
            values.update(zip(ids, map(float, column), strict=True))
            self.progress.advanced(number, len(values), score_text(cell.record, values))
        return None

    def _put_aside(self, cell: str, block: Sequence[int]) -> None:
        """Move shards that hold a part of `block` out of the way: in an attack whose results depend on the batch,
        a sample added to a block changes the others, and a block is computed whole or not at all."""
        shards = self.ledger.shards(cell, lambda _path, _reason: None)
        self.ledger.supersede([shard.path for shard in shards if not set(shard.ids).isdisjoint(block)])

    def _rows(self, cell: Cell, ids: list[int]) -> pa.Table:
        kept = frozenset(self.plan.samples[: self.plan.keep_examples])
        if isinstance(cell, FlowCell):
            return likelihood_rows(self._attacked_flow(cell, ids), kept)
        assert isinstance(cell, ClassifierCell)
        x, y = self.plan.dataset.test.by_ids(ids)
        plan = self.plan
        victim = Victim(cell.model.module, plan.device, plan.batch_size, plan.precision, plan.compiled)
        outcome = cell.attack.evaluate(
            victim, torch.tensor(ids), x, y, seed=self.plan.run.seed, batch_size=self.plan.batch_size
        )
        before = self.likelihood.clean(ids, x, y)
        after = self.likelihood.adversarial(ids, outcome.adversarial, y)
        return ledger_rows(outcome, before, after, kept)

    def _attacked_flow(self, cell: FlowCell, ids: list[int]) -> LikelihoodOutcome:
        x, y = self.plan.dataset.test.by_ids(ids)
        model, seed, batch = cell.model, self.plan.run.seed, self.plan.batch_size
        return cell.attack.evaluate(model.flow, model.judge, torch.tensor(ids), x, y, seed, batch)

    def _seconds(self, cell: str) -> float:
        return round(sum(shard.seconds for shard in self.ledger.shards(cell, lambda _path, _reason: None)), 3)


def ledger_rows(
    outcome: Outcome, before: Sequence[float | None], after: Sequence[float | None], kept: frozenset[int]
) -> pa.Table:
    """An outcome as ledger rows. before, after: bits/dim of clean and adversarial images. kept: ids that keep
    their adversarial image."""
    ids: list[int] = outcome.sample_ids.tolist()
    examples = [
        _pixels(image) if i in kept else None for i, image in zip(ids, outcome.adversarial, strict=True)
    ]
    columns = {
        "sample_id": ids,
        "label": outcome.labels.tolist(),
        "clean_prediction": outcome.clean_predictions.tolist(),
        "prediction": outcome.predictions.tolist(),
        "clean_margin": outcome.clean_margins.tolist(),
        "margin": outcome.margins.tolist(),
        "robust": outcome.robust.tolist(),
        "broken_by": outcome.broken_by,
        "broken_at": outcome.broken_at.tolist(),
        "l1": outcome.l1.tolist(),
        "l2": outcome.l2.tolist(),
        "linf": outcome.linf.tolist(),
        "cross_entropy": outcome.cross_entropy.tolist(),
        "nll_before": list(before),
        "nll_after": list(after),
        "forwards": outcome.forwards.tolist(),
        "backwards": outcome.backwards.tolist(),
        "counts_exact": [outcome.counts_exact] * len(ids),
        "example": examples,
    }
    return pa.table(columns, schema=LEDGER_SCHEMA)


def likelihood_rows(outcome: LikelihoodOutcome, kept: frozenset[int]) -> pa.Table:
    """An outcome on a flow as ledger rows. kept: ids that keep the attacked image and the adversarial one."""
    ids: list[int] = outcome.sample_ids.tolist()

    def stored(images: Tensor) -> list[bytes | None]:
        return [_pixels(image) if i in kept else None for i, image in zip(ids, images, strict=True)]

    names = ("nll_before", "nll_after", "l1", "l2", "linf", "forwards", "backwards")
    columns = {
        "sample_id": ids,
        "label": outcome.labels.tolist(),
        **{name: getattr(outcome, name).tolist() for name in names},
        "original": stored(outcome.originals),
        "example": stored(outcome.adversarial),
    }
    return pa.table(columns, schema=LIKELIHOOD_SCHEMA)


def _pixels(image: Tensor) -> bytes:
    return image.numpy().astype("<f4").tobytes()


def score_text(record: CellRecord, values: Mapping[int, float]) -> str:
    """What a cell's samples say so far: "accuracy 73.06 %", or "mean 3.21 bits/dim" over the finite ones."""
    if not values:
        return "-"
    if record.attack.target == "classifier":
        return f"accuracy {100 * sum(values.values()) / len(values):.2f} %"
    mean = bits_per_dim(list(values.values())).mean
    return "no finite NLL" if mean is None else f"mean {mean:.4g} bits/dim"


def _reason(error: Exception) -> str:
    """A failure in one line: what happened, and for lack of memory what to do."""
    text = " ".join(str(error).split()) or "no message"
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory ({text[:120]}); give a smaller --batch-size"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return f"out of memory ({text[:120]}); give a smaller --batch-size"
    return text if isinstance(error, AttackViolation | UserError) else f"{type(error).__name__}: {text[:300]}"
