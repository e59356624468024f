"""The state of a run that may still be computing, read from its folder. Never writes, never takes the lock.

A run replaces and moves files while they are read here: missing or damaged files are counted and read again next time.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from robbench.core.errors import UserError
from robbench.specs import ModelKind, Semantics
from robbench.statistics.accuracy import wilson
from robbench.statistics.likelihood import bits_per_dim
from robbench.store.folder import foreign_content, lock_is_held
from robbench.store.ledger import CELL_FILE, RUN_FILE, Ledger
from robbench.store.records import CellRecord, PlanEntry, RunFile
from robbench.store.shards import BadShardError, read_shard, shown_values

Stamp = tuple[int, int, int]  # inode, time of the last change in ns, bytes
CellState = Literal["done", "running", "failed", "missing"]
IDLE_SECONDS = 60.0  # idle time that separates two sessions; the speed is that of the latest


@dataclass(frozen=True)
class ShardFile:
    """A shard as last read. values: `shown_values` by semantics; seconds: computing time; finished: Unix time of the
    file."""

    values: dict[Semantics, dict[int, float]]
    seconds: float
    finished: float


@dataclass(frozen=True)
class CellView:
    """The present state of a cell.

    Attributes:
        model: name of the model.
        attack: label of the attack.
        target: kind of the model.
        state: whether all its rows are computed.
        done: number of requested samples with a row.
        n: number of requested samples.
        seconds: computing time of its shards.
        score: accuracy in percent, or mean bits/dim, over the present rows; None without any.
        lower, upper: its 95 % interval (Wilson's for an accuracy, a normal one for bits/dim).
        measure: what the accuracy is; "" where that is unknown, and for flows.
        error: why the cell failed, or what is wrong with its record; "" for nothing.
    """

    model: str
    attack: str
    target: ModelKind
    state: CellState
    done: int
    n: int
    seconds: float
    score: float | None = None
    lower: float | None = None
    upper: float | None = None
    measure: str = ""
    error: str = ""

    @property
    def name(self) -> str:
        """ "MODEL x ATTACK"."""
        return f"{self.model} x {self.attack}"

    @property
    def partial(self) -> bool:
        """Whether the score covers a part of the samples only."""
        return self.score is not None and self.done < self.n


@dataclass(frozen=True)
class Snapshot:
    """The state of a run folder at one moment.

    Attributes:
        folder: the run folder.
        dataset: name of the data set; "" before there is a run.yaml.
        n: number of requested samples.
        cells: the cells, in plan order.
        writing: whether a process of this machine holds the run's lock; None where that is unknown.
        last_shard: Unix time of the newest shard; None without any.
        damaged: number of shards that could not be read.
        rate: samples per second over the latest session; None without shards.
        remaining: estimated seconds to go; None where unknown.
        unknown: number of unfinished cells of unknown speed, which `remaining` leaves out.
    """

    folder: Path
    dataset: str = ""
    n: int = 0
    cells: tuple[CellView, ...] = ()
    writing: bool | None = None
    last_shard: float | None = None
    damaged: int = 0
    rate: float | None = None
    remaining: float | None = None
    unknown: int = 0

    @property
    def begun(self) -> bool:
        """Whether there is a run.yaml."""
        return bool(self.dataset)

    def count(self, state: CellState) -> int:
        """Number of cells in `state`."""
        return sum(cell.state == state for cell in self.cells)

    @property
    def settled(self) -> bool:
        """Whether every cell is done or failed."""
        return self.begun and self.count("done") + self.count("failed") == len(self.cells)

    @property
    def ended(self) -> bool:
        """Whether every cell is settled and no process is writing."""
        return self.settled and not self.writing


@dataclass
class Watcher:
    """Reads a run folder repeatedly; files are read again only when they change, since a plan of thousands of cells
    takes seconds to read."""

    folder: Path
    _shards: dict[Path, tuple[Stamp, ShardFile | None]] = field(default_factory=dict)
    _plan: tuple[Stamp, RunFile | None] | None = None

    def look(self) -> Snapshot:
        """The present state. `UserError` for a file, a folder with other content, and a damaged run.yaml."""
        refuse_foreign(self.folder)
        writing = lock_is_held(self.folder)  # first, so that a run that ends meanwhile counts as writing
        ledger = Ledger(self.folder)
        try:
            run = self._read_plan(ledger)
        except UserError:
            if (self.folder / RUN_FILE).exists():
                raise
            run = None  # moved aside by `--fresh` meanwhile
        writing = writing or lock_is_held(self.folder)  # a run that began meanwhile
        if run is None:
            return Snapshot(self.folder, writing=writing)
        requested = frozenset(run.sample_ids)
        shards = [self._read(ledger, entry.hash) for entry in run.cells]
        cells = tuple(
            _view(ledger, entry, found, requested, begun=writing is not False and _begun(ledger, entry.hash))
            for entry, found in zip(run.cells, shards, strict=True)
        )
        return self._snapshot(run, cells, [shard for found in shards for shard in found], writing)

    def _read_plan(self, ledger: Ledger) -> RunFile | None:
        try:
            stamp = _stamp((self.folder / RUN_FILE).stat())
        except FileNotFoundError:
            self._plan = None
            return None
        if self._plan is None or self._plan[0] != stamp:
            self._plan = stamp, ledger.read_run()
        return self._plan[1]

    def _snapshot(
        self, run: RunFile, cells: tuple[CellView, ...], shards: list[ShardFile | None], writing: bool | None
    ) -> Snapshot:
        good = [shard for shard in shards if shard is not None]
        speed = Speed.of(good)
        remaining, unknown = _remaining(cells, speed)
        return Snapshot(
            self.folder,
            dataset=run.dataset,
            n=run.n,
            cells=cells,
            writing=writing,
            last_shard=max((shard.finished for shard in good), default=None),
            damaged=len(shards) - len(good),
            rate=speed.samples if speed else None,
            remaining=remaining,
            unknown=unknown,
        )

    def _read(self, ledger: Ledger, cell: str) -> list[ShardFile | None]:
        """Shards of a cell in name order; None for a damaged one."""
        found = [self._shard(path, cell) for path in sorted(ledger.cell_folder(cell).glob("shard-*.parquet"))]
        return [shard for present, shard in found if present]

    def _shard(self, path: Path, cell: str) -> tuple[bool, ShardFile | None]:
        """Whether the file still exists, and its content; None where it is damaged."""
        try:
            status = path.stat()
            stamp = _stamp(status)
            if path not in self._shards or self._shards[path][0] != stamp:
                self._shards[path] = stamp, _read_shard_file(path, cell, status.st_mtime)
        except FileNotFoundError:
            self._shards.pop(path, None)
            return False, None
        return True, self._shards[path][1]


def _stamp(status: os.stat_result) -> Stamp:
    return status.st_ino, status.st_mtime_ns, status.st_size


def refuse_foreign(folder: Path) -> None:
    """`UserError` for a file or a folder with other content; an absent or empty folder may become a run folder."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is a file; give the --out of a `robbench run`")
    if foreign := foreign_content(folder):
        raise UserError(
            f"{str(folder)!r} is not a run folder: it holds something else ({', '.join(foreign[:3])}) and no "
            f"{RUN_FILE}; give the --out of a `robbench run`"
        )


