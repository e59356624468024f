"""Run folders on disk, from runs that tests make in memory."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from publish_runs import images

from robbench.specs import ModelKind
from robbench.store.ledger import Ledger
from robbench.store.records import PlanEntry, Run, RunFile, join_ids
from robbench.store.shards import SCHEMAS


def written(run: Run, folder: Path, originals: bool = True) -> Path:
    """Write `run` as a run folder; returns it. Cells without rows have no shard."""
    ledger = Ledger(folder)
    entries = [
        PlanEntry(hash=r.cell.hash, model=r.cell.model, defense=r.cell.defense, attack=r.cell.attack.label)
        for r in run.cells
    ]
    plan = RunFile(
        dataset=run.dataset,
        dataset_revision=run.dataset_revision,
        seed=run.seed,
        shape=run.shape,
        class_names=run.class_names,
        data=run.data,
        n=run.n,
        models=tuple(run.cards),
        attacks=tuple(dict.fromkeys(entry.attack for entry in entries)),
        cells=tuple(entries),
        versions=run.versions,
        samples=join_ids(run.sample_ids),
        note=run.note,
    )
    ledger.write_run(plan, run.cards, [r.cell for r in run.cells])
    for result in run.cells:
        if len(result.rows):
            ledger.write_shard(result.cell.hash, 0, _table(result.rows, result.cell.attack.target), 1.25)
    if originals:
        _add_originals(ledger, run)
    return folder


def _table(rows: pd.DataFrame, target: ModelKind) -> pa.Table:
    schema = SCHEMAS[target]
    return pa.Table.from_pandas(rows.reindex(columns=schema.names), schema=schema, preserve_index=False)


def _add_originals(ledger: Ledger, run: Run) -> None:
    kept = sorted({int(i) for r in run.cells for i in r.rows.loc[r.rows["example"].notna(), "sample_id"]})
    stored = dict(zip(kept, np.asarray(images(kept), dtype=np.float32), strict=True)) if kept else {}
    ledger.add_originals(stored, lambda path, reason: None)
