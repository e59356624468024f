"""What a model's page counts, against brute force and other libraries, and what its HTML says."""

import base64
import io
import itertools
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from flow_runs import flow_attack, flow_cell, flow_frame, flow_run, three_flows
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from publish_runs import JSA, attack, cell, frame, images, make_run
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix

from robbench.report.gallery import places, sort_by_dispute
from robbench.report.site import model_page
from robbench.report.site.frame import frame_page
from robbench.report.site.groups import Group, Site, site_of
from robbench.report.site.model_classes import class_names, class_table, confusions
from robbench.report.site.model_curves import families, sweeps
from robbench.report.site.model_gallery import EXAMPLES, examples, levels
from robbench.report.site.model_joint import ensembles, joint
from robbench.report.site.page import Page
from robbench.results.likelihood import mean_text, nll_tables
from robbench.results.rows import models
from robbench.results.tables import leaderboard
from robbench.store.records import CellResult, Run

EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


def pages(*runs: Run) -> list[Page]:
    found = site_of(runs)
    groups = tuple(_with_images(group) for group in found.groups)
    return [part for part in model_page.parts(Site(found.runs, groups)) if isinstance(part, Page)]


def _with_images(group: Group) -> Group:
    """The group, its originals from memory: the runs of these tests have no folder."""
    group.__dict__["originals"] = images
    return group


