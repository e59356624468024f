"""The loop: determinism, resuming after a real kill, selection, refusals."""

import dataclasses
import hashlib
import io
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from processes import started

from robbench.cards import ModelCard
from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.core.schema import load_yaml
from robbench.defenses import checkpoint, selection
from robbench.defenses.base import DEFENSES, Defense
from robbench.defenses.plan import make_plan
from robbench.defenses.training import Report, Trainer, TrainRequest, parse_settings, train
from robbench.models.loading import load_model
from robbench.models.zoo import read_entry

# Quick, with everything that carries state: Adam, batch norm, augmentation, random starts, selection.
SMALL = {
    "recipe.augmentation": ["crop-1"],
    "recipe.validation_samples": 40,
    "recipe.validate_every": 2,
    "steps": 2,
}


def small(out: Path, **changes) -> TrainRequest:
    settings = dict(SMALL)
    if changes.get("defense", "at") in ("standard", "quadratic"):
        del settings["steps"]
    base = TrainRequest(
        defense="at",
        dataset="digits",
        architecture="conv3",
        epochs=4,
        train_samples=150,
        name="small",
        out=out,
        device="cpu",
        overrides=settings | changes.pop("overrides", {}),
    )
    return dataclasses.replace(base, **changes)


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "weights.safetensors").read_bytes()).hexdigest()


class StopHereError(Exception):
    """Raised by a progress callback to leave a training in the middle."""


def stop_after(epoch: int, step: int = 0):
    def callback(report: Report) -> None:
        if report.epoch == epoch and report.step >= step and (step or report.epoch_done):
            raise StopHereError

    return callback


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    return train(small(tmp_path_factory.mktemp("uninterrupted")))


