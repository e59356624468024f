"""Suspicions on their way from shards to cell.json and the tables, over resumed runs."""

import json
from pathlib import Path

import pytest
import torch
from test_run import request

from robbench.attacks import base
from robbench.cli.run import run_matrix


def suspicions(folder: Path) -> list[list[str]]:
    return [json.loads(path.read_text())["suspicions"] for path in sorted(folder.glob("cells/*/cell.json"))]


def test_shards_of_two_runs_are_judged_together(
    tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        base.Victim, "loss_gradient", lambda self, x, y: torch.zeros_like(x), raising=True
    )  # as of a model that rounds its images
    assert run_matrix(request(tiny_zoo, n=20), tmp_path) == 0
    first = suspicions(tmp_path)
    assert run_matrix(request(tiny_zoo, n=60), tmp_path) == 0
    second = suspicions(tmp_path)
    assert len(first) == len(second) == 2
    for (early,), (late,) in zip(first, second, strict=True):
        assert "(100.0 %, 95 % interval" in early
        assert "(100.0 %, 95 % interval" in late
        assert int(late.partition(" at ")[2].split()[0]) > int(early.partition(" at ")[2].split()[0])
    text = (tmp_path / "leaderboard.md").read_text()
    assert text.count("gradients may be masked") == 1
    assert "tiny-a, fgsm, pgd10: the input gradient" in text
    monkeypatch.undo()
    assert run_matrix(request(tiny_zoo, n=60), tmp_path) == 0
    assert suspicions(tmp_path) == second


def test_an_ordinary_cell_has_none(tiny_zoo: Path, tmp_path: Path) -> None:
    assert run_matrix(request(tiny_zoo, n=20), tmp_path) == 0
    assert suspicions(tmp_path) == [[], []]
