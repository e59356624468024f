"""The driver of a run: finds the shards that the ledger lacks, lets a backend compute them, stores them as they arrive.

A backend only computes; ledger, progress and cell records belong to the driver. So a run can stop at any moment and be
completed by either backend.
"""

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from robbench.attacks.search.progress import heard_by
from robbench.core.errors import UserError
from robbench.core.places import Place
from robbench.core.stops import check_stop, reraise_stop
from robbench.run.cells import Cell, ClassifierCell
from robbench.run.plan import Plan
from robbench.run.progress import RunProgress
from robbench.run.ray_backend import open_ray_backend
from robbench.run.shard_work import (
    CleanLikelihood,
    ShardFailure,
    ShardRows,
    ShardTask,
    ShardWork,
    clean_score,
    sum_diagnostics,
)
from robbench.statistics.likelihood import bits_per_dim
from robbench.store.ledger import Ledger
from robbench.store.records import CellRecord, CleanScore, Status
from robbench.store.shards import shown_values

SHOW_EVERY = 0.5  # seconds


class Backend(Protocol):
    """Computes shards."""

    @property
    def longest_first(self) -> bool:
        """Whether it takes cells by decreasing cost rather than in plan order."""

    def results(self, tasks: Iterator[ShardTask]) -> Iterator[tuple[ShardTask, ShardRows | ShardFailure]]:
        """Every task with its result, in any order. Tasks are taken from the iterator when there is room for them."""

    def changed(self, cell: Cell) -> bool:
        """Whether a model or flow of the cell is, in this process, no longer what the first shard used."""


@dataclass(frozen=True)
class LocalBackend:
    """Computes in this process, one shard after another."""

    work: ShardWork
    longest_first: bool = False

    def results(self, tasks: Iterator[ShardTask]) -> Iterator[tuple[ShardTask, ShardRows | ShardFailure]]:
        for task in tasks:
            result = self.work.shard(task.cell, task.ids)
            check_stop()  # where foreign code has swallowed a Ctrl-C, its result means nothing
            yield task, result

    def changed(self, cell: Cell) -> bool:
        return any(self.work.first.change(module) for module in cell.modules)


@contextmanager
def open_backend(plan: Plan) -> Iterator[Backend]:
    """The backend of a plan; on exit running tasks are stopped and resources freed."""
    work = shard_work(plan)
    if plan.ray is None:
        yield LocalBackend(work)
        return
    with open_ray_backend(plan.ray, work) as backend:
        yield backend


def shard_work(plan: Plan) -> ShardWork:
    """The `ShardWork` of a plan, with modules on the plan's device."""
    seed, device, batch_size = plan.run.seed, plan.device, plan.batch_size
    return ShardWork(
        split=plan.dataset.test,
        seed=seed,
        device=device,
        batch_size=batch_size,
        compiled=plan.compiled,
        kept=frozenset(plan.samples[: plan.keep_examples]),
        likelihood=CleanLikelihood(plan.nll_flow, device, seed, batch_size),
    )


def execute(plan: Plan, ledger: Ledger, progress: RunProgress, backend: Backend) -> list[CellRecord]:
    """Complete every cell of `plan` in `ledger`; returns their records in plan order.

    A failing attack fails its cell only. After an interruption the finished shards remain. Every cell ends as "ok" or
    "failed", also when the backend stops early. `UserError` when the folder is removed or renamed meanwhile.
    """
    ledger.write_run(plan.run, plan.cards, [cell.record for cell in plan.cells])
    _keep_originals(plan, ledger, progress)
    return _Driver(plan, ledger, progress, backend).run()


def _keep_originals(plan: Plan, ledger: Ledger, progress: RunProgress) -> None:
    """Store the clean images of the kept adversarial ones, so that a report needs no data set."""
    kept = plan.samples[: plan.keep_examples]
    images, _ = plan.dataset.test.by_ids(kept)

    def restore(path: Path, reason: str) -> None:
        moved = ledger.quarantine(path)
        progress.message(f"Quarantined: {path} {reason}; moved to {moved}, written again from the data set")

    ledger.add_originals(dict(zip(kept, images.numpy(), strict=True)), restore)


@dataclass
class _OpenCell:
    """State of a cell whose ledger rows were read.

    Attributes:
        number: index in the plan, from 0.
        cell: the cell.
        values: `shown_values` of the requested samples in the ledger.
        waiting: (block, sample ids) not yet given to the backend.
        computing: blocks given to the backend.
        failure: the earliest block that failed, and how; None without any.
        device: see `CellRecord.device`.
    """

    number: int
    cell: Cell
    values: dict[int, float]
    waiting: deque[tuple[int, tuple[int, ...]]]
    computing: set[int] = field(default_factory=set)
    failure: tuple[int, ShardFailure] | None = None
    device: str = ""

    @property
    def record(self) -> CellRecord:
        """The cell's record, with the devices that computed its rows so far."""
        return self.cell.record.model_copy(update={"device": self.device})

    @property
    def expected_cost(self) -> int:
        """Largest number of model calls still to make."""
        cost = self.cell.cost
        return (cost.forwards + cost.backwards) * sum(len(ids) for _, ids in self.waiting)

    def fail(self, block: int, failure: ShardFailure) -> None:
        """Give no more blocks to the backend; earlier blocks are computing already, and may fail too."""
        self.waiting.clear()
        if self.failure is None or block < self.failure[0]:
            self.failure = (block, failure)


