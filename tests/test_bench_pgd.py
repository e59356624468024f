"""`robbench bench pgd` and `bench latent`, and benchmarks/gpu.py, at tiny sizes: who may be compared, and what is said
of those who may not. Times are not tested."""

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from scaled_models import Scaled

from robbench.attacks.search.inner import attack_mode
from robbench.benchmarks import latent, pgd, unforeseen
from robbench.benchmarks.flow_peers import GLOW, benchmark_glow
from robbench.benchmarks.flows import Case, prepare
from robbench.benchmarks.models import random_classifier
from robbench.benchmarks.pgd_peers import PEERS, Pgd, plain
from robbench.benchmarks.timing import interleave, peak_bytes, quartiles, quotient
from robbench.cli.app import main
from robbench.core.errors import UserError

CPU = torch.device("cpu")
CONTEST = pgd.Contest(steps=5, batch_size=20, rounds=2)
libraries = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"
)


@pytest.fixture
def subject(classifier, images):
    _ids, x, y = images
    return pgd.Subject("small", Scaled(classifier, 0.3).eval(), x, y, 0.15, CPU)


@libraries
@pytest.mark.parametrize("name", [name for name in PEERS if name != "plain loop"])
def test_a_library_returns_the_images_that_robbench_returns(subject, name):
    """Independent implementations of the same update, over three batches, the last one short."""
    pytest.importorskip({"ART": "art"}.get(name, name), reason=f"{name} is not installed")
    with attack_mode(subject.module):
        arena = pgd.Arena(subject, CONTEST, {name: PEERS[name]})
        assert arena.absent == {}
        found = {who: run() for who, run in arena.searches().items()}
    assert torch.allclose(found[name], found[pgd.OURS], atol=1e-6)
    assert float((found[name] - subject.x).abs().max()) == pytest.approx(subject.epsilon, abs=1e-6)


def test_both_comparisons_of_equal_searches_have_ratios(subject):
    found = pgd.compare(subject, CONTEST, peers={"plain": plain})
    assert found.work.refused == found.verdict.refused == ""
    assert found.work.robust["plain"] == found.work.robust[pgd.OURS]
    assert 0 < found.verdict.robust[pgd.OURS] <= found.verdict.robust["plain"] < found.n
    for one in (found.work, found.verdict):
        assert set(one.ratio) == {pgd.OURS, "plain"}
        assert one.ratio[pgd.OURS] == [1.0, 1.0, 1.0]
    text = pgd.markdown([found], CONTEST, "robbench bench pgd")
    assert text.count("| plain |") == 2


def idle(module, numbers, device):
    return lambda x, y: x.clone()


def larger(module, numbers, device):
    return plain(module, replace(numbers, epsilon=2 * numbers.epsilon), device)


def nowhere(module, numbers, device):
    return lambda x, y: x * float("nan")


@pytest.mark.parametrize(
    ("peer", "words"),
    [(idle, "differ on"), (larger, "or the ball by 3."), (nowhere, "leaves the box by nan")],
)
def test_a_peer_that_is_another_attack_gets_no_ratio_and_no_time(subject, peer, words):
    found = pgd.compare(subject, CONTEST, peers={"honest": plain, "wrong": peer})
    for one in (found.work, found.verdict):
        assert words in one.refused
        assert "wrong" in one.refused
        assert one.ratio == one.seconds == {}
    text = pgd.markdown([found], CONTEST, "c")
    assert "| robbench |" not in text
    assert text.count("Refused: ") == 2


def test_a_stronger_peer_refuses_the_second_comparison():
    """Equal last iterates, but an image that only the peer's judgement breaks."""
    judged = {pgd.OURS: torch.tensor([True, True, False]), "p": torch.tensor([True, False, False])}
    clear = {"p": torch.tensor([1.0, -0.5, -1.0]), pgd.OURS: torch.tensor([1.0, 0.5, -1.0])}
    assert "p breaks 1 image that robbench does not (image 1)" in pgd._weaker(judged, clear)
    assert pgd._weaker(judged, clear | {"p": torch.tensor([1.0, -5e-5, -1.0])}) == ""
    assert pgd._weaker(dict.fromkeys(judged, judged["p"]), clear) == ""


@pytest.mark.parametrize(("theirs", "differs"), [(-5e-5, False), (-2e-4, True), (0.0, False)])
def test_only_near_ties_may_differ(theirs, differs):
    scores = {pgd.OURS: torch.tensor([1.0, 5e-5]), "p": torch.tensor([1.0, theirs])}
    assert bool(pgd.disagreement(scores)) == differs


