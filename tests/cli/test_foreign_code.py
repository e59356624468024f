"""Whatever other people's code raises, and where: a cell that failed, or one line; never an exit code of its own."""

import ctypes
import signal
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from grids import slow_but
from processes import finished
from tiny_models import saved_model, trained_classifier
from torch import nn

import robbench
from robbench.cards import Architecture
from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.core.foreign import foreign_code, message_of
from robbench.core.stops import Stopped, check_stop, handlers_kept, listening, reraise_stop
from robbench.models.classifiers import digits_cnn
from robbench.store.ledger import Ledger, load_run

# A model of width 4 that raises `what` in its forward from call `after` on; at construction where after is -1.
CODE = """
import os, signal, sys
import torch
from torch import nn
from robbench.models.classifiers import digits_cnn

class Private(BaseException):
    pass

class Unsayable(Exception):
    def __str__(self):
        sys.exit(0)

def thrown(what):
    if what == "swallowed":
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            pass
        return
    if what == "os._exit":
        os._exit(0)
    errors = {"SystemExit": SystemExit(0), "KeyboardInterrupt": KeyboardInterrupt(), "MemoryError": MemoryError(),
              "GeneratorExit": GeneratorExit(), "StopIteration": StopIteration(), "Private": Private("mine"),
              "Unsayable": Unsayable(), "RecursionError": RecursionError("deep"),
              "StopAsyncIteration": StopAsyncIteration()}
    raise errors[what]

class Thrower(nn.Module):
    def __init__(self, what, after):
        super().__init__()
        if after < 0:
            thrown(what)
        self.net, self.what, self.after, self.calls = digits_cnn((1, 8, 8), 10, width=4), what, after, 0

    def forward(self, x):
        self.calls += 1
        if self.calls > self.after:
            thrown(self.what)
        return self.net(x)
"""
KINDS = (
    "SystemExit",
    "KeyboardInterrupt",
    "MemoryError",
    "GeneratorExit",
    "StopIteration",
    "StopAsyncIteration",
    "Private",
    "Unsayable",
    "RecursionError",
)


