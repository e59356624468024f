"""Experiments from YAML to table: trainings, resuming, failures, what each output says of scale and absence."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clocks import Clock

from robbench.cli.app import main
from robbench.cli.experiment_session import compare, dry_run_experiment, run_experiment
from robbench.core.errors import UserError
from robbench.core.resources import sha256_file
from robbench.data import load_dataset
from robbench.defenses import DEFENSES, FLOW_DEFENSES
from robbench.defenses.plan import TrainRequest
from robbench.defenses.training import Report, train
from robbench.experiments.request import ExperimentRequest
from robbench.experiments.runs import plan_experiment
from robbench.experiments.schema import Experiment, Scale, find_experiment
from robbench.experiments.table import Value, _verdict
from robbench.experiments.training_cost import StepCost, step_cost
from robbench.run import rates
from robbench.run.rates import Rate, format_hours, measure_seconds
from robbench.specs import threat_models
from robbench.store.ledger import load_run

TINY: dict[str, Any] = {
    "name": "tiny",
    "title": "A look at the machinery",
    "source": "ours",
    "published": None,
    "dataset": "digits",
    "flow": "glow",
    "doubts": ["nothing of this is in a paper"],
    "models": {
        "glow": {"defense": "clean", "recipe": "digits-glow", "settings": {"recipe.selection": "last"}},
        "plain": {"defense": "standard", "recipe": "digits", "seeds": [0, 1]},
        "joint": {"defense": "ijsat", "recipe": "digits", "flow": "glow"},
    },
    "rows": [
        {"title": "Normal", "model": "plain"},
        {"title": "IJSAT", "model": "joint"},
        {"title": "Gain", "difference": ["joint", "plain"]},
        {"title": "DMAT", "needs": ["DMAT"]},
    ],
    "columns": [
        {"title": "Standard", "metric": "accuracy"},
        {"title": "PGD", "metric": "accuracy", "attack": {"name": "pgd10", "epsilon": 0.05}},
        {"title": "JSA", "metric": "accuracy", "attack": "jsa10"},
        {"title": "Drop", "metric": "accuracy_drop", "attack": "jsa10"},
        {"title": "Loss", "metric": "test_loss"},
        {"title": "Size", "metric": "l2_all", "attack": "jsa10"},
        {"title": "Elastic", "metric": "accuracy", "needs": ["Elastic"]},
    ],
}
FLOWS = ("glow-flow-lp", "glow-ijsat")
MODELS = ["glow-scale0.03", "plain-seed0-scale0.03", "plain-seed1-scale0.03", "joint-scale0.03"]


def experiment(**changes: Any) -> ExperimentRequest:
    return ExperimentRequest(Experiment.model_validate(TINY | changes), Scale(0.03), device="cpu")


class Trainings:
    """`train`, which remembers what it trained and fails where it is told to."""

    def __init__(self, failing: str = "") -> None:
        self.names: list[str] = []
        self.failing = failing

    def __call__(self, request: TrainRequest) -> Path:
        self.names.append(str(request.name))
        if self.failing and str(request.name).startswith(self.failing):
            raise UserError("the loss is nan at epoch 1, step 1; lower the learning rate")
        return train(request)


def table(folder: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (folder / "comparison.csv").open(newline="") as stream:
        return {(line["row"], line["column"]): line for line in csv.DictReader(stream)}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny experiment, run once. Read only."""
    folder = tmp_path_factory.mktemp("experiment") / "out"
    trainings = Trainings()
    assert run_experiment(experiment(), folder, trainings) == 0
    assert trainings.names == MODELS
    return folder


def test_the_table_is_what_the_run_measured(done: Path) -> None:
    run, found = load_run(done / "run"), table(done)
    rows = {(cell.cell.model, cell.cell.attack.label): cell.rows for cell in run.cells}
    n = len(load_dataset("digits").test)
    assert run.n == round(0.03 * n)

    def accuracy(model: str, attack: str) -> float:
        return 100 * float(np.mean(rows[model, attack]["robust"]))

    def measured(row: str, column: str) -> float:
        return float(found[row, column]["measured"])

    joint, plain = MODELS[3], MODELS[1:3]
    assert measured("IJSAT", "PGD") == pytest.approx(accuracy(joint, "pgd10@0.05"))
    assert measured("Normal", "PGD") == pytest.approx(np.mean([accuracy(m, "pgd10@0.05") for m in plain]))
    clean = [100 * float((rows[m, "jsa10"].clean_prediction == rows[m, "jsa10"].label).mean()) for m in plain]
    assert measured("Normal", "Standard") == pytest.approx(np.mean(clean))
    loss = float(np.mean(rows[joint, "fgsm@0"]["cross_entropy"]))
    assert measured("IJSAT", "Loss") == pytest.approx(loss)
    gain = measured("IJSAT", "JSA") - measured("Normal", "JSA")
    assert measured("Gain", "JSA") == pytest.approx(gain)
    assert found["DMAT", "PGD"]["note"].startswith("needs DMAT")
    assert found["IJSAT", "Elastic"]["note"].startswith("needs Elastic")
    assert found["DMAT", "Elastic"]["verdict"] == "not run"
    assert {line["verdict"] for line in found.values()} == {"not comparable", "not run"}


