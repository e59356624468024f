"""A run's leaderboard.html in a real browser: it works offline, sorts, filters, shows images; names are escaped."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flow_runs import N, flow_attack, flow_cell, flow_frame, flow_run, three_flows
from PIL import Image
from publish_runs import SHAPE, attack, cell, frame, images, make_run
from site_pages import DESK, EVIL, PHONE, Reader

from robbench.report.attack_lines import budget_text
from robbench.report.curves import curve_figure
from robbench.report.gallery import FACTORS, NO_ORIGINALS, data_uri, magnification, strips, triples
from robbench.report.site.build import run_page, write_run_page
from robbench.report.site.groups import Group, site_of
from robbench.results.likelihood import bits_text, mean_text, nll_tables
from robbench.results.reproduce import commands
from robbench.results.tables import leaderboard, models
from robbench.store.records import Run

START = ""  # what the page shows when it is opened


@pytest.fixture
def with_originals(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in memory that kept the clean images of their examples."""
    monkeypatch.setattr(Group, "originals", staticmethod(images))


def model_path(run: Run, position: int = 0) -> str:
    return site_of([run]).groups[0].model_path(models(run)[position].name)


def column(page: Any, title: str) -> list[str]:
    """First words of the cells of a column of the leaderboard."""
    titles = [text.strip() for text in page.locator("table.board thead th").all_inner_texts()]
    place = titles.index(title) + 1
    return [
        text.split()[0]
        for text in page.locator(f"table.board tbody tr > :nth-child({place})").all_inner_texts()
    ]


def test_its_board_sorts_and_filters(site: Reader, damaged: Run) -> None:
    """That it does so by number and over many models is tested of the site's boards."""
    page = site.open_run(damaged)
    page.locator("table.board thead button", has_text=re.compile("^aa")).click()
    assert column(page, "aa")[-1] == "failed"
    assert page.get_by_text("left its set").first.is_visible()
    assert page.locator("table.board tbody tr").count() == 2
    page.locator(".controls input[type=search]").first.fill("ijsat")
    page.wait_for_function("document.querySelectorAll('table.board tbody tr').length === 1")
    assert column(page, "model") == ["digits-ijsat"]
    page.locator(".controls input[type=search]").first.fill("")
    page.wait_for_function("document.querySelectorAll('table.board tbody tr').length === 2")


@pytest.mark.usefixtures("with_originals")
def test_every_image_loads_and_is_described(site: Reader, run: Run) -> None:
    site.write_run(run)
    for position in range(2):
        pictures = site.open(model_path(run, position)).locator("figure .trio img")
        assert pictures.count() == 24 * 3
        assert pictures.evaluate_all(
            f"list => list.every(i => i.complete && i.naturalWidth === {SHAPE[2]} && i.alt.length > 10)"
        )
        assert pictures.first.evaluate("i => getComputedStyle(i).imageRendering") == "pixelated"


def test_the_page_names_its_language_and_captions_its_tables(site: Reader, run: Run) -> None:
    page = site.open_run(run)
    assert page.evaluate("document.documentElement.lang") == "en"
    assert page.evaluate("document.characterSet") == "UTF-8"
    for path in (START, model_path(run), model_path(run, 1)):
        page = site.open(path)
        assert page.locator("table").count() == page.locator("table > caption").count() > 0


@pytest.mark.usefixtures("with_originals")
def test_the_page_itself_never_scrolls_sideways(site: Reader, run: Run) -> None:
    """On a phone; on a desk, below."""
    site.write_run(run)
    for path in (START, model_path(run)):
        page = site.open(path, width=PHONE)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE


