"""The start page: who may lead, what failed, what was published, how to check it."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from flow_runs import three_flows
from publish_runs import attack, cell, frame, make_run
from site_pages import PHONE, Reader, only

from robbench.report.site import about, attack_page, catalog, home, published
from robbench.report.site.frame import frame_page
from robbench.report.site.groups import site_of
from robbench.report.site.page import Page
from robbench.report.site.provenance import duration, provenance
from robbench.statistics.paired import rank_ranges
from robbench.store.records import Run

pytestmark = pytest.mark.usefixtures("few_tables")


def start(*runs: Run) -> str:
    (page,) = home.parts(site_of(runs))
    assert isinstance(page, Page)
    return frame_page(page)


def test_leaders_are_all_models_whose_range_begins_with_one() -> None:
    n = 300
    rates = {"best": 0.70, "near": 0.68, "worse": 0.30, "worst": 0.05}
    run = make_run(
        [cell(name, attack(), frame(n, 1.0, rate, k)) for k, (name, rate) in enumerate(rates.items())], n
    )
    ranges = rank_ranges(np.stack([r.rows["robust"].to_numpy() for r in run.cells]))
    expected = [name for name, (first, _) in zip(rates, ranges, strict=True) if first == 1]
    assert expected == ["best", "near"]
    assert re.search(r">(best|near)</a> <span class=\"quiet\">and 1 not told apart<", start(run))


def test_a_model_alone_is_named_and_spoken_of_as_one() -> None:
    text = start(make_run([cell("lonely", attack(), frame(40, 1.0, 0.5, 1))], 40))
    assert ">lonely</a>" in text
    assert "not told apart<" not in text
    assert "1 model under 1 attack on 1 data set" in text


def test_the_page_says_what_failed_and_what_is_not_finished(damaged: Run) -> None:
    text = start(damaged)
    assert "2 cells without a number" in text
    assert "50 of 120 samples done" in text
    (page,) = about.parts(site_of([damaged]))
    assert isinstance(page, Page)
    assert "1 failed, partial: 4 of 6 cells done" in page.body
    assert re.search(r'digits-ijsat, <a [^>]*>aa</a>: <span class="failed">failed</span> \(attack', text)


def test_flows_have_no_ranks() -> None:
    text = start(three_flows())
    assert "likelihood, which has no ranks" in text
    assert "scatter" not in text


def test_the_engine_behind_autoattack_is_named(run: Run) -> None:
    (page,) = about.parts(site_of([run]))
    assert isinstance(page, Page)
    assert "robbench aa, parity table v" in page.body


def test_attacks_of_a_group_are_listed_the_strongest_first(run: Run) -> None:
    (page,) = catalog.parts(site_of([run]))
    assert isinstance(page, Page)
    means = [
        float(text)
        for text in re.findall(r'<td class="number" data-order="[\d.]+">([\d.]+)</td><td', page.body)
    ]
    assert len(means) == 3
    assert means == sorted(means)


def test_groups_lead_to_their_pages(site: Reader, run: Run, damaged: Run) -> None:
    """From the start to a board, a model, back, and by the search to an attack."""
    site.build(run, replace(damaged, seed=4))
    page = site.open()
    assert page.locator("table.best tbody").count() == 2
    page.click("table.best tbody th a >> nth=0")
    page.wait_for_selector('main[data-page="board"]')
    assert page.inner_text("header.top a[aria-current]") == "digits"
    page.click("main table.board tbody th a >> nth=0")
    page.wait_for_selector('main[data-page="model"]')
    page.click("a.brand")
    page.wait_for_selector('main[data-page="home"]')
    page.click("header.top >> text=Attacks")
    page.wait_for_selector('main[data-page="catalog"]')
    page.fill("form[role=search] input", "attack jsa5")
    page.wait_for_selector(".hits a")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    page.wait_for_selector('main[data-page="attack"]')
    assert page.inner_text("h1") == "Attack jsa50"


def test_the_start_page_is_accessible(site: Reader, run: Run) -> None:
    site.build(run, pages=only(home, published, about, catalog))
    site.assert_accessible("index.html", opened, [(PHONE, "dark")])
    site.assert_accessible("about.html", opened, [(PHONE, "dark")])
    site.assert_accessible("attacks.html", opened, [(PHONE, "light")])
    site.assert_accessible("published/index.html", opened, [(PHONE, "light")])
    site.assert_accessible("published/ijsat-table1.html", opened, [(PHONE, "dark")])


def opened(page: Any) -> None:
    page.eval_on_selector_all("main details", "all => all.forEach((one) => { one.open = true; })")


def test_marks_of_a_published_table_lead_to_its_doubts(site: Reader, run: Run) -> None:
    site.build(run, pages=only(published))
    page = site.open("published/ijsat-table1.html")
    page.click("main a.mark >> nth=0")
    assert "doubt-" in page.evaluate("document.activeElement.id + location.hash")


# ------------------------------------------------------------------------------------------------------ provenance
def test_provenance_names_commands_versions_device_time_and_hashes(run: Run) -> None:
    (group,) = site_of([run]).groups
    cells = [replace(r, cell=r.cell.model_copy(update={"device": "cpu"})) for r in run.cells[:2]]
    found = provenance(group, cells)
    facts = dict(found.facts)
    assert facts["Seed"].startswith("3")
    assert facts["Device"] == "cpu"
    assert facts["Computing time"] == "2.5 s"
    assert facts["Versions"] == "robbench 0.1.0, torch 2.8.0, python 3.11.9"
    assert "d" * 64 in facts["Data"]
    assert run.cells[0].cell.model_sha256 in facts["Weights"]
    assert "f" * 64 in facts["Flow"]
    (command,) = found.commands
    assert command.startswith("robbench run --dataset digits --model digits-standard --attacks pgd20,aa ")


def test_commands_of_two_runs_ask_for_their_own_cells_only() -> None:
    first = make_run([cell("a", attack(), frame(20, 0.9, 0.5, 1))], 20)
    second = make_run([cell("b", attack("mim"), frame(20, 0.9, 0.5, 2)), first.cells[0]], 20)
    (group,) = site_of([first, second]).groups
    lines = provenance(group).commands
    assert [re.findall(r"--(?:model|attacks) (\S+)", line) for line in lines] == [
        ["a", "pgd20"],
        ["b", "mim"],
    ]


def test_old_records_say_that_no_device_was_recorded(run: Run) -> None:
    (group,) = site_of([run]).groups
    assert dict(provenance(group).facts)["Device"] == "not recorded"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "not recorded"), (0.25, "0.25 s"), (59.94, "59.9 s"), (90, "1.5 min"), (7200, "2.0 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_commands_are_copied(site: Reader, run: Run) -> None:
    site.build(run, pages=only(attack_page))
    page = site.open("digits-seed-3-n-120/attack-pgd20.html")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("summary#provenance")
    page.click("button.copy >> nth=0")
    page.wait_for_selector("button.copy >> text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == page.inner_text(".command code >> nth=0")


def test_the_single_file_shows_every_kind_of_page(site: Reader, run: Run) -> None:
    site.build(run, single=True)
    group = "digits-seed-3-n-120"
    for path, kind in (
        ("index.html", "home"),
        (f"{group}/attack-jsa50.html", "attack"),
        (f"{group}/threat-joint.html", "threat"),
        (f"{group}/compare.html", "compare"),
        ("attacks.html", "catalog"),
        ("about.html", "about"),
        ("published/index.html", "published"),
    ):
        page = site.open(path, width=PHONE)
        assert page.get_attribute("main", "data-page") == kind
        assert page.locator("header.top a[aria-current]").count() == int(
            "/" in path and "published" not in path
        )
        page.context.close()
