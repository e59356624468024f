"""Pages of models in a real browser."""

import re

import numpy as np
import pytest
from flow_runs import N, three_flows
from publish_runs import SHAPE, attack, cell, frame, images, make_run
from site_pages import DESK, EVIL, PHONE, Reader, only

from robbench.report.site import attack_page, home, model_page
from robbench.report.site.groups import Group, site_of
from robbench.results.rows import models
from robbench.store.records import CellResult, Run

pytestmark = pytest.mark.usefixtures("few_tables")


@pytest.fixture(autouse=True)
def originals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean images from memory: the runs of these tests have no folder."""
    monkeypatch.setattr(Group, "originals", property(lambda group: images))


def swept(name: str = "digits-at") -> Run:
    """A model with curves over budgets and steps, a failed and an unfinished cell, and a sign of masked gradients."""
    specs = [
        attack(label, epsilon=epsilon, parameters={"steps": steps})
        for label, epsilon, steps in (("pgd20", 0.2, 20), ("pgd20@0.1", 0.1, 20), ("pgd50", 0.2, 50))
    ]
    ensemble = attack("aa", algorithm="autoattack", parameters={"components": ["apgd-ce", "square"]})
    cells = [cell(name, spec, frame(N, 0.95, 0.6, k)) for k, spec in enumerate(specs)]
    cells.append(cell(name, ensemble, frame(N, 0.95, 0.4, 7, "square"), suspicions=("Square broke 9",)))
    cells.append(cell(name, attack("mim"), frame(N, 0.9, 0.5, 8).iloc[:0], status="failed", error="broke"))
    half = cell(name, attack("fgsm"), frame(N, 0.95, 0.5, 9))
    cells.append(CellResult(half.cell.model_copy(update={"status": "running"}), half.rows.iloc[:10]))
    return make_run(cells, N)


def path(run: Run, position: int = 0) -> str:
    group = site_of([run]).groups[0]
    return group.model_path(group.models[position].name)


def opened_details(page: object) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")  # type: ignore[attr-defined]


def test_pages_of_classifiers_and_flows_are_accessible(site: Reader) -> None:
    run = swept()
    run = make_run([*run.cells, *three_flows().cells], N)
    site.build(run, pages=only(model_page))
    site.assert_accessible(path(run), opened_details, [(DESK, "light")])
    site.assert_accessible(path(run, 1), opened_details, [(PHONE, "dark")])


def test_a_page_shows_its_parts(site: Reader, run: Run) -> None:
    site.build(run, pages=only(model_page))
    model = models(run)[1]
    page = site.open(path(run, 1))
    assert page.locator("h1").inner_text() == model.name
    pictures = page.locator(".gallery img")
    assert pictures.count() == 24 * 3
    assert pictures.evaluate_all(f"list => list.every(i => i.complete && i.naturalWidth === {SHAPE[2]})")
    assert (
        page.locator("table.attacks tbody tr").count() == 1 + 3 + 1 + 2
    )  # clean, attacks, worst cases, average
    assert page.locator("table.attacks svg.plot").count() == page.locator("table.attacks tbody tr").count()
    rows = page.locator("table.attacks tbody tr", has_text=re.compile("^aa"))
    aa = model.cells[1].rows
    assert f"{100 * aa['robust'].mean():.1f}" in rows.first.inner_text()


def test_one_confusion_matrix_is_open_at_a_time_and_holds_the_counts(site: Reader, run: Run) -> None:
    site.build(run, pages=only(model_page))
    page = site.open(path(run, 1), scripts=False)
    assert page.locator("details[name=confusion][open]").count() == 1
    page.locator("details[name=confusion] summary", has_text="pgd20").click()
    opened = page.locator("details[name=confusion][open]")
    assert opened.locator("summary").inner_text() == "pgd20"
    shown = opened.locator("tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.querySelectorAll('td')].map(c => Number(c.textContent)))"
    )
    rows = models(run)[1].cells[0].rows
    expected = np.zeros((10, 10), dtype=int)
    np.add.at(expected, (rows["label"], rows["prediction"]), 1)
    np.testing.assert_array_equal(shown, expected)


def test_accuracies_sort_by_number(site: Reader) -> None:
    run = swept()
    site.build(run, pages=only(model_page))
    page = site.open(path(run))
    page.locator("table.attacks thead th", has_text="accuracy").locator("button").click()
    shown = page.locator("table.attacks tbody tr").evaluate_all("rows => rows.map(r => r.cells[1].innerText)")
    numbers = [float(text.split()[0]) for text in shown if text[0].isdigit()]
    assert len(numbers) == 4  # clean and three attacks: a worst case or an average lacks cells
    assert numbers == sorted(numbers)
    assert all(not text[0].isdigit() for text in shown[len(numbers) :])  # failed and not run come last


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_curves_stand_out_from_the_page(site: Reader, scheme: str) -> None:
    run = swept()
    site.build(run, pages=only(model_page))
    page = site.open(path(run), scheme=scheme)
    assert page.locator("svg.curves").count() == 2
    strokes = page.locator("svg.curves path[style*='stroke: var(--curve-1)']").evaluate_all(
        "list => list.map(e => getComputedStyle(e).stroke.match(/\\d+/g).slice(0, 3).map(Number))"
    )
    assert strokes
    brightness = [np.mean(colour) for colour in strokes]
    assert all(b > 110 for b in brightness) if scheme == "dark" else all(b < 140 for b in brightness)


def test_names_are_text_in_the_browser(site: Reader) -> None:
    run = swept(EVIL)
    site.build(run, pages=only(model_page))
    page = site.open(path(run))
    assert page.locator("h1").inner_text() == EVIL
    assert page.locator("img[src=x]").count() == 0


def test_a_single_file_has_the_page_too(site: Reader) -> None:
    run = swept()
    site.build(run, single=True, pages=only(home, model_page))
    page = site.open(path(run))
    page.locator("nav[aria-label='On this page'] a", has_text="Classes").click()
    assert page.evaluate("document.activeElement.id") == "classes"
    assert page.locator("svg.curves").count() == 2


def test_long_names_do_not_widen_a_page(site: Reader) -> None:
    run = make_run([cell("name-" * 18, attack("x" * 90), frame(N, 0.9, 0.5, 1))], N)
    site.build(run, pages=only(model_page, attack_page))
    for where in (path(run), site_of([run]).groups[0].attack_path("x" * 90)):
        page = site.open(where, width=PHONE)
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