class Netted(nn.Module):
    """The state names of `Thrower`."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


@pytest.fixture(scope="module")
def weights() -> nn.Module:
    return Netted(trained_classifier(0, epochs=2))


@pytest.fixture
def thrower(tmp_path: Path, weights: nn.Module, request: pytest.FixtureRequest):
    """Makes card folders of models that throw; every module of code has a name of its own."""

    def made(what: str, after: int) -> Path:
        module = f"thrower_{abs(hash((str(tmp_path), what, after)))}"
        architecture = Architecture(name=f"{module}:Thrower", arguments={"what": what, "after": after})
        folder = saved_model(tmp_path, "thrower", weights, architecture=architecture)
        (folder / f"{module}.py").write_text(CODE)
        return folder

    return made


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["run", *map(str, arguments), "--device", "cpu"])


@pytest.mark.parametrize("what", slow_but(("SystemExit", "MemoryError", "Unsayable"), KINDS))
def test_what_a_forward_raises_in_an_attack_fails_its_cells_and_no_others(
    what: str, thrower, tiny_zoo: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    models = ("--model", thrower(what, 12), "--model", "tiny-a", "--zoo", tiny_zoo)
    result = run(*models, "--attacks", "fgsm,pgd10", "--n", 20, "--out", out)
    assert result.exit_code == 3, result.output
    cells = {(r.cell.model, r.cell.attack.label): r.cell for r in load_run(out).cells}
    assert {cells["tiny-a", attack].status for attack in ("fgsm", "pgd10")} == {"ok"}
    failed = cells["thrower", "pgd10"]
    said = "out of memory" if what == "MemoryError" else what
    assert failed.status == "failed"
    assert said in (failed.error or "")
    assert "Traceback" in failed.details


@pytest.mark.parametrize(
    ("what", "after"), [*((kind, 0) for kind in KINDS), *((kind, at) for kind in KINDS[:3] for at in (-1, 2))]
)
def test_what_a_model_raises_before_any_attack_is_one_line(
    what: str, after: int, thrower, tmp_path: Path
) -> None:
    result = run("--model", thrower(what, after), "--attacks", "fgsm", "--n", 20, "--out", tmp_path / "out")
    assert result.exit_code in ((2,) if after < 2 else (2, 3)), result.output
    if result.exit_code == 2:
        assert result.stderr.startswith("Error: ")
        assert result.stderr.count("\n") == 1
        assert "thrower" in result.stderr


def test_a_run_whose_process_a_model_ended_never_reads_as_complete(thrower, tmp_path: Path) -> None:
    """os._exit(0) is out of reach, but what it leaves behind says "running"."""
    out = tmp_path / "out"
    options = ["--model", thrower("os._exit", 60), "--attacks", "fgsm,pgd10", "--n", 40, "--out", out]
    finished("run", *options, "--device", "cpu")
    assert {r.cell.status for r in load_run(out).cells} - {"ok"} == {"running"}
    for arguments in (["export", str(out), "-o", str(tmp_path / "a.zip")], ["watch", str(out), "--once"]):
        result = CliRunner().invoke(main, arguments)
        assert "running" in result.output or "not complete" in result.output, result.output


def test_rows_without_an_end_state_are_no_complete_cell(tiny_zoo: Path, tmp_path: Path) -> None:
    """Killed between the last shard and the end of its cell: nothing that is checked at the end was."""
    out = tmp_path / "out"
    words = ("--model", "tiny-a", "--zoo", tiny_zoo, "--attacks", "fgsm", "--n", 20, "--out", out)
    assert run(*words).exit_code == 0
    (path,) = out.glob("cells/*/cell.json")
    (result,) = load_run(out).cells
    assert path.is_file()
    Ledger(out).write_cell(result.cell.model_copy(update={"status": "running"}))
    assert [r.cell.status for r in load_run(out).cells] == ["running"]
    assert CliRunner().invoke(main, ["export", str(out), "-o", str(tmp_path / "a.zip")]).exit_code == 2
    assert run(*words).exit_code == 0
    assert [r.cell.status for r in load_run(out).cells] == ["ok"]


def test_a_swallowed_ctrl_c_still_stops_the_run(thrower, tmp_path: Path) -> None:
    result = run(
        "--model", thrower("swallowed", 12), "--attacks", "pgd10", "--n", 40, "--out", tmp_path / "out"
    )
    assert result.exit_code == 130, result.output
    assert "Interrupted" in result.stderr
    assert "resume" in result.stderr


def test_a_backend_that_ends_early_leaves_no_cell_without_end_state(
    tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robbench.run import executor

    def one_only(self: object, tasks):
        yield from ()

    monkeypatch.setattr(executor.LocalBackend, "results", one_only)
    out = tmp_path / "out"
    result = run("--model", "tiny-a", "--zoo", tiny_zoo, "--attacks", "fgsm,pgd10", "--n", 20, "--out", out)
    assert result.exit_code == 3
    assert [r.cell.status for r in load_run(out).cells] == ["failed", "failed"]
    assert "ended before every sample" in (load_run(out).cells[0].cell.error or "")


def test_cells_deleted_while_the_run_goes_on_are_not_done(
    tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The verdict of the command is what the folder says, not what the process remembers."""
    import shutil

    from robbench.store.ledger import Ledger

    out, written = tmp_path / "out", Ledger.write_shard

    def lost(self: Ledger, cell: str, *rest: object, **options: object) -> None:
        written(self, cell, *rest, **options)  # type: ignore[arg-type]
        for path in self.cell_folder(cell).glob("shard-*"):
            path.unlink()

    monkeypatch.setattr(Ledger, "write_shard", lost)
    result = run("--model", "tiny-a", "--zoo", tiny_zoo, "--attacks", "fgsm", "--n", 20, "--out", out)
    assert result.exit_code == 3
    assert "not complete" in result.output
    shutil.rmtree(out)