def refuse_no_run(folder: Path) -> None:
    """`UserError` for a folder without run.yaml whose lock no process holds, so that no run is about to begin."""
    refuse_foreign(folder)
    if not (folder / RUN_FILE).exists() and not lock_is_held(folder):
        what = "holds no run" if folder.exists() else "does not exist"
        raise UserError(f"{str(folder)!r} {what}; give the --out of a `robbench run` that has begun")


def _read_shard_file(path: Path, cell: str, finished: float) -> ShardFile | None:
    try:
        shard = read_shard(path, cell)
    except BadShardError:
        path.stat()  # FileNotFoundError when that was the reason
        return None
    values = {semantics: shown_values(shard.table, semantics) for semantics in get_args(Semantics)}
    return ShardFile(values, shard.seconds, finished)


def _view(
    ledger: Ledger,
    entry: PlanEntry,
    shards: Sequence[ShardFile | None],
    requested: frozenset[int],
    begun: bool,
) -> CellView:
    good = [shard for shard in shards if shard is not None]
    record, problem = _record(ledger, entry.hash)
    target: ModelKind = record.kind if record else "classifier"
    semantics: Semantics = record.attack.semantics if record else "worst-case"
    values = {i: value for shard in good for i, value in shard.values[semantics].items() if i in requested}
    score, lower, upper = _score(target, list(values.values()))
    return CellView(
        model=entry.model,
        attack=entry.attack,
        target=target,
        state=_state(record, len(values), len(requested), begun),
        done=len(values),
        n=len(requested),
        seconds=sum(shard.seconds for shard in good),
        score=score,
        lower=lower,
        upper=upper,
        measure=record.score_name if record and record.decides else "",
        error=(record.error or "failed") if record and record.status == "failed" else problem,
    )