@pytest.mark.usefixtures("with_originals")
def test_the_page_is_accessible(site: Reader, damaged: Run) -> None:
    site.write_run(damaged)
    site.assert_accessible(START, looks=[(DESK, "light")])
    site.assert_accessible(model_path(damaged), looks=[(PHONE, "dark")])


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_colours_follow_the_reader(site: Reader, run: Run, scheme: str, is_dark: bool) -> None:
    page = site.open_run(run, scheme=scheme)

    def brightness(name: str) -> float:
        read_style = f"e => getComputedStyle(e).{name}.match(/\\d+/g).slice(0, 3).map(Number)"
        return float(np.mean(page.locator("body").evaluate(read_style)))

    background, text = brightness("backgroundColor"), brightness("color")
    assert (background < 60 < 180 < text) if is_dark else (text < 80 < 200 < background)


@pytest.mark.usefixtures("with_originals")
def test_names_are_text(site: Reader) -> None:
    page = site.open_run(make_run([cell(EVIL, attack(), frame(30, 0.9, 0.5, 1))], 30))
    assert page.locator("table.board tbody th").inner_text() == EVIL
    assert page.locator("img[src=x]").count() == 0


def test_the_page_is_one_file_that_leads_back_to_its_start(site: Reader, run: Run) -> None:
    page = site.open_run(run)
    assert page.locator("main").get_attribute("data-page") == "board"
    page.locator("table.board tbody th a").first.click()
    page.wait_for_selector('main[data-page="model"]')
    page.locator("a.brand").click()
    page.wait_for_selector('main[data-page="home"]')
    assert "ublished" not in page.locator("main").inner_text()
    page.locator("table.best tbody th a").first.click()
    page.wait_for_selector('main[data-page="board"]')
    assert sum(url.startswith("file://") for url in site.requests) == 1


def test_the_policy_stops_remote_loads(chromium: Any, tmp_path: Path, run: Run) -> None:
    """Not by trust in the page: an image and a script put in by force are refused by the browser."""
    path = write_run_page(run, tmp_path / "page.html")
    page = chromium.new_page()
    refused: list[str] = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(path.as_uri(), timeout=60_000)
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x.png'}))")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = 1'}))"
    )
    page.wait_for_timeout(300)
    assert page.evaluate("window.ran") is None
    assert sum("Content Security Policy" in text for text in refused) == 2
    page.close()