def test_a_finished_folder_is_a_zoo_model_with_a_complete_card(uninterrupted):
    card = load_yaml(uninterrupted / "card.yaml", ModelCard)
    assert card.training is not None
    assert card.training.command == (
        "robbench train --defense at --dataset digits --architecture conv3 --seed 0 --epochs 4 "
        "--train-samples 150 --name small --set 'recipe.augmentation=[crop-1]' "
        "--set recipe.validation_samples=40 --set recipe.validate_every=2 --set steps=2"
    )
    assert (card.training.train_samples, card.training.validation_samples, card.training.epochs) == (
        150,
        40,
        4,
    )
    assert card.training.selected_epoch in (2, 4)  # only every second epoch is scored
    assert card.training.parameters["defense"]["epsilon"] == 0.2
    assert {m.split for m in card.measurements} == {"validation"}
    loaded = load_model(read_entry(uninterrupted))
    assert loaded.module(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    assert not list(uninterrupted.parent.glob("*.checkpoint.pt"))


def test_the_card_records_what_the_weights_do(uninterrupted, digits):
    loaded = load_model(read_entry(uninterrupted))
    right = loaded.module(digits.validation.x(torch.arange(180))).argmax(1) == digits.validation.labels
    measured = next(m for m in loaded.card.measurements if m.metric == "accuracy")
    assert measured.value == pytest.approx(100 * right.double().mean().item(), abs=0.01)
    assert measured.n == 180


def test_the_command_in_the_card_trains_the_same_weights(uninterrupted, tmp_path):
    """Read back as text, the way the command line does it."""
    card = load_yaml(uninterrupted / "card.yaml", ModelCard)
    words = shlex.split(card.training.command)[2:]
    pairs = list(zip(words[::2], words[1::2], strict=True))
    options = {key[2:].replace("-", "_"): value for key, value in pairs if key != "--set"}
    numbers = {key: int(options.pop(key)) for key in ("seed", "epochs", "train_samples")}
    settings = parse_settings([value for key, value in pairs if key == "--set"])
    again = train(TrainRequest(**options, **numbers, overrides=settings, out=tmp_path, device="cpu"))
    assert weights_hash(again) == weights_hash(uninterrupted)


@pytest.mark.parametrize("stop", [stop_after(1), stop_after(3), stop_after(2, step=2)])
def test_resuming_gives_the_weights_of_an_uninterrupted_training(uninterrupted, tmp_path, stop):
    with pytest.raises(StopHereError):
        train(small(tmp_path), stop)
    torch.rand(7)  # a different global random state must not matter
    reports: list[Report] = []
    folder = train(small(tmp_path), reports.append)
    assert reports[0].epoch > 1
    assert weights_hash(folder) == weights_hash(uninterrupted)


def _train_and_tell() -> None:
    """In a process of its own: into the folder of its first argument."""

    def told(report: Report) -> None:
        if report.epoch_done:
            print("epoch", report.epoch, flush=True)

    train(small(Path(sys.argv[1])), told)


def test_kill_minus_nine_and_resume(uninterrupted, tmp_path):
    """A real SIGKILL while the second epoch or a later one is running; then the same request again."""
    with started(tmp_path, target=_train_and_tell) as child:
        deadline = time.monotonic() + 120
        while "epoch 1" not in child.stdout:
            assert child.poll() is None, child.stderr
            assert time.monotonic() < deadline
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
    assert (tmp_path / "small.checkpoint.pt").exists()
    assert not (tmp_path / "small" / "card.yaml").exists()
    folder = train(small(tmp_path))
    assert weights_hash(folder) == weights_hash(uninterrupted)


HOLDER = """
import sys, time
from pathlib import Path
from test_training import small
from robbench.defenses.training import train

def told(report):
    print("training", flush=True)
    time.sleep(600)

train(small(Path(sys.argv[1])), told)
"""


@pytest.mark.slow
def test_a_second_training_of_one_name_is_refused_until_the_first_is_gone(uninterrupted, tmp_path):
    """Whoever is refused says which process is in the way; a SIGKILL frees the name."""
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (here, here.parent, os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTHONPATH": paths}
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "training\n"
        (tmp_path / "link").symlink_to(tmp_path)
        for out in (tmp_path, tmp_path / "link"):
            message = refused(small(out))
            assert "another robbench train is writing to" in message
            assert Path("/proc/locks").exists() <= (f"(process {child.pid})" in message)
        command = [
            "train",
            "--defense",
            "standard",
            "--dataset",
            "digits",
            "--name",
            "small",
            "--out",
            str(tmp_path),
        ]
        result = CliRunner().invoke(main, command)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
        assert train(small(tmp_path, name="other", epochs=1)).is_dir(), (
            "another name in the same folder is free"
        )
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    (tmp_path / ".small.checkpoint.pt.abc.tmp").write_bytes(b"half a checkpoint of a killed training")
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / ".weights.safetensors.abc.tmp").write_bytes(b"half of the weights")
    assert weights_hash(train(small(tmp_path))) == weights_hash(uninterrupted)
    assert not list(tmp_path.glob(".small.checkpoint.pt.*"))


def test_a_folder_that_is_not_there_yet_is_made(tmp_path):
    out = tmp_path / "new" / "zoo"
    assert train(small(out, epochs=1)) == out / "small"


def test_a_model_that_another_process_finished_meanwhile_is_not_trained_again(
    uninterrupted, tmp_path, monkeypatch
):
    """Between the checks of a request and its lock another training of the name may end."""
    from robbench.defenses import training

    request = small(tmp_path)
    plan = make_plan(request)
    shutil.copytree(uninterrupted, tmp_path / "small")
    monkeypatch.setattr(training, "make_plan", lambda _request: plan)
    assert "holds a finished model" in refused(request)
    assert weights_hash(tmp_path / "small") == weights_hash(uninterrupted)


def test_dropout_resumes_too(tmp_path):
    """Modules that draw from torch's global generator see the same numbers after a resume."""
    first = Trainer(make_plan(small(tmp_path / "a", epochs=2)), lambda report: None)
    draws = []

    def record(model, x, y, generator):
        draws.append(torch.rand(1).item())
        return sum(p.sum() ** 2 for p in model.parameters())

    for trainer, rounds in (
        (first, 2),
        (Trainer(make_plan(small(tmp_path / "b", epochs=2)), lambda report: None), 2),
    ):
        trainer.plan.defense.loss = record
        for _ in range(rounds):
            trainer._train_epoch()
            torch.rand(3)
    half = len(draws) // 2
    assert draws[:half] == draws[half:]
    assert len(set(draws[:half])) == half


# -------------------------------------------------------------------------------------------------- selection
def test_the_best_validation_epoch_is_kept(tmp_path, monkeypatch):
    scores = iter([10.0, 60.0, 60.0, 20.0])
    kept: dict[int, dict[str, torch.Tensor]] = {}
    monkeypatch.setattr(selection, "score", lambda *arguments: next(scores))
    plan = make_plan(small(tmp_path, defense="standard", overrides={"recipe.validate_every": 1}))
    trainer = Trainer(plan, lambda report: None)

    def remember(report: Report) -> None:
        if report.epoch_done:
            kept[report.epoch] = {k: v.clone() for k, v in trainer.model.state_dict().items()}

    trainer._notify = remember
    trainer.run()
    assert trainer.state.best_epoch == 3  # the later one of the tie
    assert all(torch.equal(value, kept[3][key]) for key, value in trainer.model.state_dict().items())


def test_patience_stops_and_bits_per_dim_are_better_lower(tmp_path, monkeypatch):
    scores = iter([3.0, 2.5, 2.6, 2.7, 1.0])
    monkeypatch.setattr(selection, "score", lambda *arguments: next(scores))
    monkeypatch.setattr(DEFENSES.get("standard"), "criterion", "bits_per_dim")
    settings = {"recipe.validate_every": 1, "recipe.patience": 2}
    trainer = Trainer(
        make_plan(small(tmp_path, defense="standard", epochs=9, overrides=settings)), lambda r: None
    )
    trainer.run()
    assert (trainer.state.best_epoch, trainer.state.epoch) == (2, 4)
    assert trainer.state.best_score == -2.5


def test_the_test_split_is_not_read_while_training(tmp_path, monkeypatch):
    from robbench.data import base

    plan = make_plan(small(tmp_path, epochs=2))
    original, test = base.Split.x, plan.dataset.test

    def guarded(self, positions):
        assert self is not test
        return original(self, positions)

    monkeypatch.setattr(base.Split, "x", guarded)
    Trainer(plan, lambda report: None).run()


# --------------------------------------------------------------------------------------------------- refusals
def refused(request: TrainRequest) -> str:
    with pytest.raises(UserError) as caught:
        train(request)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"defense": "att"}, ["att", "'at'"]),
        ({"dataset": "digit"}, ["digit", "digits"]),
        ({"recipe": "digit"}, ["recipe", "'digits'"]),
        ({"recipe": "digits-glow"}, ["flow", "classifier", "digits"]),
        ({"architecture": "conv4"}, ["conv4", "conv3"]),
        ({"defense": "mart", "architecture": "glow"}, ["glow", "classifier"]),
        ({"defense": "clean", "architecture": "conv3"}, ["conv3", "flow"]),
        ({"overrides": {"stepz": "3"}}, ["stepz"]),
        ({"overrides": {"recipe.lr": "0.1"}}, ["recipe", "lr"]),
        ({"overrides": {"recipe.learning_rate": "-1"}}, ["learning_rate"]),
        ({"overrides": {"recipe.augmentation": "[spin]"}}, ["spin", "crop"]),
        ({"overrides": {"architecture.depth": "3"}}, ["depth", "conv3"]),
        ({"epochs": 0}, ["epochs"]),
        ({"train_samples": 100000}, ["100000", "1257"]),
        ({"device": "gpu"}, ["gpu", "cpu"]),
        ({"name": "../up"}, ["../up"]),
        ({"flow": "digits-glow"}, ["at", "no flow"]),
        ({"defense": "jsa-at", "flow": "nothing-glow"}, ["nothing-glow"]),
        ({"threat_models": "/nowhere"}, ["--threat-models"]),
        ({"zoo": "/nowhere", "defense": "jsa-at"}, ["--zoo"]),
    ],
)
def test_bad_requests_name_the_argument_and_the_choices(tmp_path, changes, words):
    message = refused(small(tmp_path, **changes))
    assert all(word in message for word in words), message
    assert not list(tmp_path.glob("*.pt"))


