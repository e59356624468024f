"""Packed verdicts, and the page's script on any two of them, held against the Python reference in a real browser."""

from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from publish_runs import JSA, attack, cell, frame, make_run

from robbench.results.pairs import compare, pack, pack_run, unpack
from robbench.results.threats import name_threat
from robbench.statistics.paired import sign_test
from robbench.store.records import Run

SCRIPT = files("robbench.report") / "templates" / "site" / "paired.js.j2"


@pytest.fixture(scope="module")
def script(chromium: Any) -> Any:
    """A page that has the functions, and has logged nothing when the module ends."""
    troubles: list[str] = []
    page = chromium.new_page()
    page.on("console", lambda message: troubles.append(message.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.set_content(f"<script>{SCRIPT.read_text()}</script>")
    yield page
    page.close()
    assert troubles == []


# ----------------------------------------------------------------------------------------------------- packing
@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_packed_verdicts_come_back(verdicts: list[bool]) -> None:
    found = unpack(pack(np.array(verdicts)), len(verdicts))
    assert found.tolist() == verdicts
    assert found.dtype == np.bool_


def test_a_packed_run_is_in_the_order_of_its_samples(run: Run) -> None:
    order = np.random.default_rng(0).permutation(run.n)
    shuffled = replace(run, sample_ids=tuple(int(run.sample_ids[k]) for k in order))
    for model, found in pack_run(shuffled).items():
        cells = [r for r in run.cells if r.cell.model == model]
        for result in cells:
            by_id = dict(zip(result.rows["sample_id"], result.rows["robust"], strict=True))
            text = found.attacks[result.cell.attack.label]
            assert text is not None
            assert unpack(text, run.n).tolist() == [by_id[i] for i in shuffled.sample_ids]
        robust = np.array([r.rows["robust"] for r in cells])
        linf = np.array([r.rows["robust"] for r in cells if r.cell.attack.threat_model == "linf"])
        assert found.worst == {
            "linf@0.2": pack(linf.all(0)[order]),
            "joint@0.2@0.35": pack(robust[2][order]),
            "all": pack(robust.all(0)[order]),
        }
        clean = (cells[0].rows["clean_prediction"] == cells[0].rows["label"]).to_numpy()
        assert found.clean == pack(clean[order])


def test_missing_cells_are_absent_and_so_is_what_combines_them(damaged: Run) -> None:
    found = pack_run(damaged)
    assert found["digits-ijsat"].attacks["aa"] is None
    assert found["digits-ijsat"].worst["linf@0.2"] is None
    assert found["digits-ijsat"].worst["all"] is None
    assert found["digits-ijsat"].worst["joint@0.2@0.35"] is not None
    assert found["digits-standard"].attacks["jsa50"] is None
    assert found["digits-standard"].worst["linf@0.2"] is not None


def test_corruptions_are_no_part_of_a_worst_case() -> None:
    fog = attack("c-fog-3", "corruptions", None, space="corruption", norm="none", algorithm="corruption")
    cells = [cell("m", spec, frame(40, 0.9, 0.5, k)) for k, spec in enumerate((attack(), JSA, fog))]
    found = pack_run(make_run(cells, 40))["m"]
    assert set(found.worst) == {"linf@0.2", "joint@0.2@0.35", "all"}
    assert found.attacks["c-fog-3"] is not None
    assert fog.threat is not None
    assert name_threat(fog.threat) == "corruptions"


def test_a_model_of_which_nothing_is_done_has_no_verdicts() -> None:
    rows = frame(40, 0.9, 0.5, 0)
    failed = cell("m", attack(), rows.iloc[:0], status="failed", error="out of memory")
    run = replace(make_run([failed], 40), sample_ids=tuple(range(40)))
    assert pack_run(run)["m"].clean is None


# ------------------------------------------------------------------------------------------------- the script
def random_pairs() -> list[tuple[str, str, int]]:
    rng = np.random.default_rng(7)
    pairs = []
    for k in range(120):
        n = int(rng.choice([1, 2, 7, 8, 9, 360, 1_000, 10_000]))
        a = rng.random(n) < rng.random()
        flipped = rng.random(n) < rng.random() ** 3
        b = (rng.random(n) < rng.random()) if k % 2 else a ^ flipped
        pairs.append((pack(a), pack(b), n))
    for n in (1, 8, 360):  # every margin empty
        for a, b in ((np.ones(n, bool), np.zeros(n, bool)), (np.ones(n, bool), np.ones(n, bool))):
            pairs += [(pack(a), pack(b), n), (pack(b), pack(a), n)]
    return pairs


def test_the_script_compares_as_python_does(script: Any) -> None:
    pairs = random_pairs()
    found = script.evaluate(
        "pairs => pairs.map(([a, b, n]) => PAIRED.compare(PAIRED.unpack(a), PAIRED.unpack(b), n))",
        [list(pair) for pair in pairs],
    )
    for pair, js in zip(pairs, found, strict=True):
        counts, difference = compare(*pair)
        assert [js[k] for k in ("both", "onlyA", "onlyB", "neither")] == [
            counts.both,
            counts.only_a,
            counts.only_b,
            counts.neither,
        ]
        assert js["p"] == pytest.approx(counts.p, rel=1e-9, abs=1e-300)
        for name in ("value", "lower", "upper"):
            assert js[name] == pytest.approx(getattr(difference, name), rel=1e-9, abs=1e-11), pair


def test_the_script_has_exact_p_values_up_to_ten_thousand_pairs(script: Any) -> None:
    rng = np.random.default_rng(8)
    m = np.concatenate([np.arange(12), rng.integers(1, 10_001, 300), [10_000] * 4])
    b = np.concatenate([(rng.random(len(m) - 4) * (m[:-4] + 1)).astype(int), [0, 4_900, 5_000, 4_300]])
    near = np.clip(m[:312] // 2 - rng.integers(0, 90, 312), 0, None)  # where p is not 0
    m, b = np.concatenate([m, m[:312]]), np.concatenate([b, near])
    found = script.evaluate(
        "pairs => pairs.map(([b, c]) => PAIRED.exactP(b, c))", np.stack([b, m - b], 1).tolist()
    )
    assert found == pytest.approx(sign_test(b, m - b), rel=1e-9, abs=1e-300)
    assert sum(1e-300 < p < 1 for p in found) > 200


def test_the_script_lists_who_is_robust_where_the_other_is_not(script: Any) -> None:
    rng = np.random.default_rng(9)
    a, b = rng.random(37) < 0.6, rng.random(37) < 0.5
    only = script.evaluate("([a, b]) => PAIRED.only(PAIRED.unpack(a), PAIRED.unpack(b))", [pack(a), pack(b)])
    assert only == np.flatnonzero(a & ~b).tolist()


def test_the_script_says_nothing_of_an_absent_cell(script: Any) -> None:
    text = pack(np.ones(5, bool))
    assert script.evaluate("t => PAIRED.compare(PAIRED.unpack(null), PAIRED.unpack(t), 5)", text) is None
    assert script.evaluate("t => PAIRED.compare(PAIRED.unpack(t), PAIRED.unpack(null), 5)", text) is None


def test_the_script_is_fast_enough_to_follow_a_choice(script: Any) -> None:
    n = 10_000
    rng = np.random.default_rng(10)
    texts = [pack(rng.random(n) < rate) for rate in np.linspace(0.2, 0.9, 20)]
    milliseconds = script.evaluate(
        """([texts, n]) => {
            const bits = texts.map(PAIRED.unpack), start = performance.now();
            for (const a of bits) for (const b of bits) PAIRED.compare(a, b, n);
            return (performance.now() - start) / 400;
        }""",
        [texts, n],
    )
    assert milliseconds < 5


def test_the_script_is_the_same_in_every_template() -> None:
    from jinja2 import Environment

    text = SCRIPT.read_text()
    assert Environment(autoescape=True).from_string(text).render() == text.removesuffix("\n")