class Visible(HTMLParser):
    """Text of a page, its images (alt, src), ids and links."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.images, self.ids, self.links = [], [], [], []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if tag == "a" else []
        self.images += [(found["alt"], found["src"])] if tag == "img" else []

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def read(page: Page) -> Visible:
    parser = Visible()
    parser.feed(str(page.body))
    return parser


# ----------------------------------------------------------------------------------------------------- galleries
def test_samples_on_which_models_differ_come_first_and_each_page_begins_with_another() -> None:
    held = {"a": [True, True, False], "b": [True, False, False]}
    cells = []
    for name, robust in held.items():
        rows = frame(3, 1.0, 1.0, 1).assign(robust=robust)
        cells.append(cell(name, attack(), rows))
    ids = cells[0].rows["sample_id"].tolist()
    found = sort_by_dispute([*cells, flow_cell("flow", flow_attack("nll-in"), flow_frame(1))])
    assert found[0] == ids[1]
    assert sorted(found) == ids
    firsts = [min(order, key=order.__getitem__) for order in (places(found, turn) for turn in range(4))]
    assert firsts == [*found, found[0]]
    assert places([], 3) == {}


# ------------------------------------------------------------------------------------------------------- joint
def verdicts(label: str, right: list[bool], robust: list[bool]) -> CellResult:
    n = len(right)
    rows = pd.DataFrame(
        {
            "sample_id": np.arange(n),
            "label": np.zeros(n, dtype=np.int64),
            "clean_prediction": np.where(right, 0, 1),
            "clean_margin": np.where(right, 1.0, -1.0),
            "robust": np.array(right) & np.array(robust),
        }
    )
    return cell("m", attack(label), rows)


@st.composite
def made_cells(draw: st.DrawFn) -> list[CellResult]:
    n, k = draw(st.integers(1, 12)), draw(st.integers(1, 5))
    bools = st.lists(st.booleans(), min_size=n, max_size=n)
    right = draw(bools)
    return [verdicts(f"a{i}", right, draw(bools)) for i in range(k)]


@settings(max_examples=60)
@given(made_cells(), st.integers(1, 4))
def test_joint_counts_are_those_of_brute_force(cells: list[CellResult], limit: int) -> None:
    n = len(cells[0].rows)
    broke: dict[int, set[str]] = {i: set() for i in range(n)}
    wrong = set()
    for result in cells:
        for row in result.rows.to_dict("records"):
            if row["clean_prediction"] != row["label"]:
                wrong.add(row["sample_id"])
            elif not row["robust"]:
                broke[row["sample_id"]].add(result.cell.attack.label)
    sets = Counter(frozenset(names) for names in broke.values() if names)

    found = joint(cells, limit)
    assert (found.n, found.wrong, found.broken) == (n, len(wrong), sum(sets.values()))
    assert found.held == sum(not names and i not in wrong for i, names in broke.items())
    assert found.n == found.wrong + found.held + found.broken
    for share in found.shares:
        assert share.broken == sum(share.label in names for names in broke.values())
        assert share.only == sum(names == {share.label} for names in broke.values())
    labels = [share.label for share in found.shares]
    shown = {frozenset(itertools.compress(labels, one.among)): one.count for one in found.intersections}
    assert shown.items() <= sets.items()
    assert sorted(shown.values(), reverse=True) == sorted(sets.values(), reverse=True)[:limit]
    assert found.further == len(sets) - len(shown)
    assert found.further_samples == sum(sets.values()) - sum(shown.values())


@settings(max_examples=60)
@given(made_cells())
def test_greedy_order_takes_the_attack_that_adds_most(cells: list[CellResult]) -> None:
    broke = {
        r.cell.attack.label: set(
            r.rows.query("clean_prediction == label and not robust")["sample_id"].tolist()
        )
        for r in cells
    }
    covered: set[int] = set()
    found = joint(cells)
    for position, share in enumerate(found.greedy, 1):
        gains = {label: len(ids - covered) for label, ids in broke.items()}
        assert share.rank == position
        assert share.added == gains[share.label] == max(gains.values()) > 0
        covered |= broke[share.label]
        assert share.together == len(covered)
    assert covered == set().union(*broke.values())


def test_verdicts_that_differ_between_cells_are_counted_once() -> None:
    found = joint([verdicts("a", [True, True], [False, True]), verdicts("b", [False, True], [True, False])])
    assert (found.wrong, found.held, found.broken, found.differing) == (1, 0, 1, 1)


def test_joint_counts_need_the_same_samples() -> None:
    with pytest.raises(ValueError, match="same samples"):
        joint([verdicts("a", [True], [True]), verdicts("b", [True, True], [True, True])])


def test_joint_counts_agree_with_the_worst_case_of_the_tables(run: Run) -> None:
    for model in models(run):
        row = next(r for r in leaderboard(run) if r.model == model.name and r.metric == "worst_case_accuracy")
        found = joint(model.cells)
        threat = [r for r in leaderboard(run) if r.model == model.name and r.threat_model == "all"]
        assert 100 * found.held / found.n == pytest.approx(threat[0].value)
        assert row.value is not None


def test_components_are_counted_in_the_order_they_are_tried() -> None:
    rows = frame(60, 0.9, 0.4, 1)
    hit = rows.index[(rows["clean_prediction"] == rows["label"]) & ~rows["robust"]]
    rows.loc[hit[:5], "broken_by"] = "square"
    rows.loc[hit[5:], "broken_by"] = "apgd-ce"
    spec = attack("aa", algorithm="autoattack", parameters={"components": ["apgd-ce", "fab-t", "square"]})
    (found,) = ensembles([cell("m", attack(), rows), cell("m", spec, rows)])
    assert found.components == (("apgd-ce", len(hit) - 5), ("fab-t", 0), ("square", 5))


# ----------------------------------------------------------------------------------------------------- classes
def test_class_accuracies_and_confusions_are_those_of_other_libraries(run: Run) -> None:
    model = models(run)[1]
    names = class_names(run, model.cells)
    table = class_table(run, model.cells, names)
    assert table is not None
    label = model.cells[0].rows["label"].to_numpy()
    clean = (model.cells[0].rows["clean_prediction"] == model.cells[0].rows["label"]).to_numpy()
    held = [result.rows["robust"].to_numpy() for result in model.cells]
    expected = [clean, *held, np.logical_and.reduce(held)]
    assert [line.label for line in table.lines] == ["clean", "pgd20", "aa", "jsa50", "worst case"]
    for line, verdict in zip(table.lines, expected, strict=True):
        for k, ((_, total), estimate) in enumerate(zip(table.classes, line.estimates, strict=True)):
            mine = verdict[label == k]
            interval = binomtest(int(mine.sum()), len(mine)).proportion_ci(method="wilson")
            assert total == len(mine)
            assert estimate is not None
            assert estimate.value == pytest.approx(100 * mine.mean())
            assert (estimate.lower, estimate.upper) == pytest.approx(
                (100 * interval.low, 100 * interval.high)
            )
    columns = ["clean_prediction", "prediction", "prediction", "prediction"]
    cells = [model.cells[0], *model.cells]
    for found, result, column in zip(confusions(run, model.cells, 10), cells, columns, strict=True):
        oracle = confusion_matrix(label, result.rows[column], labels=np.arange(10))
        np.testing.assert_array_equal(found.counts, oracle)
        assert found.counts.sum() == found.n == run.n
        assert found.pairs[0][2] == np.where(np.eye(10), 0, oracle).max()


def test_a_class_without_samples_has_no_accuracy(run: Run) -> None:
    rows = run.cells[0].rows
    few = rows[rows["label"] != 4].reset_index(drop=True)
    small = make_run([cell("m", attack(), few)], len(few))
    table = class_table(small, small.cells, class_names(small, small.cells))
    assert table is not None
    assert table.classes[4] == ("4", 0)
    assert all(line.estimates[4] is None for line in table.lines)


def test_classes_that_the_data_set_does_not_name_have_numbers(run: Run) -> None:
    unnamed = replace(run, class_names=("zero", "one"))
    assert class_names(unnamed, unnamed.cells) == ["zero", "one", *map(str, range(2, 10))]


# ------------------------------------------------------------------------------------------------------ curves
def swept() -> Run:
    """pgd20 at three budgets, pgd10 and pgd50 beside it, and fgsm, which starts elsewhere."""

    def pgd(label: str, steps: int, epsilon: float = 0.2, start: str = "uniform") -> object:
        return attack(label, epsilon=epsilon, parameters={"steps": steps, "start": start})

    specs = [
        pgd("pgd20", 20),
        pgd("pgd20@0.1", 20, 0.1),
        pgd("pgd20@0.3", 20, 0.3),
        pgd("pgd50", 50),
        pgd("pgd10", 10),
        pgd("fgsm", 1, start="zero"),
        JSA,
    ]
    rates = (0.5, 0.8, 0.2, 0.45, 0.6, 0.7, 0.4)
    return make_run(
        [
            cell("m", spec, frame(100, 0.95, rate, k))
            for k, (spec, rate) in enumerate(zip(specs, rates, strict=True))
        ],
        100,
    )


def test_curves_join_attacks_that_differ_in_one_thing() -> None:
    run = swept()
    by_epsilon = [[r.cell.attack.label for r in family] for family in families(run.cells, "epsilon")]
    by_steps = [[r.cell.attack.label for r in family] for family in families(run.cells, "steps")]
    assert by_epsilon == [["pgd20@0.1", "pgd20", "pgd20@0.3"]]
    assert by_steps == [["pgd10", "pgd20", "pgd50"]]


def test_curves_tell_the_numbers_of_the_table() -> None:
    run = swept()
    rows = {row.attack: row for row in leaderboard(run) if row.metric == "accuracy"}
    epsilon, steps = sweeps(run, run.cells)
    for sweep, points in (
        (epsilon, [("clean", "0"), ("pgd20@0.1", "0.1"), ("pgd20", "0.2"), ("pgd20@0.3", "0.3")]),
        (steps, [("pgd10", "10"), ("pgd20", "20"), ("pgd50", "50")]),
    ):
        assert sweep.figure is not None
        words = re.search(r'aria-label="([^"]*)"', sweep.figure.svg)
        assert words is not None
        told = ", ".join(
            f"{rows[a].value:.1f} [{rows[a].lower:.1f}, {rows[a].upper:.1f}] at {x}" for a, x in points
        )
        assert f": {told}" in words[1]
        assert len(sweep.figure.svg) < 40_000
        assert "var(--curve-1)" in sweep.figure.svg
        assert "fill-opacity: 0.13" in sweep.figure.svg
        ids = re.findall(r' id="([^"]*)"', sweep.figure.svg)
        assert ids
        assert all(i.startswith(f"by-{sweep.axis}-") for i in ids)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(0.2, "0.05,0.1,0.15,0.2,0.3"), (8 / 255, "2/255,4/255,6/255,8/255,12/255")],
)
def test_a_missing_curve_names_the_command(budget: float, expected: str) -> None:
    spec = attack("pgd20", epsilon=budget, parameters={"steps": 20})
    run = make_run([cell("m", spec, frame(30, 0.9, 0.5, 1))], 30)
    epsilon, steps = sweeps(run, run.cells)
    start = "robbench run --dataset digits --model m --attacks pgd20 --n 30 --seed 3"
    assert (epsilon.figure, epsilon.command) == (None, f"{start} --epsilon {expected}")
    assert (steps.figure, steps.command) == (None, f"{start} --steps 5,10,20,50,100")
    text = read(pages(run)[0]).text
    assert epsilon.command in text
    assert steps.command in text
    named, _ = sweeps(replace(run, given={"m": "m.yaml"}), run.cells)
    assert (
        "--model m.yaml --attacks" in named.command
    )  # a model of one's own: "m" means nothing to robbench run


def test_a_run_of_random_draws_says_that_nothing_can_be_swept() -> None:
    spec = attack("r-la", "flow-lp-linf", epsilon=None, eta=0.1, space="latent", algorithm="random-latent")
    run = make_run([cell("m", spec, frame(30, 0.9, 0.5, 1))], 30)
    assert [sweep.command for sweep in sweeps(run, run.cells)] == ["", ""]
    assert "None of the finished attacks has an epsilon." in read(pages(run)[0]).text


# ------------------------------------------------------------------------------------------------------ images
def pixels(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def stored(result: CellResult, sample_id: int) -> np.ndarray:
    row = result.rows.set_index("sample_id").loc[sample_id]
    return np.rint(np.frombuffer(row["example"], "<f4").reshape(8, 8) * 255).astype(np.uint8)


def test_examples_are_the_pixels_of_the_ledger(run: Run) -> None:
    model = models(run)[1]
    cells = {result.cell.attack.label: result for result in model.cells}
    shown = examples(run, model.cells, images)
    assert len(shown) == EXAMPLES
    assert {triple.attack for triple in shown} == {"pgd20", "aa", "jsa50"}
    for triple in shown:
        np.testing.assert_array_equal(
            pixels(triple.adversarial), stored(cells[triple.attack], triple.sample_id)
        )
        np.testing.assert_array_equal(
            pixels(triple.original), np.rint(images([triple.sample_id])[0, 0] * 255)
        )
        row = cells[triple.attack].rows.set_index("sample_id").loc[triple.sample_id]
        assert (triple.margin, triple.clean_margin) == (row["margin"], row["clean_margin"])
    held = [triple.robust for triple in shown if triple.attack == "jsa50"]
    assert held == sorted(held)  # broken ones first


def leveled() -> Run:
    specs = [
        attack(label, "joint", 0.2, space="joint", eta=0.3, parameters={"steps": 50, "levels": chosen})
        for label, chosen in (("jsa50", None), ("jsa50-level1", [1]), ("jsa50-level2", [2]))
    ]
    other = attack("a-la", "latent", None, space="latent", eta=0.3, parameters={"levels": None})
    return make_run([cell("m", spec, frame(50, 0.9, 0.3, k)) for k, spec in enumerate([*specs, other])], 50)


def test_latent_levels_of_one_sample_stand_side_by_side() -> None:
    run = leveled()
    (found,) = levels(run, run.cells, images)
    assert found.names == (("jsa50", "all levels"), ("jsa50-level1", "level 1"), ("jsa50-level2", "level 2"))
    assert len(found.rows) == 3
    broken = [sum(not variant.robust for variant in row.variants) for row in found.rows]
    assert broken == sorted(broken, reverse=True)
    for row in found.rows:
        for result, variant in zip(run.cells, row.variants, strict=False):
            assert (variant.sample_id, variant.attack) == (row.sample_id, result.cell.attack.label)
            np.testing.assert_array_equal(pixels(variant.adversarial), stored(result, row.sample_id))
    page = read(pages(run)[0])
    for row in found.rows:
        for variant in row.variants:
            assert variant.adversarial in [src for _, src in page.images]


# ------------------------------------------------------------------------------------------------------- pages
def test_a_page_shows_every_accuracy_with_its_interval_and_the_card(run: Run) -> None:
    for page, model in zip(pages(run), models(run), strict=True):
        text = read(page).text
        for row in leaderboard(run):
            if row.model == model.name and row.metric.endswith("accuracy"):
                assert f"{row.value:.1f} [{row.lower:.1f}, {row.upper:.1f}]" in text
        card = run.cards[model.name]
        assert card.training is not None
        for words in (card.weights.sha256, card.training.command, card.training.selection, card.license):
            assert words in text
        for result in model.cells:
            assert result.cell.hash in text
        assert "None found by these checks: outputs that are probabilities" in text
        assert page.provenance.commands == (
            f"robbench run --dataset digits --model {model.name} --attacks pgd20,aa,jsa50 --n 120 --seed 3",
        )


def test_pages_are_the_same_every_time_and_have_ids_once(run: Run) -> None:
    first, second = pages(swept()), pages(swept())
    assert list(map(frame_page, first)) == list(map(frame_page, second))
    for page in (*pages(run), *first, *pages(three_flows())):
        found = read(page)
        assert len(found.ids) == len(set(found.ids))
        assert all(link.startswith(("#", "site:")) for link in found.links)
        assert all(alt for alt, _ in found.images)
        anchors = {link[1:] for link in found.links if link.startswith("#")} - {"provenance"}
        assert anchors <= set(found.ids)


def test_failed_and_unfinished_cells_are_never_numbers(damaged: Run) -> None:
    first, second = (read(page).text for page in pages(damaged))
    assert "jsa50: not run (50 of 120 samples done)" in first
    assert "not all attacks are done (jsa50)" in first
    reason = "attack 'aa' left its set: sample 3 is 0.01 outside the linf ball"
    assert second.count(f"failed ({reason})") == 3  # the summary, accuracies, classes
    assert "not all attacks are done (aa)" in second
    assert "failedworst case: linf, ε = 0.2" in second  # the tile
    assert "0.0 [" not in second
    assert re.search(r"aa ?failed ?- ?- ?-", second)  # its line of likelihoods and distances


def test_a_run_without_a_finished_cell_has_a_page(run: Run) -> None:
    only = run.cells[0]
    failed = CellResult(only.cell.model_copy(update={"status": "failed", "error": "x"}), only.rows.iloc[:0])
    text = read(pages(replace(make_run(run.cells, run.n), cells=[failed]))[0]).text
    assert "There is no finished attack to count." in text
    assert "Fewer than two attacks are finished" in text


def test_signs_of_masked_gradients_stand_with_their_attacks(run: Run) -> None:
    text = "Square broke 7 of the 12 samples that no gradient component broke"
    cells = [
        CellResult(r.cell.model_copy(update={"suspicions": (text,) if k in (0, 1) else ()}), r.rows)
        for k, r in enumerate(run.cells)
    ]
    first, second = (read(page).text for page in pages(make_run(cells, run.n)))
    assert f"pgd20, aa: {text}" in first
    assert first.count(text) == 1
    assert text not in second


def test_notes_on_single_numbers_stand_under_them(run: Run) -> None:
    first, second = (read(page).text for page in pages(run))
    assert "aa, accuracy" not in first
    assert "pgd20, accuracy: 1 of 120 samples with |margin| < 0.0001" in second
    assert "pgd20, bits per dim after: " in first  # an infinite one is left out of the mean, which has a star


def test_names_and_reasons_are_text() -> None:
    rows = frame(30, 0.9, 0.5, 1)
    failed = cell(EVIL, attack("aa"), rows.iloc[:0], status="failed", error=EVIL)
    run = make_run([cell(EVIL, attack(), rows, suspicions=(EVIL,)), failed], 30)
    run = replace(run, class_names=(EVIL,))
    run.cards[EVIL] = run.cards[EVIL].model_copy(
        update={"description": EVIL, "license": EVIL, "source": EVIL}
    )
    (page,) = pages(run)
    own = '<script src="../assets/site.js" data-root="yes">'
    assert "<script" not in frame_page(page).partition("<body")[2].replace(own, "")
    assert "<img src=x" not in frame_page(page)
    assert re.search(r"<title>[^<]*alert\(1\)", frame_page(page))


def test_a_model_without_a_card_says_so(run: Run) -> None:
    assert "The run has no card of this model." in read(pages(replace(run, cards={}))[0]).text


def test_the_page_of_a_flow_shows_its_numbers_alone() -> None:
    run = three_flows()
    found = pages(run)
    assert len(found) == 3
    for position, page in enumerate(found):
        text = read(page).text
        for table in nll_tables(run):
            for line in table.lines:
                assert mean_text(line.cells[position]) in text
        assert str(page.body).count('class="curves"') == 3
        assert len(read(page).images) == 5 * 4
        others = {name for name, _ in nll_tables(run)[0].models} - {page.title}
        assert not any(f"{name} (" in text for name in others)


def test_a_flow_whose_cell_failed_has_a_page() -> None:
    failed = flow_cell(EVIL, flow_attack("noise"), flow_frame(1).iloc[:0], status="failed", error=EVIL)
    (page,) = pages(flow_run([flow_cell(EVIL, flow_attack("nll-in"), flow_frame(1)), failed]))
    assert "<img src=x" not in frame_page(page)
    assert f"failed ({EVIL})" in read(page).text


def test_pages_of_very_many_models_have_numbers_but_no_pictures(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = pages(run)[0]
    monkeypatch.setattr(model_page, "FIGURED", 1)
    page = pages(run)[0]
    assert (
        page.body.count("2 models are in these tables, and figures and images stand on the pages of up to")
        == 2
    )
    assert "<img" in full.body
    assert "<img" not in page.body
    assert 'class="curves"' not in page.body
    for row in leaderboard(run):
        if row.model == "digits-standard" and row.metric.endswith("accuracy"):
            assert f"{row.value:.1f} [{row.lower:.1f}, {row.upper:.1f}]" in read(page).text
