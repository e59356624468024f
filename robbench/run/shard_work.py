"""Computing a shard: (cell, sample ids) in, ledger rows or a failure out.

What the local backend calls in process and the Ray backend in its workers; nothing here touches the run folder.
"""

import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
import torch
from torch import Tensor, nn

from robbench.attacks import LikelihoodOutcome, Outcome, Victim
from robbench.attacks.search.decision import margins
from robbench.attacks.search.inner import attacked
from robbench.attacks.trust.context import own_context
from robbench.attacks.trust.model_call import out_of_memory
from robbench.attacks.trust.suspicions import Diagnostics
from robbench.attacks.victim import full_precision
from robbench.attacks.witness import witnesses
from robbench.core.device import device_text
from robbench.core.errors import AttackViolation, UserError, spell_argument
from robbench.core.foreign import message_of
from robbench.core.schema import validate_json
from robbench.core.stops import reraise_stop
from robbench.core.threads import threads_for
from robbench.data import Split
from robbench.models.flows.base import FrozenFlow
from robbench.run.cells import Cell, ClassifierCell, FlowCell
from robbench.specs import ModelKind
from robbench.store.columns import LEDGER_COLUMNS, Column, encode_image
from robbench.store.records import CleanScore
from robbench.store.shards import SCHEMAS, Shard

LONGEST_TRACEBACK = 100_000  # characters that a record keeps, the end of it


@dataclass(frozen=True)
class ShardTask:
    """Samples of one cell still to compute. number: the cell's, from 0 in plan order; block: the shard's."""

    number: int
    cell: Cell
    block: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ShardRows:
    """A computed shard: ledger rows in the order of the ids asked, seconds taken, what was noticed, on which device."""

    table: pa.Table
    seconds: float
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    device: str = ""


@dataclass(frozen=True)
class ShardFailure:
    """Why a shard has no rows: one line, and the traceback."""

    error: str
    details: str


@dataclass
class CleanLikelihood:
    """Bits/dim under the run's flow; clean images are scored once per process, not once per cell.

    Attributes:
        flow: what scores; None for no scores.
        device: where it is.
        seed: seed of the dequantisation noise.
        batch_size: images at once.
    """

    flow: FrozenFlow | None
    device: torch.device
    seed: int
    batch_size: int
    _clean: dict[int, float] = field(default_factory=dict)

    @property
    def without_flow(self) -> "CleanLikelihood":
        """For cells whose images no flow is to score."""
        return replace(self, flow=None)

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