def test_every_output_says_the_scale(done: Path) -> None:
    for name in ("comparison.csv", "comparison.md", "run/leaderboard.md", "run/leaderboard.html"):
        assert "scale 0.03" in (done / name).read_text(), name
    for name in MODELS:
        assert "scale 0.03" in (done / "models" / name / "card.yaml").read_text()
    assert "scale 0.03" in (done / "run/run.yaml").read_text()
    cells = [json.loads(path.read_text()) for path in (done / "run/cells").glob("*/cell.json")]
    assert {cell["model"] for cell in cells} == set(MODELS[1:])
    assert experiment().folder_name == "tiny-scale0.03-seed0"


def test_a_second_run_trains_and_computes_nothing(done: Path) -> None:
    shards = {path: path.stat().st_mtime_ns for path in done.glob("run/cells/*/shard-*.parquet")}
    before, trainings = (done / "comparison.csv").read_bytes(), Trainings()
    assert run_experiment(experiment(), done, trainings) == 0
    assert trainings.names == []
    assert {path: path.stat().st_mtime_ns for path in shards} == shards
    assert (done / "comparison.csv").read_bytes() == before


def test_trained_models_serve_another_experiment_through_the_zoo(done: Path, tmp_path: Path) -> None:
    rows = [{"title": "Normal", "model": "plain"}]
    other = experiment(name="other", rows=rows, columns=TINY["columns"][:2], flow=None)
    request = ExperimentRequest(other.experiment, Scale(0.03), device="cpu", zoo=done / "models")
    trainings = Trainings()
    assert run_experiment(request, tmp_path / "out", trainings) == 0
    assert trainings.names == []
    changed = TINY["models"] | {"plain": {**TINY["models"]["plain"], "settings": {"recipe.batch_size": 32}}}
    wrong = Experiment.model_validate(TINY | {"models": changed, "rows": rows, "flow": None})
    again = ExperimentRequest(wrong, Scale(0.03), device="cpu", zoo=done / "models")
    with pytest.raises(
        UserError, match=r"another model than the experiment's 'plain-seed0.* schedule differ"
    ):
        run_experiment(again, tmp_path / "elsewhere", trainings)
    assert not (tmp_path / "elsewhere").exists()