# ------------------------------------------------------------------------------------------ without a browser
class Visible(HTMLParser):
    """Text outside style and script elements, and every address an element would load."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.addresses, self.skipping = "", [], False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skipping = tag in ("style", "script")
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action") and value]

    def handle_data(self, data: str) -> None:
        self.text += "" if self.skipping else data


def read(page: str) -> Visible:
    parser = Visible()
    parser.feed(page)
    return parser


@pytest.mark.usefixtures("with_originals")
def test_page_shows_every_accuracy_and_the_cards(run: Run) -> None:
    text = read(run_page(run)).text
    for row in leaderboard(run):
        if row.metric.endswith("accuracy"):
            assert f"[{row.lower:.1f}, {row.upper:.1f}]" in text
    for card in run.cards.values():
        assert card.weights.sha256 in text
        assert card.training is not None
        assert card.training.command in text
    rows = run.cells[4].rows
    attacked = rows[rows["clean_prediction"] == rows["label"]]
    broken = int((~attacked["robust"]).sum())
    assert f"{broken} of {len(attacked)}" in text
    assert f"apgd-t {broken}" in text


@pytest.mark.usefixtures("with_originals")
def test_page_refers_to_nothing_outside(run: Run) -> None:
    addresses = read(run_page(run)).addresses
    assert addresses
    assert all(address.startswith(("data:", "#")) for address in addresses)


def test_page_says_why_there_are_no_images(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert NO_ORIGINALS in " ".join(read(run_page(run)).text.split())
    monkeypatch.setattr(Group, "originals", staticmethod(images))
    bare = replace(
        run, cells=[cell(r.cell.model, r.cell.attack, r.rows.assign(example=None)) for r in run.cells]
    )
    assert "the run stored no adversarial examples" in read(run_page(bare)).text


def test_page_states_the_command_with_overridden_budgets() -> None:
    specs = [attack("pgd20"), attack("aa"), attack("pgd20@0.1", epsilon=0.1)]
    run = make_run([cell("m", spec, frame(30, 0.9, 0.5, i)) for i, spec in enumerate(specs)], 30)
    start = "robbench run --dataset digits --model m --attacks"
    assert commands(run) == [
        f"{start} pgd20,aa --n 30 --seed 3",
        f"{start} pgd20 --n 30 --seed 3 --epsilon 0.1",
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"epsilon": 8 / 255}, "ε = 8/255"),
        ({"epsilon": 0.2}, "ε = 0.2"),
        ({"epsilon": 0.0}, "ε = 0"),
        ({"epsilon": 0.3, "eta": 0.35}, "ε = 0.3, η = 0.35"),
        ({"epsilon": None}, "none"),
    ],
)
def test_budgets_read_as_papers_print_them(changes: dict[str, Any], expected: str) -> None:
    assert budget_text(attack(**changes)) == expected


def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def test_images_are_the_pixels_scaled_by_whole_factors() -> None:
    grey = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 8, 8)
    shown = pixels(data_uri(grey))
    assert shown.shape == (128, 128)
    np.testing.assert_array_equal(shown[::16, ::16], np.rint(grey[0] * 255))
    np.testing.assert_array_equal(shown, np.kron(shown[::16, ::16], np.ones((16, 16), dtype=np.uint8)))
    colour = np.random.default_rng(0).random((3, 32, 32), dtype=np.float32)
    np.testing.assert_array_equal(
        pixels(data_uri(colour))[::4, ::4], np.rint(colour * 255).transpose(1, 2, 0)
    )


@pytest.mark.parametrize("largest", [0.0, 8 / 255, 0.1, 0.3, 0.7, 1.0])
def test_magnified_differences_stay_in_range(largest: float) -> None:
    factor = magnification(largest)
    assert factor in FACTORS
    assert 0.5 + 0.5 * factor * largest <= 1
    assert factor == FACTORS[-1] or 2.5 * factor * largest > 1


def test_triples_take_attacks_in_turn_and_broken_samples_first(run: Run) -> None:
    model = models(run)[1]
    shown = triples(run, model.cells, images)
    assert [t.attack for t in shown] == ["pgd20", "pgd20", "aa", "aa", "jsa50", "jsa50"]
    assert not any(t.robust for t in shown)
    assert all(t.clean_prediction == t.label != t.prediction for t in shown)
    first = shown[0]
    row = model.cells[0].rows.set_index("sample_id").loc[first.sample_id]
    np.testing.assert_array_equal(
        pixels(first.adversarial)[::16, ::16].ravel(), np.rint(np.frombuffer(row["example"], "<f4") * 255)
    )


def test_originals_of_another_shape_are_refused(run: Run) -> None:
    with pytest.raises(ValueError, match=re.escape("need (6, 1, 8, 8)")):
        triples(run, models(run)[0].cells, lambda ids: np.zeros((len(ids), 8, 8)))


# ------------------------------------------------------------------------------------------------------ flows
def evil_flow() -> Run:
    """A flow with a hostile name, an infinite likelihood and a failed cell with hostile words."""
    rows = flow_frame(1)
    rows.loc[20, "nll_after"] = np.inf
    failed = flow_cell(EVIL, flow_attack("noise"), rows.iloc[:0], status="failed", error=f"broke {EVIL}")
    return flow_run([flow_cell(EVIL, flow_attack("nll-in"), rows), failed])


@pytest.mark.usefixtures("with_originals")
def test_a_page_of_flows_and_classifiers_works(site: Reader) -> None:
    run = flow_run([cell("digits-standard", attack(), frame(N, 0.9, 0.4, 1)), *three_flows().cells])
    page = site.open_run(run, width=PHONE)
    assert page.locator("table.board").first.locator("tbody tr").count() == 1
    page = site.open(model_path(run, 1), width=PHONE)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE
    assert page.locator("table.nll").count() == page.locator("svg.curves").count() == 3
    pictures = page.locator(".strips img")
    assert pictures.count() == 5 * 4
    assert pictures.evaluate_all("list => list.every(i => i.complete && i.naturalWidth >= 100)")
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_a_page_of_flows_alone_has_no_accuracies(site: Reader) -> None:
    page = site.open_run(three_flows())
    assert "Accuracy" not in page.locator("main").inner_text()
    assert page.locator("table").count() == page.locator("table > caption").count() > 0


def test_names_of_flows_are_text(site: Reader) -> None:
    run = evil_flow()
    site.write_run(run)
    page = site.open(model_path(run))
    assert page.locator("img[src=x]").count() == 0
    assert EVIL in page.locator("table.nll th").nth(1).inner_text()
    assert EVIL in page.locator(".notes").last.inner_text()


def test_the_page_shows_every_mean_of_a_flow_and_refers_to_nothing_outside() -> None:
    run = three_flows()
    page = run_page(run)
    parsed = read(page)
    for table in nll_tables(run):
        for line in table.lines:
            for nll in line.cells:
                assert mean_text(nll) in parsed.text
    assert all(address.startswith(("data:", "#")) for address in parsed.addresses)
    assert re.findall(r'(?:xlink:href|url\()="?(?!#|")[^)"]{3}', page.partition("<body")[2]) == []
    assert page == run_page(three_flows())


def test_curves_tell_their_numbers_in_words() -> None:
    run = three_flows()
    table = nll_tables(run)[0]
    figure = curve_figure(table)
    assert figure is not None
    words = re.search(r'aria-label="([^"]*)"', figure.svg)
    assert words is not None
    for (name, defense), *points in zip(table.models, *(line.cells for line in table.lines), strict=True):
        told = ", ".join(
            f"{bits_text(nll.mean)} at {line.epsilon:g}"
            for nll, line in zip(points, table.lines, strict=True)
        )
        assert f"{name} ({defense}): {told}" in words[1]


@pytest.mark.parametrize("worst", [1e3, 1e16, 1e300, np.inf])
def test_curves_survive_any_values(worst: float) -> None:
    run = flow_run(
        [
            flow_cell("toy-glow", flow_attack("nll-in", eps), flow_frame(1).assign(nll_after=value))
            for eps, value in ((2, 5.0), (8, worst))
        ]
    )
    figure = curve_figure(nll_tables(run)[0])
    assert figure is not None
    assert "nan" not in figure.svg
    assert "inf" not in figure.svg.replace("nll-inf", "")
    assert figure.omitted == (worst > 1e100)
    assert ("10^{" in figure.svg) == (worst <= 1e100)  # matplotlib notes a label's source: powers of ten


def test_a_flow_shows_each_image_with_its_own_score() -> None:
    run = three_flows()
    model = models(run)[0]
    shown = strips(run, model.cells)
    expected = [
        ("test images", 3, "original", "nll_before"),
        ("nll-in@8", 3, "example", "nll_after"),
        ("noise@8", 5, "example", "nll_after"),
        ("uniform-noise images", 4, "original", "nll_before"),
        ("nll-out@8", 4, "example", "nll_after"),
    ]
    assert [strip.name for strip in shown] == [name for name, *_ in expected]
    for strip, (_, position, stored, score) in zip(shown, expected, strict=True):
        rows = model.cells[position].rows.set_index("sample_id")
        for shot in strip.shots:
            row = rows.loc[shot.sample_id]
            assert shot.bits == bits_text(row[score])
            np.testing.assert_array_equal(
                pixels(shot.uri)[::16, ::16].ravel(), np.rint(np.frombuffer(row[stored], "<f4") * 255)
            )


def test_a_flow_without_stored_images_says_so() -> None:
    run = flow_run([flow_cell("toy-glow", flow_attack("nll-in"), flow_frame(1, kept=0))])
    assert "the run stored none of this flow" in read(run_page(run)).text
