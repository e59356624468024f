"""`robbench bench`: what it compares, and when it says so. Times are not tested."""

import json

import pytest
import torch
from click.testing import CliRunner

from robbench.benchmarks import autoattack as benchmarks
from robbench.benchmarks.autoattack import OURS, REFERENCE, Contest, Parity, compare, floor, markdown, report
from robbench.benchmarks.models import load_classifiers
from robbench.cli.app import main
from robbench.core.errors import UserError


def parity(**changes) -> Parity:
    fields = {
        "model": "m",
        "attack": "aa",
        "n": 50,
        "clean": 49,
        "robust": {OURS: [30, 31], REFERENCE: [30, 32]},
        "only_ours_breaks": [7],
        "only_reference_breaks": [],
        "seconds": {OURS: [2.0, 4.0], REFERENCE: [9.0, 9.0]},
        "floor_seconds": 1.5,
        "least_seconds": 1.0,
        "forwards": 100,
        "backwards": 40,
        "threads": 1,
    }
    return Parity(**{**fields, **changes})


def test_numbers_follow_from_the_runs():
    one = parity()
    assert (one.excess, one.speedup, one.over_floor, one.over_least) == (-1, 3.0, 2.0, 3.0)
    assert parity(robust={OURS: [33, 30], REFERENCE: [31, 32]}).excess == 1
    text = markdown([one], Contest("aa", 50, (0, 1)), "robbench bench aa")
    assert "| m | 50 | 98.00 | 60.00 / 62.00 | 60.00 / 64.00 | -1 | 7 | none |" in text
    assert "| m | 1 | 1.5 | 1.0 | 3.0 [2.0, 4.0] | 9.0 [9.0, 9.0] | 2.00 | 3.00 | 3.00 |" in text
    plain = json.loads(json.dumps(report([one], Contest("aa-l2", 50, (0,)), "x")))
    assert plain["contest"]["attack"] == "aa-l2"
    assert plain["models"][0]["speedup"] == 3.0


def test_both_engines_see_the_same_samples_and_disagreement_is_listed():
    """With one engine's verdicts replaced, the samples it differs on are named."""
    ((model, data, device),) = load_classifiers(["digits-standard"])
    lines = []
    found = compare(model, data, Contest("aa", 6, (0, 1), batch_size=16), device, lines.append)
    assert found.n == 6
    assert found.robust[OURS] == found.robust[REFERENCE] == [0, 0]
    assert found.only_ours_breaks == found.only_reference_breaks == []
    assert len(lines) == 4
    assert found.floor_seconds > 0
    assert found.least_seconds > 0
    order = [line.split(", ")[1] for line in lines]
    assert order == [REFERENCE, OURS, OURS, REFERENCE]


def test_the_floor_grows_with_the_calls():
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)).eval()
    x = torch.rand(8, 1, 8, 8)
    some = floor(module, x, 1000, 0, torch.device("cpu"))
    more = floor(module, x, 100_000, 50_000, torch.device("cpu"))
    assert 0 < some < more


@pytest.mark.parametrize(
    ("options", "stem"), [((), "aa-digits"), (("--epsilon", "0.1"), "aa-digits-epsilon0.1")]
)
def test_the_command_writes_what_it_prints(tmp_path, options, stem, monkeypatch):
    """Around a comparison that is made up: the real one is above."""
    asked = []

    def made_up(model, data, contest, device, report):
        asked.append(contest)
        return parity(model="digits-standard")

    monkeypatch.setattr(benchmarks, "compare", made_up)
    arguments = ["--model", "digits-standard", "--n", "4", "--seeds", "0", *options]
    result = CliRunner().invoke(main, ["bench", "aa", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    text = (tmp_path / f"{stem}.md").read_text()
    assert text.strip() in result.output
    assert text.splitlines()[0].endswith("epsilon 0.1") == bool(options)
    found = json.loads((tmp_path / f"{stem}.json").read_text())
    assert found["models"][0]["model"] == "digits-standard"
    assert found["contest"]["epsilon"] == (0.1 if options else None)
    assert found["models"][0]["least_seconds"] > 0
    (contest,) = asked
    assert (contest.n, contest.seeds, contest.epsilon) == (4, (0,), 0.1 if options else None)


@pytest.mark.slow
def test_a_budget_reaches_both_engines(tmp_path):
    """At next to none an undefended model keeps what it classifies; at the data set's it keeps nothing (above)."""
    ((model, data, device),) = load_classifiers(["digits-standard"])
    found = compare(model, data, Contest("aa", 4, (0,), epsilon=1e-4), device, lambda _: None)
    assert found.robust[OURS] == found.robust[REFERENCE] == [found.clean]
    assert found.clean > 0


@pytest.mark.parametrize(
    ("names", "words"),
    [(["digits-glow"], ["digits-glow", "flow"]), (["digits-att"], ["digits-att", "digits-at"])],
)
def test_refusals(names, words):
    with pytest.raises(UserError) as caught:
        load_classifiers(names)
    assert all(word in str(caught.value) for word in words)
