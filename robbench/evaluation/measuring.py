"""Measuring the cells of a plan: in memory, or in a run folder that keeps and resumes them."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import torch
from torch import Tensor

from robbench.attacks import Victim
from robbench.attacks.search.decision import margins
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.trust.context import full_precision
from robbench.attacks.trust.suspicions import Diagnostics
from robbench.core.errors import UserError, spell_argument
from robbench.core.places import check_output_folder
from robbench.core.terminal import Terminal, print_line
from robbench.report.files import write_tables
from robbench.run.cells import SHARD_SIZE, ClassifierCell
from robbench.run.executor import execute, open_backend, score_text
from robbench.run.plan import Plan
from robbench.run.progress import LiveProgress, RunProgress, run_progress
from robbench.run.shard_work import tabulate
from robbench.specs import ResolvedAttack
from robbench.store.columns import decode_images
from robbench.store.folder import check_not_foreign, open_ledger
from robbench.store.ledger import Ledger, load_run
from robbench.store.records import CellRecord
from robbench.store.shards import shown_values

if TYPE_CHECKING:
    import pandas as pd

AGREEMENT = 1e-3  # of margins of one model on two machines, relative to those above 1


@dataclass(frozen=True)
class Measured:
    """An attack and its samples.

    Attributes:
        spec: the attack.
        rows: columns of the ledger, one row per sample in ascending order of ids.
        suspicions: what speaks against its number, one line each.
        images: adversarial images [N,C,H,W] on the CPU; None where they were not kept.
    """

    spec: ResolvedAttack
    rows: "pd.DataFrame"
    suspicions: tuple[str, ...]
    images: Tensor | None = None


class Silence:
    """A `RunProgress` that shows nothing."""

    def on_start(self, cell: int, record: CellRecord, done: int) -> None:
        """Nothing."""

    def on_advance(self, cell: int, done: int, score: str) -> None:
        """Nothing."""

    def on_end(self, cell: int, record: CellRecord, done: int, score: str) -> None:
        """Nothing."""

    def message(self, line: str) -> None:
        """Nothing."""


def show_progress(plan: Plan, notes: tuple[str, ...], shown: bool) -> AbstractContextManager[RunProgress]:
    """On stderr a live table in terminals and notebooks, plain lines anywhere else; nothing unless `shown`."""
    if not shown:
        return nullcontext(Silence())
    console = Terminal(stderr=True)
    for note in notes:
        print_line(console, note)
    records = [cell.record for cell in plan.cells]
    if console.is_jupyter and find_spec("ipywidgets") is not None:
        return LiveProgress(console, records, len(plan.samples))
    return run_progress(console, records, len(plan.samples))


def measure_in_memory(plan: Plan, victim: Victim, progress: RunProgress, keep: bool) -> list[Measured]:
    """Every cell of `plan`; what an attack raises is raised."""
    found = []
    for number, cell in enumerate(plan.cells):
        assert isinstance(cell, ClassifierCell)
        progress.on_start(number, cell.record, 0)
        found.append(_measure(plan, cell, victim, keep, partial(progress.on_advance, number)))
        score = score_text(cell.record, _values(found[-1].rows, cell))
        progress.on_end(number, cell.record, len(plan.samples), score)
    return found


def _measure(
    plan: Plan, cell: ClassifierCell, victim: Victim, keep: bool, advanced: Callable[[int, str], None]
) -> Measured:
    tables, images, seen, done = [], [], Diagnostics(), 0
    values: dict[int, float] = {}
    for part in _blocks(len(plan.samples), plan.batch_size):
        test = plan.dataset.test
        ids, x, y = test.ids[part], test.x(torch.arange(len(test))[part]), test.labels[part]
        outcome = cell.attack.evaluate(victim, ids, x, y, seed=plan.run.seed, batch_size=plan.batch_size)
        nothing = [None] * len(ids)
        tables.append(tabulate("classifier", outcome, frozenset(), dict.fromkeys(_BESIDE, nothing)))
        images += [outcome.adversarial] if keep else []
        seen, done = seen + outcome.diagnostics, done + len(ids)
        values |= shown_values(tables[-1], cell.attack.spec.semantics)
        advanced(done, score_text(cell.record, values))
    rows = pa.concat_tables(tables).to_pandas()
    suspicions = tuple(one.text for one in seen.suspicions)
    return Measured(cell.attack.spec, rows, suspicions, torch.cat(images) if keep else None)


_BESIDE = ("nll_before", "nll_after", "witness")


def _blocks(n: int, batch_size: int) -> Iterator[slice]:
    """Whole batches, at least a shard of them, so that progress shows and no attack depends on where a block ends."""
    size = batch_size * -(-SHARD_SIZE // batch_size)
    return (slice(start, start + size) for start in range(0, n, size))


def _values(rows: "pd.DataFrame", cell: ClassifierCell) -> dict[int, float]:
    shown = rows["margin"] > 0 if cell.attack.spec.semantics == "perturbation" else rows["robust"]
    return dict(zip(rows["sample_id"].tolist(), map(float, shown), strict=True))


def require_run_folder(folder: Path) -> None:
    """`UserError` where no run can be written; before anything is computed."""
    check_not_foreign(folder)
    check_output_folder(folder, "out")


def measure_in_folder(
    plan: Plan, victim: Victim, progress: RunProgress, folder: Path, fresh: bool, keep: bool
) -> list[Measured]:
    """Every cell of `plan` in the ledger of `folder`, what is there already is kept; then its tables and pages.

    `UserError` where the folder's rows are of a model that answers otherwise, and after the run for failed attacks.
    """
    with open_backend(plan) as backend, open_ledger(folder, plan.run, fresh) as ledger:
        _require_same_model(plan, victim, ledger)
        execute(plan, ledger, progress, backend)
        run = load_run(folder)
        write_tables(run, folder)
    failed = [result.cell for result in run.cells if result.cell.status != "ok"]
    if failed:
        others = "; the other attacks are in it" if len(failed) < len(run.cells) else ""
        raise UserError(
            f"{', '.join(cell.attack.label for cell in failed)} failed: {failed[0].error or 'not complete'}; the run "
            f"is in {str(folder)!r}{others}"
        )
    return [
        Measured(
            one.cell.attack, one.rows, one.cell.suspicions, _examples(one.rows, run.shape) if keep else None
        )
        for one in run.cells
    ]


def _examples(rows: "pd.DataFrame", shape: tuple[int, int, int]) -> Tensor | None:
    """The images of the rows; None where an earlier call has not kept them all."""
    kept = rows["example"]
    return None if kept.isna().any() else torch.from_numpy(decode_images(kept.tolist(), shape).copy())


def _require_same_model(plan: Plan, victim: Victim, ledger: Ledger) -> None:
    """The address of a cell holds what Python shows of a model; that it still answers the clean images as its rows say
    is seen here."""
    stored: dict[int, float] = {}
    for cell in plan.cells:
        if isinstance(cell, ClassifierCell) and cell.attack.verdict_forwards == 1:
            for shard in ledger.shards(cell.record.hash, lambda _path, _reason: None):
                stored |= dict(zip(shard.ids, shard.table["clean_margin"].to_pylist(), strict=True))
    ids = sorted(stored.keys() & set(plan.samples))
    if not ids:
        return
    x, y = plan.dataset.test.by_ids(ids)
    with attack_mode(victim.module), full_precision():
        now = margins(victim.clean_logits(x), y)
    before = torch.tensor([stored[i] for i in ids])
    if bool(((now - before).abs() > AGREEMENT * before.abs().clamp(min=1.0)).any()):
        raise UserError(
            f"out={str(ledger.folder)!r} holds rows of a model that looks the same and gives other logits now; give "
            f"another {spell_argument('out')}, or {spell_argument('fresh', True)} to put them aside"
        )
