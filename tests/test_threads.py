"""How many threads commands compute with, as a model sees it from inside its forward."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import robbench
from robbench.cli.app import main
from robbench.core import threads
from robbench.core.resources import sha256_file
from robbench.core.threads import VARIABLES, multiply_adds, thread_rule, threads_for
from robbench.models.zoo import read_entry

BEFORE = 3  # what PyTorch is set to when a command starts; no rule would choose it
SPY = """
from pathlib import Path
import torch
from torch import nn
{at_import}

class Spy(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        with Path({log!r}).open("a") as log:
            print(torch.get_num_threads(), file=log)
        return self.head(x.flatten(1))
"""


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process that nobody has told how many threads to use, and PyTorch's own number is `BEFORE`."""
    before = torch.get_num_threads()
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(BEFORE)
    yield
    assert torch.get_num_threads() == BEFORE, "what a command sets, it sets back"
    torch.set_num_threads(before)


def spy(folder: Path, at_import: str = "") -> Path:
    """A folder with a linear model on digits that writes down the number of threads at each forward."""
    folder.mkdir()
    module = (
        f"spy_{hashlib.sha256(str(folder).encode()).hexdigest()[:8]}"  # Python loads a module of a name once
    )
    (folder / f"{module}.py").write_text(SPY.format(log=str(folder / "log"), at_import=at_import))
    torch.save({"head.weight": torch.randn(10, 64), "head.bias": torch.zeros(10)}, folder / "weights.pt")
    card = {
        "name": "spy",
        "kind": "classifier",
        "description": "writes down the number of threads",
        "dataset": "digits",
        "defense": "standard",
        "architecture": {"name": f"{module}:Spy"},
        "input_shape": [1, 8, 8],
        "classes": 10,
        "weights": {
            "file": "weights.pt",
            "format": "state-dict",
            "sha256": sha256_file(folder / "weights.pt"),
        },
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    return folder


def seen(folder: Path, *options: str) -> int:
    """The number of threads at the last forward of an attack."""
    arguments = ["run", "--model", str(folder), "--attacks", "pgd10", "--n", "4", "--device", "cpu"]
    result = CliRunner().invoke(main, [*arguments, *options, "--out", str(folder / "run")])
    assert result.exit_code == 0, result.output
    return int((folder / "log").read_text().split()[-1])


def test_a_small_network_is_computed_in_one_thread(tmp_path: Path) -> None:
    assert seen(spy(tmp_path / "spy")) == 1


def test_a_large_network_is_computed_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "LARGE", 640)
    assert seen(spy(tmp_path / "spy")) == BEFORE


def test_the_option_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert seen(spy(tmp_path / "spy"), "--threads", "2") == 2


@pytest.mark.parametrize("name", VARIABLES)
def test_the_environment_is_respected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, f"{BEFORE}")
    assert seen(spy(tmp_path / "spy")) == BEFORE


def test_what_a_model_sets_is_respected(tmp_path: Path) -> None:
    assert seen(spy(tmp_path / "spy", "torch.set_num_threads(2)")) == 2


@pytest.mark.parametrize(("options", "expected"), [((), "1"), (("--threads", "2"), "2")])
def test_training_records_its_threads(tmp_path: Path, options: tuple[str, ...], expected: str) -> None:
    arguments = ["train", "--defense", "standard", "--epochs", "1", "--train-samples", "64", "--name", "t"]
    result = CliRunner().invoke(main, [*arguments, *options, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    training = read_entry(tmp_path / "t").card.training
    assert training is not None
    assert training.versions["threads"] == expected


def test_from_python_nothing_changes(classifier: nn.Module, images: tuple[torch.Tensor, ...]) -> None:
    counts = []
    hook = classifier.register_forward_hook(lambda *_: counts.append(torch.get_num_threads()))
    _, x, y = images
    try:
        robbench.evaluate(classifier, x[:4], y[:4], ["fgsm"], dataset="digits")
    finally:
        hook.remove()
    assert set(counts) == {BEFORE}


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--threads", "0"], "--threads"), (["--threads", "2", "--backend", "ray"], "one CPU thread each")],
)
def test_refusals(tmp_path: Path, options: list[str], words: str) -> None:
    arguments = ["run", "--model", "digits-at", "--attacks", "pgd10", *options]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "run")])
    assert (result.exit_code, len(result.output.splitlines())) == (2, 1)
    assert words in result.output


# ----------------------------------------------------------------------------------------------------- the arithmetic
def test_without_a_rule_nothing_is_counted() -> None:
    with threads_for(lambda: pytest.fail("counted")):
        assert torch.get_num_threads() == BEFORE


def test_an_error_inside_restores_the_number() -> None:
    def fail() -> None:
        with thread_rule(), threads_for(lambda: threads.LARGE):
            assert torch.get_num_threads() == BEFORE
            raise KeyError

    with pytest.raises(KeyError):
        fail()


@settings()
@given(
    n=st.integers(1, 3),
    channels=st.integers(1, 4),
    out=st.integers(1, 5),
    side=st.integers(1, 3),
    stride=st.integers(1, 2),
    grouped=st.booleans(),
)
def test_a_convolution_by_hand(
    n: int, channels: int, out: int, side: int, stride: int, grouped: bool
) -> None:
    groups = channels if grouped else 1
    conv = nn.Conv2d(channels, out * groups, side, stride=stride, groups=groups)
    x = torch.zeros(n, channels, 7, 6)
    rows, columns = ((size - side) // stride + 1 for size in (7, 6))
    expected = n * out * groups * rows * columns * side * side * channels / groups
    assert multiply_adds(lambda: conv(x)) == expected


@settings()
@given(m=st.integers(1, 4), k=st.integers(1, 5), n=st.integers(1, 6), batch=st.integers(1, 3))
def test_products_by_hand(m: int, k: int, n: int, batch: int) -> None:
    a, b, layer = torch.zeros(m, k), torch.zeros(k, n), nn.Linear(k, n)
    many, others = torch.zeros(batch, m, k), torch.zeros(batch, k, n)
    for call in (lambda: a @ b, lambda: torch.mm(a, b), lambda: layer(a), lambda: a.matmul(b)):
        assert multiply_adds(call) == m * k * n
    for call in (lambda: many @ others, lambda: torch.bmm(many, others), lambda: layer(many)):
        assert multiply_adds(call) == batch * m * k * n
    assert multiply_adds(lambda: torch.addmm(torch.zeros(n), a, b)) == m * k * n


def test_counting_changes_nothing_and_never_fails() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    assert multiply_adds(lambda: torch.rand(2, 2) @ torch.rand(2, 2)) == 8
    assert torch.equal(torch.get_rng_state(), state)
    assert multiply_adds(lambda: [].pop()) == 0.0
    with pytest.raises(KeyboardInterrupt):
        multiply_adds(_interrupted)


def _interrupted() -> None:
    raise KeyboardInterrupt


def test_networks_of_the_zoo_by_torch_s_own_counter() -> None:
    """Of every architecture that the rule must tell apart."""
    from torch.utils.flop_counter import FlopCounterMode

    from robbench.models.classifiers import ARCHITECTURES

    for name, shape in (("digits-cnn", (1, 8, 8)), ("conv3", (1, 28, 28)), ("resnet18", (3, 32, 32))):
        module, x = ARCHITECTURES.get(name)(shape, 10).eval(), torch.zeros(1, *shape)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(x)
        found = multiply_adds(lambda module=module, x=x: module(x))  # type: ignore[misc]
        assert found == counter.get_total_flops() / 2
        assert (found >= threads.LARGE) == (name == "resnet18")
