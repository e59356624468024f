"""Computing a shard: from (cell, sample ids) to ledger rows or a failure.

The local backend calls it in its process, the Ray backend in its workers; nothing here touches the run folder.
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
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.trust.context import full_precision, own_context
from robbench.attacks.trust.model_call import out_of_memory
from robbench.attacks.trust.suspicions import Diagnostics
from robbench.attacks.witness import witnesses
from robbench.core.device import device_text
from robbench.core.errors import AttackViolation, UserError, spell_argument
from robbench.core.foreign import message_of
from robbench.core.schema import validate_json
from robbench.core.stops import reraise_stop
from robbench.core.threads import threads_for
from robbench.data import Split
from robbench.models.flows.base import FrozenFlow
from robbench.models.state import FirstStates, ModelState
from robbench.run.cells import Cell, ClassifierCell, DetectionCell, FlowCell
from robbench.run.detection import detect
from robbench.specs import ModelKind
from robbench.store.columns import LEDGER_COLUMNS, Column, encode_image
from robbench.store.records import CleanScore
from robbench.store.shards import SCHEMAS, Shard

LONGEST_TRACEBACK = 100_000  # characters at the end of a traceback that a record keeps


@dataclass(frozen=True)
class ShardTask:
    """Samples of one cell to compute. number: index of the cell in the plan, from 0; block: number of the shard."""

    number: int
    cell: Cell
    block: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class ShardRows:
    """A computed shard. table: ledger rows in the order of the requested ids. diagnostics: counts of the attack."""

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
        flow: the flow; None for no scores.
        device: of the flow.
        seed: of the dequantisation noise.
        batch_size: images per batch.
    """

    flow: FrozenFlow | None
    device: torch.device
    seed: int
    batch_size: int
    _clean: dict[int, float] = field(default_factory=dict)

    @property
    def without_flow(self) -> "CleanLikelihood":
        """The same without scores, for cells whose images are not scored."""
        return replace(self, flow=None)

    def clean(self, ids: list[int], x: Tensor, y: Tensor) -> list[float | None]:
        """Bits/dim of clean images x [n,C,H,W] with labels y [n]; None per image without a flow."""
        if self.flow is None:
            return [None] * len(ids)
        missing = [row for row, i in enumerate(ids) if i not in self._clean]
        names = [ids[row] for row in missing]
        self._clean.update(zip(names, self._scores(self.flow, names, x[missing], y[missing]), strict=True))
        return [self._clean[i] for i in ids]

    def adversarial(self, ids: list[int], x: Tensor, y: Tensor) -> list[float | None]:
        """Bits/dim of adversarial images, with the dequantisation noise of their clean images."""
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
    """Everything that computing a shard needs besides its cell. Picklable.

    Attributes:
        split: the samples.
        seed: of the run.
        device: of the cells' modules and of `likelihood.flow`.
        batch_size: images per batch.
        compiled: whether attacks search classifiers with torch.compile.
        kept: ids of the samples whose images are stored.
        likelihood: scores images in bits/dim.
        fits: batch sizes that fit into memory, by hash of the cell, where `batch_size` did not.
        first: states of the models and flows when the first shard used them.
    """

    split: Split
    seed: int
    device: torch.device
    batch_size: int
    compiled: bool
    kept: frozenset[int]
    likelihood: CleanLikelihood
    fits: dict[str, int] = field(default_factory=dict)
    first: FirstStates = field(default_factory=FirstStates)

    def on(self, device: torch.device) -> "ShardWork":
        """The same for a process whose modules are on `device`."""
        return replace(self, device=device, likelihood=replace(self.likelihood, device=device))

    def shard(self, cell: Cell, ids: Sequence[int]) -> ShardRows | ShardFailure:
        """Attack the samples `ids`. Anything that model or attack raise, SystemExit and KeyboardInterrupt too, becomes
        a failure, unless this process itself is asked to stop (`Stopped`)."""
        begun = time.monotonic()
        try:
            with threads_for(lambda: cell.multiply_adds(*self.split.by_ids(list(ids[:1])))):
                table, diagnostics = self.table(cell, ids)
            return ShardRows(table, time.monotonic() - begun, diagnostics, device_text(self.device))
        except BaseException as error:
            reraise_stop(error)
            return record_failure(error)

    def table(self, cell: Cell, ids: Sequence[int]) -> tuple[pa.Table, Diagnostics]:
        """Ledger rows of the samples `ids`, in that order, and the attack's diagnostics."""
        names = list(ids)
        for module in cell.modules:
            self._require_unchanged(module)
        with full_precision():
            if isinstance(cell, FlowCell):
                return tabulate("flow", self._attack_flow(cell, names), self.kept, {}), Diagnostics()
            assert isinstance(cell, ClassifierCell)
            return self._attack_classifier(cell, names)

    def _require_unchanged(self, module: nn.Module) -> None:
        changed = self.first.change(module)
        if changed is not None:
            raise UserError(
                f"the model or flow is no longer the one that was loaded: {changed} during an earlier attack of this "
                f"run, which is wrong; leave that attack out and run the same command again"
            )

    def _attack_classifier(self, cell: ClassifierCell, ids: list[int]) -> tuple[pa.Table, Diagnostics]:
        x, y = self.split.by_ids(ids)
        victim = Victim(cell.model.module, self.device, self.batch_size, self.compiled)
        if cell.record.hash in self.fits:
            victim.use_batches_of(self.fits[cell.record.hash])
        guard = ModelState.of(cell.detector) if isinstance(cell, DetectionCell) else None
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
        if isinstance(cell, DetectionCell) and guard is not None:
            detected = detect(cell, guard, victim, outcome, x, self.seed)
            outcome, beside = detected.outcome, beside | detected.columns
        if victim.fits is not None:
            self.fits[cell.record.hash] = victim.fits
        return tabulate(cell.record.kind, outcome, self.kept, beside), outcome.diagnostics

    def _attack_flow(self, cell: FlowCell, ids: list[int]) -> LikelihoodOutcome:
        x, y = self.split.by_ids(ids)
        model = cell.model
        return cell.attack.evaluate(
            model.flow, model.judge, torch.tensor(ids), x, y, self.seed, self.batch_size
        )


def clean_score(module: nn.Module, x: Tensor, y: Tensor, device: torch.device, batch_size: int) -> CleanScore:
    """How many of the clean images x [N,C,H,W] with labels y [N] `module` classifies correctly."""
    with own_context(), attack_mode(module), full_precision():
        logits = Victim(module, device, batch_size).clean_logits(x)
    return CleanScore(right=int((margins(logits, y) > 0).sum()), samples=len(x))


def sum_diagnostics(shards: Iterable[Shard]) -> Diagnostics:
    """The sum of the shards' diagnostics; `UserError` for counts that robbench does not write."""
    found = (validate_json(shard.diagnostics, Diagnostics, f"{shard.path}, metadata") for shard in shards)
    return sum(found, Diagnostics())


def record_failure(error: BaseException) -> ShardFailure:
    """An exception as the failure that a cell's record keeps."""
    return ShardFailure(_reason(error), "".join(traceback.format_exception(error))[-LONGEST_TRACEBACK:])


def _reason(error: BaseException) -> str:
    """The reason of a failure in one line; for lack of memory with the next step."""
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
    """An outcome on a model of kind `target` as ledger rows, in the outcome's order. kept: ids whose images are stored.
    beside: by name, values of the columns that are not part of the outcome."""
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
