"""Published numbers beside runs: verdicts, what differs, reasons of "not run", and the pages."""

import csv
import functools
import io
import math
from dataclasses import replace
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from flow_runs import three_flows
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from publish_runs import attack, cell, frame, make_run

from robbench.cli.app import main
from robbench.experiments.comparison import CALLED, Comparison, Known, Measured, compare, measured_rows
from robbench.experiments.published import PublishedRow, Table, published_index, published_table, table_rows
from robbench.report.published_page import (
    TableComparison,
    compare_tables,
    comparison_csv,
    comparison_markdown,
    find_known_names,
    table_values,
)
from robbench.report.site.build import run_page, write_published
from robbench.report.site.frame import body
from robbench.results.rows import TableRow
from robbench.store.records import Run

KNOWN = Known(
    attacks={"pgd20", "aa", "jsa50", "elastic", "fog", "jpeg-linf", "nll-in", "r-la"},
    defenses={"standard", "at", "trades", "ijsat", "clean", "r-la"},
    datasets=("cifar10", "mnist", "digits"),
)
NO_SEED = "seed 0, published not stated"  # IJSAT prints no n
EVIL = "<img src=x onerror=alert(1)>"


@functools.cache
def rows_of(name: str) -> list[PublishedRow]:
    """The rows of a published table."""
    return table_rows(published_table(name, published_index()))


def published(**changes: object) -> PublishedRow:
    """AT on CIFAR-10 with ResNet-18 under PGD-20, as IJSAT prints it, with changes."""
    row = next(r for r in rows_of("ijsat-table1") if (r.column, r.defense) == ("PGD-20", "at"))
    return PublishedRow.model_validate(row.model_dump() | changes)


def of_model(**changes: object) -> PublishedRow:
    """A clean accuracy of a loadable checkpoint, on 10,000 images, with changes."""
    row = rows_of("third_party")[0]
    return PublishedRow.model_validate(row.model_dump() | changes)


def measured(
    value: float | None = 50.0, half: float = 1.0, row: dict[str, object] | None = None, **changes: object
) -> Measured:
    """The same experiment as `published`, measured: value with an interval of +- half, with changes."""
    numbers = (
        {"value": value, "lower": None, "upper": None}
        if value is None
        else {"value": value, "lower": value - half, "upper": value + half}
    )
    values: dict[str, object] = {
        "dataset": "cifar10",
        "model": "ours",
        "defense": "at",
        "threat_model": "linf",
        "attack": "pgd20",
        "epsilon": 8 / 255,
        "eta": None,
        "metric": "accuracy",
        "unit": "%",
        "n": 10_000,
        "seed": 0,
        "status": "ok",
        "model_sha256": "0" * 64,
        "flow": "",
        **numbers,
        **(row or {}),
    }
    trained = {"epsilon": 8 / 255, "step_size": 2 / 255, "steps": 10}
    same = Measured(TableRow(**values), "run", "pgd20", "resnet18", 50_000, 120, 20, trained=trained)  # type: ignore[arg-type]
    return replace(same, **changes)  # type: ignore[arg-type]


def judged(row: PublishedRow, *found: Measured) -> Comparison:
    (comparison,) = compare([row], found, KNOWN)
    return comparison


# ----------------------------------------------------------------------------------------------------- verdicts
@given(st.integers(0, 10_000), st.integers(0, 400))
def test_within_is_the_interval_widened_by_the_rounding(hundredths: int, tenths: int) -> None:
    value, half = hundredths / 100, tenths / 10
    found = judged(published(), measured(value, half))
    gap = Decimal(abs(hundredths - 4985)).scaleb(-2) - Decimal(tenths).scaleb(-1)
    assert found.verdict == ("within" if gap <= Decimal("0.005") else "outside")
    assert found.reason == "95 % interval"
    assert found.difference == pytest.approx(value - 49.85)


