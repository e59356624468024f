"""Leaderboards of the site: the ledger's numbers, and pages that sort, filter, page and remember in a browser."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from flow_runs import N, flow_attack, flow_cell, flow_frame, flow_run, three_flows
from hypothesis import given, settings
from hypothesis import strategies as st
from publish_runs import attack, cell, corruption_spec, frame, generated_spec, make_run
from scipy.stats import binomtest
from site_pages import EVIL, PHONE, Reader

from robbench.data.corruption_names import Headline
from robbench.report.site import board_page
from robbench.report.site.boards import EVERY, board_paths, boards
from robbench.report.site.frame import frame_page
from robbench.report.site.groups import Group, site_of
from robbench.report.site.page import Page
from robbench.report.site.ranks import ranges
from robbench.report.site.scatter import Point, Scatter
from robbench.report.site.tables import DEFENSE, NAME, RANK, Board, Cell, Column, Table, lead
from robbench.results.corruptions import MEANS
from robbench.results.likelihood import mean_text, nll_tables
from robbench.results.rows import models
from robbench.results.tables import leaderboard
from robbench.store.records import CellResult, Run


def group_of(run: Run) -> Group:
    return site_of([run]).groups[0]


def only_boards(site: Any) -> Any:
    """The pages of leaderboards alone: what else a site has is tested elsewhere."""
    return (part for part in board_page.parts(site) if isinstance(part, Page))


def opened(site: Reader, run: Run, board: str = "", **how: Any) -> Any:
    """The board that a run opens with, or another: "all", "likelihood"."""
    site.build(run, pages=only_boards)
    return site.open(group_of(run).board_path(board), **how)


def board_called(run: Run, title: str) -> Board:
    return {board.title: board for board in boards(group_of(run))}[title]


def column(page: Any, title: str, table: str = "table.board") -> list[str]:
    """First words of the cells of a column, in the order shown."""
    heads = page.locator(f"{table} >> nth=0 >> thead th").all_inner_texts()
    index = [" ".join(head.split()) for head in heads].index(title) + 1
    cells = page.locator(f"{table} >> nth=0 >> tbody tr > :nth-child({index})").all_inner_texts()
    return [text.split()[0] if text else "" for text in cells]


def graded(values: list[float], defenses: tuple[str, ...] = ("at", "ijsat")) -> Run:
    """Models m0, m1, ... whose accuracy under pgd20 is `values`, in percent; nan: failed."""
    n, cells = 100, []
    for k, value in enumerate(values):
        rows = frame(n, 1.0, 1.0, 1)
        rows["robust"] = np.arange(n) < value
        how: dict[str, Any] = {"defense": defenses[k % len(defenses)]}
        if np.isnan(value):
            rows, how = rows.iloc[:0], {**how, "status": "failed", "error": "out of memory"}
        cells.append(cell(f"m{k}", attack(), rows, **how))
    return make_run(sorted(cells, key=lambda c: c.cell.status == "failed"), n)


# ------------------------------------------------------------------------------------------------------- numbers
def test_every_accuracy_of_the_ledger_stands_on_a_board(run: Run) -> None:
    group = group_of(run)
    pages = {part.path: part.body for part in board_page.parts(site_of([run])) if isinstance(part, Page)}
    assert list(pages) == [
        *board_paths(group).values(), group.board_path("likelihood"), group.board_path("all")
    ]  # fmt: skip
    for row in leaderboard(run):
        if row.metric.endswith("accuracy"):
            assert row.value is not None
            interval = f"[{row.lower:.1f}, {row.upper:.1f}]"
            number = rf">{row.value:.1f}(<sup>\*</sup>)? <small>{re.escape(interval)}<"
            assert re.search(number, pages[group.board_path("all")])


def test_a_group_opens_with_one_threat_model_linf_with_autoattack_first() -> None:
    """Never with all attacks, over which a worst case says nothing."""
    specs = [
        attack("pgd20-l2", "l2"), attack("fgsm-l2", "l2"), attack("aa-l2", "l2", algorithm="autoattack"),
        attack("pgd20@0.1", "linf", 0.1), attack("mim@0.1", "linf", 0.1),
        attack("aa", "linf", 0.2, algorithm="autoattack"),
    ]  # fmt: skip
    run = make_run([cell(m, s, frame(40, 0.9, 0.5, k)) for k, s in enumerate(specs) for m in "ab"], 40)
    assert [board.title for board in boards(group_of(run))] == [
        "linf, ε = 0.2", "l2, ε = 0.2", "linf, ε = 0.1", "Likelihood", EVERY
    ]  # fmt: skip
    first, *_, every = boards(group_of(run))
    assert first.path == group_of(run).board_path()
    keys = [column.key for column in every.tables[0].columns if column.shown]
    assert RANK not in keys
    assert "worst case" not in keys


def test_likelihoods_are_on_their_own_board_only(run: Run) -> None:
    for board in boards(group_of(run)):
        parts = {column.part for table in board.tables for column in table.columns}
        assert any("NLL" in part for part in parts) == (board.title == "Likelihood")


# ------------------------------------------------------------------------------------------------------- scatter
@settings(max_examples=80)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=2, max_size=12))
def test_the_front_is_what_no_model_beats(places: list[tuple[int, int]]) -> None:
    points = [
        Point(f"m{k}", "x.html", (10.0 * a, 10.0 * a, 10.0 * a), (10.0 * b, 10.0 * b, 10.0 * b))
        for k, (a, b) in enumerate(places)
    ]
    beaten = {
        p.name for p in points for q in points
        if q.clean[0] >= p.clean[0] and q.robust[0] >= p.robust[0]
        and (q.clean[0], q.robust[0]) != (p.clean[0], p.robust[0])
    }  # fmt: skip
    scatter = Scatter("worst case", tuple(points))
    assert {p.name for p in scatter.front} == {p.name for p in points} - beaten
    for mark in scatter.marks:
        assert 46 <= mark.x <= 704
        assert 12 <= mark.y <= 290


def test_a_scatter_shows_every_complete_model_with_its_intervals(run: Run, damaged: Run) -> None:
    table = boards(group_of(run))[0].tables[0]
    assert table.scatter is not None
    for line in table.lines:
        (point,) = [p for p in table.scatter.points if p.name == line[0].text]
        for cell_of, shown in zip((line[2], line[3]), (point.clean, point.robust), strict=True):
            assert (cell_of.order, cell_of.lower, cell_of.upper) == shown
    assert boards(group_of(damaged))[0].tables[0].scatter is None, "one complete model is no picture"


def test_points_are_reached_by_keyboard_and_lead_to_models(site: Reader) -> None:
    page = opened(site, graded([20, 80, 50]), scheme="dark")
    assert page.locator(".scatter a[tabindex='0']").count() == 1
    page.locator(".scatter a").first.evaluate(
        "e => e.closest('svg').querySelector(\"a[tabindex='0']\").focus()"
    )
    names = [page.evaluate("document.activeElement.getAttribute('aria-label').split(':')[0]")]
    for _ in range(2):
        page.keyboard.press("ArrowRight")
        names.append(page.evaluate("document.activeElement.getAttribute('aria-label').split(':')[0]"))
    assert sorted(names) == ["m0", "m1", "m2"]
    assert page.locator(".scatter a:focus text").evaluate("e => getComputedStyle(e).opacity") == "1"
    assert page.evaluate("document.activeElement.href.baseVal").startswith("model-m")


def test_who_leads_is_said_with_those_not_told_apart() -> None:
    run = graded([70, 68, 20])
    found = lead(boards(group_of(run))[0].tables[0])
    assert found is not None
    assert found.name.text == "m0"
    assert [name.text for name in found.ties] == ["m1"]


def test_on_a_phone_two_columns_are_shown_and_the_controls_are_one_line(site: Reader, run: Run) -> None:
    page = opened(site, run, width=PHONE)
    shown = page.locator("table.board thead th").evaluate_all(
        "l => l.filter(e => e.offsetWidth).map(e => e.dataset.key)"
    )
    assert shown == ["model", "worst case"]
    tops = page.locator(".controls > *").evaluate_all(
        "l => l.filter(e => e.offsetWidth > 1).map(e => e.offsetTop + e.offsetHeight / 2)"
    )
    assert max(tops) - min(tops) < 6
    page.locator("details.columns summary").first.click()
    page.get_by_label("clean", exact=True).check()
    assert page.locator("table.board th[data-key=clean]").is_visible()


def test_nothing_is_cut_off_at_1400_pixels(site: Reader, run: Run) -> None:
    page = opened(site, run, width=1400)
    assert page.locator(".scroll.tall").first.evaluate("e => e.scrollWidth - e.clientWidth") <= 0


def test_a_threat_model_has_its_own_worst_case_and_average(run: Run) -> None:
    """Against verdicts combined by hand."""
    board = {board.title: board for board in boards(group_of(run))}["linf, ε = 0.2"]
    keys = [column.key for column in board.tables[0].columns]
    assert keys[:6] == ["model", "rank", "clean", "worst case", "average", "defense"]
    assert {"pgd20", "aa"} <= set(keys)
    assert "jsa50" not in keys
    for line in board.tables[0].lines:
        shown = dict(zip(keys, line, strict=True))
        mine = [
            r.rows
            for r in run.cells
            if r.cell.model == shown["model"].text and r.cell.attack.label != "jsa50"
        ]
        verdicts = np.stack([rows["robust"] for rows in mine])
        clean = (mine[0]["clean_prediction"] == mine[0]["label"]).mean()
        assert shown["worst case"].order == pytest.approx(100 * verdicts.all(0).mean())
        assert shown["average"].order == pytest.approx(100 * np.mean([clean, *verdicts.mean(1)]))


def test_failed_and_missing_cells_say_so(site: Reader, damaged: Run) -> None:
    assert "not" in column(opened(site, damaged, "joint-0.2-eta0.35"), "jsa50")
    page = site.open(group_of(damaged).board_path())
    assert sorted(column(page, "aa"))[1] == "failed"
    assert sorted(column(page, "worst case"))[1] == "failed", "a worst case that lacks an attack is no number"
    assert set(column(page, "rank")) == {"none"}
    reason = page.locator("td[title*='left its set']").first
    assert reason.inner_text() == "failed"
    assert page.locator(".notes li", has_text="left its set").count() > 0
    assert page.get_by_text("No model has a rank").count() == 1
    for direction in range(2):
        page.locator("button.sort", has_text=re.compile("^aa$")).click()
        assert column(page, "aa")[-1] == "failed", direction


def test_likelihoods_and_distances_have_columns(run: Run) -> None:
    table = board_called(run, "Likelihood").tables[0]
    keys = [column.key for column in table.columns]
    expected = {(r.model, f"NLL {r.attack}"): r for r in leaderboard(run) if r.metric == "bits_per_dim_after"}
    assert len(expected) == 6
    for (model, key), row in expected.items():
        line = next(line for line in table.lines if line[0].text == model)
        assert line[keys.index(key)].order == (row.value if np.isfinite(row.value) else None)


def corruption(name: str, severity: int) -> CellResult:
    return cell(
        "m",
        corruption_spec(name, severity),
        frame(20, 0.9, 1 - 0.15 * severity, severity + len(name)),
        nll_flow=None,
    )


def test_published_and_generated_corruptions_are_never_mixed() -> None:
    grid = [(name, severity) for name in get_args(Headline) for severity in range(1, 6)]
    own = [
        cell("m", generated_spec(*one), frame(20, 0.9, 0.2, one[1] + len(one[0])), nll_flow=None)
        for one in grid
    ]
    published = [corruption(*one) for one in grid]
    first, second, every = boards(group_of(make_run([*published, *own], 20)))
    for board, names in ((first, ["corruptions"]), (second, ["corruptions-generated"]), (every, MEANS)):
        keys = [column.key for column in board.tables[0].columns]
        assert [key for key in keys if key in MEANS] == [*names]
        assert [table.threat_model for table in board.corruption_tables] == [*names]


def test_corruptions_have_their_mean_and_a_board() -> None:
    cells = [corruption(name, severity) for name in get_args(Headline) for severity in range(1, 6)]
    mean = 100 * np.mean([r.rows["robust"].mean() for r in cells])
    linf, corrupted, _, every = boards(
        group_of(make_run([*cells, cell("m", attack(), frame(20, 0.9, 0.5, 3))], 20))
    )
    for board in (every, corrupted):
        table = board.tables[0]
        shown = dict(zip([c.key for c in table.columns], table.lines[0], strict=True))
        assert shown["corruptions"].order == pytest.approx(mean)
        assert "worst case" not in shown or shown["worst case"].order == shown["pgd20"].order
        assert [t.model for t in board.corruption_tables] == ["m"]
    assert "c-fog-3" in shown
    assert sum(column.shown for column in corrupted.tables[0].columns) == 5, "75 more wait in the chooser"
    assert linf.corruption_tables == ()
    alone = boards(group_of(make_run(cells, 20)))
    assert len(alone) == 1
    assert "c-fog-3" in [column.key for column in alone[0].tables[0].columns]


# --------------------------------------------------------------------------------------------------------- ranks
def brute_ranges(verdicts: np.ndarray) -> list[tuple[int, int]]:
    """Pair by pair with scipy's binomial test, Holm's steps written out."""
    pairs = list(combinations(range(len(verdicts)), 2))
    tested = []
    for i, j in pairs:
        b, c = int((verdicts[i] & ~verdicts[j]).sum()), int((~verdicts[i] & verdicts[j]).sum())
        tested.append((binomtest(b, b + c).pvalue if b + c else 1.0, i if b > c else j, j if b > c else i))
    above, below = np.zeros(len(verdicts), int), np.zeros(len(verdicts), int)
    for step, (p, better, worse) in enumerate(sorted(tested)):
        if p > 0.05 / (len(pairs) - step):
            break
        above[worse] += 1
        below[better] += 1
    return [(1 + int(a), len(verdicts) - int(b)) for a, b in zip(above, below, strict=True)]


def test_ranks_are_those_of_paired_tests_on_the_worst_case() -> None:
    rates = [0.9, 0.85, 0.6, 0.55, 0.2, 0.5]
    cells = [
        cell(f"m{k}", spec, frame(150, 0.95, rate, 10 * k + j))
        for k, rate in enumerate(rates)
        for j, spec in enumerate((attack(), attack("mim")))
    ]
    run = make_run(cells, 150)
    held = np.stack([np.stack([r.rows["robust"] for r in model.cells]).all(0) for model in models(run)])
    expected = dict(zip([f"m{k}" for k in range(6)], brute_ranges(held), strict=True))
    assert ranges(run, models(run), ["pgd20", "mim"]) == expected
    assert len(set(expected.values())) > 2
    table = boards(group_of(run))[0].tables[0]
    shown = {line[0].text: line[1].text for line in table.lines}
    assert shown == {name: f"{a}-{b}" if a != b else f"{a}" for name, (a, b) in expected.items()}


def test_a_model_without_all_attacks_has_no_rank_and_its_worst_case_says_so() -> None:
    cells = [cell("whole", spec, frame(60, 0.9, 0.5, k)) for k, spec in enumerate((attack(), attack("mim")))]
    run = make_run([*cells, cell("part", attack(), frame(60, 0.9, 0.99, 5))], 60)
    assert ranges(run, models(run), ["pgd20", "mim"]) == {"whole": (1, 1)}
    table = boards(group_of(run))[0].tables[0]
    assert [line[0].text for line in table.lines] == ["whole", "part"], "an easier worst case is not ahead"
    keys = [column.key for column in table.columns]
    worst = table.lines[1][keys.index("worst case")]
    assert worst.marked
    assert worst.note == "over 1 of 2 attacks; not run: mim"
    assert table.lines[1][keys.index("average")].marked
    assert "part, worst case and average: partial, over 1 of 2 attacks; not run: mim" in table.notes
    assert {line[keys.index("rank")].text for line in table.lines} == {"none"}, (
        "one alone is compared with nothing"
    )
    assert table.lines[1][keys.index("mim")].text == "not run"


# --------------------------------------------------------------------------------------------- sorting and the like
def test_headers_sort_by_number_and_by_keyboard(site: Reader) -> None:
    page = opened(site, graded([9, 100, 52, 0, np.nan]))
    order = ["100.0", "52.0", "9.0", "0.0", "failed"]
    assert column(page, "pgd20") == order, "the best first as the page comes"
    header = page.locator("table.board thead th", has_text=re.compile("^pgd20$"))
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "descending"
    assert column(page, "pgd20") == order
    header.locator("button").press("Enter")
    assert header.get_attribute("aria-sort") == "ascending"
    assert column(page, "pgd20") == ["0.0", "9.0", "52.0", "100.0", "failed"]
    assert "sort=pgd20.asc" in page.url
    page.locator("table.board thead th >> nth=0 >> button").press("Space")
    assert column(page, "model") == ["m0", "m1", "m2", "m3", "m4"]
    assert "Sorted by model, ascending" in page.locator("p.status").text_content()
    assert page.locator("th[aria-sort]").count() == 1


def test_equal_numbers_keep_their_order(site: Reader) -> None:
    page = opened(site, graded([50, 70, 50, 70, 50]))
    first = column(page, "model")
    page.locator("table.board button.sort", has_text="clean").click()
    assert column(page, "model") == first


def test_filters_count_and_reset(site: Reader) -> None:
    page = opened(site, graded([9, 100, 52, 0, np.nan]))
    box = page.get_by_label("Filter")
    box.fill("IJSAT")
    assert sorted(column(page, "model")) == ["m1", "m3"]
    assert page.locator(".controls .count").inner_text() == "2 of 5 models"
    box.fill("failed")
    assert column(page, "model") == ["m4"]
    box.fill("nothing like it")
    assert page.locator("table.board tbody").inner_text() == "No models match."
    page.get_by_role("button", name="Reset").click()
    assert len(column(page, "model")) == 5
    assert "#" not in page.url
    page.locator(".controls select").select_option("at")
    assert sorted(column(page, "model")) == ["m0", "m2", "m4"]


def test_columns_are_chosen_and_all_of_it_is_in_the_address(site: Reader, run: Run) -> None:
    page = opened(site, run)
    page.locator("details.columns summary").click()
    page.get_by_label("average", exact=True).uncheck()
    page.keyboard.press("Escape")
    page.get_by_label("Filter").fill("digits & 100%")
    page.get_by_label("Filter").fill("digits-i")
    page.locator("table.board button.sort", has_text="aa").first.click()
    page.get_by_label("95 % intervals").uncheck()
    assert page.locator("table.board thead th", has_text="average").is_hidden()
    again = site.open(group_of(run).board_path(), state=page.url.partition("#?")[2])
    for one in (page, again):
        assert column(one, "model") == ["digits-ijsat"]
        assert one.locator("table.board thead th", has_text="average").is_hidden()
        assert (
            one.locator("table.board thead th", has_text=re.compile("^aa$")).get_attribute("aria-sort")
            == "descending"
        )
        assert one.locator("table.board small").first.is_hidden()
        assert one.get_by_label("Filter").input_value() == "digits-i"
    again.goto(site.address(group_of(run).board_path(), "sort=clean.asc&filter=100%25"))
    again.locator("table.board tbody", has_text="No models match.").wait_for()
    assert again.locator("table.board tbody").inner_text() == "No models match."


def test_many_attacks_wait_in_the_column_chooser(site: Reader) -> None:
    specs = [attack(f"pgd{k}", "linf" if k % 2 else "l2") for k in range(1, 15)]
    run = make_run([cell("m", spec, frame(40, 0.9, 0.5, k)) for k, spec in enumerate(specs)], 40)
    page = opened(site, run, "all")
    assert page.locator("table.board th[data-key='worst linf']").is_visible()
    assert page.locator("table.board th[data-key=pgd3]").is_hidden()
    shared = site.open(group_of(run).board_path("all"), state="show=pgd3")
    assert shared.locator("table.board th[data-key=pgd3]").is_visible()
    assert shared.locator("table.board th[data-key=clean]").is_hidden()


@pytest.mark.parametrize("single", [False, True])
def test_boards_work_in_both_forms(site: Reader, run: Run, single: bool) -> None:
    site.build(run, single=single, pages=only_boards)
    group = group_of(run)
    page = site.open(group.board_path(), state="sort=model.asc")
    assert column(page, "model") == ["digits-ijsat", "digits-standard"]
    page.get_by_role("link", name="joint, ε = 0.2, η = 0.35").click()
    page.wait_for_selector("h1:has-text('joint')")
    page.locator("table.board button.sort", has_text="model").click()
    assert column(page, "model") == ["digits-ijsat", "digits-standard"]
    assert page.locator("table.board tbody a").first.get_attribute("href").endswith("model-digits-ijsat.html")
    assert page.url.endswith("?sort=model.asc")
    if single:  # a column that the page left behind does not have
        page.evaluate("path => { location.hash = path; }", f"#/{group.board_path()}?sort=aa.asc")
        page.wait_for_selector("th[data-key=aa][aria-sort=ascending]")
    else:
        page.evaluate("location.hash = '#?sort=jsa50.asc'")
        page.wait_for_selector("th[data-key=jsa50][aria-sort=ascending]")


def test_an_anchor_keeps_the_state(site: Reader) -> None:
    page = opened(site, graded([20, 80]), state="filter=m1")
    page.get_by_role("link", name="how they are made").click()
    assert page.evaluate("document.activeElement.id") == "ranks"
    assert column(page, "model") == ["m1"]
    assert page.url.endswith("#?filter=m1")


def test_a_board_is_readable_without_scripts(site: Reader, run: Run) -> None:
    page = opened(site, run, scripts=False)
    assert column(page, "model") == ["digits-ijsat", "digits-standard"]
    assert page.locator("button.sort, .controls").count() == 0
    assert page.locator("table.board th[scope=col]").count() == page.locator("table.board thead th").count()


# ------------------------------------------------------------------------------------------------------ accessible
def test_boards_are_accessible(site: Reader, damaged: Run) -> None:
    site.build(damaged, pages=only_boards)

    def prepare(page: Any) -> None:
        page.locator("details.columns summary").first.click()
        page.locator("table.board button.sort").nth(1).focus()

    site.assert_accessible(group_of(damaged).board_path(), prepare)


def test_boards_of_flows_are_accessible(site: Reader) -> None:
    run = flow_run([cell("digits-standard", attack(), frame(N, 0.9, 0.4, 1)), *three_flows().cells])
    site.build(run, pages=only_boards)
    site.assert_accessible(group_of(run).board_path(), looks=[(PHONE, "dark")])


def test_headers_and_first_column_stay_in_sight(site: Reader) -> None:
    page = opened(site, graded(list(range(60))), width=PHONE)
    page.locator(".scroll.tall").evaluate("e => e.scrollTo(150, 500)")
    head = page.locator("table.board thead th").first.bounding_box()
    region = page.locator(".scroll.tall").bounding_box()
    assert abs(head["y"] - region["y"]) < 2
    assert abs(head["x"] - region["x"]) < 2


# ----------------------------------------------------------------------------------------------------------- flows
def test_flows_have_boards_of_bits_per_dimension(site: Reader) -> None:
    run = three_flows()
    page = opened(site, run)
    assert "Accuracy" not in page.locator("main").inner_text()
    text = page.locator("main").inner_text()
    for table in nll_tables(run):
        assert f"Likelihood under {table.attack}" in text
        for line in table.lines:
            assert all(mean_text(nll).removesuffix("*") in text for nll in line.cells)
    assert page.locator("table.board").count() == 3
    page.locator("table.board >> nth=1 >> button.sort >> nth=0").click()
    assert "nll2.sort=model.asc" in page.url


# -------------------------------------------------------------------------------------------------------- escaping
def test_hostile_names_are_text(site: Reader) -> None:
    rows = frame(30, 0.9, 0.5, 1)
    failed = cell(EVIL + "2", attack(), rows.iloc[:0], status="failed", error=f"broke {EVIL}", defense=EVIL)
    hostile = attack("pgd20").model_copy(update={"label": EVIL, "threat_model": EVIL, "algorithm": EVIL})
    flow = flow_cell(EVIL + "3", flow_attack("nll-in"), flow_frame(1))
    cells = [cell(EVIL, hostile, rows, defense=EVIL), failed, cell(EVIL, attack(), rows, defense=EVIL), flow]
    page = opened(site, replace(make_run(cells, 30), note=EVIL), "all")
    assert page.locator("table.board tbody th").first.inner_text() == EVIL
    assert page.locator("img").count() == 0
    page.locator("details.columns summary").first.click()
    assert page.locator(".choices label", has_text="<script>").count() > 0


# ----------------------------------------------------------------------------------------------------- large boards
def synthetic(lines: int, attacks: int, name: Callable[[int], str]) -> Table:
    """A board's table of random accuracies over 1,000 samples."""
    correct = np.random.default_rng(0).integers(0, 1001, (lines, attacks))
    correct[0] = 1000
    columns = [Column(f"attack{k}", f"attack{k}", "linf") for k in range(attacks)]
    return Table(
        key="",
        title="Accuracy under attack",
        about="",
        caption="",
        explanation="",
        columns=(NAME, DEFENSE, Column(RANK, "rank", first="asc"), *columns),
        lines=tuple(
            (
                Cell("name", name(i), name(i), file=f"digits-seed-3-n-30/model-m{i}.html"),
                Cell("text", f"defense{i % 7}", f"defense{i % 7}"),
                Cell("rank", f"{i + 1}", float(i + 1)) if i else Cell("absent", "none", note="no rank"),
                *(
                    Cell("score", f"{k / 10:.1f}", k / 10, max(0, k / 10 - 3), min(100, k / 10 + 3))
                    for k in row
                ),
            )
            for i, row in enumerate(correct.tolist())
        ),
        sort="rank.asc",
    )


