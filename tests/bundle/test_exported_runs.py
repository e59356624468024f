"""Exported runs come back as they were, in the same bytes every time; what cannot be exported is refused."""

import fcntl
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from written_runs import attack, card, cell, contents, likelihood_rows, write_run

from robbench.bundle.archive import open_bundle
from robbench.bundle.examples import ExampleChoice
from robbench.bundle.export import ExportRequest, export_run, table_digests
from robbench.bundle.manifest import Manifest
from robbench.bundle.runs import open_runs
from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.core.resources import sha256_file
from robbench.store.ledger import Ledger, load_run
from robbench.store.records import PlanEntry, Run


def exported(folder: Path, out: Path, examples: str = "all", **options: bool) -> Manifest:
    return export_run(ExportRequest(folder, out, ExampleChoice.parse(examples), **options))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Read only."""
    folder = tmp_path_factory.mktemp("written") / "run"
    write_run(folder)
    return folder


def same_rows(one: Run, other: Run, but: tuple[str, ...] = ()) -> None:
    assert [r.cell.hash for r in one.cells] == [r.cell.hash for r in other.cells]
    for mine, its in zip(one.cells, other.cells, strict=True):
        pd.testing.assert_frame_equal(mine.rows.drop(columns=[*but]), its.rows.drop(columns=[*but]))
        assert mine.cell.seconds == pytest.approx(its.cell.seconds, abs=2e-3)
        assert mine.cell.model_copy(update={"seconds": 0}) == its.cell.model_copy(update={"seconds": 0})


ids = st.lists(st.integers(0, 10**6), min_size=1, max_size=12, unique=True)


@settings(max_examples=5)
@given(ids=ids, blocks=st.integers(1, 3), share=st.integers(0, 12), seed=st.integers(0, 99))
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, ids: list[int], blocks: int, share: int, seed: int
) -> None:
    """Rows, examples, witnesses, originals, cards and records, bit for bit, however the rows lay in shards."""
    folder = tmp_path_factory.mktemp("trip")
    blocks = min(blocks, len(ids))
    write_run(folder / "run", ids=ids, blocks=blocks, kept=ids[:share], seed=seed)
    manifest = exported(folder / "run", folder / "bundle.zip")
    before = load_run(folder / "run")
    with open_bundle(folder / "bundle.zip") as bundle:
        same_rows(before, bundle.run)
        assert (bundle.run.cards, bundle.run.sample_ids) == (before.cards, before.sample_ids)
        assert bundle.manifest == manifest
        assert bundle.sha256 == sha256_file(folder / "bundle.zip")
        mine, its = Ledger(folder / "run").originals(), Ledger(bundle.folder).originals()
        assert mine.keys() == its.keys()
        assert all(np.array_equal(mine[i], its[i]) for i in mine)
        assert table_digests(bundle.run) == manifest.tables
    kept = len(ids[:share])
    assert manifest.examples.stored == manifest.examples.exported == 4 * kept
    assert manifest.examples.witnesses == 2 * kept


def test_the_same_bytes(tmp_path: Path) -> None:
    """Wherever the run lies, whenever its files were written, however its rows are cut into shards."""
    write_run(tmp_path / "a", blocks=1)
    write_run(tmp_path / "elsewhere" / "b", blocks=1)
    for path in (tmp_path / "elsewhere").rglob("*"):
        os.utime(path, (1, 1))
    exported(tmp_path / "a", tmp_path / "a.zip")
    exported(tmp_path / "elsewhere" / "b", tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_an_exported_bundle_exports_to_itself(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    exported(tmp_path / "run", tmp_path / "one.zip")
    with open_bundle(tmp_path / "one.zip") as bundle:
        exported(bundle.folder, tmp_path / "two.zip")
    assert (tmp_path / "one.zip").read_bytes() == (tmp_path / "two.zip").read_bytes()


def test_what_is_inside(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "leaderboard.html").write_text("derived")
    exported(tmp_path / "run", tmp_path / "x.zip")
    names = sorted(contents(tmp_path / "x.zip"))
    cells = [f"cells/{number:016x}" for number in (0, 1, 100, 101)]
    shard = next(name for name in names if name.startswith(cells[0]) and "shard" in name).rsplit("/", 1)[1]
    expected = ["cards/alpha.yaml", "cards/beta.yaml", "manifest.json", "originals.npz", "run.yaml"]
    expected += [f"threat_models/{name}.yaml" for name in ("joint", "linf")]
    expected += [f"{folder}/{name}" for folder in cells for name in ("cell.json", shard)]
    assert names == sorted(expected)


# ------------------------------------------------------------------------------------------------------ examples
@pytest.mark.parametrize(
    ("examples", "each"),
    [("all", 3), ("none", 0), ("0", 0), ("2", 2), ("99", 3), ("0.5", 2), ("1/3", 1), ("34%", 2), ("1.0", 3)],
)
def test_a_share_of_the_examples(written: Path, tmp_path: Path, examples: str, each: int) -> None:
    manifest = exported(written, tmp_path / "x.zip", examples)
    assert (manifest.examples.stored, manifest.examples.exported) == (12, 4 * each)
    assert [cell.examples for cell in manifest.cells] == [each] * 4
    before = load_run(written)
    with open_bundle(tmp_path / "x.zip") as bundle:
        same_rows(before, bundle.run, but=("example", "witness"))
        stored = [set(r.rows["sample_id"][r.rows["example"].notna()]) for r in bundle.run.cells]
        assert set(Ledger(bundle.folder).originals()) == set().union(*stored)
        for mine, its in zip(before.cells, bundle.run.cells, strict=True):
            there = its.rows["example"].notna()
            for name in ("example", "witness"):
                assert mine.rows[name][there].tolist() == its.rows[name][there].tolist()
                assert its.rows[name][~there].isna().all()


def test_the_choice_is_seeded() -> None:
    stored = list(range(100))
    choices = [ExampleChoice.parse("10", seed).choose(stored) for seed in (0, 0, 1)]
    assert choices[0] == choices[1] != choices[2]
    assert ExampleChoice.parse("5").choose(stored) < choices[0]


@pytest.mark.parametrize("text", ["", "some", "-1", "1.5", "101%", "1/0", "nan", "1e999999999x", "0.5.5"])
def test_no_choice(text: str) -> None:
    with pytest.raises(UserError, match=r"--examples .* is no choice; give a share"):
        ExampleChoice.parse(text)


def test_flows_keep_their_originals_in_the_rows(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", models=("alpha",), attacks=("pgd20",))
    ledger = Ledger(tmp_path / "run")
    record = cell("dense", attack("nll-in"), 900)
    record = record.model_copy(update={"nll_flow": None, "defense": "clean"})
    entry = PlanEntry(hash=record.hash, model="dense", defense="clean", attack=record.attack.label)
    flow = card("dense").model_copy(update={"kind": "flow", "classes": None, "grey_levels": 17})
    changes = {"cells": (*run.cells, entry), "models": (*run.models, "dense")}
    ledger.write_run(run.model_copy(update=changes), {"alpha": card("alpha"), "dense": flow}, [record])
    ledger.write_shard(record.hash, 0, likelihood_rows([3, 11, 5, 8, 20], [3, 11, 5], 0), 0.5)
    exported(tmp_path / "run", tmp_path / "x.zip", "1")
    with open_bundle(tmp_path / "x.zip") as bundle:
        rows = bundle.run.cells[-1].rows
        before = load_run(tmp_path / "run").cells[-1].rows
        assert rows["original"].notna().sum() == rows["example"].notna().sum() == 1
        pd.testing.assert_frame_equal(
            rows.drop(columns=["original", "example"]), before.drop(columns=["original", "example"])
        )


# ------------------------------------------------------------------------------------------------------ refusals
def refused(folder: Path, out: Path, **options: bool) -> str:
    with pytest.raises(UserError) as caught:
        exported(folder, out, **options)
    assert not out.exists() or out.is_dir() or out.read_bytes() == b"mine"
    return str(caught.value)


def damage(folder: Path, number: int, status: str = "running") -> None:
    """A cell without one of its shards, or without any and failed."""
    ledger, run = Ledger(folder), load_run(folder)
    record = run.cells[number].cell
    paths = sorted(ledger.cell_folder(record.hash).glob("shard-*"))
    for path in paths if status == "failed" else paths[:1]:
        path.unlink()
    ledger.write_cell(record.model_copy(update={"status": status, "error": "sample 3 left the ball"}))


@pytest.mark.parametrize(
    ("status", "reason"),
    [("running", "1 unfinished cell, first alpha x jsa50"), ("failed", "1 failed cell, first alpha x jsa50")],
)
def test_incomplete(tmp_path: Path, status: str, reason: str) -> None:
    write_run(tmp_path / "run")
    damage(tmp_path / "run", 1, status)
    assert reason in refused(tmp_path / "run", tmp_path / "x.zip")
    manifest = exported(tmp_path / "run", tmp_path / "x.zip", partial=True)
    assert manifest.partial
    assert [cell.status for cell in manifest.cells] == ["ok", status, "ok", "ok"]
    with open_bundle(tmp_path / "x.zip") as bundle:
        assert [r.cell.status for r in bundle.run.cells] == ["ok", status, "ok", "ok"]
        same_rows(load_run(tmp_path / "run"), bundle.run)


def test_being_written(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    with (tmp_path / "run" / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert "is writing to it" in refused(tmp_path / "run", tmp_path / "x.zip")
        assert exported(tmp_path / "run", tmp_path / "x.zip", partial=True).partial
    assert not exported(tmp_path / "run", tmp_path / "y.zip").partial


def test_changed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with more samples begins after the rows were read."""
    write_run(tmp_path / "run")

    def late(folder: Path) -> Run:
        run = load_run(folder)
        write_run(folder, ids=(3, 11, 5, 8, 20, 40))
        return run

    monkeypatch.setattr("robbench.bundle.export.load_run", late)
    assert "was changed while it was exported" in refused(tmp_path / "run", tmp_path / "x.zip")