@pytest.mark.parametrize(
    ("value", "verdict"), [(99.48, "within"), (99.53, "within"), (99.54, "outside"), (99.42, "outside")]
)
def test_clean_accuracy_of_a_checkpoint_is_a_fixed_number(value: float, verdict: str) -> None:
    clean = {"dataset": "mnist", "model": "trades-mnist", "attack": "clean", "epsilon": None}
    found = judged(of_model(), measured(value, 0.2, clean, attack="clean", architecture="other"))
    assert (found.verdict, found.reason) == (verdict, "whole test set: 0.05 points")


def test_a_subset_of_the_test_images_is_judged_by_its_interval_and_named() -> None:
    clean = {
        "dataset": "mnist",
        "model": "trades-mnist",
        "attack": "clean",
        "epsilon": None,
        "n": 500,
        "seed": 3,
    }
    found = judged(of_model(), measured(99.0, 0.9, clean, attack="clean"))
    assert (found.verdict, found.reason) == ("within", "95 % interval")
    assert found.setting == "n 500, published 10,000; seed 3, published not stated"
    other = judged(of_model(), measured(99.0, 0.9, {**clean, "model": "mine"}, attack="clean"))
    assert other.verdict == "not run"


DECIDING = {
    "data set": {"row": {"dataset": "digits"}},
    "architecture": {"architecture": "small-cnn"},
    "training images": {"train_samples": 2_500},
    "epochs": {"epochs": 10},
    "epsilon": {"row": {"epsilon": 0.031}},
    "steps": {"steps": 10},
    "training epsilon": {"trained": {"epsilon": 16 / 255, "step_size": 2 / 255, "steps": 10}},
    "training step_size": {"trained": {"epsilon": 8 / 255, "steps": 10}},
}


APART = {"data set", "architecture", "epsilon"}


@pytest.mark.parametrize("what", sorted(set(DECIDING) - APART))
def test_another_setting_differs_and_is_never_within(what: str) -> None:
    found = judged(published(), measured(49.85, **DECIDING[what]))  # type: ignore[arg-type]
    assert found.verdict == "differs"
    assert what in [difference.what for difference in found.differences if difference.effect == "no verdict"]
    assert f"{what} " in found.setting
    assert found.difference == pytest.approx(0)


@pytest.mark.parametrize("what", sorted(APART))
def test_another_data_set_model_or_budget_is_never_set_beside_print(what: str) -> None:
    found = judged(published(), measured(49.85, **DECIDING[what]))  # type: ignore[arg-type]
    assert found.verdict == "not comparable"
    assert (found.measured, found.difference) == (None, None)
    assert found.reason.startswith("ours (run): ")
    assert f"{what} " in found.reason
    assert [d.what for d in found.differences if d.effect == "not comparable"] == [what]


def test_an_eta_is_a_budget_too() -> None:
    row = published(attack="r-la", threat_model="flow-lp-linf", epsilon=None, eta=0.15, steps=None)
    ours = {"attack": "r-la", "threat_model": "flow-lp-linf", "epsilon": None}
    same = measured(49.85, row={**ours, "eta": 0.15}, attack="r-la", steps=None, every_image=True)
    other = measured(49.85, row={**ours, "eta": 0.05}, attack="r-la", steps=None, every_image=True)
    assert judged(row, same).verdict == "within"
    assert judged(row, other).verdict == "not comparable"
    assert judged(row, other).reason == "ours (run): eta 0.05, published 0.15"
    assert judged(row, other, same).measured == same


def test_a_model_without_a_card_is_not_known_to_be_the_published_one() -> None:
    found = judged(published(), measured(49.85, architecture=""))
    assert found.verdict == "not comparable"
    assert "architecture not known, published resnet18" in found.reason


@given(st.sets(st.sampled_from(list(DECIDING)), min_size=1), st.floats(0, 100))
def test_no_mixture_of_differences_gets_a_verdict(kinds: set[str], value: float) -> None:
    changes: dict[str, object] = {}
    rows: dict[str, object] = {}
    for kind in sorted(kinds):
        for key, change in DECIDING[kind].items():
            if key == "row":
                rows |= change  # type: ignore[arg-type]
            else:
                changes[key] = change
    found = judged(published(), measured(value, 100, rows, **changes))
    assert found.verdict == ("not comparable" if kinds & APART else "differs")
    assert (found.difference is None) == bool(kinds & APART)


