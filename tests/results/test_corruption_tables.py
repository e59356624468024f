"""The unweighted mean over 15 corruptions x 5 severities, its table, and what stays out of worst case and average."""

import csv
import io
from typing import get_args

import numpy as np
import pytest
from publish_runs import attack, cell, corruption_spec, frame, generated_spec, make_run

from robbench.data.corruption_names import Extra, Headline
from robbench.report.site.build import run_page
from robbench.report.writers import markdown, wide_csv
from robbench.results import corruptions
from robbench.results.reproduce import commands
from robbench.results.tables import leaderboard, wide
from robbench.store.records import CellResult, Run

N = 40
GRID = [(name, severity) for name in get_args(Headline) for severity in range(1, 6)]


def corruption(name: str, severity: int, rate: float, **changes: object) -> CellResult:
    rows = frame(N, 0.9, rate, seed=1000 * severity + len(name) + ord(name[0]))
    return cell("resnet", corruption_spec(name, severity), rows, nll_flow=None, **changes)


def grid() -> list[CellResult]:
    return [corruption(name, severity, 1 - 0.15 * severity) for name, severity in GRID]


def accuracies(run: Run) -> dict[tuple[str, str], float | None]:
    return {(row.attack, row.metric): row.value for row in leaderboard(run) if "accuracy" in row.metric}


def test_the_mean_gives_every_cell_the_same_weight_and_stays_apart_from_attacks() -> None:
    cells = [*grid(), corruption("saturate", 2, 0.0), cell("resnet", attack(), frame(N, 0.9, 0.6, 5))]
    run = make_run(cells, N)
    found = accuracies(run)
    mean = np.mean([result.rows["robust"].mean() for result in cells[:75]])
    assert found["corruptions", "corruption_accuracy"] == pytest.approx(100 * mean)
    under_pgd = 100 * cells[-1].rows["robust"].mean()
    clean = 100 * (cells[-1].rows["clean_prediction"] == cells[-1].rows["label"]).mean()
    assert found["worst-case", "worst_case_accuracy"] == pytest.approx(under_pgd)
    assert found["average", "average_accuracy"] == pytest.approx((clean + under_pgd) / 2)
    assert found["c-fog-3", "accuracy"] is not None, "every cell has its row in the tidy table"
    assert wide(leaderboard(run)).columns == ("clean", "pgd20", "corruptions", "worst case", "average")
    assert next(csv.reader(io.StringIO(wide_csv(wide(leaderboard(run))))))[15] == "corruptions"


def test_the_interval_is_a_bootstrap_over_images() -> None:
    """Cells that agree on every image are one observation an image, however many they are."""
    same = [corruption(name, severity, 0.5) for name, severity in GRID]
    same = [CellResult(result.cell, same[0].rows) for result in same]
    rows = {row.attack: row for row in leaderboard(make_run(same, N)) if "accuracy" in row.metric}
    mean, one = rows["corruptions"], rows["c-fog-1"]
    assert mean.value == pytest.approx(one.value)
    assert mean.lower == pytest.approx(one.lower, abs=4)
    assert mean.upper == pytest.approx(one.upper, abs=4)
    assert "worst-case" not in rows, "corruptions alone are no attacks"
    assert "average" not in rows


def test_no_mean_over_a_part() -> None:
    part = make_run(grid()[:74], N)
    assert ("corruptions", "corruption_accuracy") not in accuracies(part)
    assert "c-fog-3" in wide(leaderboard(part)).columns
    (table,) = corruptions.corruption_tables(part)
    assert [line[0] for line in table.lines[-2:]] == ["jpeg_compression", "mean"]
    for line in table.lines[-2:]:
        assert line[5:] == ("", ""), "severity 5 was not asked for, so that there is no mean either"
    lost = [*grid()[:74], corruption(*GRID[74], 0.5, status="failed", error="no file")]
    row = next(r for r in leaderboard(make_run(lost, N)) if r.metric == "corruption_accuracy")
    assert (row.status, row.value, row.note) == ("failed", None, "c-jpeg_compression-5 failed")


def test_generated_images_have_a_mean_and_a_table_of_their_own() -> None:
    published = grid()
    generated = [
        cell(
            "resnet", generated_spec(name, severity), frame(N, 0.9, 0.3, severity + len(name)), nll_flow=None
        )
        for name, severity in GRID
    ]
    run = make_run([*published, *generated], N)
    means = [
        100 * np.mean([(r.rows["margin"] > 0).mean() for r in cells]) for cells in (published, generated)
    ]
    found = accuracies(run)
    assert abs(means[0] - means[1]) > 5
    for name, mean in zip(("corruptions", "corruptions-generated"), means, strict=True):
        assert found[name, "corruption_accuracy"] == pytest.approx(mean)
    assert wide(leaderboard(run)).columns == ("clean", "corruptions", "corruptions-generated")
    first, second = corruptions.corruption_tables(run)
    assert (first.title, second.title) == ("resnet", "resnet (corruptions-generated)")
    for table, mean in zip((first, second), means, strict=True):
        assert float(table.lines[15][-1]) == pytest.approx(mean, abs=0.051)
    assert "| mean | " + " | ".join(second.lines[15][1:]) in markdown(run, leaderboard(run))
    (line,) = commands(run)
    assert " --attacks corruptions,corruptions-generated " in line
    part = wide(leaderboard(make_run([*published, *generated[:3]], N))).columns
    singles = {f"g-gaussian_noise-{severity}" for severity in (1, 2, 3)}
    assert set(part) == {"clean", "corruptions", *singles}, (
        "a part has no mean, and no mean of another hides it"
    )


def test_the_table_has_severities_across_and_extras_below_the_mean() -> None:
    extras = [corruption(name, 1, 0.5) for name in get_args(Extra)]
    run = make_run([*extras, *grid()], N)
    (table,) = corruptions.corruption_tables(run)
    assert [line[0] for line in table.lines] == [*get_args(Headline), "mean", *get_args(Extra)]
    rates = np.array([100 * result.rows["robust"].mean() for result in run.cells[4:]]).reshape(15, 5)
    printed = np.array([[float(text) for text in line[1:]] for line in table.lines[:16]])
    np.testing.assert_allclose(printed[:15, :5], rates, atol=0.051)
    np.testing.assert_allclose(printed[:15, 5], rates.mean(1), atol=0.051)
    np.testing.assert_allclose(printed[15], [*rates.mean(0), rates.mean()], atol=0.051)
    text = markdown(run, leaderboard(run))
    assert f"| mean | {' | '.join(table.lines[15][1:])} |" in text
    page = run_page(run)
    assert "Corruptions: resnet" in page
    assert f'<th scope="row">fog</th><td class="number">{table.lines[9][1]}</td>' in page
    names = ",".join(f"c-{name}-1" for name in get_args(Extra))
    assert [line.partition(" --attacks ")[2] for line in commands(run)] == [
        f"{names},corruptions --n {N} --seed 3"
    ]
