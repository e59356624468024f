"""Pages of attacks and threat models: definitions, formulas, strength on every model, samples."""

# ruff: noqa: RUF001 - the letters of formulas are meant
import re
import xml.etree.ElementTree as ElementTree
from html import unescape
from pathlib import Path

import pytest
import yaml
from flow_runs import three_flows
from publish_runs import JSA, attack, cell, frame, make_run
from site_pages import DESK, PHONE, Reader, only
from site_runs import written

from robbench.core.errors import UserError
from robbench.data.names import dataset_names
from robbench.report.site import attack_page, definitions, formulas
from robbench.report.site.frame import frame_page
from robbench.report.site.groups import site_of
from robbench.report.site.page import Page
from robbench.results.rows import WORST_CASE
from robbench.results.tables import leaderboard
from robbench.specs import ResolvedAttack, resolve_attack, threat_models
from robbench.store.ledger import load_run
from robbench.store.records import Run

GROUP = "digits-seed-3-n-120"


def pages(*runs: Run) -> dict[str, str]:
    found = [page for page in attack_page.parts(site_of(runs)) if isinstance(page, Page)]
    return {page.path.rpartition("/")[2]: frame_page(page) for page in found}


def shipped() -> list[ResolvedAttack]:
    """Every shipped attack on a data set that it has a budget for; of calibrated budgets one."""
    models = threat_models(None)
    found = []
    for model in models.values():
        for name in model.attacks:
            if model.space == "rendered" and name[-2:] in {f"-{place}" for place in range(2, 7)}:
                continue
            for dataset in (*model.budgets, *dataset_names()):
                try:
                    found.append(resolve_attack(name, dataset, models))
                except UserError:
                    continue
                break
    assert len(found) > 130
    return found


# -------------------------------------------------------------------------------------------------------- formulas
def test_every_shipped_attack_has_a_formula_that_is_well_formed() -> None:
    for spec in shipped():
        sets, letters = formulas.admissible(spec.space, spec.norm, spec.pixel_range)
        goal, words = formulas.objective(spec)
        measure, _ = formulas.measure(spec.target, several=True)
        assert goal, spec.name
        assert words
        assert letters
        for formula in (sets, *goal, measure):
            root = ElementTree.fromstring(str(formula))
            assert root.tag == "math"
            text = "".join(root.itertext())
            assert "\\" not in text
            assert text.count("(") == text.count(")"), text
            assert text.count("{") == text.count("}"), text


@pytest.mark.parametrize(
    ("space", "norm", "pixel_range", "text"),
    [
        ("image", "linf", 1, "𝒜(x)={x′∈[0,1]d:‖x′−x‖∞≤ε}"),
        ("image", "l2", 1, "𝒜(x)={x′∈[0,1]d:‖x′−x‖2≤ε}"),
        ("image", "linf", 255, "𝒜(x)={x′∈[0,255]d:‖x′−x‖∞≤ε}"),
        ("latent", "l2", 1, "𝒜(x)={clip(G(F(x)+λ)):‖λ‖2≤η}"),
        ("latent", "none", 1, "𝒜(x)={clip(G(F(x)+λ)):λ∼𝒩(0,η2I)}"),
        ("joint", "linf", 1, "𝒜(x)={clip(G(F(x)+λ)+δ):‖λ‖∞≤η,‖δ‖∞≤ε}"),
        ("rendered", "linf", 1, "𝒜(x)={clip(R(x,v)):v∈𝒱ε}"),
        ("corruption", "none", 1, "𝒜(x)={c(x)}"),
    ],
    ids=lambda value: str(value) if str(value).isascii() else "set",
)
def test_admissible_sets(space: str, norm: str, pixel_range: int, text: str) -> None:
    formula, _ = formulas.admissible(space, norm, pixel_range)  # type: ignore[arg-type]
    assert "".join(ElementTree.fromstring(str(formula)).itertext()) == text


def test_another_package_s_algorithm_is_said_to_be_one() -> None:
    goal, words = formulas.objective(attack("mine", algorithm="mine"))
    assert goal == ()
    assert "'mine'" in words