def _record(ledger: Ledger, cell: str) -> tuple[CellRecord | None, str]:
    """(cell.json, ""), or (None, what is wrong with it)."""
    try:
        return ledger.read_cell(cell), ""
    except UserError as error:
        return None, str(error)


def _state(record: CellRecord | None, done: int, requested: int, begun: bool) -> CellState:
    if record is not None and record.status == "failed":
        return "failed"
    if done == requested and record is not None and record.status == "ok":
        return "done"
    return "running" if done or begun else "missing"


def _begun(ledger: Ledger, cell: str) -> bool:
    """Whether this session has begun a cell: a run writes every cell.json before its run.yaml, and again when it starts
    the cell."""
    try:
        started = (ledger.cell_folder(cell) / CELL_FILE).stat().st_mtime_ns
        return started > (ledger.folder / RUN_FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return False


def _score(target: ModelKind, values: list[float]) -> tuple[float | None, float | None, float | None]:
    if not values:
        return None, None, None
    if target != "flow":
        estimate = wilson(int(sum(values)), len(values))
        return estimate.value, estimate.lower, estimate.upper
    summary = bits_per_dim(values)
    return summary.mean, summary.lower, summary.upper


@dataclass(frozen=True)
class Speed:
    """Speed of the latest session. samples: per second; workers: mean number of shards computed at once, their seconds
    over the elapsed time (below 1 where models were loaded in between)."""

    samples: float
    workers: float

    @staticmethod
    def of(shards: Sequence[ShardFile]) -> "Speed | None":
        """From the times of shards; None without any. A session ends where nothing was computed for `IDLE_SECONDS`."""
        latest = sorted(shards, key=lambda shard: shard.finished, reverse=True)
        if not latest:
            return None
        begun, session = latest[0].finished - latest[0].seconds, [latest[0]]
        for shard in latest[1:]:
            if shard.finished < begun - IDLE_SECONDS:
                break
            begun = min(begun, shard.finished - shard.seconds)
            session.append(shard)
        elapsed = max(latest[0].finished - begun, 1e-3)
        busy, samples = sum(s.seconds for s in session), sum(len(s.values["worst-case"]) for s in session)
        return Speed(samples / elapsed, max(busy / elapsed, 1e-3))


def _remaining(cells: Sequence[CellView], speed: Speed | None) -> tuple[float | None, int]:
    """Estimated seconds to go, and the number of unfinished cells of unknown speed that they leave out.

    Seconds per sample are those of the cell's own shards, else those of the same attack on other models.
    """
    if speed is None:
        return None, 0
    open_cells = [cell for cell in cells if cell.state in ("running", "missing")]
    by_attack: dict[str, list[CellView]] = {}
    for cell in cells:
        by_attack.setdefault(cell.attack, []).append(cell)
    rates = {attack: _seconds_per_sample(same) for attack, same in by_attack.items()}
    known = [(cell, _seconds_per_sample([cell]) if cell.done else rates[cell.attack]) for cell in open_cells]
    work = [each * (cell.n - cell.done) for cell, each in known if each is not None]
    unknown = len(known) - len(work)
    return (sum(work) / speed.workers if work or not unknown else None), unknown


def _seconds_per_sample(cells: Sequence[CellView]) -> float | None:
    """Seconds per computed sample of `cells`; None without any."""
    done = sum(cell.done for cell in cells)
    return sum(cell.seconds for cell in cells if cell.done) / done if done else None