def test_robbenchs_validation_split_is_named_and_compared() -> None:
    found = judged(published(), measured(49.85, train_samples=45_000, held_out=5_000))
    assert found.verdict == "within"
    assert "training images 45,000 (5,000 more held out for validation), published 50,000" in found.setting
    assert judged(published(), measured(49.85, train_samples=44_000, held_out=5_000)).verdict == "differs"


def test_step_sizes_of_attacks_count() -> None:
    row = published(attack_parameters="step_size=0.008")
    assert judged(row, measured(49.85, step_size=0.008)).verdict == "within"
    found = judged(row, measured(49.85, step_size=2 / 255))
    assert (found.verdict, found.setting) == ("differs", "step size 0.007843, published 0.008; " + NO_SEED)


def test_unknown_parts_of_the_print_are_not_held_against_a_run() -> None:
    row = published(epochs=None, steps=None, train_samples=None, defense_parameters="")
    assert judged(row, measured(49.85, epochs=3, steps=7, train_samples=1)).verdict == "within"


def test_the_closest_of_several_runs_counts_then_the_largest() -> None:
    far = measured(49.85, row={"dataset": "digits", "model": "far"})
    near = measured(10.0, row={"model": "near", "n": 100})
    large = measured(20.0, row={"model": "large", "n": 1000})
    found = judged(published(), far, near, large)
    assert found.measured == large
    assert found.verdict == "outside"
    assert judged(published(), far, measured(None, row={"status": "failed"})).verdict == "not comparable"
    budget = measured(49.85, row={"model": "budget", "epsilon": 0.1})
    epochs = measured(20.0, row={"model": "epochs"}, epochs=10, train_samples=1)
    assert judged(published(), budget, epochs).measured == epochs, "what may be shown comes first"


def test_no_attack_is_no_smaller_budget() -> None:
    bits = {
        "metric": "bits_per_dim",
        "unit": "bits/dim",
        "attack": "nll-in",
        "defense": "clean",
        "epsilon": 0.0,
    }
    row = published(
        attack="nll-in",
        metric="bits_per_dim",
        unit="bits/dim",
        epsilon=1.0,
        steps=None,
        defense="clean",
        defense_parameters="",
    )
    flow = measured(3.0, 0.1, bits, attack="nll-in", steps=None)
    assert judged(row, flow).verdict == "not run"
    assert judged(row.model_copy(update={"epsilon": 0.0, "value": Decimal("3.0")}), flow).verdict == "within"


def test_a_wrong_average_is_compared_with_the_recomputed_one() -> None:
    rows = rows_of("ijsat-table4")
    label = "AT [PGD10], eps 32/255"
    mine = [row for row in rows if row.row == label]
    average = next(row for row in mine if row.column == "Avg" and row.origin == "printed")
    trained = {"epsilon": 32 / 255, "steps": 10}
    ours = {"attack": "average", "metric": "average_accuracy", "epsilon": None, "combined": average.combines}
    found = {
        c.published.column: c
        for c in compare(
            mine, [measured(24.3, 0.2, ours, attack="average", steps=None, trained=trained)], KNOWN
        )
    }
    assert found["Avg"].recomputed == pytest.approx(24.3743, abs=1e-4)
    assert found["Avg"].verdict == "within"
    ours["combined"] = ("clean", "pgd20")
    others = compare(mine, [measured(24.3, 0.2, ours, attack="average", steps=None, trained=trained)], KNOWN)
    assert {c.verdict for c in others} == {"not run"}


