"""Fixtures: runs with every situation a table must survive, for the conftest.py of the folders that want them."""

from collections.abc import Callable

import numpy as np
import pytest
from publish_runs import JSA, attack, cell, frame, images, make_run

from robbench.store.records import CellResult, Run


@pytest.fixture
def run() -> Run:
    """Two models, three attacks under two threat models, all done; one infinite likelihood, one near tie."""
    n = 120
    aa = attack("aa", algorithm="autoattack")
    cells = [
        cell("digits-standard", attack(), frame(n, 0.97, 0.05, 1)),
        cell("digits-standard", aa, frame(n, 0.97, 0.01, 2, "apgd-ce")),
        cell("digits-standard", JSA, frame(n, 0.97, 0.03, 3, "jsa50")),
        cell("digits-ijsat", attack(), frame(n, 0.92, 0.75, 4)),
        cell("digits-ijsat", aa, frame(n, 0.92, 0.70, 5, "apgd-t")),
        cell("digits-ijsat", JSA, frame(n, 0.92, 0.66, 6, "jsa50")),
    ]
    cells[0].rows.loc[5, "nll_after"] = np.inf
    cells[3].rows.loc[0, "margin"] = 5e-5
    return make_run(cells, n)


@pytest.fixture
def damaged(run: Run) -> Run:
    """The same run with a failed cell and a cell that is half done."""
    failed = cell(
        "digits-ijsat",
        run.cells[4].cell.attack,
        run.cells[4].rows.iloc[:0],
        status="failed",
        error="attack 'aa' left its set: sample 3 is 0.01 outside the linf ball",
    )
    half = CellResult(run.cells[2].cell.model_copy(update={"status": "running"}), run.cells[2].rows.iloc[:50])
    return make_run([*run.cells[:2], half, run.cells[3], failed, run.cells[5]], run.n)


@pytest.fixture
def originals() -> Callable[..., np.ndarray]:
    return images
