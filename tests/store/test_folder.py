"""Which output folders a run may take, and that two runs cannot share one."""

from pathlib import Path

import pytest

from robbench.core.errors import UserError
from robbench.store.folder import check_folder, open_ledger
from robbench.store.records import PlanEntry, RunFile

HASH = "c" * 64


def run_file(**changes: object) -> RunFile:
    fields = {
        "dataset": "digits",
        "dataset_revision": "d" * 64,
        "seed": 0,
        "shape": (1, 8, 8),
        "class_names": ("0", "1"),
        "n": 2,
        "models": ("m",),
        "attacks": ("pgd20",),
        "cells": (PlanEntry(hash=HASH, model="m", defense="d", attack="pgd20"),),
        "versions": {},
        "samples": "4 2",
    }
    return RunFile.model_validate(fields | changes)


def taken(folder: Path, run: RunFile) -> None:
    """Make `folder` the folder of `run`."""
    with open_ledger(folder, run, fresh=False) as ledger:
        ledger.write_run(run, {})


def test_absent_empty_and_same_run(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    check_folder(folder, run_file(), fresh=False)
    assert not folder.exists()
    taken(folder, run_file())
    taken(folder, run_file(n=1, samples="4"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"dataset": "mnist"}, "dataset digits, not mnist"),
        ({"dataset_revision": "e" * 64}, "revision dddddddddddd, not eeeeeeeeeeee"),
    ],
)
def test_another_run_is_named_and_kept(tmp_path: Path, change: dict[str, object], named: str) -> None:
    taken(tmp_path / "run", run_file())
    content = (tmp_path / "run" / "run.yaml").read_bytes()
    with (
        pytest.raises(UserError, match=f"{named}.*--out.*--fresh"),
        open_ledger(tmp_path / "run", run_file(**change), fresh=False),
    ):
        pass
    assert (tmp_path / "run" / "run.yaml").read_bytes() == content


def test_fresh_puts_another_run_aside(tmp_path: Path) -> None:
    taken(tmp_path, run_file())
    content = (tmp_path / "run.yaml").read_bytes()
    with open_ledger(tmp_path, run_file(seed=1), fresh=True):
        assert not (tmp_path / "run.yaml").exists()
    assert (tmp_path / "superseded-1" / "run.yaml").read_bytes() == content


@pytest.mark.parametrize("content", ["", "dataset: [", "dataset: digits\n"])
def test_damaged_run_file_is_named_and_fresh_puts_it_aside(tmp_path: Path, content: str) -> None:
    taken(tmp_path, run_file())
    (tmp_path / "run.yaml").write_text(content)
    with pytest.raises(UserError, match=r"run\.yaml.*--out.*--fresh"):
        check_folder(tmp_path, run_file(), fresh=False)
    with open_ledger(tmp_path, run_file(), fresh=True):
        assert not (tmp_path / "run.yaml").exists()
    assert (tmp_path / "superseded-1" / "run.yaml").read_text() == content


@pytest.mark.parametrize(
    "changes", [{"samples": "4 x"}, {"samples": "4 4"}, {"n": 7}, {"models": ("../../m",)}]
)
def test_inconsistent_run_file(tmp_path: Path, changes: dict[str, object]) -> None:
    import yaml

    content = run_file().model_dump(mode="json") | {k: v for k, v in changes.items() if k != "models"}
    content |= {"models": list(changes.get("models", ("m",)))}  # type: ignore[call-overload]
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"run\.yaml"):
        check_folder(tmp_path, run_file(), fresh=False)


def test_fresh_never_moves_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for fresh in (False, True):
        with pytest.raises(UserError, match=r"thesis\.tex"), open_ledger(tmp_path, run_file(), fresh):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="--out"), open_ledger(folder, run_file(), fresh=False):
            pass


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        open_ledger(tmp_path, run_file(), fresh=False),
        pytest.raises(UserError, match="another robbench run"),
        open_ledger(tmp_path, run_file(), fresh=False),
    ):
        pass
    with open_ledger(tmp_path, run_file(), fresh=False):
        pass


def test_a_link_in_place_of_the_lock_does_not_empty_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "notes").write_text("precious")
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "notes")
    taken(tmp_path / "run", run_file())
    assert (tmp_path / "notes").read_text() == "precious"


def test_leftovers_of_a_killed_run_are_no_foreign_files(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".run.yaml.abc.tmp").touch()
    with open_ledger(tmp_path, run_file(), fresh=False):
        pass
