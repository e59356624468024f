"""Which accuracy a column shows, in every output: robust accuracy of a worst case, accuracy under attack of a
perturbation; and what worst cases, averages, comparisons and old runs make of both."""

import csv
import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from publish_runs import attack, cell, frame, make_run

from robbench.bundle.archive import open_bundle
from robbench.compare.numbers import Numbers
from robbench.compare.paired import compare_samples
from robbench.compare.pairing import pair_runs
from robbench.compare.samples import of_run, read_samples, write_reference
from robbench.compare.tables import check
from robbench.experiments.comparison import Known, compare, measured_rows
from robbench.experiments.published import published_index, published_table, table_rows
from robbench.experiments.table import Measurements
from robbench.report.badge import badge_of
from robbench.report.mlflow_export import model_exports
from robbench.report.site.model_joint import joint
from robbench.report.site.ranks import ranges
from robbench.report.writers import markdown, tidy_csv, wide_csv
from robbench.results.pairs import pack_run, unpack
from robbench.results.tables import leaderboard, models, wide
from robbench.specs import ResolvedAttack
from robbench.store.records import CellResult, Run

N = 120
BUNDLES = Path(__file__).parents[2] / "reports" / "runs"


def make_cell(name: str, spec: ResolvedAttack, n: int, clean: float, robust: float, seed: int) -> CellResult:
    return cell(name, spec, frame(n, clean, robust, seed, spec.name))


def random_latent(semantics: str = "perturbation") -> object:
    return attack(
        "r-la", "flow-lp-linf", None, space="latent", eta=0.25, algorithm="random-latent", semantics=semantics
    )


def perturbed(result: CellResult, wrong: np.ndarray) -> CellResult:
    """The cell with verdicts on the perturbed images instead of its own: wrong [n]."""
    rows, right = result.rows, result.rows["clean_margin"].to_numpy() > 0
    robust = right & ~wrong
    label = rows["label"].to_numpy()
    changed = rows.assign(
        margin=np.where(wrong, -1.0, 1.0).astype(np.float32),
        prediction=np.where(wrong, (label + 1) % 10, label),
        robust=robust,
        broken_by=pd.Series(np.where(robust, None, np.where(right, "r-la", "clean")), dtype=object),
    )
    return CellResult(result.cell, changed)


@pytest.fixture(scope="module")
def run() -> Run:
    """PGD, and an R-LA under which a model that is wrong on a part of the clean images is always right."""
    pgd = make_cell("m", attack(), N, 0.7, 0.5, 1)
    latent = perturbed(make_cell("m", random_latent(), N, 0.7, 0.5, 2), np.zeros(N, np.bool_))
    return make_run([pgd, latent], N)


def clean_share(run: Run) -> float:
    return 100 * float((run.cells[0].rows["clean_margin"] > 0).mean())


def test_rows_show_both_numbers_and_name_them(run: Run) -> None:
    rows = {(row.attack, row.metric): row for row in leaderboard(run) if row.metric.endswith("accuracy")}
    assert rows["clean", "accuracy"].measure == "accuracy"
    assert rows["pgd20", "accuracy"].measure == "robust accuracy"
    under, robust = rows["r-la", "accuracy"], rows["r-la", "robust_accuracy"]
    assert (under.value, under.measure) == (100.0, "accuracy under attack")
    assert (robust.value, robust.measure) == (pytest.approx(clean_share(run)), "robust accuracy")
    assert ("pgd20", "robust_accuracy") not in rows


def test_the_worst_case_is_of_adversaries_and_the_average_of_what_columns_show(run: Run) -> None:
    rows = [row for row in leaderboard(run) if row.attack in ("worst-case", "average")]
    pgd = 100 * float(run.cells[0].rows["robust"].mean())
    worst = [row for row in rows if row.attack == "worst-case"]
    assert [(row.value, row.note, row.measure) for row in worst] == [
        (pytest.approx(pgd), "over pgd20", "robust accuracy")
    ] * 2
    average = next(row for row in rows if row.attack == "average")
    assert average.value == pytest.approx((clean_share(run) + pgd + 100.0) / 3)
    alone = make_run(run.cells[1:], N)
    assert not [row for row in leaderboard(alone) if row.attack == "worst-case"]