def test_another_experiment_or_foreign_files_keep_their_folder(done: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds tiny at scale 0.03, seed 0"):
        run_experiment(ExperimentRequest(experiment().experiment, Scale(0.5)), done, Trainings())
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        run_experiment(experiment(), tmp_path, Trainings())


@pytest.mark.slow
def test_a_training_that_fails_leaves_the_others_alone(tmp_path: Path) -> None:
    """Its own rows and those of attacks through it say why; everything else is measured; the next run tries again."""
    columns = TINY["columns"][:3]
    request = experiment(columns=columns)
    assert run_experiment(request, tmp_path / "out", Trainings("glow")) == 2
    found = table(tmp_path / "out")
    assert found["Normal", "PGD"]["measured"]
    assert found["Normal", "JSA"]["verdict"] == "failed"
    assert "flow glow-scale0.03 failed" in found["Normal", "JSA"]["note"]
    assert "its flow glow-scale0.03 failed to train" in found["IJSAT", "PGD"]["note"]
    trainings = Trainings()
    assert run_experiment(request, tmp_path / "out", trainings) == 0
    assert trainings.names == [MODELS[0], MODELS[3]]
    assert table(tmp_path / "out")["Normal", "JSA"]["measured"]


def test_a_training_cut_off_resumes_to_the_same_weights(done: Path, tmp_path: Path) -> None:
    def cut_off(request: TrainRequest) -> Path:
        def stop(report: Report) -> None:
            if report.epoch_done and report.epoch == 2:
                raise KeyboardInterrupt

        return train(request, stop)

    models = {"plain": TINY["models"]["plain"] | {"seeds": [1]}}
    request = experiment(models=models, flow=None, rows=TINY["rows"][:1], columns=TINY["columns"][:1])
    with pytest.raises(KeyboardInterrupt):
        run_experiment(request, tmp_path / "out", cut_off)
    assert (tmp_path / "out/models/plain-seed1-scale0.03.checkpoint.pt").is_file()
    assert run_experiment(request, tmp_path / "out", train) == 0
    weights = [
        folder / "models/plain-seed1-scale0.03/weights.safetensors" for folder in (done, tmp_path / "out")
    ]
    assert sha256_file(weights[0]) == sha256_file(weights[1])


# ------------------------------------------------------------------------------------------------------ dry run
def test_dry_run_counts_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    dry_run_experiment(experiment(), tmp_path / "out")
    text = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    images, n = (
        round(0.03 * len(load_dataset("digits").train)),
        round(0.03 * len(load_dataset("digits").test)),
    )
    epochs = round(120 * 0.03)
    lines = [line.split() for line in text.splitlines()]
    joint = next(line for line in lines if line[:1] == ["joint-scale0.03"])
    calls = f"{11 * epochs * images:,}"  # ten steps of the inner search and one of its own
    assert joint[1:5] == [f"{epochs}", f"{images}", calls, calls]
    cell = next(line for line in lines if line[:2] == ["joint-scale0.03", "jsa10"])
    assert cell[2:4] == [f"{12 * n:,}", f"{10 * n:,}"]
    assert "not run: needs DMAT (6 of the table's cells)" in text
    assert "hours of training" in text


def test_an_absent_data_set_is_said_and_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    request = experiment(dataset="lsun-bedroom")
    dry_run_experiment(request, tmp_path / "out")
    assert "not run: needs data set lsun-bedroom" in capsys.readouterr().out
    assert run_experiment(request, tmp_path / "out", Trainings()) == 0
    assert {line["verdict"] for line in table(tmp_path / "out").values()} == {"not run"}


CLASSIFIER_STEPS = {
    # forwards, backwards, of them the step's own; encodes, decodes, decode backwards. Ten inner steps, seven of IAT.
    "standard": StepCost(1, 1, 1),
    "mixup": StepCost(1, 1, 1),
    "cutout": StepCost(1, 1, 1),
    "at": StepCost(11, 11, 1),
    "iat": StepCost(9, 9, 2),
    "mart": StepCost(12, 12, 2),
    "trades": StepCost(13, 12, 2),  # one forward more: the clean prediction the search moves away from
    "r-la": StepCost(1, 1, 1, 1, 1, 0),
    "a-la": StepCost(11, 11, 1, 1, 11, 10),
    "jsa-at": StepCost(11, 11, 1, 1, 11, 10),
    "ijsat": StepCost(11, 11, 1, 1, 11, 10),
    "mart-jsa": StepCost(12, 12, 2, 1, 11, 10),
    "trades-jsa": StepCost(13, 12, 2, 1, 11, 10),
    # Encoder passes: of the critic's step without a graph, of the classifier's and the encoder's own.
    "er-minus": StepCost(1, 1, 1, further_networks=True),
    "e-cla": StepCost(1, 1, 1, further_networks=True),
    "er": StepCost(3, 2, 2, further_networks=True),
    "er-at": StepCost(17, 14, 14, further_networks=True),
}


def test_calls_of_a_training_step_are_those_of_the_formulas() -> None:
    assert set(CLASSIFIER_STEPS) <= set(DEFENSES)
    for name, expected in CLASSIFIER_STEPS.items():
        assert step_cost(name, "classifier", {}, "cifar10", threat_models()) == expected, name
    flows = {"clean": StepCost(1, 1, 1), "at": StepCost(11, 11, 1), "hybrid": StepCost(12, 12, 2)}
    assert set(flows) <= set(FLOW_DEFENSES)
    for name, expected in flows.items():
        assert step_cost(name, "flow", {}, "cifar10", threat_models()) == expected, name
    assert step_cost("at", "classifier", {"steps": 3}, "digits", threat_models()).forwards == 4


def test_a_count_is_that_of_a_real_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forwards of the network itself in one epoch of TRADES, without the validation at its end."""
    from robbench.defenses import selection
    from robbench.models import classifiers

    seen = 0
    build: Callable[..., torch.nn.Module] = classifiers.ARCHITECTURES.get("digits-cnn")

    def counted(*arguments: Any, **named: Any) -> torch.nn.Module:
        model = build(*arguments, **named)

        def count(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], out: torch.Tensor) -> None:
            nonlocal seen
            seen += len(out)

        model.register_forward_hook(count)
        return model

    monkeypatch.setattr("robbench.defenses.training.build_architecture", lambda *a: counted(a[1], a[2]))
    monkeypatch.setattr(selection, "classifier_measurements", lambda *a: ())
    settings = {"recipe.selection": "last", "recipe.budget_warmup_epochs": 0}
    request = TrainRequest("trades", "digits", epochs=1, train_samples=64, out=tmp_path, overrides=settings)
    train(request)
    golden = 4  # images whose outputs the folder records
    assert seen - golden == 13 * 64


# -------------------------------------------------------------------------------------------------------- rates
@pytest.mark.parametrize(
    ("constant", "each", "largest"), [(1e-3, 1e-4, 120), (0.0, 0.05, 64), (0.1, 1e-5, 7)]
)
def test_the_rate_is_that_of_the_largest_batch_tried(
    constant: float, each: float, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(rates, "now", clock)
    tried: list[int] = []

    def call(n: int) -> None:
        tried.append(n)
        clock.time += constant + n * each

    found = measure_seconds(call, largest, torch.device("cpu"))
    assert max(tried) <= largest
    assert found == pytest.approx(min(constant / n + each for n in tried))
    assert clock.time < 30


def test_a_batch_that_memory_does_not_hold_is_halved() -> None:
    def call(n: int) -> None:
        if n > 16:
            raise MemoryError

    assert measure_seconds(call, 512, torch.device("cpu")) < float("inf")


def test_backwards_come_with_their_forwards() -> None:
    assert Rate(1.0, 3.0).seconds(12, 10) == pytest.approx(2 * 1.0 + 10 * 3.0)
    assert [format_hours(h) for h in (0, 1e-4, 0.25, 3.14, 1204.4)] == ["0", "<0.01", "0.25", "3.1", "1,204"]


# ----------------------------------------------------------------------------------------------------- verdicts
@pytest.mark.parametrize(
    ("printed", "rounding", "differs", "verdict"),
    [
        (50.0, 0.005, "", "within"),
        (52.004, 0.005, "", "within"),
        (52.01, 0.005, "", "outside"),
        (47.9, 0.05, "", "outside"),
        (50.0, 0.005, "scale 0.5", "not comparable"),
        (None, 0.0, "", "not compared"),
    ],
)
def test_verdicts(printed: float | None, rounding: float, differs: str, verdict: str) -> None:
    assert _verdict(printed, rounding, Value(50.0, 48.0, 52.0, n=1000), differs) == verdict


def test_without_an_interval_there_is_no_verdict() -> None:
    assert _verdict(3.65, 0.005, Value(3.65), "") == "not compared"
    assert _verdict(3.65, 0.005, Value(status="not run", reason="needs x"), "") == "not run"


# ------------------------------------------------------------------------------------------------- command line
def invoked(*arguments: object) -> Any:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--experiment", "ijsat-table1", "--attacks", "aa"], "leave --attacks out"),
        (
            ["--experiment", "ijsat-table1", "--dataset", "cifar10", "--model", "x"],
            "leave --model, --dataset out",
        ),
        (["--experiment", "ijsat-table1", "--scale", "2"], "--scale 2 is not in (0, 1]"),
        (["--experiment", "ijsat-table0"], "did you mean 'ijsat-table"),
        (["--experiment", "ijsat-table1", "--recipe", "ijsat-table2"], "leave --recipe out"),
        (["--scale", "0.1", "--attacks", "aa"], "--scale is for --experiment"),
        (["--defense", "at"], "neither --attacks nor --experiment is given"),
    ],
)
def test_wrong_use_is_one_line(in_tmp: Path, arguments: list[str], words: str) -> None:
    result = invoked("run", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    assert words in result.stderr.replace("--dataset, --model", "--model, --dataset")
    assert not list(in_tmp.iterdir())


def test_the_option_of_before_goes_on_working_and_says_what_replaces_it(in_tmp: Path) -> None:
    old = invoked("run", "--recipe", "er-table1", "--dry-run")
    new = invoked("run", "--experiment", "er-table1", "--dry-run")
    assert (old.exit_code, old.stdout, new.stderr) == (0, new.stdout, "")
    assert (
        old.stderr == "--recipe is now --experiment, and goes with the next version: --experiment er-table1\n"
    )
    assert "--recipe" not in invoked("run", "--help").output


def array_images(folder: Path, name: str, like: str) -> None:
    """A data set of noise in two brightnesses, 28x28 grey, 10 classes; 200 training and 40 test images."""
    numbers = np.random.default_rng(0)
    lines = [
        f"name: {name}",
        f"like: {like}",
        "layout: NHW",
        f"class_names: {[str(i) for i in range(10)]}",
        "splits:",
    ]
    for split, n in (("train", 200), ("test", 40)):
        path = folder / f"{split}.npz"
        images, labels = numbers.integers(0, 256, (n, 28, 28)), np.arange(n) % 10
        np.savez(path, x=images.astype(np.uint8), y=labels)
        lines.append(f"  {split}: {{file: {path.name}, sha256: {sha256_file(path)}}}")
    (folder / "card.yaml").write_text("\n".join(lines))


def test_a_paper_s_table_runs_on_images_like_its_own(in_tmp: Path) -> None:
    """flow-lp Table 9 (MNIST) with the whole of its machinery, at a scale of 0.0005, through the command line."""
    data = in_tmp / "noise"
    data.mkdir()
    array_images(data, "noise", "mnist")
    command = (
        "run",
        "--experiment",
        "flow-lp-table9",
        "--scale",
        "0.0005",
        "--data",
        data,
        "--device",
        "cpu",
    )
    dry = invoked(*command, "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "flow-lp-mnist-a-la-scale0.0005" in dry.output
    result = invoked(*command)
    assert result.exit_code == 0, result.output
    folder = in_tmp / "robbench-runs" / "flow-lp-table9-scale0.0005-seed0"
    found = table(folder)
    assert len(found) == 12
    for row in ("Standard", "Randomized-LA (L_inf, eps=0.15)"):
        assert found[row, "test accuracy"]["verdict"] == "not comparable"
        assert 0 <= float(found[row, "test accuracy"]["measured"]) <= 100
        assert found[row, "train loss"]["note"].startswith("needs numbers on training images")
    text = (folder / "comparison.md").read_text()
    assert "scale 0.0005, data set noise: another experiment than the paper's" in text
    assert found["Standard", "test accuracy"]["published"] == "", (
        "no print of MNIST beside numbers of other images"
    )
    assert "not comparable: data set noise, published mnist" in found["Standard", "test accuracy"]["note"]


def test_recipes_and_experiments_are_listed_and_shown() -> None:
    listed = invoked("list", "experiments")
    assert "ijsat-table1\tijsat-table1\tcifar10\t" in listed.output
    assert listed.stderr == ""
    schedules = invoked("list", "recipes")
    assert "flow-lp-mnist\ttrain\tmnist\t" in schedules.stdout
    assert "ijsat-table1" not in schedules.stdout
    assert schedules.stderr.endswith("robbench list experiments\n")
    assert schedules.stderr.count("\n") == 1
    assert "published: ijsat-table1" in invoked("show", "ijsat-table1").output


def test_without_corrupted_images_no_model_is_trained_for_them(in_tmp: Path) -> None:
    """IJSAT Table 2 on digits, which have none: the models of its other column are planned, with their flows."""
    table2 = find_experiment("ijsat-table2")
    models = {
        name: model.model_copy(update={"recipe": None if model.recipe in FLOWS else "digits", "settings": {}})
        for name, model in table2.models.items()
    }
    changed = Experiment.model_validate(table2.model_dump() | {"dataset": "digits", "models": models})
    plan = plan_experiment(ExperimentRequest(changed, Scale(0.01), device="cpu"), in_tmp / "out")
    assert plan.uncorrupted
    names = {job.member for job in plan.jobs}
    assert not any(name.startswith("corruptions-") for name in names)
    assert {"flow-lp-cifar10-glow", "flow-lp-cifar10-r-la", "ijsat-cifar10-glow"} <= names
    lines = {(line.row, line.column): line for line in compare(plan, None, {})}
    assert lines["L_2 AT", "CIFAR-10-C"].measured.reason.startswith("needs corrupted images")
    assert lines["Fast PAT", "CIFAR-10-C"].measured.reason == "needs Fast PAT"
