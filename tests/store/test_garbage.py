"""What `robbench gc` lists and removes, and above all what it leaves alone."""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from robbench.cli.app import main
from robbench.cli.run import run_matrix
from robbench.run.request import RunRequest
from robbench.store.ledger import Ledger

TABLES = ("leaderboard.csv", "leaderboard-wide.csv", "leaderboard.md", "leaderboard.html")


def request(zoo: Path, **changes: object) -> RunRequest:
    fields = {"attacks": ("fgsm",), "models": ("tiny-a",), "zoo": zoo, "n": 30, "device": "cpu"}
    return RunRequest(**(fields | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def two_plans(tiny_zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose first plan was 2 models x 2 attacks on 40 samples, and whose last is one cell on 30. Read only."""
    folder = tmp_path_factory.mktemp("two") / "run"
    more = {"attacks": ("fgsm", "pgd10"), "models": ("tiny-a", "tiny-b"), "n": 40, "keep_examples": 40}
    run_matrix(request(tiny_zoo, **more), folder)
    run_matrix(request(tiny_zoo), folder)
    return folder


@pytest.fixture
def folder(two_plans: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_plans, tmp_path / "run"))


def gc(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["gc", *map(str, arguments)])


def listed(*arguments: object) -> dict[str, list[str]]:
    """Paths of the garbage by kind, and under "left alone" what stays."""
    result = gc(*arguments, "--json")
    assert result.exit_code == 0, result.output
    found: dict[str, list[str]] = {}
    for place in json.loads(result.stdout)["places"]:
        for item in place["garbage"]:
            found.setdefault(item["kind"], []).append(os.path.relpath(item["path"], place["place"]))
        for item in place["left_alone"]:
            found.setdefault("left alone", []).append(os.path.relpath(item["path"], place["place"]))
    return found


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def old(path: Path, content: bytes = b"half") -> Path:
    """A file of two hours ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (time.time() - 7200,) * 2)
    return path


# -------------------------------------------------------------------------------------------------- cells
def test_cells_of_an_earlier_plan_are_named_and_only_removed_when_told(folder: Path) -> None:
    before = contents(folder)
    result = gc(folder)
    assert result.exit_code == 0
    assert contents(folder) == before
    for cell in ("tiny-a x pgd10", "tiny-b x fgsm", "tiny-b x pgd10"):
        assert re.search(
            rf"cell .* {cell}, 1 shard, .* s of computing; the last plan does not name it", result.output
        )
    assert "tiny-a x fgsm" not in result.output
    assert "results of earlier plans in the same folder, a larger matrix for example" in result.output
    assert "Nothing was removed; give --yes" in result.output


def test_sizes_are_those_of_the_files(folder: Path) -> None:
    cells = [
        item
        for item in json.loads(gc(folder, "--json").stdout)["places"][0]["garbage"]
        if item["kind"] == "cell"
    ]
    for item in cells:
        assert item["bytes"] == sum(path.stat().st_size for path in Path(item["path"]).iterdir())
    found = json.loads(gc(folder, "--json").stdout)
    assert found["bytes"] == sum(item["bytes"] for item in found["places"][0]["garbage"])
    assert found["removed"] is False


def test_resume_after_gc_computes_nothing_and_gives_the_same_tables(folder: Path, tiny_zoo: Path) -> None:
    tables = {name: (folder / name).read_bytes() for name in TABLES}
    planned = {path: path.stat().st_mtime_ns for path in _planned_shards(folder)}
    assert gc(folder, "--yes").exit_code == 0
    assert len(list((folder / "cells").iterdir())) == 1
    run_matrix(request(tiny_zoo), folder)
    assert {name: (folder / name).read_bytes() for name in TABLES} == tables
    assert {path: path.stat().st_mtime_ns for path in _planned_shards(folder)} == planned
    assert listed(folder) == {}


def _planned_shards(folder: Path) -> list[Path]:
    run = Ledger(folder).read_run()
    assert run is not None
    return [path for entry in run.cells for path in Ledger(folder).cell_folder(entry.hash).glob("shard-*")]


def test_removed_cells_are_computed_again_to_the_same_rows(
    folder: Path, two_plans: Path, tiny_zoo: Path
) -> None:
    assert gc(folder, "--yes").exit_code == 0
    run_matrix(request(tiny_zoo, attacks=("fgsm", "pgd10")), folder)
    for cell in (folder / "cells").iterdir():
        mine, theirs = (Ledger(place).shards(_hash(cell), _fail) for place in (folder, two_plans))
        rows = {row["sample_id"]: row["prediction"] for shard in theirs for row in shard.table.to_pylist()}
        assert all(rows[row["sample_id"]] == row["prediction"] for s in mine for row in s.table.to_pylist())


def _hash(cell: Path) -> str:
    return str(json.loads((cell / "cell.json").read_text())["hash"])


def _fail(path: Path, reason: str) -> None:
    raise AssertionError(f"{path} {reason}")


def _foreign_file(cell: Path) -> None:
    (cell / "notes.txt").write_text("mine")


def _foreign_folder(cell: Path) -> None:
    (cell / "plots").mkdir()
    (cell / "plots" / "a.png").write_bytes(b"x")


def _no_record(cell: Path) -> None:
    (cell / "cell.json").unlink()


def _no_json(cell: Path) -> None:
    (cell / "cell.json").write_text("{")


def _newer_record(cell: Path) -> None:
    record = json.loads((cell / "cell.json").read_text()) | {"schema_version": 99}
    (cell / "cell.json").write_text(json.dumps(record))


def _link(cell: Path) -> None:
    (cell / "shard-0009-abcdef01.parquet").symlink_to(cell / "cell.json")


def _other_name(cell: Path) -> None:
    cell.rename(cell.with_name("0" * 16))


def _newer_shard(cell: Path) -> None:
    import pyarrow.parquet as pq

    shard = next(cell.glob("shard-*"))
    table = pq.read_table(shard)
    metadata = dict(table.schema.metadata) | {b"robbench.schema_version": b"99"}
    pq.write_table(table.replace_schema_metadata(metadata), shard)


@pytest.mark.parametrize(
    "change",
    [_foreign_file, _foreign_folder, _no_record, _no_json, _newer_record, _newer_shard, _link, _other_name],
)
def test_a_cell_with_anything_strange_in_it_stays(folder: Path, change: Callable[[Path], None]) -> None:
    cell = next(folder / path for path in listed(folder)["cell"])
    change(cell)
    before = {path: data for path, data in contents(folder).items() if _changed_cell(path, cell)}
    found = listed(folder)
    assert len(found["cell"]) == 2
    assert len(found["left alone"]) == 1
    assert gc(folder, "--yes").exit_code == 0
    assert {path: data for path, data in contents(folder).items() if _changed_cell(path, cell)} == before
    assert before


def _changed_cell(path: Path, cell: Path) -> bool:
    return path.parent in (cell, cell / "plots", cell.with_name("0" * 16))


def test_a_damaged_shard_of_an_unplanned_cell_goes_with_it(folder: Path) -> None:
    cell = folder / listed(folder)["cell"][0]
    next(cell.glob("shard-*")).write_bytes(b"PAR1")
    assert len(listed(folder)["cell"]) == 3


# ------------------------------------------------------------------------------------- files beside the cells
def test_half_files_quarantine_and_superseded_results_go(folder: Path, tiny_zoo: Path) -> None:
    shard = _planned_shards(folder)[0]
    shard.write_bytes(b"PAR1 damaged")
    run_matrix(request(tiny_zoo), folder)
    run_matrix(request(tiny_zoo), folder, fresh=True)
    temporary = old(folder / "cells" / shard.parent.name / f".{shard.name}.a1b2c3d_.tmp")
    found = listed(folder)
    assert found["quarantine"] == ["quarantine"]
    assert found["superseded"] == ["superseded-1"]
    assert found["temporary"] == [str(temporary.relative_to(folder))]
    assert "left alone" not in found
    tables = (folder / "leaderboard.csv").read_bytes()
    assert gc(folder, "--yes").exit_code == 0
    assert not (folder / "quarantine").exists()
    assert not (folder / "superseded-1").exists()
    assert not temporary.exists()
    run_matrix(request(tiny_zoo), folder)
    assert (folder / "leaderboard.csv").read_bytes() == tables


def test_a_whole_run_put_aside_goes_except_what_is_not_of_robbench(folder: Path, tiny_zoo: Path) -> None:
    (folder / "thesis.tex").write_text("mine")
    run_matrix(request(tiny_zoo, seed=1), folder, fresh=True)
    assert (folder / "superseded-1" / "thesis.tex").exists()
    assert listed(folder)["left alone"] == ["superseded-1/thesis.tex"]
    assert gc(folder, "--yes").exit_code == 0
    left = [path.relative_to(folder).as_posix() for path in contents(folder / "superseded-1")]
    assert left == ["superseded-1/thesis.tex"]


def test_what_may_be_in_use_or_is_not_of_robbench_stays(folder: Path) -> None:
    (folder / "cards" / ".tiny-a.yaml.a1b2c3d_.tmp").write_text("being written")
    old(folder / ".mine.tmp")
    old(folder / "quarantine" / "note.txt")
    elsewhere = old(folder.parent / "elsewhere" / "shard-0000-00000000.parquet")
    (folder / "superseded-7").symlink_to(elsewhere.parent)
    (folder / "quarantine" / "originals.npz").symlink_to(elsewhere)
    names = {
        ".mine.tmp",
        "cards/.tiny-a.yaml.a1b2c3d_.tmp",
        "quarantine/note.txt",
        "quarantine/originals.npz",
    }
    found = listed(folder)
    assert set(found["left alone"]) == names
    assert not {"temporary", "quarantine", "superseded"} & set(found)
    assert gc(folder, "--yes").exit_code == 0
    assert all((folder / name).exists() for name in names)
    assert elsewhere.exists()


def test_clean_images_without_adversarial_ones_go(folder: Path) -> None:
    """40 were kept for the larger plan; the planned cell's own shard still has its 40 examples."""
    ledger = Ledger(folder)
    stored = ledger.originals()
    assert len(stored) == 40
    assert "original" not in listed(folder)
    strangers = {10**6 + k: np.zeros((1, 8, 8), np.float32) for k in range(3)}
    ledger.add_originals(strangers, _fail)
    item = next(
        i for i in json.loads(gc(folder, "--json").stdout)["places"][0]["garbage"] if i["kind"] == "original"
    )
    assert "3 of 43 clean images" in item["what"]
    assert gc(folder, "--yes").exit_code == 0
    after = ledger.originals()
    assert after.keys() == stored.keys()
    assert all(np.array_equal(after[i], stored[i]) for i in stored)


def test_clean_images_of_an_unfinished_plan_stay(folder: Path) -> None:
    run = Ledger(folder).read_run()
    assert run is not None
    for path in _planned_shards(folder):
        path.unlink()
    assert gc(folder, "--yes").exit_code == 0
    assert set(Ledger(folder).originals()) == set(run.sample_ids)


def test_cards_and_distances_of_unplanned_cells_go(folder: Path) -> None:
    found = listed(folder)
    assert found["card"] == ["cards/tiny-b.yaml"]
    (folder / "frechet").mkdir()
    (folder / "frechet" / "0123456789abcdef-01234567.json").write_text("{}")
    assert "frechet/0123456789abcdef-01234567.json" in listed(folder)["left alone"]


@pytest.mark.parametrize("name", ["cells", "cards", "frechet"])
def test_what_a_linked_folder_leads_to_stays(folder: Path, name: str) -> None:
    elsewhere = folder.parent / f"elsewhere-{name}"
    (folder / name).rename(elsewhere) if (folder / name).exists() else elsewhere.mkdir()
    old(elsewhere / ".run.yaml.abcd1234.tmp")
    (folder / name).symlink_to(elsewhere)
    before = contents(elsewhere)
    assert name in listed(folder)["left alone"]
    assert gc(folder, "--yes").exit_code == 0
    assert contents(elsewhere) == before


def test_a_cell_half_removed_is_garbage_still(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path, missing_ok: bool = False) -> None:
        os.unlink(path)
        raise KeyboardInterrupt

    cells = set(listed(folder)["cell"])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        assert gc(folder, "--yes").exit_code == 130
    assert set(listed(folder)["cell"]) == cells
    assert gc(folder, "--yes").exit_code == 0
    assert "cell" not in listed(folder)


def test_a_folder_counts_once_however_it_is_spelt(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    result = gc(folder, link, folder / ".." / folder.name, "--yes")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("tiny-b x fgsm") == 1


def test_names_that_no_terminal_can_take_are_escaped(folder: Path) -> None:
    (folder / "cells" / "\x1b[31mred").touch()
    (folder / "cells" / os.fsdecode(b"\xff")).touch()
    result = gc(folder)
    assert result.exit_code == 0, result.output
    assert r"cells/\x1b[31mred" in result.stdout
    assert r"cells/\udcff" in result.stdout


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("arguments", [[], ["--yes"]])
def test_nothing_named_is_an_error(arguments: list[str]) -> None:
    result = gc(*arguments)
    assert result.exit_code == 2
    assert "name run folders, or give --cache" in result.stderr


@pytest.mark.parametrize("yes", [[], ["--yes"]])
def test_a_folder_that_is_no_run_is_left_as_it_is(tmp_path: Path, yes: list[str]) -> None:
    (tmp_path / "cells").mkdir()
    old(tmp_path / "cells" / "0123456789abcdef" / "cell.json")
    result = gc(tmp_path, *yes)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "is not a run folder" in result.stderr
    assert [path.name for path in contents(tmp_path)] == ["cell.json"]


@pytest.mark.parametrize("yes", [[], ["--yes"]])
def test_a_run_in_progress_is_refused_and_the_others_with_it(
    folder: Path, two_plans: Path, yes: list[str]
) -> None:
    other = Path(shutil.copytree(two_plans, folder.parent / "other"))
    before = contents(folder.parent)
    with (folder / ".lock").open("r") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        result = gc(other, folder, *yes)
    assert result.exit_code == 2
    assert "is writing to" in result.stderr
    assert "leave it out" in result.stderr
    assert contents(folder.parent) == before


# ---------------------------------------------------------------------------------------------------- cache
def test_the_cache_keeps_what_nobody_can_get_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    root = tmp_path / "robbench"
    gone = [
        old(root / "frechet" / f"digits-{'a' * 32}.npz"),
        old(root / "weights" / "pt_inception-2015-12-05-6726825d.pth"),
        old(root / "weights" / ".pt_inception-2015-12-05-6726825d.pth.a1b2c3d_.tmp"),
        old(root / "checkpoints" / _downloadable()),
    ]
    stay = [
        old(root / "checkpoints" / "mine.pt"),
        old(root / "data" / "mnist" / "train.npz"),
        old(root / "frechet" / "notes.txt"),
        old(root / "other" / "file"),
    ]
    before = contents(root)
    assert gc("--cache").exit_code == 0
    assert contents(root) == before
    assert set(listed("--cache")["left alone"]) == {
        "checkpoints/mine.pt",
        "data",
        "frechet/notes.txt",
        "other",
    }
    assert gc("--cache", "--yes").exit_code == 0
    assert not any(path.exists() for path in gone)
    assert all(path.exists() for path in stay)


def _downloadable() -> str:
    """The weights file of a shipped card that has an address for it, read from the YAML itself."""
    import yaml

    from robbench.core.resources import data_root

    cards = [yaml.safe_load(path.read_text()) for path in sorted((data_root() / "zoo").glob("*/card.yaml"))]
    found = [card["weights"]["file"] for card in cards if card["weights"].get("urls")]
    if not found:
        pytest.skip("no shipped card has an address for its weights")
    return str(found[0])


def test_an_empty_cache_is_nothing_to_remove(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "absent"))
    result = gc("--cache", "--yes")
    assert result.exit_code == 0
    assert result.output.splitlines()[-1] == "Nothing to remove."
    assert not (tmp_path / "absent").exists()