def test_every_output_says_which_accuracy_a_column_shows(run: Run) -> None:
    rows = leaderboard(run)
    table = wide(rows)
    assert "r-la (robust)" in table.columns
    (line,) = csv.DictReader(io.StringIO(wide_csv(table)))
    assert (line["r-la_measure"], line["pgd20_measure"]) == ("accuracy under attack", "robust accuracy")
    assert (float(line["r-la"]), line["r-la (robust)_measure"]) == (100.0, "robust accuracy")
    tidy = {(r["attack"], r["metric"]): r["measure"] for r in csv.DictReader(io.StringIO(tidy_csv(rows)))}
    assert tidy["r-la", "accuracy"] == "accuracy under attack"
    text = markdown(run, rows)
    assert "Robust accuracy (right on the clean image and under attack): pgd20." in text
    assert "all images are perturbed, misclassified ones too): r-la." in text
    assert badge_of(run, None, "r-la").label.startswith("digits accuracy under attack, r-la")
    (export,) = model_exports(run)
    assert "r-la" in export.tags["robbench.measures"]
    assert export.metrics["accuracy/r-la"] == 100.0
    assert export.metrics["robust_accuracy/r-la"] == pytest.approx(clean_share(run))


def test_pairs_ranks_and_joint_counts_follow_the_tables(run: Run) -> None:
    packed = pack_run(run)["m"]
    assert packed.attacks["r-la"] is not None
    assert unpack(packed.attacks["r-la"], N).all()
    assert packed.worst["all"] == packed.attacks["pgd20"]
    assert "flow-lp-linf@0.25" not in packed.worst
    assert ranges(run, models(run), ["pgd20"]) == {"m": (1, 1)}
    assert joint(run.cells).n == N


def test_a_diff_compares_what_both_tables_show(run: Run) -> None:
    lost = np.arange(N) < 30
    other = make_run([run.cells[0], perturbed(run.cells[1], lost)], N)
    changes = {
        c.attack: c for c in Numbers(pair_runs(run, other, ("A", "B")), 0.95).all() if c.metric == "accuracy"
    }
    assert (changes["r-la"].a.value, changes["r-la"].b.value) == (100.0, 75.0)
    assert len(changes["r-la"].fell) == 30, "also those that are wrong on the clean image"
    assert changes["r-la"].measure == "accuracy under attack"
    before = make_run([run.cells[0], replace_semantics(run.cells[1])], N)
    mixed = {
        c.attack: c for c in Numbers(pair_runs(before, run, ("A", "B")), 0.95).all() if c.metric == "accuracy"
    }
    assert mixed["r-la"].measure == "robust accuracy"
    assert mixed["r-la"].difference == 0.0
    assert any("accuracy under attack" in note for note in mixed["r-la"].notes)


def replace_semantics(result: CellResult) -> CellResult:
    """The cell as it was recorded before semantics were declared."""
    old = result.cell.attack.model_copy(update={"semantics": "worst-case"})
    return CellResult(result.cell.model_copy(update={"attack": old}), result.rows)


def test_a_reference_run_sees_a_perturbed_image_go_wrong_whose_clean_one_is_wrong(
    run: Run, tmp_path: Path
) -> None:
    write_reference(of_run(run), tmp_path / "r.parquet", "first")
    reference = read_samples(tmp_path / "r.parquet")
    wrong = ~(run.cells[1].rows["clean_margin"].to_numpy() > 0)
    assert wrong.sum() > 10
    now = of_run(make_run([run.cells[0], perturbed(run.cells[1], wrong)], N))
    assert not [item for item in compare_samples(reference, of_run(run)) if item.regression]
    failing = [item for item in compare_samples(reference, now) if item.regression]
    assert {(item.attack) for item in failing} == {"r-la"}