def test_distances_without_an_interval_may_be_off_by_one_percent() -> None:
    row = published(
        metric="l2_all",
        unit="pixel range",
        value=Decimal("4.18"),
        attack="r-la",
        epsilon=None,
        defense="",
        defense_parameters="",
        steps=None,
    )
    size = {
        "metric": "l2_all",
        "lower": None,
        "upper": None,
        "attack": "r-la",
        "epsilon": None,
        "defense": "mart",
    }
    for value, verdict in ((4.22, "within"), (4.23, "outside")):
        found = judged(row, measured(value, 0, size, attack="r-la", steps=None))
        assert (found.verdict, found.reason) == (verdict, "no interval: 1%")


# ------------------------------------------------------------------------------------------------------ not run
@pytest.mark.parametrize(
    ("table", "label", "column", "reason"),
    [
        ("ijsat-table1", "DMAT", "AA", "needs DMAT"),
        ("ijsat-table1", "DMAT", "Elastic", "needs DMAT"),
        ("ijsat-table1", "IJSAT", "JPEG", "no run has it"),
        ("ijsat-table1", "IJSAT", "AA", "no run has it"),
        ("ijsat-table2", "VAE-GAN", "CIFAR-10", "needs VAE-GAN"),
        ("ijsat-table3", "TRADES", "Fog", "needs data set om-imagenet"),
        ("er-table3", "ER1", "MNIST ACC-COM", "needs ER-Detector, C&W"),
        ("flow-lp-table9", "Standard", "test loss", "nothing that a run measures"),
        ("flow-robustness-table2", "Clean", "eps 8", "needs data set lsun-bedroom"),
    ],
)
def test_not_run_says_what_it_needs(table: str, label: str, column: str, reason: str) -> None:
    rows = rows_of(table)
    found = {(c.published.row, c.published.column): c for c in compare(rows, [], KNOWN)}
    assert {c.verdict for c in found.values()} == {"not run"}
    assert found[label, column].reason == reason


def test_a_failed_cell_is_not_run_and_says_why() -> None:
    found = judged(published(), measured(None, row={"status": "failed", "reason": "attack left its set"}))
    assert (found.verdict, found.reason) == ("not run", "failed: attack left its set")
    assert judged(published(), measured(None, row={"status": "not run"})).reason == "not run"


def test_everything_missing_has_a_readable_name() -> None:
    known = find_known_names()
    attacks = {*known.attacks, "clean", "average"}
    for table in published_index().tables:
        if table.kind != "results":
            continue
        for row in table_rows(table):
            if row.metric != "accuracy":
                continue
            if row.attack.partition("@")[0] not in attacks:
                assert row.attack in CALLED
            if row.defense not in known.defenses and not row.model:
                assert row.defense in CALLED


# ------------------------------------------------------------------------------------------------- runs and pages
def test_measured_rows_are_the_leaderboard_with_the_settings_of_cards(run: Run) -> None:
    rows = measured_rows(run)
    found = next(m for m in rows if (m.row.model, m.row.attack) == ("digits-ijsat", "pgd20"))
    assert (found.attack, found.architecture, found.train_samples, found.epochs) == (
        "pgd20",
        "small-cnn",
        1077,
        60,
    )
    assert found.held_out == 360
    assert found.trained["flow"] == "digits-glow"
    spec = attack("pgd20@0.1", epsilon=0.1, parameters={"steps": 20, "relative_step_size": 0.25})
    labelled = make_run([cell("m", spec, frame(30, 0.9, 0.5, 1))], 30)
    pgd = next(m for m in measured_rows(labelled) if m.row.metric == "accuracy" and m.row.attack != "clean")
    assert (pgd.attack, pgd.steps, pgd.row.epsilon, pgd.step_size) == ("pgd20", 20, 0.1, 0.025)


def test_flows_have_their_unattacked_bits_once() -> None:
    rows = [
        m
        for m in measured_rows(three_flows())
        if m.attack == "nll-in" and m.row.metric == "bits_per_dim" and m.row.epsilon == 0
    ]
    models = {m.row.model for m in rows if m.steps is None}
    assert models == {r.cell.model_name for r in three_flows().cells}
    assert len([m for m in rows if m.steps is None]) == len(models)


