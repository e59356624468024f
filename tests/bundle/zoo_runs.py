"""Runs on the digits zoo for the tests of verify and merge, and what a forger does to them.

A forger hashes everything again: rows are written with new digests, and the run is exported anew.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from click.testing import CliRunner

from robbench.bundle.examples import ExampleChoice
from robbench.bundle.export import ExportRequest, export_run
from robbench.bundle.findings import Finding, Verification
from robbench.bundle.verify import VerifyRequest, verify_bundle
from robbench.cli.app import main
from robbench.core.resources import data_root
from robbench.store.ledger import Ledger
from robbench.store.records import CellRecord
from robbench.store.shards import SCHEMAS

N, KEPT = 10, 5
ZOO = data_root() / "zoo"


def attacked(folder: Path, models: Sequence[str], attacks: Sequence[str], *options: str) -> Path:
    """Run attacks on models of the digits zoo; returns the run folder."""
    arguments = ["run", *(part for name in models for part in ("--model", name))]
    arguments += ["--attacks", ",".join(attacks), "--n", str(N), "--keep-examples", str(KEPT)]
    result = CliRunner().invoke(main, [*arguments, *options, "--out", str(folder)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return folder


def bundled(folder: Path, out: Path) -> Path:
    """The run as a bundle; every hash, digest and count is that of what is there now."""
    export_run(ExportRequest(folder, out, ExampleChoice.parse("all"), partial=True))
    return out


def checked(bundle: Path, **options: Any) -> Verification:
    """A verification without re-runs unless `share` is given."""
    return verify_bundle(VerifyRequest(bundle, **{"share": 0.0, "seed": 1, **options}))


def differing(result: Verification) -> set[str]:
    """The checks that differ."""
    return {finding.check for finding in result.of("differs")}


def reason(result: Verification, check: str) -> str:
    found: list[Finding] = [f for f in result.findings if f.check == check and f.verdict != "agrees"]
    return " | ".join(f.reason for f in found)


# ------------------------------------------------------------------------------------------------------- forging
class Forgery:
    """A copy of a run folder to be changed and exported."""

    def __init__(self, original: Path, place: Path) -> None:
        self.folder = place / "forged"
        shutil.copytree(original, self.folder)
        self.ledger, self.out = Ledger(self.folder), place / "forged.zip"

    def record(self, model: str, attack: str) -> CellRecord:
        run = self.ledger.read_run()
        assert run is not None
        entry = next(e for e in run.cells if (e.model, e.attack) == (model, attack))
        record = self.ledger.read_cell(entry.hash)
        assert record is not None
        return record

    def edit(
        self, model: str, attack: str, change: Callable[[pd.DataFrame], pd.DataFrame | None]
    ) -> "Forgery":
        """Change rows, in place or by returning others; digests are made again."""
        record = self.record(model, attack)
        shards = self.ledger.shards(record.hash, lambda path, why: None)
        for block, shard in enumerate(shards):
            rows = shard.table.replace_schema_metadata().to_pandas()
            changed = change(rows)
            table = pa.Table.from_pandas(
                rows if changed is None else changed, SCHEMAS[record.kind], preserve_index=False
            )
            shard.path.unlink()
            self.ledger.write_shard(record.hash, block, table, shard.seconds, shard.diagnostics)
        return self

    def change_record(self, model: str, label: str, /, **changes: Any) -> "Forgery":
        self.ledger.write_cell(self.record(model, label).model_copy(update=changes))
        return self

    def bundle(self) -> Path:
        return bundled(self.folder, self.out)


def stored_row(rows: pd.DataFrame, robust: bool | None = None) -> int:
    """Index of a row that stores its example and (of a classifier) was right before the attack."""
    mask = rows["example"].notna()
    if "clean_margin" in rows:  # rows of a flow have no verdicts
        mask &= rows["clean_margin"] > 0
    if robust is not None:
        mask &= rows["robust"] == robust
    return int(mask.idxmax()) if mask.any() else -1


def say_robust(rows: pd.DataFrame, at: int) -> None:
    """Make a broken row a robust one that contradicts nothing in itself."""
    rows.loc[at, "prediction"] = rows.loc[at, "label"]
    rows.loc[at, "margin"], rows.loc[at, "cross_entropy"] = 2.0, 0.2
    rows.loc[at, "robust"], rows.loc[at, "broken_at"] = True, -1
    rows.loc[at, "broken_by"] = None