def test_a_set_flag_without_a_value_is_refused():
    assert parse_settings(["beta=5", "recipe.augmentation=[flip]"]) == {
        "beta": "5",
        "recipe.augmentation": "[flip]",
    }
    for pairs in (["beta"], ["=5"], ["beta=5", "beta=6"]):
        with pytest.raises(UserError, match="--set"):
            parse_settings(pairs)


def test_a_checkpoint_of_another_training_is_refused_and_kept(tmp_path):
    with pytest.raises(StopHereError):
        train(small(tmp_path), stop_after(1))
    before = (tmp_path / "small.checkpoint.pt").read_bytes()
    message = refused(small(tmp_path, seed=1, overrides={"epsilon": 0.1}))
    assert "seed was 0, now 1" in message
    assert "parameters.epsilon was 0.2, now 0.1" in message
    assert (tmp_path / "small.checkpoint.pt").read_bytes() == before


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A folder with the checkpoint of epoch 2, scored, so that it holds a best state too."""
    out = tmp_path_factory.mktemp("interrupted")
    with pytest.raises(StopHereError):
        train(small(out), stop_after(2))
    return out


def reading(path: Path, identity) -> str:
    """Why the checkpoint at `path` is refused."""
    with pytest.raises(UserError) as caught:
        checkpoint.load(path, identity, torch.device("cpu"))
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    assert "move it away" in text
    return text


def test_no_flipped_bit_of_a_checkpoint_resumes(interrupted, tmp_path):
    """Anywhere in the file: weights, optimiser, the epoch, the identity, zip headers, the digest itself."""
    plan = make_plan(small(interrupted))
    whole = plan.checkpoint.read_bytes()
    assert checkpoint.load(plan.checkpoint, plan.identity, torch.device("cpu")).epoch == 2
    generator = random.Random(11)
    places = [*range(0, 120, 7), *(generator.randrange(len(whole)) for _ in range(200)), len(whole) - 1]
    path = tmp_path / "flipped.pt"
    for place in places:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << generator.randrange(8)
        path.write_bytes(flipped)
        reading(path, plan.identity)
    for content in (whole[:-1], whole + b"x", whole[: len(whole) // 2], whole[:50]):
        path.write_bytes(content)
        assert "damaged" in reading(path, plan.identity)


def test_a_flipped_bit_stops_the_command_and_nothing_is_lost(interrupted, tmp_path):
    shutil.copytree(interrupted, tmp_path / "out")
    path = tmp_path / "out" / "small.checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert "is damaged: its content does not have the digest written with it" in refused(
        small(tmp_path / "out")
    )
    assert path.read_bytes() == content
    assert not (tmp_path / "out" / "small").exists()


def test_a_checkpoint_of_before_there_were_digests_is_refused(interrupted, tmp_path):
    plan = make_plan(small(interrupted))
    stored = checkpoint.load(plan.checkpoint, plan.identity, torch.device("cpu"))
    torch.save(
        {"schema_version": 1, "identity": plan.identity, **vars(stored)}, tmp_path / "small.checkpoint.pt"
    )
    assert "has no digest (an earlier robbench wrote it" in reading(
        tmp_path / "small.checkpoint.pt", plan.identity
    )


def test_a_digest_of_something_else_is_no_checkpoint(tmp_path):
    """Whoever writes the digest too gets no code executed and no traceback."""
    for written in ({"identity": {}}, [1, 2], {"identity": {}, "model": {}, "optimizer": {}, "more": 1}):
        buffer = io.BytesIO()
        torch.save(written, buffer)
        payload = buffer.getvalue()
        header = checkpoint.MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n"
        (tmp_path / "x.pt").write_bytes(header + payload)
        assert "is not a checkpoint that can be read here" in reading(tmp_path / "x.pt", {})


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 half a file"])
def test_a_damaged_checkpoint_is_named(tmp_path, content):
    (tmp_path / "small.checkpoint.pt").write_bytes(content)
    assert "small.checkpoint.pt" in refused(small(tmp_path))
    assert (tmp_path / "small.checkpoint.pt").read_bytes() == content


def test_a_checkpoint_with_code_in_it_is_not_executed(tmp_path):
    import pickle

    class Payload:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "executed"),))

    (tmp_path / "small.checkpoint.pt").write_bytes(pickle.dumps(Payload(), protocol=2))
    refused(small(tmp_path))
    assert not (tmp_path / "executed").exists()


def test_a_finished_model_is_not_overwritten(uninterrupted):
    before = weights_hash(uninterrupted)
    assert "finished model" in refused(small(uninterrupted.parent))
    assert weights_hash(uninterrupted) == before


def test_an_output_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    assert "--out" in refused(small(tmp_path / "file"))


def test_a_loss_that_is_not_finite_names_epoch_and_step_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    calls = []
    original = DEFENSES.get("standard").loss

    def breaking(self, model, x, y, generator):
        calls.append(1)
        loss = original(self, model, x, y, generator)
        return loss * float("nan") if len(calls) == 5 else loss

    monkeypatch.setattr(DEFENSES.get("standard"), "loss", breaking)
    request = small(tmp_path, defense="standard")
    message = refused(request)  # 150 images are 3 steps an epoch
    assert "epoch 2, step 2" in message
    plan = make_plan(request)
    kept = checkpoint.load(plan.checkpoint, plan.identity, torch.device("cpu"))
    assert kept is not None
    assert kept.epoch == 1
    assert all(torch.isfinite(value).all() for value in kept.model.values())


def test_a_defense_of_another_package_is_an_ordinary_defense(tmp_path, monkeypatch):
    """What an entry point of `robbench.defenses` adds."""

    class Quadratic(Defense):
        """Squared logits: nobody's defense."""

        def loss(self, model, x, y, generator):
            return model(x).square().mean()

    monkeypatch.setitem(DEFENSES._entries, "quadratic", Quadratic)
    folder = train(small(tmp_path, defense="quadratic", epochs=1))
    assert load_yaml(folder / "card.yaml", ModelCard).defense == "quadratic"


def test_a_folder_that_holds_something_else_is_never_written_into(tmp_path: Path) -> None:
    """Refused before the training, not after it, and nothing in it is touched."""
    foreign = tmp_path / "mine"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something else"):
        train(TrainRequest(defense="standard", dataset="digits", out=tmp_path, name="mine"))
    assert [path.name for path in foreign.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match="is a file"):
        train(TrainRequest(defense="standard", dataset="digits", out=tmp_path, name="file"))