class Links(HTMLParser):
    """Addresses a page refers to, elements that may not be there, and its plain text."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.ids: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("href", "src")]
        self.ids |= {value or "" for name, value in attrs if name == "id"}

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(path: Path) -> Links:
    links = Links()
    links.feed(path.read_text(encoding="utf-8"))
    return links


def test_one_page_in_the_design_of_the_site_that_opens_on_the_tables(run: Run, tmp_path: Path) -> None:
    found = write_published([run, three_flows()], tmp_path)
    (tmp_path / "leaderboard.html").write_text(
        run_page(run, published="published/index.html"), encoding="utf-8"
    )
    assert "published/index.html" in parsed(tmp_path / "leaderboard.html").addresses
    page = parsed(tmp_path / "published" / "index.html")
    for path in ("index.html", "about.html", *(f"published/{one.table.name}.html" for one in found)):
        assert path in {address.removeprefix("#/") for address in page.addresses}
    assert not [one for one in page.addresses if not one.startswith(("#", "data:", "https://")) and one]
    assert {path.name for path in (tmp_path / "published").iterdir()} == {
        *("index.html", "comparison.md"),
        *(f"{one.table.name}.csv" for one in found),
    }
    assert "published/index.html" not in run_page(run)


def test_pages_and_files_have_every_printed_number(run: Run, tmp_path: Path) -> None:
    for comparison in write_published([run], tmp_path):
        printed = [row for row in table_rows(comparison.table) if row.origin != "recomputed"]
        lines = list(
            csv.DictReader(io.StringIO((tmp_path / "published" / f"{comparison.table.name}.csv").read_text()))
        )
        assert [line["published"] for line in lines] == [
            "" if r.value is None else str(r.value) for r in printed
        ]
        assert sum(comparison.counts.values()) == len(printed)
        for line, found in zip(lines, comparison.comparisons, strict=True):
            assert line["verdict"] == found.verdict
            assert line["measured"] == ("" if found.measured is None else repr(found.measured.row.value))
    text = " ".join(parsed(tmp_path / "published" / "index.html").text)
    assert "recomputed 49.0867" in text
    assert "the mean of the 6 printed columns is 49.0867" in text


def rendered(comparison: TableComparison, run: Run) -> str:
    """The page of a table, without header and footer."""
    return body("published.html.j2", **table_values(comparison, [run], "x.csv"))


def test_a_digits_run_differs_from_cifar_and_says_how(run: Run) -> None:
    tables = {c.table.name: c for c in compare_tables([run], KNOWN)}
    counts = tables["ijsat-table1"].counts
    assert counts["within"] == counts["outside"] == counts["differs"] == 0
    assert counts["not comparable"] == 8  # clean, PGD-20, AA and JSA-50 of Normal Training and IJSAT
    assert "## IJSAT Table" not in comparison_markdown(list(tables.values()), [run])
    rows = list(csv.DictReader(io.StringIO(comparison_csv(tables["ijsat-table1"]))))
    listed = [row for row in rows if row["verdict"] == "not comparable"]
    assert {row["measured"] + row["difference"] + row["measured_model"] for row in listed} == {""}
    text = "data set digits, published cifar10; architecture small-cnn, published resnet18"
    assert all(text in row["reason"] for row in listed)
    page = rendered(tables["ijsat-table1"], run)
    assert "data set digits, published cifar10" in page
    for row in run_rows(run):
        assert f">{row.value:.2f}<" not in page.split("Published and measured")[1]
    assert page.index("As printed") < page.index("Published and measured")


def run_rows(run: Run) -> list[TableRow]:
    """The accuracies of a run that no printed number of the test's table happens to equal."""
    printed = {f"{row.value:.2f}" for row in rows_of("ijsat-table1") if row.value is not None}
    found = [m.row for m in measured_rows(run) if m.row.metric == "accuracy" and m.row.value is not None]
    return [row for row in found if f"{row.value:.2f}" not in printed]