@pytest.mark.parametrize("count", [150, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_models_are_paged(site: Reader, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_page, "PLAIN_ROWS", 100)
    last = count // board_page.PAGE_SIZE
    group = group_of(make_run([cell("m", attack(), frame(30, 0.9, 0.5, 1))], 30))
    table = synthetic(count, 30, lambda i: EVIL if i == 3 else f"model {i}")
    board = Board(group.board_path(), "All attacks", (table,), tuple(group.run.cells))
    made = board_page.page(group, board, [board])
    assert frame_page(made) == frame_page(board_page.page(group, board, [board]))
    size = len(frame_page(made).encode())
    assert size < 5_000_000
    site.build(group.run, pages=lambda _: iter([made]))
    page = site.open(board.path)
    if count == 10_000:  # of 150 the time is that of the browser's start
        opened_in = page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd")
        print(f"{size:,} bytes, interactive after {opened_in:.0f} ms")
        assert opened_in < 4_000, "ms, on a machine that does other things too"
    assert page.locator("table.board tbody tr").count() == board_page.PAGE_SIZE
    assert column(page, "model")[1:3] == ["model", EVIL.split()[0]]
    assert page.locator(".pager span").inner_text() == f"1 to 50 of {count:,}"
    page.get_by_role("button", name="Last").click()
    assert column(page, "rank")[-2:] == [f"{count}", "none"], "without a rank it comes last"
    page.get_by_role("button", name="Previous").click()
    assert f"page={last - 1}" in page.url
    page.locator("table.board button.sort", has_text=re.compile("^attack7$")).click()
    best = [table.lines[i][10].order for i in range(count)]
    shown = page.locator("table.board tbody tr > :nth-child(11)").evaluate_all(
        "l => l.map(e => Number(e.dataset.order))"
    )
    assert shown == sorted(best, reverse=True)[:50]
    page.get_by_label("Filter").fill("model 77")
    sevens = sum("77" in str(i) for i in range(count))
    assert page.locator(".controls .count").inner_text() == f"{sevens} of {count:,} models"
    page.get_by_label("Filter").fill("onerror")
    assert page.locator("table.board tbody th").inner_text() == EVIL
    assert page.locator("table.board tbody a").get_attribute("href") == "model-m3.html"
    assert page.locator("img").count() == 0
    plain = site.open(board.path, scripts=False)
    assert plain.locator("table.board tbody tr").count() == board_page.PAGE_SIZE


def test_a_paged_board_is_accessible(site: Reader) -> None:
    group = group_of(make_run([cell("m", attack(), frame(30, 0.9, 0.5, 1))], 30))
    board = Board(group.board_path(), "All", (synthetic(450, 6, lambda i: f"m{i}"),), tuple(group.run.cells))
    site.build(group.run, pages=lambda _: iter([board_page.page(group, board, [board])]))
    site.assert_accessible(board.path, looks=[(PHONE, "light")])


def repeated(run: Run, count: int, attacks: int) -> Run:
    """`count` models under `attacks` attacks, from the ledger of a few of each."""
    by_model = models(run)
    cells = []
    for k in range(count):
        source = by_model[k % len(by_model)].cells
        for j in range(attacks):
            result = source[j % len(source)]
            spec = result.cell.attack.model_copy(update={"label": f"{result.cell.attack.name}-{j}"})
            changes = {"model": f"{result.cell.model}-{k}", "attack": spec, "hash": f"{k * attacks + j:064x}"}
            cells.append(CellResult(result.cell.model_copy(update=changes), result.rows))
    cards = {r.cell.model: run.cards[r.cell.model.rpartition("-")[0]] for r in cells}
    return replace(run, cells=cells, cards=cards)


CLICKED = """() => {
  const ready = performance.getEntriesByType("navigation")[0].domContentLoadedEventEnd;
  const start = performance.now();
  document.querySelector("table.board th[data-key=clean] button").click();
  document.querySelector("table.board").getBoundingClientRect();
  return [ready, performance.now() - start];
}"""


def assert_quick(site: Reader, path: str, limit: float = float("inf")) -> None:
    """The first of 200 lines on less than 5 MB that are sorted after a click; with a `limit`, within as many ms of the
    page's start."""
    assets = sum(file.stat().st_size for file in (site.folder / "assets").iterdir())
    size = (site.folder / path).stat().st_size + assets
    assert size < 5_000_000
    best = float("inf")
    for _ in range(3):  # other tests run beside this one: the best of three
        page = site.open(path)
        ready, sort = page.evaluate(CLICKED)
        print(f"{size:,} bytes, interactive after {ready:.0f} ms, sorted in {sort:.0f} ms")
        assert page.locator("table.board tbody tr").count() == board_page.PAGE_SIZE
        assert page.locator(".controls .count").inner_text() == "200 models"
        assert page.locator("th[data-key=clean]").get_attribute("aria-sort") == "descending"
        best = min(best, ready + sort)
        if best < limit:
            return
    raise AssertionError(f"interactive and sorted after {best:.0f} ms at best")


@pytest.mark.slow
def test_a_table_of_200_models_and_30_attacks_sorts(site: Reader) -> None:
    group = group_of(make_run([cell("m", attack(), frame(30, 0.9, 0.5, 1))], 30))
    table = synthetic(200, 30, lambda i: f"model {i}")
    clean = replace(table.columns[3], key="clean", label="clean")
    table = replace(table, columns=(*table.columns[:3], clean, *table.columns[4:]))
    board = Board(group.board_path(), "All", (table,), tuple(group.run.cells))
    site.build(group.run, pages=lambda _: iter([board_page.page(group, board, [board])]))
    assert_quick(site, board.path)


@pytest.mark.slow
def test_200_models_and_30_attacks_sort_in_a_second(site: Reader, tmp_path: Path) -> None:
    """From real ledgers, repeated; the clock is the page's own, from its start to sorted rows after a click."""
    from robbench.cli.run import run_matrix
    from robbench.run.request import RunRequest
    from robbench.store.ledger import load_run

    zoo = ("digits-standard", "digits-at")
    assert (
        run_matrix(RunRequest(("fgsm", "pgd10", "fgsm-l2"), models=zoo, device="cpu"), tmp_path / "run") == 0
    )
    run = repeated(load_run(tmp_path / "run"), 200, 30)
    assert (len(run.cells), run.n) == (6000, 360)
    site.build(run, pages=only_boards)
    assert_quick(site, group_of(run).board_path(), 1_000)


def test_the_same_runs_give_the_same_bytes(run: Run, damaged: Run) -> None:
    for one in (run, damaged, three_flows()):
        first, second = (
            [frame_page(part) for part in board_page.parts(site_of([one])) if isinstance(part, Page)]
            for _ in range(2)
        )
        assert first == second
