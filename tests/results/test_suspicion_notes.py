"""What a run suspects of a model stands under its tables and in the notes of the CSV, and moves no number."""

import csv
import io
from dataclasses import replace

from publish_runs import make_run
from rich.console import Console

from robbench.report.badge import badge_of
from robbench.report.site.build import run_page
from robbench.report.writers import markdown, terminal_table, tidy_csv
from robbench.results import wording
from robbench.results.parity import parity_note
from robbench.results.tables import leaderboard
from robbench.store.records import CellResult, Run

SOFTMAX = "the model returns probabilities, not logits (all 120 outputs sum to 1); return logits"
SQUARE = "Square broke 7 of the 12 samples that no gradient component broke; gradients may be masked"


def suspected(run: Run) -> Run:
    """Two cells of the second model share one suspicion, one of them has another too."""
    notes = {3: (SOFTMAX,), 4: (SQUARE, SOFTMAX)}
    cells = [
        CellResult(r.cell.model_copy(update={"suspicions": notes.get(number, ())}), r.rows)
        for number, r in enumerate(run.cells)
    ]
    return make_run(cells, run.n)


def test_a_suspicion_is_said_once_a_model(run: Run) -> None:
    before, after = (wording.problems(leaderboard(one)) for one in (run, suspected(run)))
    assert after[: len(before)] == before
    assert after[len(before) :] == [
        f"digits-ijsat, pgd20, aa: {SOFTMAX}",
        f"digits-ijsat, aa: {SQUARE}",
    ]


def test_a_search_since_withdrawn_is_said_in_every_table(run: Run) -> None:
    """Runs of earlier versions are read, shown with the same numbers, and not believed without a word."""
    cells = [
        CellResult(r.cell.model_copy(update={"search_precision": "bf16, compiled"}), r.rows)
        if number == 4
        else r
        for number, r in enumerate(run.cells)
    ]
    old = make_run(cells, run.n)
    said = "searched in bf16, which was withdrawn because it overstates robustness"
    assert wording.problems(leaderboard(old))[-1] == f"digits-ijsat, aa: {said}"
    assert said in markdown(old, leaderboard(old))
    assert said in run_page(old)
    assert parity_note(cells[4].cell) == "robbench aa: no parity table"
    assert badge_of(old, "digits-ijsat", "aa").suspicious
    assert not badge_of(old, "digits-ijsat", "pgd20").suspicious
    assert [row.value for row in leaderboard(old)] == [row.value for row in leaderboard(run)]


def test_numbers_are_as_without_it(run: Run) -> None:
    strip = [[replace(row, suspicions=()) for row in leaderboard(one)] for one in (run, suspected(run))]
    assert strip[0] == strip[1]


def test_the_csv_keeps_it_in_the_note(run: Run) -> None:
    rows = list(csv.DictReader(io.StringIO(tidy_csv(leaderboard(suspected(run))))))
    notes = {(row["model"], row["attack"]): row["note"] for row in rows if row["metric"] == "accuracy"}
    parity = parity_note(suspected(run).cells[4].cell)
    assert parity.startswith("robbench aa, parity table v")
    assert notes["digits-ijsat", "aa"] == f"{parity}; suspicious: {SQUARE}; suspicious: {SOFTMAX}"
    assert notes["digits-ijsat", "pgd20"] == f"1 of 120 samples with |margin| < 0.0001; suspicious: {SOFTMAX}"
    assert "suspicious" not in notes["digits-standard", "aa"]


def test_pages_and_terminal_show_it(run: Run) -> None:
    one = suspected(run)
    console = Console(width=400, record=True, file=io.StringIO())
    console.print(terminal_table(one))
    for text in (markdown(one, leaderboard(one)), run_page(one), console.export_text()):
        assert "digits-ijsat, pgd20, aa: the model returns probabilities, not logits" in text
        assert "Square broke 7 of the 12" in text


def test_a_failed_cell_suspects_nothing(run: Run) -> None:
    failed = CellResult(
        run.cells[4].cell.model_copy(update={"status": "failed", "error": "broke", "suspicions": (SQUARE,)}),
        run.cells[4].rows.iloc[:0],
    )
    lines = wording.problems(leaderboard(make_run([*run.cells[:4], failed, run.cells[5]], run.n)))
    assert not any(SQUARE in line for line in lines)
    assert any("failed (broke)" in line for line in lines)