@dataclass
class _Searching:
    """A shard that is being searched in this process: images in model calls so far, and samples done with."""

    task: ShardTask
    calls: int = 0
    done: int = 0
    shown: float = field(default_factory=time.monotonic)

    def hears(self, calls: int, done: int) -> bool:
        """Count; whether it is time to show it."""
        self.calls, self.done = self.calls + calls, min(self.done + done, len(self.task.ids))
        now = time.monotonic()
        if now - self.shown < SHOW_EVERY:
            return False
        self.shown = now
        return True

    @property
    def samples(self) -> int:
        """Samples done: those done with, and of the calls that the others need at most the share that was made."""
        left = len(self.task.ids) - self.done
        share = self.calls / max(self.task.cell.cost.forwards * left, 1)
        return self.done + int(left * min(share, 1.0))


@dataclass
class _Driver:
    plan: Plan
    ledger: Ledger
    progress: RunProgress
    backend: Backend
    _place: Place = field(init=False)
    _open: dict[int, _OpenCell] = field(default_factory=dict)
    _records: dict[int, CellRecord] = field(default_factory=dict)
    _clean: dict[str, CleanScore | None] = field(default_factory=dict)
    _searching: "_Searching | None" = None

    def __post_init__(self) -> None:
        self._place = Place.of(self.ledger.folder)

    def run(self) -> list[CellRecord]:
        with heard_by(self._hear):
            for task, result in self.backend.results(self._tasks()):
                self._searching = None
                cell = self._open[task.number]
                cell.computing.remove(task.block)
                if isinstance(result, ShardFailure):
                    cell.fail(task.block, result)
                else:
                    self._store(cell, task, result)
                self._end_if_done(cell)
        self._fail_unended()
        return [self._records[number] for number in range(len(self.plan.cells))]

    def _hear(self, calls: int, done: int) -> None:
        """Of a search in this process: show how far the shard is, twice a second. This is called from inside an attack,
        whose failure nothing here may become."""
        if self._searching is None or not self._searching.hears(calls, done):
            return
        task = self._searching.task
        values = self._open[task.number].values
        shown = min(len(values) + self._searching.samples, len(self.plan.samples))
        with suppress(Exception):
            self.progress.on_advance(task.number, shown, score_text(task.cell.record, values))

    def _fail_unended(self) -> None:
        """Fail the cells whose samples a backend that stopped early did not all compute."""
        for number, cell in enumerate(self.plan.cells):
            if number in self._records:
                continue
            if number not in self._open:
                self._open[number] = _OpenCell(number, cell, self._read_values(cell), deque())
                self.progress.on_start(number, cell.record, len(self._open[number].values))
            left = self._open[number]
            left.computing.clear()
            error = "the backend ended before every sample was computed; run the same command again"
            left.fail(0, ShardFailure(error, ""))
            self._end_if_done(left)

    def _tasks(self) -> Iterator[ShardTask]:
        """The missing shards, cell after cell; a cell starts when its first shard is requested."""
        for cell in self._in_order():
            self._start(cell)
            while cell.waiting:
                block, ids = cell.waiting.popleft()
                if cell.cell.attack.batch_dependent:
                    self._put_aside(cell.cell.record.hash, ids)
                cell.computing.add(block)
                task = ShardTask(cell.number, cell.cell, block, ids)
                self._searching = _Searching(task)
                yield task

    def _in_order(self) -> Iterator[_OpenCell]:
        cells = (self._read_cell(number, cell) for number, cell in enumerate(self.plan.cells))
        if not self.backend.longest_first:
            yield from cells
            return
        incomplete: list[_OpenCell] = []
        for cell in cells:
            if cell.waiting:
                incomplete.append(cell)
            else:
                yield cell
        # `pop` frees the values of finished cells; of equal costs the first in the plan comes first.
        incomplete.sort(key=lambda cell: (cell.expected_cost, -cell.number))
        while incomplete:
            yield incomplete.pop()

    def _read_cell(self, number: int, cell: Cell) -> _OpenCell:
        values = self._read_values(cell)
        waiting: deque[tuple[int, tuple[int, ...]]] = deque()
        for block, requested in self.plan.blocks():
            missing = tuple(i for i in requested if i not in values)
            if missing:
                waiting.append((block, requested if cell.attack.batch_dependent else missing))
        return _OpenCell(number, cell, values, waiting, device=self._device(cell) if values else "")

    def _device(self, cell: Cell) -> str:
        """Devices that computed the samples in the ledger; "" where they were not recorded."""
        try:
            record = self.ledger.read_cell(cell.record.hash)
        except UserError:  # a damaged cell.json is written again
            return ""
        return record.device if record is not None else ""

    def _read_values(self, cell: Cell) -> dict[int, float]:
        """`shown_values` of the requested samples in the ledger; damaged shards are quarantined and reported."""
        known = frozenset(int(i) for i in self.plan.dataset.test.ids.tolist())
        values: dict[int, float] = {}
        for shard in self.ledger.shards(cell.record.hash, self._quarantine, known):
            values.update(shown_values(shard.table, cell.record.attack.semantics))
        requested = set(self.plan.samples)
        return {i: value for i, value in values.items() if i in requested}

    def _quarantine(self, path: Path, reason: str) -> None:
        moved = self.ledger.quarantine(path)
        self.progress.message(
            f"Quarantined: {path} {reason}; moved to {moved}, its samples are computed again"
        )

    def _put_aside(self, cell: str, block: Sequence[int]) -> None:
        """Move shards aside that contain samples of `block`: where results depend on the batch, an added sample changes
        the others, so that a block is computed as a whole."""
        shards = self.ledger.shards(cell, _ignore)
        self.ledger.supersede([shard.path for shard in shards if not set(shard.ids).isdisjoint(block)])

    def _start(self, cell: _OpenCell) -> None:
        self._place.require()
        self._open[cell.number] = cell
        self.progress.on_start(cell.number, cell.cell.record, len(cell.values))
        if cell.waiting:
            self.ledger.write_cell(cell.record)
        self._end_if_done(cell)

    def _store(self, cell: _OpenCell, task: ShardTask, rows: ShardRows) -> None:
        record = cell.cell.record
        self._place.require()
        try:
            noticed = rows.diagnostics.model_dump_json(exclude_defaults=True)
            self.ledger.write_shard(record.hash, task.block, rows.table, rows.seconds, noticed)
            if rows.device not in cell.device.split(", "):
                cell.device = ", ".join(filter(None, [cell.device, rows.device]))
                self.ledger.write_cell(cell.record)
        except OSError as error:
            raise UserError(
                f"cannot write to {self.ledger.folder} ({error.strerror}); "
                f"make room and run the same command again"
            ) from error
        cell.values.update(shown_values(rows.table, record.attack.semantics))
        self.progress.on_advance(cell.number, len(cell.values), score_text(record, cell.values))

    def _end_if_done(self, cell: _OpenCell) -> None:
        if cell.waiting or cell.computing:
            return
        record = cell.record
        status: Status = "failed" if cell.failure else "ok"
        reason = {"error": cell.failure[1].error, "details": cell.failure[1].details} if cell.failure else {}
        seconds, suspicions = self._sum_shards(record.hash)
        changes = {"status": status, **reason, "seconds": seconds, "suspicions": suspicions}
        if cell.failure:
            changes["clean"] = self._clean_score(cell.cell)
        record = record.model_copy(update=changes)
        self._place.require()
        self.ledger.write_cell(record)
        self.progress.on_end(cell.number, record, len(cell.values), score_text(record, cell.values))
        self._records[cell.number] = record
        del self._open[cell.number]

    def _clean_score(self, cell: Cell) -> CleanScore | None:
        """Clean accuracy of the model of a failed attack, so that it is not lost; None where clean images fail too,
        or where the attack changed the model."""
        if not isinstance(cell, ClassifierCell) or cell.record.detector or self.backend.changed(cell):
            return None
        name = cell.record.model
        if name not in self._clean:
            x, y = self.plan.dataset.test.by_ids(self.plan.samples)
            try:
                self._clean[name] = clean_score(
                    cell.model.module, x, y, self.plan.device, self.plan.batch_size
                )
            except BaseException as error:  # a foreign forward, which has failed once already
                reraise_stop(error)
                self._clean[name] = None
        return self._clean[name]

    def _sum_shards(self, cell: str) -> tuple[float, tuple[str, ...]]:
        """Seconds of all shards of a cell, earlier runs included, and the suspicions that follow from their counts."""
        shards = self.ledger.shards(cell, _ignore)
        found = sum_diagnostics(shards).suspicions
        return round(sum(shard.seconds for shard in shards), 3), tuple(one.text for one in found)


def _ignore(path: Path, reason: str) -> None:
    """Ignore damaged shards of a cell that were quarantined and reported before."""


def score_text(record: CellRecord, values: Mapping[int, float]) -> str:
    """The score of a cell's samples so far: "robust accuracy 73.06 %", or "mean 3.21 bits/dim" over the finite ones."""
    if not values:
        return "-"
    if record.decides:
        return f"{record.score_name} {100 * sum(values.values()) / len(values):.2f} %"
    mean = bits_per_dim(list(values.values())).mean
    return "no finite NLL" if mean is None else f"mean {mean:.4g} bits/dim"