def test_a_leaderboard_of_before_is_checked_by_what_it_names(run: Run, tmp_path: Path) -> None:
    columns = "dataset,model,attack,metric,value\n"
    file = tmp_path / "t.csv"
    file.write_text(
        f"{columns}digits,m,r-la,accuracy,100\ndigits,m,r-la,robust_accuracy,{clean_share(run)}\n"
    )
    assert [result.verdict for result in check(run, file)] == ["pass", "pass"]
    row = next(row for row in leaderboard(run) if (row.attack, row.metric) == ("r-la", "robust_accuracy"))
    old = {**asdict(row), "metric": "accuracy"}
    del old["measure"]
    file.write_text(f"{','.join(old)}\n{','.join('' if v is None else str(v) for v in old.values())}\n")
    (result,) = check(run, file)
    assert (result.verdict, result.reason) == (
        "not run",
        "the reference is robust accuracy, the run's number accuracy under attack",
    )


# ---------------------------------------------------------------------------------------------------- published
def test_papers_are_compared_by_accuracy_under_attack(run: Run) -> None:
    """A last iterate may be right where the clean image is not; tables show robust accuracy, papers the other."""
    last = perturbed(
        make_cell("m", attack(parameters={"early_stop": False}), N, 0.7, 0.5, 1), np.arange(N) < 30
    )
    whole = make_run([last, run.cells[1]], N)
    shown = {row.attack: row.value for row in leaderboard(whole) if row.metric == "accuracy"}
    papers = {m.attack: m.row for m in measured_rows(whole) if m.row.metric == "accuracy"}
    assert shown["pgd20"] < papers["pgd20"].value == 75.0
    assert {papers[name].measure for name in ("pgd20", "r-la")} == {"accuracy under attack"}
    measured = Measurements(whole, {"m": ("m",)}, {}, {})
    assert measured.of("m", "pgd20", "accuracy").value == 75.0
    drop = measured.of("m", "pgd20", "accuracy_drop").value
    assert drop == pytest.approx(100 * (1 - 75.0 / clean_share(whole)))


def test_an_r_la_of_before_that_left_images_alone_gets_no_verdict(run: Run) -> None:
    index = published_index()
    rows = [row for row in table_rows(published_table("flow-lp-table6", index)) if row.attack == "r-la"]
    row = next(row for row in rows if row.metric == "accuracy")
    known = Known({"r-la"}, {row.defense}, {row.dataset})

    def differences(cell: CellResult) -> list[str]:
        record = cell.cell.model_copy(update={"defense": row.defense})
        (found,) = compare([row], measured_rows(make_run([CellResult(record, cell.rows)], N)), known)
        return [d.what for d in found.differences if d.effect == "no verdict"]

    assert "misclassified images" not in differences(run.cells[1])
    assert "misclassified images" in differences(replace_semantics(run.cells[1]))


# --------------------------------------------------------------------------------------------------- old bundles
@pytest.mark.skipif(not (BUNDLES / "digits.zip").exists(), reason="no committed bundle")
def test_a_committed_bundle_is_read_as_what_it_was() -> None:
    """Where it was written before semantics were declared, its R-LA shows robust accuracy and says so."""
    with open_bundle(BUNDLES / "digits.zip") as bundle:
        old = bundle.run
        rows = {(row.model, row.attack): row for row in leaderboard(old) if row.metric == "accuracy"}
    for result in old.cells:
        right = (result.rows["clean_margin"] > 0) & (result.rows["margin"] > 0)
        assert (result.rows["robust"] == right).all(), "one meaning for all attacks"
        row, spec = rows[result.cell.model, result.cell.attack.label], result.cell.attack
        shown = result.rows["margin"] > 0 if spec.semantics == "perturbation" else result.rows["robust"]
        assert row.measure == spec.measure
        assert row.value == pytest.approx(100 * shown.mean())
    assert any(result.cell.attack.algorithm == "random-latent" for result in old.cells)
