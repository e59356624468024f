"""Two runs held against each other: what is said of every change, in records, as JSON and on the command line."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result
from flow_runs import flow_attack, flow_cell, flow_frame, flow_run
from hypothesis import given, settings
from hypothesis import strategies as st
from publish_runs import JSA, attack, cell, frame, make_run
from rich.console import Console
from site_runs import written

from robbench.attacks.named import ENGINE_VERSION
from robbench.cli.app import main
from robbench.compare.comparison import Comparison, Side, judge
from robbench.compare.runs import RunDiff, compare_runs, document
from robbench.core.errors import UserError
from robbench.report.diff_text import print_diff
from robbench.statistics.paired import holm, paired, sign_test
from robbench.store.frechet_records import FrechetRecord, samples_hash, write_record
from robbench.store.records import CellResult, Run

NAMES = ("before", "after")


def compare(a: Run, b: Run, **options: object) -> RunDiff:
    return compare_runs(a, b, NAMES, **options)  # type: ignore[arg-type]


def change_of(diff: RunDiff, model: str, name: str, threat_model: str | None = None) -> Comparison:
    found = [
        c
        for c in diff.changes
        if (c.model, c.attack) == (model, name) and threat_model in (None, c.threat_model)
    ]
    assert len(found) == 1
    return found[0]


def edited(run: Run, number: int, change: Callable[[pd.DataFrame], object], **record: object) -> Run:
    """`run` with another cell in place of cell `number`; its hash stays unless `record` says otherwise."""
    result = run.cells[number]
    rows = result.rows.copy()
    change(rows)
    cells = list(run.cells)
    cells[number] = CellResult(result.cell.model_copy(update=record), rows)
    return replace(run, cells=cells)


def broken(count: int) -> Callable[[pd.DataFrame], None]:
    """Breaks the first robust samples."""

    def change(rows: pd.DataFrame) -> None:
        chosen = rows.index[rows["robust"]][:count]
        assert len(chosen) == count
        rows.loc[chosen, "robust"] = False
        rows.loc[chosen, "margin"] = -0.3

    return change


def printed(diff: RunDiff, width: int = 80) -> str:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        print_diff(diff, console)
    return capture.get()


# -------------------------------------------------------------------------------------------------- accuracies
def test_a_run_does_not_differ_from_itself(run: Run) -> None:
    diff = compare(run, run)
    assert {change.verdict for change in diff.changes} == {"unchanged"}
    assert (diff.fell, diff.differences, diff.other_rows, diff.other_labels) == ([], (), (), 0)
    assert (diff.runs.only_a, diff.runs.only_b) == ((), ())
    # Two models: clean, three attacks, the worst case of linf and of all, the average.
    assert len(diff.changes) == 2 * (1 + 3 + 2 + 1)
    assert "Nothing fell beyond its interval." in printed(diff)


def test_a_fall_is_that_of_its_samples(run: Run) -> None:
    diff = compare(run, edited(run, 3, broken(20), hash="0" * 64))
    change = change_of(diff, "digits-ijsat", "pgd20")
    rows = run.cells[3].rows
    robust = rows["robust"].to_numpy()
    ids = rows["sample_id"].to_numpy()[robust][:20]
    after = robust & ~np.isin(rows["sample_id"], ids)
    assert change.verdict == "worse"
    assert change.fell == tuple(ids)
    assert change.rose == ()
    counts = paired(robust, after)
    assert (change.p, change.n) == (counts.p, run.n)
    assert (change.difference, change.lower, change.upper) == (
        pytest.approx(-100 * 20 / run.n),
        counts.difference().lower,
        counts.difference().upper,
    )
    assert (change.a.value, change.b.value) == pytest.approx((100 * robust.mean(), 100 * after.mean()))
    assert diff.fell[0].loss >= diff.fell[-1].loss
    back = change_of(compare(edited(run, 3, broken(20)), run), "digits-ijsat", "pgd20")
    assert (back.verdict, back.rose, back.difference) == (
        "better",
        change.fell,
        pytest.approx(100 * 20 / run.n),
    )


def test_worst_case_and_average_follow(run: Run) -> None:
    b = edited(run, 3, broken(20))
    diff = compare(run, b)
    for threat, numbers in (("all", (3, 4, 5)), ("linf@0.2", (3, 4))):
        worst = [np.all([r.cells[k].rows["robust"] for k in numbers], axis=0) for r in (run, b)]
        change = change_of(diff, "digits-ijsat", "worst-case", threat)
        assert (change.a.value, change.b.value) == pytest.approx([100 * w.mean() for w in worst])
        assert change.p == paired(*worst).p
    change = change_of(diff, "digits-ijsat", "average")
    assert change.difference == pytest.approx(-100 * 20 / run.n / 4)
    assert len(change.fell) == 20
    assert change.p == sign_test(20, 0)
    assert change_of(diff, "digits-ijsat", "clean").verdict == "unchanged"


def test_what_one_sample_does_is_within_its_interval(run: Run) -> None:
    diff = compare(run, edited(run, 3, broken(1)))
    assert change_of(diff, "digits-ijsat", "pgd20").verdict == "within interval"
    assert diff.fell == []
    assert "Biggest changes within their intervals (" in printed(diff)


def test_among_many_numbers_a_small_fall_is_no_surprise(run: Run) -> None:
    b = edited(run, 3, broken(7))
    assert change_of(compare(run, b), "digits-ijsat", "pgd20").verdict == "maybe worse"
    assert compare(run, b).fell == []
    assert change_of(compare(run, b, correction="none"), "digits-ijsat", "pgd20").verdict == "worse"
    alone = compare(run, b, models=["digits-ijsat"], attacks=["pgd20"])  # Holm over two numbers
    assert [change.attack for change in alone.fell] == ["pgd20"]
    assert alone.tested == 2


def test_alpha_sets_intervals_and_tests(run: Run) -> None:
    b = edited(run, 3, broken(7))
    strict = change_of(compare(run, b, alpha=1e-6, correction="none"), "digits-ijsat", "pgd20")
    usual = change_of(compare(run, b, correction="none"), "digits-ijsat", "pgd20")
    assert strict.lower < usual.lower
    assert (strict.verdict, usual.verdict) == ("within interval", "worse")


def test_near_ties_among_the_changes_are_counted(run: Run) -> None:
    def tie(rows: pd.DataFrame) -> None:
        chosen = rows.index[rows["robust"]][:3]
        rows.loc[chosen, "robust"] = False
        rows.loc[chosen, "margin"] = -2e-5

    a = edited(run, 3, lambda rows: rows.__setitem__("margin", np.float32(3e-5)))
    assert change_of(compare(a, edited(a, 3, tie)), "digits-ijsat", "pgd20").near_ties == 3


# ------------------------------------------------------------------------------------------- failed and absent
def test_a_cell_that_fails_falls(run: Run, damaged: Run) -> None:
    diff = compare(run, damaged)
    failed = change_of(diff, "digits-ijsat", "aa")
    assert (failed.verdict, failed.regression, failed.b.value) == ("failed", True, None)
    assert failed.a.value == pytest.approx(100 * run.cells[4].rows["robust"].mean())
    assert "left its set" in failed.b.note
    half = change_of(diff, "digits-standard", "jsa50")
    assert (half.verdict, half.b.status, half.b.note) == ("not compared", "not run", "50 of 120 samples done")
    assert [change.attack for change in diff.fell] == ["aa"]
    worst = change_of(diff, "digits-ijsat", "worst-case", "all")
    assert worst.combined == ("pgd20", "jsa50")
    assert worst.notes == ("without aa, not whole in both runs",)
    text = printed(diff)
    assert "left its set" in text
    assert "1 number fell." in text
    assert not compare(damaged, run).fell  # what had failed does not fall
    assert not compare(damaged, damaged).fell


def test_cells_of_one_run_only_are_named(run: Run) -> None:
    b = replace(run, cells=[*run.cells[:2], *run.cells[3:]])
    diff = compare(run, b)
    assert [r.cell.attack.label for r in diff.runs.only_a] == ["jsa50"]
    assert "Only in A: digits-standard x jsa50" in printed(diff)
    assert diff.fell == []
    assert [r.cell.attack.label for r in compare(b, run).runs.only_b] == ["jsa50"]


def test_only_common_samples_are_compared(run: Run) -> None:
    kept = run.cells[0].rows["sample_id"].iloc[10:70].tolist()
    cells = [CellResult(r.cell, r.rows[r.rows["sample_id"].isin(kept)].iloc[::-1]) for r in run.cells]
    smaller = replace(run, cells=cells, n=60, sample_ids=tuple(reversed(kept)))
    diff = compare(run, smaller)
    assert {change.n for change in diff.changes} == {60}
    assert {change.verdict for change in diff.changes} == {"unchanged"}
    assert [found.text for found in diff.differences] == ["samples (compared: the 60 of both) 120 -> 60"]


def test_runs_without_a_common_sample_are_refused(run: Run) -> None:
    moved = [CellResult(r.cell, r.rows.assign(sample_id=r.rows["sample_id"] + 10_000)) for r in run.cells]
    other = replace(run, cells=moved, sample_ids=tuple(i + 10_000 for i in run.sample_ids))
    with pytest.raises(
        UserError, match=r"before \(n 120, seed 3\) and after .* no sample in common; run both"
    ):
        compare(run, other)
    with pytest.raises(UserError, match="different data sets \\(digits, mnist\\)"):
        compare(run, replace(run, dataset="mnist"))
    with pytest.raises(UserError, match="different revisions of digits"):
        compare(run, replace(run, dataset_revision="e" * 64))
    with pytest.raises(UserError, match=r"no model x attack in common; A has digits-standard x pgd20"):
        compare(replace(run, cells=run.cells[:1]), replace(run, cells=run.cells[1:2]))


def test_filters_name_what_there_is(run: Run) -> None:
    diff = compare(run, run, models=["digits-ijsat"], attacks=["pgd20", "aa"])
    assert {(c.model, c.attack) for c in diff.changes} == {
        ("digits-ijsat", name) for name in ("clean", "pgd20", "aa", "worst-case", "average")
    }
    with pytest.raises(UserError, match="unknown attack in either run 'pgd21'; did you mean 'pgd20'"):
        compare(run, run, attacks=["pgd21"])
    with pytest.raises(UserError, match="unknown model in either run 'digits'"):
        compare(run, run, models=["digits"])


# ---------------------------------------------------------------------------------------------------- settings
def test_what_the_runs_do_not_share_is_named(run: Run) -> None:
    spec = attack(parameters={"steps": 10})
    changed = edited(run, 0, lambda rows: None, attack=spec, hash="0" * 64, engine="robbench engine 99")
    cards = {name: card.model_copy() for name, card in run.cards.items()}
    other = cards["digits-ijsat"]
    cards["digits-ijsat"] = other.model_copy(
        update={"weights": other.weights.model_copy(update={"sha256": "9" * 64})}
    )
    b = replace(changed, seed=4, versions={**run.versions, "torch": "2.9.0"}, cards=cards)
    texts = [found.text for found in compare(run, b).differences]
    assert texts[0] == "seed 3 -> 4"
    assert "version of torch 2.8.0 -> 2.9.0" in texts
    assert f"digits-ijsat: weights {other.weights.sha256[:12]} -> {'9' * 12}" in texts
    assert "pgd20: attack spec parameters.steps None -> 10 (1 cell)" in texts
    assert f"pgd20: engine robbench engine {ENGINE_VERSION} -> robbench engine 99 (1 cell)" in texts


def test_other_rows_under_one_hash_are_said_loudly(run: Run) -> None:
    diff = compare(run, edited(run, 3, broken(4)))
    (found,) = diff.other_rows
    assert (found.model, found.attack, found.n, found.rows, found.verdicts, found.beyond) == (
        "digits-ijsat",
        "pgd20",
        run.n,
        4,
        4,
        4,
    )
    assert "SAME CELL HASH, OTHER ROWS in 1 cell" in printed(diff)
    assert compare(run, edited(run, 3, broken(4), hash="0" * 64)).other_rows == ()


def test_rounding_under_one_hash_is_said_quietly(run: Run) -> None:
    diff = compare(run, edited(run, 3, lambda rows: rows.__setitem__("margin", rows["margin"] * 1.000001)))
    assert [(found.verdicts, found.beyond) for found in diff.other_rows] == [(0, 0)]
    assert diff.other_rows[0].rows > 0
    text = printed(diff)
    assert "differ by rounding" in text
    assert "SAME CELL HASH" not in text
    images = compare(run, edited(run, 3, lambda rows: rows.__setitem__("example", None)))
    assert images.other_rows == ()  # fewer images kept are no other result


def test_other_labels_are_said_loudly(run: Run) -> None:
    b = edited(run, 0, lambda rows: rows.__setitem__("label", (rows["label"] + 1) % 10))
    assert compare(run, b).other_labels == run.n
    assert "other labels" in printed(compare(run, b))


# ----------------------------------------------------------------------------------------------------- verdicts
def number(p: float | None, lower: float, upper: float, lower_is_better: bool = False) -> Comparison:
    side = Side("ok", 1.0)
    return Comparison(
        "m", "a", "accuracy", side, side, n=10, difference=(lower + upper) / 2, lower=lower, upper=upper, p=p,
        fell=(1,), rose=(2,), lower_is_better=lower_is_better,
    )  # fmt: skip


@given(
    st.lists(
        st.tuples(st.floats(0, 1), st.floats(-9, 9), st.floats(0, 9), st.booleans()), min_size=1, max_size=8
    )
)
def test_a_fall_needs_its_interval_and_its_adjusted_p(
    numbers: list[tuple[float, float, float, bool]],
) -> None:
    changes = [number(p, low, low + width, better) for p, low, width, better in numbers]
    adjusted = holm([change.p for change in changes])
    for change, p in zip(judge(changes), adjusted, strict=True):
        beyond = change.lower > 0 if change.lower_is_better else change.upper < 0
        assert change.regression == (beyond and p <= 0.05)
        assert change.p_adjusted == p
    for change in judge(changes, correction="none"):
        beyond = change.lower > 0 if change.lower_is_better else change.upper < 0
        assert change.regression == beyond


# -------------------------------------------------------------------------------------------------- likelihoods
def flows(after: Sequence[float] = (6.0, 4.0)) -> Run:
    specs = zip((flow_attack("nll-in", 8), flow_attack("nll-out", 8)), after, strict=True)
    return flow_run(
        [flow_cell("toy-glow", spec, flow_frame(k, mean)) for k, (spec, mean) in enumerate(specs)]
    )


@pytest.mark.parametrize(
    ("cell_number", "shift", "verdict"),
    [(0, 0.5, "worse"), (0, -0.5, "better"), (1, 0.5, "better"), (1, -0.5, "worse"), (0, 1e-6, "unchanged")],
)
def test_the_likelihood_that_an_attack_reaches(cell_number: int, shift: float, verdict: str) -> None:
    run = flows()
    noise = np.random.default_rng(0).normal(0, 0.05, len(run.cells[0].rows)) if abs(shift) > 0.1 else 0
    b = edited(
        run, cell_number, lambda rows: rows.__setitem__("nll_after", rows["nll_after"] + shift + noise)
    )
    change = change_of(compare(run, b), "toy-glow", ("nll-in@8", "nll-out@8")[cell_number])
    assert change.verdict == verdict
    assert change.difference == pytest.approx(float(np.mean(shift + noise)), rel=1e-6)
    assert change.n == len(run.sample_ids)


def test_infinite_likelihoods_are_left_out_of_the_mean_and_counted() -> None:
    run = flows()

    def overflow(rows: pd.DataFrame) -> None:
        rows.loc[:3, "nll_after"] = np.inf

    change = change_of(compare(run, edited(run, 0, overflow)), "toy-glow", "nll-in@8")
    assert len(change.fell) == 4
    assert change.difference == 0.0
    assert change.notes == ("mean over 36 of 40 samples: the others are not finite",)
    lost = edited(run, 0, lambda rows: rows.__setitem__("nll_after", np.nan))
    change = change_of(compare(run, lost), "toy-glow", "nll-in@8")
    assert (change.verdict, change.b.value, len(change.fell)) == ("worse", None, 40)
    assert "none finite" in printed(compare(run, lost))


def test_likelihood_before_any_attack_is_compared_once() -> None:
    run = flows()
    b = edited(run, 0, lambda rows: rows.__setitem__("nll_before", rows["nll_before"] + 1.0))
    change = change_of(compare(run, b), "toy-glow", "clean")
    assert (change.metric, change.verdict, change.difference) == (
        "bits_per_dim_before",
        "worse",
        pytest.approx(1.0),
    )


# ------------------------------------------------------------------------------------------------ on the disk
def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["diff", *map(str, arguments)], env={"COLUMNS": "80"})


@pytest.fixture
def folders(run: Run, tmp_path: Path) -> tuple[Path, Path]:
    return written(run, tmp_path / "a"), written(edited(run, 3, broken(20)), tmp_path / "b")


def test_the_command_exits_with_one_when_a_number_fell(folders: tuple[Path, Path]) -> None:
    a, b = folders
    found = invoke(a, b)
    assert found.exit_code == 1, found.output
    lines = found.output.splitlines()
    first = lines.index(next(line for line in lines if line.startswith("Worse in B")))
    assert re.match(r"digits-ijsat pgd20 +\d+\.\d +\d+\.\d +-16\.7 \[.*\] +\S+ +20/0", lines[first + 3])
    assert invoke(b, a).exit_code == 0
    assert invoke(a, a).exit_code == 0
    assert invoke(a, b, "--model", "digits-standard").exit_code == 0


def test_json_has_every_number_and_every_sample(folders: tuple[Path, Path], run: Run) -> None:
    found = invoke(*folders, "--json")
    assert found.exit_code == 1
    content = json.loads(found.output)
    assert content["fell"] is True
    assert (content["a"]["run"], content["a"]["n"], content["common_samples"]) == (
        str(folders[0]),
        run.n,
        run.n,
    )
    (change,) = [c for c in content["changes"] if (c["model"], c["attack"]) == ("digits-ijsat", "pgd20")]
    robust = run.cells[3].rows["robust"]
    assert change["fell"] == run.cells[3].rows["sample_id"][robust][:20].tolist()
    assert (change["verdict"], change["regression"], change["a"]["status"]) == ("worse", True, "ok")
    assert content["same_hash_other_rows"][0]["verdicts"] == 20
    assert len(content["changes"]) == 14


def test_bundles_are_runs_too(run: Run, tmp_path: Path) -> None:
    from robbench.bundle.examples import ExampleChoice
    from robbench.bundle.export import ExportRequest, export_run

    linf = replace(run, cells=[run.cells[0], run.cells[3]])
    for result in linf.cells:
        result.rows["example"] = None
    a, b = written(linf, tmp_path / "a"), written(edited(linf, 1, broken(20)), tmp_path / "b")
    export_run(ExportRequest(b, tmp_path / "b.zip", ExampleChoice.parse("none")))
    found = invoke(a, tmp_path / "b.zip")
    assert found.exit_code == 1, found.output
    assert "b.zip (digits, n = 120, seed 3)" in found.output
    assert (
        json.loads(invoke(a, tmp_path / "b.zip", "--json").output)["changes"]
        == (json.loads(invoke(a, b, "--json").output)["changes"])
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{a}", "{a}", "--alpha", "0"), "--alpha 0 is no error rate; give a number between 0 and 1"),
        (("{a}", "{a}", "--alpha", "nan"), "'--alpha': 'nan' is no finite number"),
        (("{a}", "{a}", "--alpha", "1e-18"), "--alpha 1e-18 is no error rate"),
        (("{a}", "nowhere"), "'nowhere' is not a run folder"),
        (("{a}", "{a}", "--attacks", ","), "--attacks is given without a value"),
        (("{a}", "{a}", "--model", "x"), "unknown model in either run 'x'"),
    ],
)  # fmt: skip
def test_wrong_use_is_one_line(folders: tuple[Path, Path], arguments: tuple[str, ...], message: str) -> None:
    found = invoke(*(argument.format(a=folders[0]) for argument in arguments))
    assert found.exit_code == 2
    assert message in found.output
    assert len(found.output.splitlines()) == 1


def frechet(run: Run, number: int | None, value: float | None) -> FrechetRecord:
    result = None if number is None else run.cells[number].cell
    return FrechetRecord(
        status="ok" if value is not None else "not run",
        cell=result and result.hash,
        model=result and result.model,
        attack=result.attack.label if result else "clean",
        extractor="FID",
        extractor_sha256="1" * 64,
        extractor_hash="2" * 64,
        dataset="digits",
        dataset_revision="d" * 64,
        reference_split="train",
        reference_n=1_000,
        n=run.n,
        samples_sha256=samples_hash(run.sample_ids),
        key="3" * 64 if value is not None else None,
        value=value,
        reason="" if value is not None else "no images",
        versions={},
    )


def test_frechet_distances_are_shown_and_not_judged(run: Run, folders: tuple[Path, Path]) -> None:
    for folder, values in zip(folders, ((10.0, 20.0), (10.0, 90.0)), strict=True):
        for number, value in zip((None, 0), values, strict=True):
            write_record(folder, frechet(run, number, value))
    content = json.loads(invoke(*folders, "--json", "--attacks", "pgd20").output)
    found = {c["model"]: c for c in content["changes"] if c["metric"] == "FID" and c["a"]["value"]}
    assert found[""]["verdict"] == "unchanged"
    assert (found["digits-standard"]["difference"], found["digits-standard"]["verdict"]) == (
        70.0,
        "not judged",
    )
    assert not found["digits-standard"]["regression"]
    assert "digits-standard pgd20 FID" in invoke(*folders).output


# ---------------------------------------------------------------------------------------------------- on paper
@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_every_table_fits_eighty_columns(seed: int) -> None:
    cells = [
        cell(model, spec, frame(60, 0.9, rate, seed + k))
        for k, (model, spec, rate) in enumerate(
            (model, spec, rate)
            for model, rate in (("digits-a-rather-long-name-of-a-model", 0.9), ("m[red]x[/]", 0.2))
            for spec in (attack(), attack("aa", algorithm="autoattack"), JSA)
        )
    ]
    others = [
        CellResult(r.cell.model_copy(update={"hash": f"{k:064x}"}), frame(60, 0.9, 0.5, seed + 50 + k))
        for k, r in enumerate(cells)
    ]
    text = printed(compare(make_run(cells, 60), make_run(others, 60)))
    rows = [line for line in text.splitlines() if re.search(r" \S+/\S+ *$|─", line)]
    assert rows
    assert max(map(len, rows)) <= 80
    assert "…" not in text
    assert "m[red]x[/]" in text
    json.dumps(document(compare(make_run(cells, 60), make_run(others, 60))), allow_nan=False)
