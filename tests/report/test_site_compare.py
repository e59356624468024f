"""Two models: what the page says against the tested functions and brute force."""

import json
import re
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs, quote

import numpy as np
import pytest
from flow_runs import three_flows
from publish_runs import attack, cell, frame, make_run
from scipy.stats import binomtest
from site_pages import DESK, EVIL, Reader, only

from robbench.report.site import board_page, compare_page, home, model_page
from robbench.report.site.frame import frame_page
from robbench.report.site.groups import site_of
from robbench.report.site.page import Page
from robbench.results.pairs import unpack
from robbench.store.records import CellResult, Run

pytestmark = pytest.mark.usefixtures("few_tables")
PATH = "digits-seed-3-n-120/compare.html"


def pages(*runs: Run) -> list[Page]:
    return [page for page in compare_page.parts(site_of(runs)) if isinstance(page, Page)]


def data(page: Page) -> Any:
    found = re.search(r'data-id="compare">(.*?)</script>', page.body, re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def verdicts(run: Run, model: str, *labels: str) -> np.ndarray:
    """Brute force, in the order of run.sample_ids."""
    held = np.ones(run.n, bool)
    for result in run.cells:
        if result.cell.model == model and (not labels or result.cell.attack.label in labels):
            by_id = dict(zip(result.rows["sample_id"], result.rows["robust"], strict=True))
            held &= np.array([by_id[i] for i in run.sample_ids])
    return held


def test_the_island_holds_the_verdicts(run: Run) -> None:
    shuffled = replace(run, sample_ids=tuple(np.random.default_rng(0).permutation(run.sample_ids).tolist()))
    (page,) = pages(shuffled)
    found = data(page)
    assert found["ids"] == list(shuffled.sample_ids)
    assert found["columns"] == [
        *(
            "worst case",
            "worst linf, ε = 0.2",
            "worst joint, ε = 0.2, η = 0.35",
            "clean",
            "pgd20",
            "aa",
            "jsa50",
        )
    ]
    for name, packed in found["models"]:
        columns = dict(zip(found["columns"], packed, strict=True))
        expected = {"worst case": (), "worst linf, ε = 0.2": ("pgd20", "aa"), "pgd20": ("pgd20",)}
        for key, labels in expected.items():
            assert (unpack(columns[key], run.n) == verdicts(shuffled, name, *labels)).all()


def test_a_cell_without_verdicts_is_null(damaged: Run) -> None:
    (page,) = pages(damaged)
    found = data(page)
    columns = {name: dict(zip(found["columns"], packed, strict=True)) for name, packed in found["models"]}
    assert columns["digits-ijsat"]["aa"] is None
    assert columns["digits-ijsat"]["worst case"] is None
    assert columns["digits-standard"]["jsa50"] is None
    assert columns["digits-standard"]["aa"] is not None


def test_closest_pairs_are_there_without_scripts() -> None:
    n = 120
    rates = (0.7, 0.69, 0.4, 0.1)
    run = make_run([cell(f"m{k}", attack(), frame(n, 1, rate, k)) for k, rate in enumerate(rates)], n)
    (page,) = pages(run)
    lines = re.findall(r"<tr><th scope=\"row\"><a [^>]*>(m\d)</a></th><td>(m\d)</td>", page.body)
    held = {f"m{k}": verdicts(run, f"m{k}").sum() for k in range(4)}
    gaps = [abs(int(held[a]) - int(held[b])) for a, b in lines]
    assert len(lines) == 6
    assert gaps == sorted(gaps)
    a, b = (verdicts(run, name) for name in lines[0])
    p = binomtest(int((a & ~b).sum()), int((a ^ b).sum())).pvalue
    assert f'<td class="number">{p:.2g}</td>' in page.body


def test_one_model_or_flows_alone_have_no_page() -> None:
    assert pages(make_run([cell("a", attack(), frame(30, 1, 0.5, 1))], 30)) == []
    assert pages(three_flows()) == []


def test_models_of_another_group_on_the_same_images_can_be_chosen(run: Run) -> None:
    newer = replace(run, versions={"robbench": "0.2.0"})
    changed = replace(
        newer,
        cells=[CellResult(r.cell, r.rows.assign(robust=~r.rows["robust"])) for r in run.cells],
        folder=run.folder.with_name("newer"),
    )
    first, second = pages(run, changed)
    assert len(data(first)["models"]) == len(data(second)["models"]) == 4
    names = [name for name, _ in data(first)["models"]]
    assert names[:2] == ["digits-standard", "digits-ijsat"]
    assert names[2].startswith("digits-standard, digits, seed 3, n = 120")
    elsewhere = replace(run, dataset="mnist")
    assert len(data(pages(run, elsewhere)[0])["models"]) == 2


def test_two_hundred_models_and_thirty_attacks_stay_small() -> None:
    n = 1000
    rows = [frame(n, 0.9, rate, k).drop(columns="example") for k, rate in enumerate(np.linspace(0.1, 0.9, 8))]
    specs = [attack(f"pgd{k}") for k in range(1, 31)]
    cells = [
        CellResult(result.cell, result.rows)
        for k in range(200)
        for j, spec in enumerate(specs)
        for result in [cell(f"model-{k}", spec, rows[(k + j) % 8])]
    ]
    (page,) = pages(make_run(cells, n))
    assert len(frame_page(page)) < 2_000_000
    assert len(data(page)["models"]) == 200
    assert len(data(page)["columns"]) == 32


# --------------------------------------------------------------------------------------------------------- browser
def test_the_page_says_what_brute_force_says(site: Reader, run: Run) -> None:
    site.build(run, pages=only(compare_page))
    page = site.open(PATH, state="a=digits-standard&b=digits-ijsat&on=pgd20")
    a, b = (verdicts(run, name, "pgd20") for name in ("digits-standard", "digits-ijsat"))
    counts = {"both": a & b, "onlyA": a & ~b, "onlyB": b & ~a, "neither": ~a & ~b}
    for key, held in counts.items():
        assert page.inner_text(f"[data-count={key}]") == str(held.sum())
    for key in ("onlyA", "onlyB"):
        page.click(f"[data-ids={key}] summary")
        listed = [int(i) for i in re.findall(r"\d+", page.inner_text(f"[data-ids={key}] p"))]
        assert listed == [i for i, held in zip(run.sample_ids, counts[key], strict=True) if held]
    p = binomtest(int(counts["onlyA"].sum()), int((a ^ b).sum())).pvalue
    sentence = page.inner_text(".verdict-line").replace("\u2212", "-")
    assert float(re.search(r"p = ([\d.e-]+)\.$", sentence)[1]) == pytest.approx(p, rel=0.06)  # type: ignore[index]
    assert f"A {100 * a.mean():.1f} %, B {100 * b.mean():.1f} %" in sentence
    assert "B is right more often" in sentence
    assert page.locator("table.each tbody tr").count() == 7


def test_choices_are_in_the_address_and_come_back(site: Reader, run: Run) -> None:
    site.build(run, pages=only(compare_page))
    page = site.open(PATH)
    page.select_option("select[name=on]", "worst linf, ε = 0.2")
    page.select_option("select[name=a]", "digits-standard")
    page.click("button.swap")
    state = parse_qs(page.url.partition("#?")[2])
    assert state["on"] == ["worst linf, ε = 0.2"]
    text = page.inner_text(".compared")
    page.reload()
    page.wait_for_selector("html[data-ready=yes]")
    assert page.inner_text(".compared") == text
    other = site.open(PATH, state=page.url.partition("#?")[2])
    assert other.inner_text(".compared") == text


def test_a_missing_cell_is_said_to_be_missing(site: Reader, damaged: Run) -> None:
    site.build(damaged, pages=only(compare_page))
    page = site.open(PATH, state="a=digits-ijsat&b=digits-standard&on=aa")
    assert page.inner_text(".verdict-line") == "No comparison: digits-ijsat has no complete aa."
    assert not page.is_visible(".cross")


def test_model_and_board_lead_here_with_the_model_chosen(site: Reader, run: Run) -> None:
    for single in (False, True):
        site.build(run, single=single, pages=only(home, board_page, model_page, compare_page))
        page = site.open("digits-seed-3-n-120/model-digits-standard.html")
        page.click(".more a")
        page.wait_for_selector(".compared:not([hidden])")
        assert page.input_value("select[name=a]") == "digits-standard"
        page = site.open("digits-seed-3-n-120/index.html")
        page.click("main >> text=Compare two models")
        page.wait_for_selector(".compared:not([hidden])")
        page.click("#closest ~ .scroll tbody a")
        assert page.input_value("select[name=a]") in ("digits-standard", "digits-ijsat")


def test_odd_names_survive_the_address(site: Reader) -> None:
    names = [EVIL, "50% & more+@?#/x", "a ä = ö"]
    run = make_run([cell(name, attack(), frame(40, 1, 0.5, k)) for k, name in enumerate(names)], 40)
    site.build(run, pages=only(compare_page))
    path = "digits-seed-3-n-40/compare.html"
    for name in names:
        page = site.open(path, state=f"a={quote(name, safe='')}&b={quote(names[0], safe='')}")
        assert page.input_value("select[name=a]") == name
        page.click("button.swap")
        page.reload()
        page.wait_for_selector("html[data-ready=yes]")
        assert page.input_value("select[name=b]") == name


def test_the_comparison_is_accessible(site: Reader, run: Run) -> None:
    site.build(run, pages=only(compare_page))
    site.assert_accessible(PATH, looks=[(DESK, "light")])
    page = site.open(PATH, scripts=False)
    assert page.is_visible("noscript p")
    assert not page.is_visible("form.choose")
    assert page.is_visible("#closest")
