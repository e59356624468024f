"""Tables of attacks on flows against the ledger's rows, recomputed in plain Python; no infinity may rule them."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flow_runs import DEFENSES, N, flow_attack, flow_cell, flow_frame, flow_run, three_flows
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from publish_runs import attack, cell, frame
from rich.console import Console

from robbench.compare.tables import check, has_passed, without_reference
from robbench.metrics.registry import metric_of
from robbench.report.files import write_tables
from robbench.report.terminal import terminal_likelihood, terminal_sizes
from robbench.report.writers import likelihood_csv, markdown, terminal_table, tidy_csv
from robbench.results.likelihood import bits_text, mean_text, nll_tables, summarize
from robbench.results.reproduce import commands
from robbench.results.rows import TableRow
from robbench.results.tables import leaderboard, wide
from robbench.store.records import CellResult, Run

FIRST = "toy-glow"


@pytest.fixture
def flows() -> Run:
    return three_flows()


@pytest.fixture
def poisoned(flows: Run) -> Run:
    """toy-glow nll-in@8: two infinite, one NaN, one of 1e16; toy-glow-at noise@8 failed, hybrid nll-out@8 half done."""
    rows = flows.cells[3].rows
    rows["nll_after"] = [np.inf, np.inf, np.nan, 1e16, *rows["nll_after"][4:]]
    failed = flow_cell(
        "toy-glow-at",
        flow_attack("noise", 8),
        flow_frame(1).iloc[:0],
        status="failed",
        error="model returned <NaN>",
    )
    half = flow_cell("toy-glow-hybrid", flow_attack("nll-out", 8), flow_frame(1).iloc[:5], status="running")
    cells = [{11: failed, 16: half}.get(k, result) for k, result in enumerate(flows.cells)]
    return replace(flows, cells=cells)


@pytest.fixture
def mixed(flows: Run) -> Run:
    pgd = cell("digits-standard", attack(), frame(N, 0.9, 0.4, 1))
    return flow_run([pgd, *flows.cells])


def find(rows: Sequence[TableRow], model: str, label: str, metric: str) -> TableRow:
    (found,) = [r for r in rows if (r.model, r.attack, r.metric) == (model, label, metric)]
    return found


def column(result: CellResult, name: str) -> list[float]:
    return [float(value) for value in result.rows[name]]


def half_by_hand(values: list[float]) -> float:
    return statistics.NormalDist().inv_cdf(0.975) * statistics.stdev(values) / math.sqrt(len(values))


def printed(renderable: object, width: int = 80) -> str:
    console = Console(width=width, file=io.StringIO(), legacy_windows=False)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


# -------------------------------------------------------------------------------------------------- tidy rows
def test_tidy_rows_are_the_ledgers(flows: Run) -> None:
    rows = leaderboard(flows)
    for result in flows.cells:
        model, label = result.cell.model, result.cell.attack.label
        after = column(result, "nll_after")
        mean = find(rows, model, label, "bits_per_dim")
        assert mean.value == pytest.approx(statistics.fmean(after))
        assert mean.upper == pytest.approx(statistics.fmean(after) + half_by_hand(after))
        assert mean.lower == pytest.approx(statistics.fmean(after) - half_by_hand(after))
        assert "epsilon of 255" in mean.note
        assert ("steps" in mean.note) == (result.cell.attack.name != "noise")
        expected = {
            "bits_per_dim_median": statistics.median(after),
            "bits_per_dim_before": statistics.fmean(column(result, "nll_before")),
            "l2": statistics.fmean(column(result, "l2")),
            "l2_std": statistics.pstdev(column(result, "l2")),
            "linf": statistics.fmean(column(result, "linf")),
            "linf_std": statistics.pstdev(column(result, "linf")),
        }
        for metric, value in expected.items():
            assert find(rows, model, label, metric).value == pytest.approx(value), metric
    assert {row.status for row in rows} == {"ok"}
    assert not any("accuracy" in row.metric for row in rows)


def test_nothing_that_is_not_finite_poisons_a_mean(poisoned: Run) -> None:
    rows = leaderboard(poisoned)
    after = column(poisoned.cells[3], "nll_after")
    finite = [value for value in after if math.isfinite(value)]
    row = find(rows, FIRST, "nll-in@8", "bits_per_dim")
    assert row.value == pytest.approx(statistics.fmean(finite))
    assert f"mean over {N - 3} finite of {N}: 2 infinite, 1 NaN left out" in row.note
    assert f"1 of {N - 3} above 100 times the median" in row.note
    median = find(rows, FIRST, "nll-in@8", "bits_per_dim_median")
    assert median.value == pytest.approx(statistics.median(v for v in after if not math.isnan(v)))
    assert median.value is not None
    assert median.value < 20
    assert "1 NaN left out" in median.note


def test_failed_and_half_done_cells_have_one_row_without_a_number(poisoned: Run) -> None:
    rows = leaderboard(poisoned)
    for model, label, status in (
        ("toy-glow-at", "noise@8", "failed"),
        ("toy-glow-hybrid", "nll-out@8", "not run"),
    ):
        (row,) = [r for r in rows if (r.model, r.attack) == (model, label)]
        assert (row.metric, row.status, row.value, row.upper) == ("bits_per_dim", status, None, None)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True, width=32), min_size=1, max_size=30))
def test_any_samples_give_a_summary(values: list[float]) -> None:
    nll = summarize(np.array(values, dtype=np.float64))
    finite = [value for value in values if math.isfinite(value)]
    assert nll.nonfinite == len(values) - len(finite)
    assert (nll.mean is None) == (not finite)
    assert (nll.lower is None) == (len(finite) < 2)
    if nll.mean is not None and nll.lower is not None and nll.upper is not None:
        assert nll.lower <= nll.mean <= nll.upper
    assert ("left out" in nll.note) == bool(nll.nonfinite)
    assert mean_text(nll)


def test_intervals_of_huge_values_do_not_overflow() -> None:
    huge = summarize(np.array([1e308, 0.5e308, 1.7e308]))
    assert huge.mean == pytest.approx(1.6e308 / 1.5)
    half = 1e200 * half_by_hand([1, 3])
    large = summarize(np.array([1e200, 3e200]))
    assert (large.lower, large.upper) == pytest.approx((2e200 - half, 2e200 + half))
    constant = summarize(np.zeros(3))
    assert constant.lower == constant.mean == constant.upper == 0


# ------------------------------------------------------------------------------------------------- NLL tables
def test_every_table_says_the_ledgers_numbers(poisoned: Run) -> None:
    """CSV, Markdown and terminal at once: one number, three places."""
    lines = list(csv.DictReader(io.StringIO(likelihood_csv(nll_tables(poisoned)))))
    text, terminal = markdown(poisoned, leaderboard(poisoned)), printed(terminal_likelihood(poisoned))
    for result in poisoned.cells:
        spec, model = result.cell.attack, result.cell.model
        (line,) = [ln for ln in lines if ln["attack"] == spec.name and float(ln["epsilon"]) == spec.epsilon]
        assert line["steps"] == str(spec.parameters.get("steps", ""))
        if result.cell.status != "ok":
            assert line[f"{model}_status"] == ("failed" if result.cell.status == "failed" else "not run")
            assert line[model] == line[f"{model}_median"] == line[f"{model}_nonfinite"] == ""
            continue
        after = column(result, "nll_after")
        finite = [value for value in after if math.isfinite(value)]
        assert line[f"{model}_status"] == "ok"
        assert float(line[model]) == pytest.approx(statistics.fmean(finite))
        assert float(line[f"{model}_lower"]) == pytest.approx(statistics.fmean(finite) - half_by_hand(finite))
        assert float(line[f"{model}_upper"]) == pytest.approx(statistics.fmean(finite) + half_by_hand(finite))
        median = statistics.median(value for value in after if not math.isnan(value))
        assert float(line[f"{model}_median"]) == pytest.approx(median)
        assert int(line[f"{model}_nonfinite"]) == N - len(finite)
        assert f"{bits_text(statistics.fmean(finite))} ± " in text
        assert f"[{bits_text(median)}]" in text
        assert f"{bits_text(statistics.fmean(finite))} ± " in terminal


def test_epsilon_0_is_the_images_before_the_attack(flows: Run) -> None:
    for table in nll_tables(flows):
        assert [line.epsilon for line in table.lines] == [0, 2, 8]
        for (model, _), zero in zip(table.models, table.lines[0].cells, strict=True):
            own = next(r for r in flows.cells if r.cell.model == model and r.cell.attack.name == table.attack)
            assert zero is not None
            assert zero.mean == pytest.approx(statistics.fmean(column(own, "nll_before")))


def test_an_epsilon_0_that_was_run_is_not_shown_twice() -> None:
    run = flow_run(
        [flow_cell(FIRST, flow_attack("nll-in", eps), flow_frame(k)) for k, eps in enumerate((0, 8))]
    )
    (table,) = nll_tables(run)
    assert [(line.epsilon, line.steps) for line in table.lines] == [(0, None), (8, 32)]
    assert table.lines[0].cells[0] == summarize(run.cells[0].rows["nll_after"].to_numpy())


def test_a_steps_sweep_is_one_table() -> None:
    cells = [
        flow_cell(FIRST, flow_attack("nll-in", 8, m), flow_frame(m, after=float(m))) for m in (50, 10, 20)
    ]
    run = flow_run([*cells, flow_cell(FIRST, flow_attack("noise", 8), flow_frame(1))])
    steps, noise = nll_tables(run)
    assert [line.steps for line in steps.lines] == [None, 10, 20, 50]
    assert (steps.sweeps_steps, noise.sweeps_steps) == (True, False)
    assert "steps" not in steps.settings
    text = printed(terminal_likelihood(run))
    assert text.count("steps") == 1
    assert [line["steps"] for line in csv.DictReader(io.StringIO(likelihood_csv([steps])))] == [
        "",
        "10",
        "20",
        "50",
    ]


def test_a_flow_without_an_attack_has_an_empty_place() -> None:
    run = flow_run(
        [
            flow_cell(FIRST, flow_attack("nll-in", 8), flow_frame(1)),
            flow_cell("toy-glow-at", flow_attack("nll-in", 4), flow_frame(2)),
        ]
    )
    (table,) = nll_tables(run)
    texts = [[mean_text(cell) for cell in line.cells] for line in table.lines]
    assert texts[1][0] == texts[2][1] == "not run"


def test_the_terminal_fits_three_flows_in_80_columns(poisoned: Run) -> None:
    text = printed(terminal_likelihood(poisoned))
    assert max(map(len, text.splitlines())) <= 80
    headers = [line for line in text.splitlines() if line.startswith("epsilon ")]
    assert [header.split()[1:] for header in headers] == [["clean", "at", "hybrid"]] * 3
    for words in ("lower is more likely", "works where the number is higher", f"n = {N}, seed 3"):
        assert words in " ".join(text.split())
    assert "2 infinite, 1 NaN left out" in " ".join(text.split())
    assert "failed (model returned <NaN>)" in " ".join(text.split())
    assert "median" in text
    assert "…" not in text


@pytest.mark.parametrize("width", [20, 40, 60, 200])
def test_the_terminal_keeps_its_width(mixed: Run, width: int) -> None:
    for renderable in (terminal_likelihood(mixed), terminal_sizes(mixed)):
        assert max(map(len, printed(renderable, width).splitlines())) <= width


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (2.5354, "2.535"),
        (0.0, "0.000"),
        (13.1807, "13.18"),
        (320.4, "320.4"),
        (5812.0, "5812"),
        (2.0e6, "2.00e+06"),
        (-3.25, "-3.250"),
        (math.inf, "inf"),
    ],
)
def test_numbers_read_as_papers_print_them(value: float, text: str) -> None:
    assert bits_text(value) == text


# ----------------------------------------------------------------------------------------------------- mixed
def test_accuracy_tables_skip_flows(mixed: Run) -> None:
    rows = leaderboard(mixed)
    assert wide(rows).models == (("digits-standard", "standard"),)
    accuracy = printed(terminal_table(mixed), 120)
    assert "toy-glow" not in accuracy
    assert "1 model, 1 attack, n = 40" in " ".join(accuracy.split())
    alone = flow_run(mixed.cells[:1])
    assert accuracy == printed(terminal_table(alone), 120)
    assert [r for r in rows if r.model == "digits-standard"] == leaderboard(alone)


def test_files_follow_what_the_run_has(mixed: Run, flows: Run, tmp_path: Path) -> None:
    both = write_tables(mixed, tmp_path)
    assert list(both) == ["csv", "wide", "likelihood", "markdown", "html"]
    first = both["html"].read_bytes()
    assert write_tables(mixed, tmp_path)["html"].read_bytes() == first
    assert list(write_tables(flows, tmp_path)) == ["csv", "likelihood", "markdown", "html"]
    assert not both["wide"].exists()
    assert list(write_tables(flow_run(mixed.cells[:1]), tmp_path)) == ["csv", "wide", "markdown", "html"]
    assert not both["likelihood"].exists()


def test_markdown_of_flows_alone_has_no_accuracy(flows: Run) -> None:
    text = markdown(flows, leaderboard(flows))
    assert "Accuracy" not in text
    tables = [t for t in MarkdownIt("commonmark").enable("table").parse(text) if t.type == "table_open"]
    assert len(tables) == 3 + 1
    assert "| epsilon | toy-glow (clean) | toy-glow-at (at) | toy-glow-hybrid (hybrid) |" in text


# ------------------------------------------------------------------------------------------ perturbation sizes
def test_sizes_over_all_and_over_broken_samples_are_the_ledgers(mixed: Run) -> None:
    rows, result = leaderboard(mixed), mixed.cells[0]
    records = result.rows.to_dict("records")
    right = [r for r in records if r["clean_prediction"] == r["label"]]
    lost = [r for r in right if not r["robust"]]
    assert 0 < len(lost) < len(right) < N
    for suffix, part in (("", lost), ("_all", right)):
        for name in ("l2", "linf"):
            values = [float(r[name]) for r in part]
            mean = find(rows, "digits-standard", "pgd20", f"{name}{suffix}")
            assert mean.value == pytest.approx(statistics.fmean(values))
            assert f"{len(part)} samples" in mean.note
            spread = find(rows, "digits-standard", "pgd20", f"{name}{suffix}_std")
            assert spread.value == pytest.approx(statistics.pstdev(values))
    text = printed(terminal_sizes(mixed))
    assert f"attacked {len(right)}" in text
    assert f"broken {len(lost)}" in text
    assert f"{statistics.fmean(float(r['l2']) for r in right):.3f} ± " in text
    assert text.count("not run [1]") == len(mixed.cells)
    assert "[1] no images were scored yet; robbench fid" in " ".join(text.split())


def stored_distances(run: Run, folder: Path, values: dict[str, float]) -> Run:
    """The run in a folder with Fréchet records of some of its cells, "" for the clean images; by cell hash."""
    from robbench.store.frechet_records import FrechetRecord, samples_hash, write_record
    from robbench.store.ledger import Ledger
    from robbench.store.records import PlanEntry, RunFile, join_ids

    entries = [
        PlanEntry(hash=r.cell.hash, model=r.cell.model, defense=r.cell.defense, attack=r.cell.attack.label)
        for r in run.cells
    ]
    names = tuple(dict.fromkeys(e.model for e in entries))
    file = RunFile(
        dataset=run.dataset,
        dataset_revision=run.dataset_revision,
        seed=run.seed,
        shape=run.shape,
        class_names=run.class_names,
        n=run.n,
        models=names,
        attacks=tuple(dict.fromkeys(e.attack for e in entries)),
        cells=tuple(entries),
        versions=run.versions,
        samples=join_ids(run.sample_ids),
    )
    Ledger(folder).write_run(file, {})
    for cell_hash, value in values.items():
        record = FrechetRecord(
            status="ok",
            cell=cell_hash or None,
            model=None,
            attack="clean",
            extractor="frechet[toy]",
            extractor_sha256="a" * 64,
            extractor_hash="b" * 64,
            dataset=run.dataset,
            dataset_revision=run.dataset_revision,
            reference_split="train",
            reference_n=1000,
            n=run.n,
            samples_sha256=samples_hash(run.sample_ids),
            key="c" * 64,
            value=value,
            notes=("few samples",) if cell_hash else (),
            versions={},
        )
        write_record(folder, record)
    return replace(run, folder=folder)


def test_distances_of_features_appear_in_every_table(mixed: Run, tmp_path: Path) -> None:
    run = stored_distances(mixed, tmp_path, {"": 11.5, mixed.cells[0].cell.hash: 72.25})
    rows = leaderboard(run)
    assert find(rows, "", "clean", "frechet[toy]").value == 11.5
    row = find(rows, "digits-standard", "pgd20", "frechet[toy]")
    assert (row.value, row.status, row.note) == (72.25, "ok", "few samples")
    absent = find(rows, FIRST, "nll-in@8", "frechet[toy]")
    assert (absent.value, absent.status) == (None, "not run")
    assert "robbench fid" in absent.note
    text = markdown(run, rows)
    assert "| 72.25 [1] |" in text
    assert "not run [2]" in text
    assert "frechet[toy]" in printed(terminal_sizes(run))
    page = write_tables(run, tmp_path)["html"].read_text()
    assert "72.25 [1]" in page
    assert "Clean images of the same samples: frechet[toy] 11.50." in page


# ------------------------------------------------------------------------------------------- check, commands
def test_a_run_passes_against_its_own_tables(flows: Run, tmp_path: Path) -> None:
    table = tmp_path / "reference.csv"
    table.write_text(tidy_csv(leaderboard(flows)))
    results = check(flows, table)
    assert has_passed(results)
    assert {result.verdict for result in results} == {"pass"}
    assert without_reference(leaderboard(flows), results) == []
    assert f"{FIRST} x nll-in@2" in without_reference(leaderboard(flows), results[1:][7:])


def test_checking_a_poisoned_or_scored_run_does_not_crash(poisoned: Run, tmp_path: Path) -> None:
    run = stored_distances(poisoned, tmp_path, {"": 11.5, poisoned.cells[0].cell.hash: 72.25})
    table = tmp_path / "reference.csv"
    table.write_text(tidy_csv(leaderboard(run)))
    verdicts = {(r.a.attack, r.a.metric, r.verdict) for r in check(run, table)}
    assert ("clean", "frechet[toy]", "pass") in verdicts
    assert ("nll-in@8", "bits_per_dim", "pass") in verdicts
    assert not any(verdict == "fail" for _, _, verdict in verdicts)


@pytest.mark.parametrize(
    ("value", "allowed"), [(0.2, 0.01), (-0.5, 0.01), (1.0, 0.01), (3.0, 0.03), (2e6, 2e4)]
)
def test_bits_per_dim_under_attack_may_differ_by_a_hundredth_or_one_percent(
    value: float, allowed: float
) -> None:
    assert metric_of("bits_per_dim").tolerance(value) == pytest.approx(allowed)


@pytest.mark.parametrize(("shift", "verdict"), [(0.009, "pass"), (0.011, "fail"), (-0.011, "fail")])
def test_small_bits_per_dim_are_compared_absolutely(shift: float, verdict: str, tmp_path: Path) -> None:
    run = flow_run([flow_cell(FIRST, flow_attack("nll-in"), flow_frame(1).assign(nll_after=0.5))])
    table = tmp_path / "reference.csv"
    table.write_text(
        f"dataset,model,attack,metric,value\ndigits,{FIRST},nll-in@8,bits_per_dim,{0.5 + shift}\n"
    )
    (result,) = check(run, table)
    assert result.verdict == verdict


def test_commands_reproduce_steps_and_precision(mixed: Run) -> None:
    cells = [
        flow_cell(model, flow_attack(name, 8, steps), flow_frame(1), precision="fp64")
        for model in ("toy-glow", "toy-glow-at")
        for name, steps in (("nll-in", 10), ("nll-in", 50), ("noise", None))
    ]
    start, sample = "robbench run --dataset digits --model", "--n 40 --seed 3"
    flows, wide_scores = "toy-glow,toy-glow-at", "--likelihood-dtype float64"
    assert commands(flow_run([mixed.cells[0], *cells])) == [
        f"{start} digits-standard --attacks pgd20 {sample}",
        f"{start} {flows} --attacks nll-in {sample} --epsilon 8 --steps 10,50 {wide_scores}",
        f"{start} {flows} --attacks noise {sample} --epsilon 8 {wide_scores}",
    ]


def test_commands_list_budgets_only_where_every_combination_is_there(mixed: Run) -> None:
    def line(*pairs: tuple[int, int]) -> list[str]:
        cells = [flow_cell("toy-glow", flow_attack("nll-in", e, k), flow_frame(1)) for e, k in pairs]
        return [text.partition("--seed 3 ")[2] for text in commands(flow_run(cells))]

    assert line((8, 10), (8, 50), (16, 10), (16, 50)) == ["--epsilon 8,16 --steps 10,50"]
    assert line((8, 10), (16, 50)) == ["--epsilon 8 --steps 10", "--epsilon 16 --steps 50"]
    for searched, options in (
        ("tf32, compiled", "--compile"),
        ("bf16", ""),
    ):
        cell = mixed.cells[0].cell.model_copy(update={"search_precision": searched})
        (text,) = commands(flow_run([replace(mixed.cells[0], cell=cell)]))
        assert text.partition("--seed 3 ")[2] == options


def test_defenses_and_models_are_named_in_plan_order(flows: Run) -> None:
    assert [table.attack for table in nll_tables(flows)] == ["nll-in", "nll-out", "noise"]
    assert all(dict(table.models) == DEFENSES for table in nll_tables(flows))