def test_absent_peers_are_named_with_the_command_that_installs_them(subject, monkeypatch):
    for module in ("foolbox", "torchattacks", "art"):
        for loaded in [name for name in sys.modules if name.split(".")[0] == module]:
            monkeypatch.delitem(sys.modules, loaded)
        monkeypatch.setitem(sys.modules, module, None)
    found = pgd.compare(subject, replace(CONTEST, rounds=1))
    assert set(found.absent) == {"foolbox", "torchattacks", "ART"}
    assert set(found.work.ratio) == {pgd.OURS, "plain loop"}
    text = pgd.markdown([found], CONTEST, "c")
    assert "torchattacks is missing" in text
    assert "pip install --no-deps torchattacks" in text
    assert "pip install adversarial-robustness-toolbox packaging" in text


@libraries
def test_the_command_writes_what_it_prints(tmp_path):
    options = ["--steps", "2", "--n", "6", "--rounds", "1", "--architecture", "digits-cnn"]
    before = torch.get_num_threads()
    try:
        result = CliRunner().invoke(
            main, ["bench", "pgd", "--model", "digits-at", *options, "--out", str(tmp_path)]
        )
    finally:
        torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    text = (tmp_path / "pgd2-digits-at-digits-cnn.md").read_text()
    assert text.strip() in result.output
    plain = json.loads((tmp_path / "pgd2-digits-at-digits-cnn.json").read_text())
    assert [one["model"] for one in plain["models"]] == ["digits-at", "digits-cnn (random weights)"]
    assert plain["contest"]["steps"] == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pgd", "--architecture", "resnet19"], ["resnet19", "resnet18"]),
        (["pgd", "--model", "digits-glow"], ["digits-glow", "classifiers"]),
        (["latent", "--case", "mlp"], ["mlp", "small"]),
        (["latent", "--attack", "pgd20"], ["pgd20", "om-pgd"]),
    ],
)
def test_bad_input_is_one_line(arguments, words, tmp_path):
    result = CliRunner().invoke(main, ["bench", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert len(result.output.splitlines()) == 1
    assert all(word in result.output for word in words)


# ------------------------------------------------------------------------------------------ latent
def tiny(**peers) -> Case:
    return Case("tiny", lambda: benchmark_glow(2, 4, 16, (3, 8, 8)), batch=6, rounds=1, peers=peers)


LATENT = latent.Contest(steps=3, rounds=1)


@libraries
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_attacks_through_a_flow_agree_with_a_plain_loop_over_a_library():
    pytest.importorskip("normflows", reason="pip install normflows")
    case = tiny(normflows=GLOW["normflows"])
    arena = latent.Arena(case, LATENT, prepare(case))
    with attack_mode(arena.module):
        for name in LATENT.attacks:
            found = {who: run() for who, run in arena.runs(LATENT.spec(name)).items()}
            for who in ("robbench mask", "robbench invert", "normflows frozen", "normflows naive"):
                assert torch.allclose(found[who], found["robbench none"], atol=1e-3), who
            assert float((found["robbench none"] - arena.x).abs().max()) > 0.01
    result = latent.compare(case, LATENT)
    assert all(not times.refused and "normflows naive" in times.ratio for times in result.attacks)
    memory = result.memory
    assert memory["invert"].peak < memory["mask"].peak < memory["none"].peak
    assert memory["none"].largest_batch == case.batch < memory["mask"].largest_batch
    text = latent.markdown([result], LATENT, "c")
    assert "| mask |" in text
    assert "time, jsa50" in text


def test_a_loop_that_is_another_attack_gets_no_ratio(monkeypatch):
    """A plain loop that never moves leaves its images robust."""
    monkeypatch.setattr(
        latent, "plain_joint", lambda decode, module, z, y, spec: decode(z).detach().clamp(0, 1)
    )
    strong = replace(LATENT, attacks=("jsa50",), steps=20, eta=0.3)
    case = tiny(same=lambda flow, frozen: flow.transform)
    found = latent.compare(case, strong).attacks[0]
    assert found.robust["same frozen"] == 6 > found.robust["robbench none"]
    assert "same frozen and robbench none differ" in found.refused
    assert found.ratio == found.seconds == {}
    assert found.table(2) == [f"Refused: {found.refused}."]


def test_absent_flow_libraries_are_named():
    def absent(flow, frozen):
        raise ImportError("No module named 'lost'")

    found = latent.compare(tiny(lost=absent), replace(LATENT, attacks=("a-la",)))
    assert "pip install lost" in found.absent["lost"]
    assert "* lost is missing" in latent.markdown([found], LATENT, "c")


# ------------------------------------------------------------------------------------------ clock and memory
def test_rounds_run_everybody_once_each_in_a_changing_order():
    seen: list[str] = []
    runs = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = interleave(runs, 6, CPU, lambda line: None)
    rounds = ["".join(seen[i : i + 3]) for i in range(0, 18, 3)]
    assert all(sorted(one) == list("abc") for one in rounds)
    assert len(set(rounds)) > 1
    assert all(len(of) == 6 for of in times.values())
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 3.0, 4.0]
    assert quotient([2.0, 6.0], [1.0, 2.0]) == [2.25, 2.5, 2.75]


def test_the_peak_counts_what_lives_at_the_same_time():
    def two_then_one() -> None:
        first = torch.zeros(250_000)
        second = torch.zeros(500_000)
        del first, second
        torch.zeros(600_000)

    assert peak_bytes(two_then_one, CPU) == pytest.approx(3_000_000, rel=0.01)


def test_random_classifiers_are_the_same_every_time_and_right_about_their_labels():
    module, x, y = random_classifier("digits-cnn", 5)
    again, same, _ = random_classifier("digits-cnn", 5)
    assert torch.equal(x, same)
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    assert torch.equal(module(x).argmax(1), y)
    with pytest.raises(UserError, match="unknown architecture"):
        random_classifier("nothing", 5)


# ------------------------------------------------------------------------------------------ benchmarks/gpu.py
@pytest.fixture
def gpu(monkeypatch):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"
    spec = importlib.util.spec_from_file_location("gpu_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_benchmark", module)
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_the_script_says_so_in_one_line(gpu, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("not run on a GPU: ")
    assert len(printed.err.splitlines()) == 1


@pytest.mark.slow
@libraries
def test_the_script_measures_every_attack(gpu):
    """On the CPU, with sizes at which the numbers mean nothing."""
    plan = gpu.Plan(
        architecture="digits-cnn", n=8, batch_size=4, jsa_batch=2, pgd_steps=2, jsa_steps=2, iterations=2, targets=1,
        queries=5, epsilon=0.01, rounds=1, batches=(4,),
    )  # fmt: skip
    rows = gpu.measure(plan, CPU, tiny())
    assert [row.attack for row in rows] == ["pgd2", "aa (2 iterations, 1 targets, 5 queries)", "jsa2"]
    assert all(row.images_a_second > 0 and row.peak_share > 0 and not row.refused for row in rows)
    assert set(rows[1].ratio) == {"aa", "aa-reference"}
    assert "plain loop" in rows[0].ratio
    text = gpu.markdown(rows, plan, CPU, "c")
    assert "| jsa2 | 2 |" in text
    assert len(json.loads(json.dumps(gpu.report(rows, plan, CPU, "c")))["attacks"]) == 3


def test_what_everybody_runs_follows_from_the_contest(subject):
    seen: list[Pgd] = []

    def spy(module, numbers, device):
        seen.append(numbers)
        return plain(module, numbers, device)

    with attack_mode(subject.module):
        pgd.Arena(subject, CONTEST, {"spy": spy})
    assert seen == [Pgd(0.15, 0.25 * 0.15, 5, 20, 10)]


def test_a_budget_and_a_folder_of_checkpoints_as_run_takes_them(tmp_path):
    (subject,) = pgd.zoo_subjects(("digits-at",), 4, 0.05, device="cpu")
    assert (subject.epsilon, pgd.zoo_subjects(("digits-at",), 4, device="cpu")[0].epsilon) == (0.05, 0.2)
    for option, words in (
        (("--epsilon", "0.1,0.2"), "at one budget"),
        (("--checkpoints", "absent"), "'absent'"),
    ):
        result = CliRunner().invoke(
            main, ["bench", "pgd", "--model", "digits-at", "--out", str(tmp_path), *option]
        )
        assert (result.exit_code, words in result.stderr) == (2, True), result.output


def test_unforeseen_attacks_are_timed_beside_a_plain_loop(tmp_path):
    options = ["--steps", "2", "--n", "4", "--rounds", "1", "--out", str(tmp_path)]
    before = torch.get_num_threads()
    try:
        result = CliRunner().invoke(main, ["bench", "unforeseen", *options])
    finally:
        torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "unforeseen-digits-cnn-32.json").read_text())["attacks"]
    assert [one["attack"] for one in found] == ["elastic", "jpeg-linf"]
    for one in found:
        assert one["stray"] < 0.02
        assert max(one["unequal"], one["gradient_gap"]) < 1e-3
        assert one["work"]["refused"] == ""
        assert set(one["work"]["ratio"]) == set(one["rendering"]["ratio"]) == {"robbench", "plain loop"}


def test_another_rendering_gets_no_ratio():
    contest = unforeseen.Contest(n=2, steps=1, rounds=1)
    found = unforeseen.compare("elastic", contest, peer=lambda x, flow: x + flow.mean())
    assert "pixels of a rendering differ" in found.work.refused
    assert found.rendering.ratio == {}
    with pytest.raises(UserError, match="multiples of 16"):
        unforeseen.Contest(side=33)