def test_empty(tmp_path: Path) -> None:
    write_run(tmp_path / "run", blocks=0)
    assert "no finished rows" in refused(tmp_path / "run", tmp_path / "x.zip", partial=True)
    assert "not a run folder" in refused(tmp_path, tmp_path / "x.zip")


def test_targets(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    assert "is a folder" in refused(tmp_path / "run", tmp_path)
    assert "is no folder" in refused(tmp_path / "run", tmp_path / "absent" / "x.zip")
    (tmp_path / "x.zip").write_bytes(b"mine")
    assert "--overwrite" in refused(tmp_path / "run", tmp_path / "x.zip")
    exported(tmp_path / "run", tmp_path / "x.zip", overwrite=True)
    assert contents(tmp_path / "x.zip")


def test_nothing_but_a_bundle_is_overwritten(tmp_path: Path) -> None:
    """`-o RUN/run.yaml --overwrite` would be the end of the run."""
    write_run(tmp_path / "run")
    plan = (tmp_path / "run" / "run.yaml").read_bytes()
    with pytest.raises(UserError, match="is no bundle, and --overwrite replaces only those"):
        exported(tmp_path / "run", tmp_path / "run" / "run.yaml", overwrite=True)
    assert (tmp_path / "run" / "run.yaml").read_bytes() == plan


def test_a_damaged_shard_is_not_exported(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    path = next((tmp_path / "run").glob("cells/*/shard-*"))
    path.write_bytes(path.read_bytes()[:-5])
    assert "run the same `robbench run` again" in refused(tmp_path / "run", tmp_path / "x.zip")


def test_a_missing_original(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "run" / "originals.npz").unlink()
    assert "lacks sample 3" in refused(tmp_path / "run", tmp_path / "x.zip")
    assert exported(tmp_path / "run", tmp_path / "x.zip", "none").examples.exported == 0


def test_a_threat_model_that_is_not_installed(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    ledger = Ledger(tmp_path / "run")
    record = ledger.read_cell(run.cells[0].hash)
    assert record is not None
    foreign = record.attack.model_copy(update={"threat_model": "house", "name": "mine"})
    ledger.write_cell(record.model_copy(update={"attack": foreign}))
    assert "--threat-models" in refused(tmp_path / "run", tmp_path / "x.zip")


# ------------------------------------------------------------------------------------------------------ commands
def test_the_command(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    command = ["export", str(tmp_path / "run"), "-o", str(tmp_path / "x.zip"), "--examples", "1"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "4 cells, 20 rows, 4 of 12 stored examples (2 with a witness)" in result.output
    assert f"{(tmp_path / 'x.zip').stat().st_size:,} bytes" in result.output
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 2
    assert again.output.count("\n") == 1
    assert "--overwrite" in again.output


def test_folders_and_bundles_side_by_side(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    exported(tmp_path / "run", tmp_path / "x.zip")
    with open_runs([tmp_path / "x.zip", tmp_path / "run"]) as runs:
        same_rows(*runs)
        folders = [run.folder for run in runs]
        assert folders[0].is_dir()
    assert [folder.is_dir() for folder in folders] == [False, True]
    with pytest.raises(UserError, match="not a run folder"), open_runs([tmp_path / "absent"]):
        pass