# ----------------------------------------------------------------------------------------------------- definitions
def test_definitions_are_those_of_the_files() -> None:
    for spec in shipped():
        found = definitions.of_attack(spec)
        (content,) = yaml.safe_load(found.yaml).values()
        assert content.get("parameters", {}).items() <= spec.parameters.items()
        assert found.note == ""
    for spec in {spec.threat_model: spec for spec in shipped()}.values():
        whole = definitions.of_threat_model(spec)
        assert whole.description
        assert yaml.safe_load(whole.yaml)["name"] == spec.threat_model


def test_what_a_run_changed_is_named() -> None:
    spec = resolve_attack("pgd20", "digits", threat_models(None), steps=50)
    assert definitions.of_attack(spec).note == "Run with steps = 50 in the place of the file's."
    own = attack("own", "own-model")
    assert definitions.of_attack(own).note == definitions.of_threat_model(own).note == definitions.OWN


# -------------------------------------------------------------------------------------------------------- strength
def test_strength_is_the_ledger_s(damaged: Run) -> None:
    found = pages(damaged)
    assert set(found) == {
        *(f"attack-{name}.html" for name in ("pgd20", "aa", "jsa50")),
        *(f"threat-{name}.html" for name in ("linf", "joint")),
    }
    result = damaged.cells[3]
    rows = result.rows
    right = rows["clean_prediction"] == rows["label"]
    broken = right & ~rows["robust"]
    text = found["attack-pgd20.html"]
    line = re.search(r"<tr><th scope=\"row\"><a [^>]*>digits-ijsat</a>.*?</tr>", text, re.DOTALL)
    assert line is not None
    assert f"{broken.sum()} of {right.sum()}" in line[0]
    assert f"{100 * broken.sum() / right.sum():.1f} %" in line[0]
    row = next(r for r in leaderboard(damaged) if (r.model, r.attack) == ("digits-ijsat", "pgd20"))
    assert f'data-order="{row.value}"' in line[0]


def test_failed_and_partial_cells_are_no_numbers(damaged: Run) -> None:
    found = pages(damaged)
    text = unescape(found["attack-aa.html"])
    assert "digits-ijsat: <span class=\"failed\">failed</span> (attack 'aa' left its set" in text
    assert "50 of 120 samples done" in found["attack-jsa50.html"]
    line = re.search(r"<tr><th scope=\"row\"><a [^>]*>digits-ijsat</a>.*?</tr>", text, re.DOTALL)
    assert line is not None
    assert '<td class="number" data-order=""><span class="failed">failed</span></td>' in line[0]


def test_a_threat_model_names_the_strongest_attack_and_the_worst_case(run: Run) -> None:
    text = pages(run)["threat-linf.html"]
    for model in ("digits-standard", "digits-ijsat"):
        rows = [r for r in leaderboard(run) if r.model == model and r.threat_model == "linf"]
        worst = next(r for r in rows if r.attack == WORST_CASE)
        lowest = min((r for r in rows if r.metric == "accuracy"), key=lambda r: r.value or 0)
        line = re.search(rf"<tr><th scope=\"row\"><a [^>]*>{model}</a>.*?</tr>", text, re.DOTALL)
        assert line is not None
        assert f'data-order="{worst.value}"' in line[0]
        assert re.search(rf">{lowest.attack}</a></td>", line[0])


def test_attacks_that_left_the_same_accuracy_are_all_the_strongest() -> None:
    specs = [attack(label) for label in ("fgsm", "pgd20", "aa", "mim", "pgd50")]
    rates = (0.9, 0.0, 0.0, 0.0, 0.0)
    cells = [cell("a", s, frame(30, 1, r, k)) for k, (s, r) in enumerate(zip(specs, rates, strict=True))]
    text = pages(make_run(cells, 30))["threat-linf.html"]
    found = re.findall(
        r'<td class="number" data-order="(\d)">\1</td><td class="number" data-order="1">1</td>', text
    )
    assert found == ["1", "1", "1", "1", "0"], "the strongest first"
    line = re.search(r'<tr><th scope="row"><a [^>]*>a</a>.*?</tr>', text, re.DOTALL)
    assert line is not None
    assert re.search(r">pgd20</a>, <a [^>]*>aa</a>, <a [^>]*>mim</a> and 1 more</td>", line[0])