def test_same_runs_same_bytes(run: Run, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_published([run], tmp_path / folder)
    first, second = (sorted((tmp_path / folder / "published").iterdir()) for folder in ("a", "b"))
    assert [path.name for path in first] == [path.name for path in second]
    assert all(one.read_bytes() == two.read_bytes() for one, two in zip(first, second, strict=True))


def test_names_are_escaped(run: Run) -> None:
    row = published(row=EVIL, column=EVIL, gate=False, doubt=EVIL)
    found = compare([row], [measured(49.0, row={"model": EVIL}, run=EVIL)], KNOWN)
    table = Table(name="t", source=EVIL, what=EVIL)
    page = rendered(TableComparison(table, None, (row,), tuple(found)), run)
    assert "<img" not in page
    assert page.count("&lt;img") >= 6
    markdown = comparison_markdown([TableComparison(table, None, (row,), tuple(found))], [run])
    tokens = MarkdownIt("commonmark").enable("table").parse(markdown)
    kinds = {child.type for token in tokens for child in [token, *(token.children or [])]}
    assert not kinds & {"html_block", "html_inline", "image", "link_open"}
    assert markdown.count("onerror") >= 4


def test_runs_without_a_published_number_say_so(run: Run) -> None:
    table = Table(name="t", source="T", what="w")
    empty = TableComparison(table, None, (published(),), tuple(compare([published()], [], KNOWN)))
    assert "No published number was measured" in comparison_markdown([empty], [run])
    assert not any(math.isnan(c.difference or 0) for c in empty.comparisons)


def test_report_holds_runs_against_published_tables(tmp_path: Path) -> None:
    def robbench(*arguments: str) -> str:
        result = CliRunner().invoke(main, [*arguments])
        assert result.exit_code == 0, result.output
        return result.output

    for model in ("digits-at", "digits-trades"):
        robbench("run", "--model", model, "--attacks", "fgsm", "--n", "6", "--out", str(tmp_path / model))
    folders = [str(tmp_path / model) for model in ("digits-at", "digits-trades")]
    output = robbench("report", *folders, "--published")
    assert "other tables" in output
    first, second = (tmp_path / model / "leaderboard.html" for model in ("digits-at", "digits-trades"))
    assert "published/index.html" in parsed(first).addresses
    assert "published/index.html" not in parsed(second).addresses
    text = (tmp_path / "digits-at" / "published" / "comparison.md").read_text(encoding="utf-8")
    assert "No published number was measured by these runs." in text
    page = (tmp_path / "digits-at" / "published" / "index.html").read_text(encoding="utf-8")
    assert "digits-at (digits-at): data set digits, published cifar10" in page
    assert "digits-trades (digits-trades): data set digits, published cifar10" in page
    assert not (tmp_path / "digits-trades" / "published").exists()
    robbench("report", folders[0])
    assert "published/index.html" not in parsed(first).addresses


def test_report_of_nothing_is_one_line(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["report", str(tmp_path / "nowhere"), "--published"])
    assert result.exit_code == 2
    assert result.output.startswith("Error: ")
    assert len(result.output.strip().splitlines()) == 1


def test_another_network_of_a_checkpoints_name_gets_no_verdict() -> None:
    row = of_model()
    known = replace(KNOWN, weights={"trades-mnist": "a" * 12})
    fields = {"dataset": "mnist", "model": "trades-mnist", "attack": "clean", "threat_model": "clean"}
    ours = replace(measured(99.48, row={**fields, "epsilon": None}), attack="clean")
    (same,) = compare([row], [replace(ours, weights="a" * 12)], known)
    (other,) = compare([row], [replace(ours, weights="b" * 12)], known)
    assert same.verdict == "within"
    assert other.verdict == "not comparable"
    assert f"weights {'b' * 12}, published {'a' * 12}" in other.setting
    assert find_known_names().weights["trades-mnist"]
