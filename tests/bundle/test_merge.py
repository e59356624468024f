"""Bundles become one run folder or one bundle; what is no one leaderboard is refused, and nothing is written."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from zoo_runs import Forgery, N, attacked, bundled, checked, say_robust, stored_row

from robbench.bundle.archive import open_bundle
from robbench.cli.app import main
from robbench.report.writers import markdown
from robbench.results.tables import leaderboard
from robbench.store.ledger import Ledger, load_run

AT, IJSAT = "digits-at", "digits-ijsat"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models, three cells; one of them in both runs."""
    place = tmp_path_factory.mktemp("parts")
    return {
        "one": attacked(place / "one", [AT], ["pgd10", "fgsm"]),
        "two": attacked(place / "two", [AT, IJSAT], ["pgd10"]),
    }


@pytest.fixture(scope="module")
def bundles(runs: dict[str, Path]) -> tuple[Path, Path]:
    one, two = (bundled(folder, folder.with_suffix(".zip")) for folder in runs.values())
    return one, two


def merged(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["merge", *map(str, arguments)])


def test_round_trip(bundles: tuple[Path, Path], runs: dict[str, Path], tmp_path: Path) -> None:
    """Both bundles are verified first; the union has every cell once and every number as it was."""
    out = tmp_path / "union"
    result = merged(*bundles, "-o", out, "--share", 0.5, "--rerun-samples", 3, "--model", IJSAT)
    assert result.exit_code == 0, result.output
    union, parts = load_run(out), [load_run(folder) for folder in runs.values()]
    cells = {(r.cell.model, r.cell.attack.label): r for r in union.cells}
    assert list(cells) == [(AT, "pgd10"), (AT, "fgsm"), (IJSAT, "pgd10")]
    for part in parts:
        for theirs in part.cells:
            mine = cells[theirs.cell.model, theirs.cell.attack.label]
            pd.testing.assert_frame_equal(mine.rows, theirs.rows)
    singles = {
        (r.model, r.attack, r.metric): r for part in parts for r in leaderboard(part) if r.attack in cells
    }
    assert {(r.model, r.attack, r.metric) for r in leaderboard(union)} >= singles.keys()
    assert union.n == N
    assert "re-scored, 50 % of the cells re-run on 3 samples each" in union.note
    assert "one.zip" in markdown(union, leaderboard(union))
    originals = Ledger(out).originals()
    for folder in runs.values():
        for i, image in Ledger(folder).originals().items():
            assert np.array_equal(originals[i], image)


def test_into_a_bundle_that_verifies(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "union.zip"
    result = merged(*bundles, "-o", out, "--files-only")
    assert result.exit_code == 0, result.output
    assert checked(out).exit_code == 0
    with open_bundle(out) as bundle:
        assert len(bundle.run.cells) == 3
        assert "not re-scored" in bundle.run.note
        assert "not re-scored" in markdown(bundle.run, leaderboard(bundle.run))


def test_the_order_does_not_change_the_numbers(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    found = []
    for number, order in enumerate([bundles, bundles[::-1]]):
        out = tmp_path / str(number)
        assert merged(*order, "-o", out, "--files-only").exit_code == 0
        rows = leaderboard(load_run(out))
        found.append(
            {(r.model, r.attack, r.threat_model, r.metric): (r.value, r.lower, r.upper) for r in rows}
        )
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------------------------- refusals
def refused(result: Result, code: int, why: str, out: Path) -> None:
    assert result.exit_code == code, result.output
    assert why in " ".join(result.output.split())
    assert not out.exists()
    assert not list(out.parent.glob(".robbench-merge-*"))


def test_a_bundle_that_does_not_verify(
    bundles: tuple[Path, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    forgery = Forgery(runs["two"], tmp_path)
    forgery.edit(IJSAT, "pgd10", lambda rows: say_robust(rows, stored_row(rows, robust=False)))
    out = tmp_path / "union"
    result = merged(bundles[0], forgery.bundle(), "-o", out, "--share", 0)
    refused(result, 1, "a bundle does not verify", out)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--seed", "5"], "seed is 0 in"),
        (["--n", "9"], "number of samples is"),
        (["--epsilon", "0.1"], None),  # pgd10@0.1 is another attack under another name
    ],
)
def test_other_runs(bundles: tuple[Path, Path], tmp_path: Path, options: list[str], why: str | None) -> None:
    other = bundled(attacked(tmp_path / "run", [IJSAT], ["pgd10"], *options), tmp_path / "other.zip")
    out = tmp_path / "union"
    result = merged(bundles[0], other, "-o", out, "--files-only")
    if why is None:
        assert result.exit_code == 0, result.output
    else:
        refused(result, 2, why, out)


def test_one_cell_with_two_results(bundles: tuple[Path, Path], runs: dict[str, Path], tmp_path: Path) -> None:
    forgery = Forgery(runs["two"], tmp_path)
    forgery.edit(AT, "pgd10", lambda rows: say_robust(rows, stored_row(rows, robust=False)))
    out = tmp_path / "union"
    refused(merged(bundles[0], forgery.bundle(), "-o", out, "--files-only"), 2, "has 1 rows in", out)


def test_an_output_that_is_taken(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep")
    for out, why in ((tmp_path / "full", "exists"), (tmp_path / "no" / "where", "is no folder")):
        result = merged(*bundles, "-o", out, "--files-only")
        assert result.exit_code == 2
        assert why in " ".join(result.output.split())
    assert (tmp_path / "full" / "mine").read_text() == "keep"


def test_an_output_that_cannot_be_replaced(
    bundles: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before anything is verified."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path / "real")
    for out, why in ((tmp_path / "link", "is a link"), (".", "is the folder you are in")):
        result = merged(*bundles, "-o", out, "--files-only")
        assert result.exit_code == 2
        assert why in result.output
        assert "agrees" not in result.output


def test_too_few(bundles: tuple[Path, Path], tmp_path: Path) -> None:
    assert "at least two" in merged(bundles[0], "-o", tmp_path / "x").output
    assert "named twice" in merged(bundles[0], bundles[0], "-o", tmp_path / "x").output
    (tmp_path / "copy.zip").write_bytes(bundles[0].read_bytes())
    result = merged(bundles[0], tmp_path / "copy.zip", "-o", tmp_path / "x", "--files-only")
    assert "are the same; name one of them" in result.output