def test_budgets_of_one_threat_model_are_kept_apart() -> None:
    near, far = attack("pgd20@0.2"), attack("pgd20@0.4", epsilon=0.4)
    run = make_run([cell("a", near, frame(30, 1, 0.6, 1)), cell("a", far, frame(30, 1, 0.1, 2))], 30)
    titles = re.findall(r'<h2 id="budget-\d">([^<]*)', pages(run)["threat-linf.html"])
    assert titles == ["ε = 0.2", "ε = 0.4"]


def test_flows_show_bits_per_dimension() -> None:
    found = pages(three_flows())
    text = next(text for name, text in found.items() if name.startswith("attack-nll-in"))
    assert "Flows under" in text
    assert "bits/dim" in text
    assert "Models under" not in text


def test_corruptions_show_their_mean() -> None:
    parameters = {"corruption": "fog", "severity": 1}
    changes = {"space": "corruption", "norm": "none", "algorithm": "corruption", "parameters": parameters}
    spec = attack("c-fog-1", "corruptions", **changes, epsilon=None)  # type: ignore[arg-type]
    text = pages(make_run([cell("a", spec, frame(30, 1, 0.6, 1))], 30))["threat-corruptions.html"]
    assert "Without a budget" in text
    assert ">mean</th>" in text


def test_suspicions_stand_on_the_attack_s_page() -> None:
    found = cell("a", attack(), frame(30, 1, 0.6, 1), suspicions=("gradients of 3 of 30 samples are zero",))
    assert "a: gradients of 3 of 30 samples are zero" in pages(make_run([found], 30))["attack-pgd20.html"]


# --------------------------------------------------------------------------------------------------------- samples
def test_samples_come_from_several_models(tmp_path: Path) -> None:
    rows = [frame(30, 1, 0.2, k) for k in range(6)]
    run = make_run([cell(f"m{k}", JSA, rows[k]) for k in range(6)], 30)
    folder = written(run, tmp_path / "run")
    text = pages(load_run(folder))["attack-jsa50.html"]
    shown = re.findall(r"<figcaption><a [^>]*>(m\d)</a>", text)
    assert shown == ["m0", "m1", "m3", "m5"]
    assert text.count("data:image/png") == 3 * len(shown)
    bare = written(run, tmp_path / "bare", originals=False)
    assert "<figcaption>" not in pages(load_run(bare))["attack-jsa50.html"]


# --------------------------------------------------------------------------------------------------------- browser
def test_models_are_sorted_and_filtered(site: Reader, run: Run) -> None:
    site.build(run, pages=only(attack_page))
    page = site.open(f"{GROUP}/attack-pgd20.html")
    names = "rows => rows.map((row) => row.cells[0].textContent)"
    visible = "main table.strength tbody tr:visible"
    page.click("main table.strength th >> text=accuracy")
    first = [row.split("\n")[0] for row in page.locator(visible).all_inner_texts()]
    page.click("main table.strength th >> text=accuracy")
    second = [row.split("\n")[0] for row in page.locator(visible).all_inner_texts()]
    assert first == second[::-1]
    page.fill("main input[type=search]", "ijsat")
    assert page.locator(visible).count() == 1
    assert "digits-ijsat" in page.eval_on_selector_all("main table.strength tbody tr", names)


def test_pages_of_attacks_are_accessible(site: Reader, damaged: Run, tmp_path: Path) -> None:
    folder = written(damaged, tmp_path / "run")
    flows = three_flows()
    site.build(load_run(folder), flows, pages=only(attack_page))
    (nll,) = site_of([flows]).groups
    site.assert_accessible(f"{GROUP}/attack-aa.html", looks=[(DESK, "light")])
    for path in (f"{GROUP}/threat-joint.html", nll.attack_path(nll.attack_labels[0])):
        site.assert_accessible(path, looks=[(PHONE, "dark")])


def test_formulas_are_drawn(site: Reader, run: Run) -> None:
    site.build(run, pages=only(attack_page))
    page = site.open(f"{GROUP}/attack-jsa50.html")
    sizes = page.eval_on_selector_all("math", "all => all.map((one) => one.getBoundingClientRect().height)")
    assert len(sizes) >= 3
    assert min(sizes) > 15