@dataclass(frozen=True)
class ShardWork:
    """Everything a shard needs beside its cell. Picklable; the cells' modules and `likelihood.flow` are on `device`.

    Attributes:
        split: holds the samples.
        seed: seed of the run.
        device: where modules are.
        batch_size: images at once.
        compiled: whether attacks search classifiers with torch.compile.
        kept: ids of the samples that keep their images.
        likelihood: scores images in bits/dim.
        fits: batch sizes that memory holds, by hash of the cell, where `batch_size` was too large.
    """

    split: Split
    seed: int
    device: torch.device
    batch_size: int
    compiled: bool
    kept: frozenset[int]
    likelihood: CleanLikelihood
    fits: dict[str, int] = field(default_factory=dict)

    def on(self, device: torch.device) -> "ShardWork":
        """The same work for a process whose modules are on `device`."""
        return replace(self, device=device, likelihood=replace(self.likelihood, device=device))

    def shard(self, cell: Cell, ids: Sequence[int]) -> ShardRows | ShardFailure:
        """Attack the samples called `ids`; whatever model and attack raise becomes a failure, SystemExit and
        KeyboardInterrupt too, unless this process itself is to stop (`Stopped`)."""
        begun = time.monotonic()
        try:
            with threads_for(lambda: cell.multiply_adds(*self.split.by_ids(list(ids[:1])))):
                table, diagnostics = self.table(cell, ids)
            return ShardRows(table, time.monotonic() - begun, diagnostics, device_text(self.device))
        except BaseException as error:
            reraise_stop(error)
            return failed(error)

    def table(self, cell: Cell, ids: Sequence[int]) -> tuple[pa.Table, Diagnostics]:
        """Ledger rows of the samples called `ids`, in that order, and what the attack noticed on the way."""
        names = list(ids)
        with full_precision():
            if isinstance(cell, FlowCell):
                return tabulate("flow", self._attacked_flow(cell, names), self.kept, {}), Diagnostics()
            assert isinstance(cell, ClassifierCell)
            return self._attacked_classifier(cell, names)

    def _attacked_classifier(self, cell: ClassifierCell, ids: list[int]) -> tuple[pa.Table, Diagnostics]:
        x, y = self.split.by_ids(ids)
        victim = Victim(cell.model.module, self.device, self.batch_size, self.compiled)
        if cell.record.hash in self.fits:
            victim.use_batches_of(self.fits[cell.record.hash])
        outcome = cell.attack.evaluate(
            victim, torch.tensor(ids), x, y, seed=self.seed, batch_size=self.batch_size
        )
        scored = self.likelihood if cell.record.nll_flow is not None else self.likelihood.without_flow
        flow = cell.record.attack_flow
        beside: dict[str, Sequence[object]] = {
            "nll_before": scored.clean(ids, x, y),
            "nll_after": scored.adversarial(ids, outcome.adversarial, y),
            "witness": witnesses(outcome, flow.sha256 if flow else None, self.kept),
        }
        if victim.fits is not None:
            self.fits[cell.record.hash] = victim.fits
        return tabulate("classifier", outcome, self.kept, beside), outcome.diagnostics

    def _attacked_flow(self, cell: FlowCell, ids: list[int]) -> LikelihoodOutcome:
        x, y = self.split.by_ids(ids)
        model = cell.model
        return cell.attack.evaluate(
            model.flow, model.judge, torch.tensor(ids), x, y, self.seed, self.batch_size
        )


def clean_score(module: nn.Module, x: Tensor, y: Tensor, device: torch.device, batch_size: int) -> CleanScore:
    """How many of the images x [N,C,H,W] with labels y [N] `module` classifies correctly without an attack."""
    with own_context(), attacked(module), full_precision():
        logits = Victim(module, device, batch_size).clean_logits(x)
    return CleanScore(right=int((margins(logits, y) > 0).sum()), samples=len(x))


def sum_diagnostics(shards: Iterable[Shard]) -> Diagnostics:
    """What attacks noticed in all these shards together; `UserError` for counts that robbench does not write."""
    found = (validate_json(shard.diagnostics, Diagnostics, f"{shard.path}, metadata") for shard in shards)
    return sum(found, Diagnostics())


def failed(error: BaseException) -> ShardFailure:
    """An exception, while it is being handled or after, as the record of a cell keeps it."""
    return ShardFailure(_reason(error), "".join(traceback.format_exception(error))[-LONGEST_TRACEBACK:])


def _reason(error: BaseException) -> str:
    """A failure in one line: what happened, and for lack of memory what to do."""
    text = message_of(error, 1000)
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory ({text[:120]}); give a smaller {spell_argument('batch_size')}"
    if out_of_memory(error):
        return f"out of memory ({text[:120]}); give a smaller {spell_argument('batch_size')}"
    return text if isinstance(error, AttackViolation | UserError) else f"{type(error).__name__}: {text[:300]}"


def tabulate(
    target: ModelKind,
    outcome: Outcome | LikelihoodOutcome,
    kept: frozenset[int],
    beside: Mapping[str, Sequence[object]],
) -> pa.Table:
    """An outcome on a model of kind `target` as ledger rows, in the outcome's order. kept: ids that keep their images.
    beside: values of the columns that are computed beside the outcome, by name."""
    ids: list[int] = outcome.sample_ids.tolist()

    def values(column: Column) -> Sequence[object]:
        if not column.source:
            return beside[column.name]
        found = getattr(outcome, column.source)
        if column.kind == "image":
            return [
                encode_image(image.numpy()) if i in kept else None
                for i, image in zip(ids, found, strict=True)
            ]
        if isinstance(found, Tensor):
            found = found.tolist()
        return found if isinstance(found, list) else [found] * len(ids)

    return pa.table(
        {column.name: values(column) for column in LEDGER_COLUMNS[target]}, schema=SCHEMAS[target]
    )