@pytest.mark.parametrize("how", ["removed", "renamed", "replaced"])
def test_a_folder_that_goes_away_stops_the_run_and_is_not_made_again(
    how: str, tiny_zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    from robbench.attacks.pgd import ProjectedGradientDescent

    out, search = tmp_path / "out", ProjectedGradientDescent.search

    def gone(self, victim, task):
        if how == "removed":
            shutil.rmtree(out)
        else:
            out.rename(tmp_path / "elsewhere")
        if how == "replaced":
            out.mkdir()
        monkeypatch.undo()
        return search(self, victim, task)

    monkeypatch.setattr(ProjectedGradientDescent, "search", gone)
    result = run("--model", "tiny-a", "--zoo", tiny_zoo, "--attacks", "pgd10,fgsm", "--n", 20, "--out", out)
    assert result.exit_code == 2
    assert "was removed or renamed" in result.stderr
    assert not out.exists() or not list(out.iterdir())


# ------------------------------------------------------------------------------------------------------- from Python
class Raising(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.net, self.error = digits_cnn((1, 8, 8), 10, width=4), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error", [SystemExit(0), KeyboardInterrupt(), GeneratorExit(), BaseException("mine")]
)
def test_evaluate_names_the_model_that_would_have_ended_the_program(error: BaseException, images) -> None:
    _, x, y = images
    with pytest.raises(UserError, match=f"Raising.*{type(error).__name__}"):
        robbench.evaluate(Raising(error), x[:4], y[:4], ["fgsm"], dataset="digits", device="cpu")


def test_a_loop_around_evaluate_does_not_end_at_a_stop_iteration(images) -> None:
    _, x, y = images
    models = [Raising(StopIteration())]
    with pytest.raises((UserError, RuntimeError)):
        [robbench.evaluate(m, x[:4], y[:4], ["fgsm"], dataset="digits", device="cpu") for m in models]


def test_errors_of_a_model_reach_the_caller_of_evaluate_as_they_are(images) -> None:
    _, x, y = images
    with pytest.raises(UserError, match=r"the model's forward \(Raising\) failed") as caught:
        robbench.evaluate(
            Raising(ZeroDivisionError()), x[:4], y[:4], ["fgsm"], dataset="digits", device="cpu"
        )
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_real_ctrl_c_in_evaluate_is_a_keyboard_interrupt(images) -> None:
    class Stopping(Raising):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            signal.raise_signal(signal.SIGINT)
            return x

    _, x, y = images
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        robbench.evaluate(Stopping(SystemExit()), x[:4], y[:4], ["fgsm"], dataset="digits", device="cpu")
    assert signal.getsignal(signal.SIGINT) is before


# ------------------------------------------------------------------------------------------------- training, signals
@pytest.mark.parametrize("where", ["prepare", "loss"])
@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt(), StopIteration(), MemoryError()])
def test_a_defense_that_would_end_the_program_is_one_line(
    where: str, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from robbench.defenses import DEFENSES

    def raising(*_: object) -> None:
        raise error

    monkeypatch.setattr(DEFENSES.get("standard"), where, raising)
    words = ["--defense", "standard", "--epochs", "1", "--train-samples", "64", "--out", str(tmp_path / "t")]
    result = CliRunner().invoke(main, ["train", *words, "--device", "cpu"])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert type(error).__name__ in result.stderr


def test_a_signal_counts_whatever_becomes_of_its_exception() -> None:
    with listening((signal.SIGINT, signal.SIGTERM)):
        check_stop()
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:  # as a careless model does
            stopped = True
        assert stopped
        with pytest.raises(Stopped) as found:
            check_stop()
        assert (found.value.exit_code, found.value.word) == (143, "Terminated")
        with pytest.raises(Stopped):
            reraise_stop(SystemExit(0))
    check_stop()


def test_a_plain_keyboard_interrupt_that_a_library_makes_of_a_signal_keeps_its_exit_code() -> None:
    def loop() -> None:
        with listening((signal.SIGINT, signal.SIGTERM)):
            try:
                signal.raise_signal(signal.SIGTERM)
            except Stopped:
                raise KeyboardInterrupt from None  # as Ray's waiting loops do

    with pytest.raises(Stopped) as found:
        loop()
    assert found.value.exit_code == 143


def test_a_signal_counts_after_a_library_gave_it_to_the_system() -> None:
    """As the core of Ray does when it ends: Python still knows its handler, and the signal kills the process."""
    with listening((signal.SIGINT, signal.SIGTERM)):
        with handlers_kept():
            ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(0))
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            check_stop()


def test_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with listening():
            signal.raise_signal(signal.SIGINT)
            reraise_stop(KeyboardInterrupt())  # nobody pressed a key that counts: it is the model's
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_keyboard_interrupt_is_the_users_where_nobody_listens() -> None:
    with pytest.raises(KeyboardInterrupt), foreign_code("a model"):
        raise KeyboardInterrupt


def test_a_message_is_one_line_of_bounded_length() -> None:
    assert message_of(ValueError("two\nlines")) == "two lines"
    assert message_of(ValueError()) == "no message"
    assert len(message_of(ValueError("x" * 10**6))) == 160
