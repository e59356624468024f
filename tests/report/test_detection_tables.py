"""Guarded classifiers in tables and pages: oblivious beside adaptive attacks, no rank without these, ROC curves."""

import csv
import io
import re
from pathlib import Path

import pytest
from detection_rows import ADAPTIVE, GUARD, random_cell
from publish_runs import attack, cell, frame, make_run
from rich.console import Console

from robbench.metrics.detection import scored
from robbench.report.site.boards import boards
from robbench.report.site.downloads import group_tables
from robbench.report.site.groups import site_of
from robbench.report.site.model_detection import detection_section, roc_lines
from robbench.report.site.model_page import parts
from robbench.report.site.ranks import ranges
from robbench.report.terminal import terminal_detection
from robbench.report.writers import detection_csv, markdown
from robbench.results.detection import detection_table
from robbench.results.rows import OBLIVIOUS, models
from robbench.results.tables import leaderboard
from robbench.results.wording import problems
from robbench.statistics.roc import roc_curve
from robbench.store.records import Run

N = 60
PLAIN, KNOWN, IGNORED = "digits-standard", "digits-standard-kde", "digits-standard-lid"


@pytest.fixture(scope="module")
def run() -> Run:
    """A plain classifier, and two guarded ones of which only the first met an attack that knows its detector."""
    cells = [
        cell(PLAIN, attack(), frame(N, 0.9, 0.2, 1)),
        random_cell(N, 1, attack(), KNOWN),
        random_cell(N, 2, ADAPTIVE, KNOWN),
        random_cell(N, 3, attack(), IGNORED),
    ]
    return make_run(cells, N)


def shown(run: Run, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(terminal_detection(run))
    return console.export_text()


def test_oblivious_and_adaptive_attacks_stand_side_by_side(run: Run) -> None:
    lines = detection_table(run, leaderboard(run)).lines
    assert [(line.model, *line.names[1:], line.oblivious) for line in lines] == [
        (KNOWN, "pgd20", "oblivious", False),
        (KNOWN, "adaptive-pgd", "adaptive", False),
        (IGNORED, "pgd20", "oblivious", True),
    ]
    text = shown(run)
    assert re.search(r"pgd20 +adaptive-pgd", text)
    assert re.search(r"oblivious +adaptive", text)
    assert max(map(len, shown(run, 80).splitlines())) <= 80


def test_acc_com_never_stands_without_acc_nadv(run: Run) -> None:
    rows = leaderboard(run)
    texts = [
        shown(run),
        markdown(run, rows),
        detection_csv(detection_table(run, rows)).upper().replace("_", "-"),
    ]
    for text in texts:
        assert text.index("ACC-NADV") < text.index("ACC-COM")
    assert markdown(run, rows).count("| ACC-COM |") == 1  # in no table of its own


def test_a_model_without_an_adaptive_attack_is_marked_everywhere(run: Run) -> None:
    rows = leaderboard(run)
    marked = {(row.model, row.attack) for row in rows if row.oblivious}
    assert marked == {(IGNORED, "pgd20"), (IGNORED, "worst-case"), (IGNORED, "average")}
    line = f"{IGNORED}: {OBLIVIOUS}"
    assert problems(rows).count(line) == 1
    assert " ".join(shown(run).split()).count(line) == 1
    assert f"* {line}" in markdown(run, rows)
    notes = {row.note for row in rows if row.oblivious and row.attack == "pgd20" and row.kind.accuracy}
    assert all(OBLIVIOUS in note for note in notes)
    table = list(csv.DictReader(io.StringIO(detection_csv(detection_table(run, rows)))))
    assert [row["adaptive_run"] for row in table] == ["true", "true", "false"]
    assert [row["knows_detector"] for row in table] == ["false", "true", "false"]
    assert table[0]["detector"] == GUARD.name


def test_an_adaptive_attack_that_failed_is_none(run: Run) -> None:
    failed = random_cell(N, 2, ADAPTIVE, KNOWN)
    failed = type(failed)(
        failed.cell.model_copy(update={"status": "failed", "error": "broke"}), failed.rows.iloc[:0]
    )
    again = make_run([run.cells[1], failed], N)
    assert {row.oblivious for row in leaderboard(again) if row.attack == "pgd20" and row.kind.attacked} == {
        True
    }
    assert "failed" in shown(again)


def test_a_plain_classifier_lacks_no_adaptive_attack_and_a_guarded_one_needs_it_for_a_rank(run: Run) -> None:
    assert {row.status for row in leaderboard(run) if row.model == PLAIN} == {"ok"}
    assert ranges(run, models(run), ["pgd20", "adaptive-pgd"]).keys() == {PLAIN, KNOWN}
    board, *_ = boards(site_of([run]).groups[0])
    assert board.accuracies is not None
    cells = {line[0].text: line for line in board.accuracies.lines}
    place = board.accuracies.column("rank")
    assert place is not None
    assert OBLIVIOUS in cells[IGNORED][place].note
    assert cells[KNOWN][place].kind == "rank"


def test_a_page_has_the_table_the_curves_and_their_points(run: Run) -> None:
    site = site_of([run])
    (group,) = site.groups
    pages = {page.title: str(page.body) for page in parts(site)}
    assert 'id="detection"' not in pages[PLAIN]
    assert "accuracy with rejection" in pages[KNOWN]
    assert "pgd20, oblivious" in pages[KNOWN]
    assert "adaptive-pgd, adaptive" in pages[KNOWN]
    assert f"<li>{IGNORED}: {OBLIVIOUS}</li>" in pages[IGNORED]
    names = {Path(table.path).name: table for table in group_tables(group)}
    points = names[f"model-{KNOWN}-roc"]
    assert f"model-{PLAIN}-roc" not in names
    curve = roc_curve(scored(run.cells[2]))
    assert curve is not None
    mine = [line[2:] for line in points.lines if line[:2] == ("adaptive-pgd", "true")]
    assert mine == list(zip(curve.false_positives.tolist(), curve.true_positives.tolist(), strict=True))


def test_the_figure_draws_the_points_of_the_file(run: Run) -> None:
    known = next(model for model in models(run) if model.name == KNOWN)
    section = detection_section(run, known, leaderboard(run), plain=False)
    assert section is not None
    assert section.figure is not None
    assert [name for _, name in section.figure.legend] == ["pgd20, oblivious", "adaptive-pgd, adaptive"]
    attacked = {line[0] for line in roc_lines(run, known)}
    assert attacked == {"pgd20", "adaptive-pgd"}
    at_five = max(100 * float(y) for a, _, x, y in roc_lines(run, known) if a == "pgd20" and float(x) <= 0.05)
    assert f"{at_five:.1f} at 5" in section.figure.svg
    assert detection_section(run, models(run)[0], [], plain=False) is None
