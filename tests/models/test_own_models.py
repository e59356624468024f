"""`--model module:Class --weights FILE` and `robbench init`: what is found by itself, and what is refused."""

import json
import os
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from click.testing import CliRunner, Result
from safetensors.torch import save_file
from torch import Tensor, nn

from robbench.cli.app import main
from robbench.core.errors import UserError, python_arguments
from robbench.core.resources import sha256_file
from robbench.models.code import find_code
from robbench.models.layouts import find_layout
from robbench.models.loading import load_model
from robbench.models.zoo import find_model, read_entry

NET = """
from torch import nn

class MyNet(nn.Module):
    def __init__(self, num_classes=10, width=2):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * width, num_classes)
        )

    def forward(self, x):
        return self.body(x)

class Needy(MyNet):
    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes)

class AnySize(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(1, 10)

    def forward(self, x):
        return self.head(x.mean((2, 3)))

class Config:
    pass
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, with mynet.py and mynet.pt in it; what a test imports from it is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ROBBENCH_CHECKPOINTS", raising=False)
    (tmp_path / "mynet.py").write_text(NET)
    torch.save(state(), tmp_path / "mynet.pt")
    yield tmp_path
    forget(tmp_path)


def forget(folder: Path) -> None:
    """As a new process would: modules below `folder` are imported again."""
    for name, module in list(sys.modules.items()):
        if str(folder) in str(getattr(module, "__file__", "")):
            del sys.modules[name]


def state(seed: int = 0, width: int = 2) -> dict[str, Tensor]:
    """Weights of MyNet, by the layers it has."""
    layers = (nn.Conv2d(1, width, 3, padding=1), nn.Linear(64 * width, 10))
    generator = torch.Generator().manual_seed(seed)
    return OrderedDict(
        (f"body.{place}.{name}", torch.randn(value.shape, generator=generator) / 4)
        for place, layer in zip((0, 3), layers, strict=True)
        for name, value in layer.state_dict().items()
    )


def invoked(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def run(*options: object, attacks: str = "fgsm", dry: bool = False) -> Result:
    more = ["--dry-run"] if dry else []
    return invoked("run", "--attacks", attacks, "--n", 5, "--device", "cpu", "--out", "out", *options, *more)


def found(*options: object, model: str = "mynet:MyNet", weights: str = "mynet.pt") -> Result:
    """The model is read, tried, and its card written to cards/found.yaml, over the one that was there."""
    Path("cards/found.yaml").unlink(missing_ok=True)
    return invoked("init", model, "--weights", weights, "--out", "cards", "--name", "found", *options)


def address() -> str:
    """What the cells of the model that was `found` depend on."""
    return read_entry(Path("cards/found.yaml")).card.function_hash


def dry(*options: object, model: str = "mynet:MyNet", weights: str = "mynet.pt") -> Result:
    """Everything is loaded and tried, nothing computed."""
    return run("--model", model, "--weights", weights, *options, dry=True)


def refused(result: Result, *parts: str) -> None:
    lines = result.stderr.splitlines()
    assert (result.exit_code, "Error: " in lines[-1], result.stdout) == (2, True, ""), result.output
    for part in parts:
        assert part in lines[-1], lines[-1]
    assert not Path("out").exists()


def cells() -> dict[str, str]:
    """Model names by the addresses of the cells in the run folder."""
    found = [json.loads(path.read_text()) for path in Path("out/cells").glob("*/cell.json")]
    return {cell["hash"]: cell["model"] for cell in found}


# ----------------------------------------------------------------------------------------------- a class and weights
def test_a_class_and_its_weights_are_a_model(here: Path) -> None:
    result = run("--model", "mynet:MyNet", "--weights", "mynet.pt")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith(
        "model mynet: mynet:MyNet with mynet.pt, no normalisation but the network's own (--mean, --std), "
        "on images 1,8,8 in [0,1] of digits\n"
    )
    assert Path("out/leaderboard.html").is_file()
    card = yaml.safe_load(Path("out/cards/mynet.yaml").read_text())
    assert card["weights"]["sha256"] == sha256_file(here / "mynet.pt")
    assert card["architecture"] == {
        "name": "mynet:MyNet", "arguments": {}, "sha256": sha256_file(here / "mynet.py")
    }  # fmt: skip
    assert str(here) not in Path("out/cards/mynet.yaml").read_text()
    assert not (here / "__pycache__").exists()


def test_other_weights_source_arguments_or_scaling_are_another_function(here: Path) -> None:
    """Under one name each time; the same again is the same."""
    changes: list[tuple[Callable[[], object], tuple[str, ...]]] = [
        (lambda: None, ()),
        (lambda: None, ()),
        (lambda: torch.save(state(1), "mynet.pt"), ()),
        (lambda: Path("mynet.py").write_text(NET.replace("self.body(x)", "2 * self.body(x)")), ()),
        (lambda: None, ("--mean", "0.5", "--std", "0.25")),
        (lambda: None, ("--model-args", '{"num_classes": 10}')),
    ]
    addresses = []
    for change, more in changes:
        change()
        forget(here)
        result = found(*more)
        assert result.exit_code == 0, result.output
        addresses.append(address())
    assert addresses[0] == addresses[1]
    assert len(set(addresses)) == 5


def test_changed_weights_under_one_name_are_other_cells(here: Path) -> None:
    for seed in (0, 0, 1):
        torch.save(state(seed), "mynet.pt")
        result = run("--model", "mynet.py:MyNet", "--weights", "mynet.pt")
        assert result.exit_code == 0, result.output
    assert list(cells().values()) == ["mynet", "mynet"]


def test_a_file_that_the_class_imports_is_part_of_its_source(here: Path) -> None:
    package = here / "nets"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("from .scale import FACTOR\n")
    (package / "scale.py").write_text("FACTOR = 1\n")
    (here / "unrelated.py").write_text("")
    (package / "net.py").write_text("from nets.parts import FACTOR\nimport torch\n" + NET)
    before = find_code("nets.net:MyNet").sha256
    (here / "unrelated.py").write_text("changed = 1\n")
    assert find_code("nets.net:MyNet").sha256 == before
    (package / "scale.py").write_text("FACTOR = 2\n")
    assert find_code("nets.net:MyNet").sha256 != before
    assert found(model="nets.net:MyNet").exit_code == 0


def test_code_of_an_installed_package_has_the_source_of_that_package_alone() -> None:
    code = find_code("yaml.nodes:Node")
    assert code.file is not None
    assert code.file.name == "nodes.py"
    assert code.sha256 is not None
    assert find_code("sys:exit").sha256 is None


def test_one_class_with_several_weights_and_two_classes(here: Path) -> None:
    torch.save(state(1), "later.pt")
    result = run("--model", "mynet:MyNet", "--weights", "mynet.pt", "--weights", "later.pt")
    assert result.exit_code == 0, result.output
    assert set(cells().values()) == {"mynet", "MyNet-later"}
    (here / "other.py").write_text(NET)
    two = ("--model", "mynet:MyNet,other:MyNet", "--weights", "mynet.pt", "--weights", "later.pt")
    assert run(*two, dry=True).exit_code == 0
    forget(here)
    both = run("--model", "mynet:MyNet,digits-at", "--weights", "mynet.pt", dry=True)
    assert both.exit_code == 0
    assert "digits-at" in both.stdout


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--model", "mynet:MyNet"), ["names a class without its weights", "--weights FILE"]),
        (("--model", "mynet.py"), ["Python code", "MyNet, Needy, AnySize", "--model mynet.py:CLASS"]),
        (("--model", "mynet.pt"), ["without the network", "--model module:Class --weights mynet.pt"]),
        (("--model", "mynet.pth"), ["no file or folder; near it: mynet.pt, mynet.py"]),
        (("--model", "nets/mynet.yaml"), ["no file or folder"]),
        (("--model", "tochvision:resnet50"), ["unknown model", "did you mean 'torchvision:resnet50'"]),
        (("--model", "digits-at", "--weights", "mynet.pt"), ["--model module:Class"]),
        (("--model", "digits-at", "--mean", "0.5", "--std", "1"), ["--mean", "--model module:Class"]),
        (("--model", "mynet:MyNet,mynet:Needy", "--weights", "mynet.pt"), ["2 classes and 1 weights"]),
    ],
)
def test_what_a_model_is_missing_is_said(options: tuple[str, ...], parts: list[str]) -> None:
    refused(run(*options), *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"model": "mynett:MyNet"}, ["does not import", "put mynett.py"]),
        ({"model": "mynett.py:MyNet"}, ["near it: mynet.py"]),
        ({"model": "mynet:MyNett"}, ["unknown class or function", "did you mean 'MyNet'"]),
        ({"model": "mynet:Config"}, ["no torch.nn.Module; name one that is: MyNet, Needy, AnySize"]),
        (
            {"model": "mynet:Needy"},
            ["needs num_classes, in_channels", """--model-args '{"num_classes": 10, "in_channels": 1}'"""],
        ),
        (
            {"model": "mynet:AnySize"},
            ["do not fit", "2 missing (head.weight, head.bias)", "4 unexpected (body.0.weight"],
        ),
        ({"weights": "mynet.tp"}, ["is no file; near it: mynet.pt"]),
        ({"weights": "."}, ["is a folder; it holds: mynet.pt, mynet.py"]),
    ],
)
def test_a_class_or_file_that_is_none(options: dict[str, str], parts: list[str]) -> None:
    refused(dry(**options), *parts)


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        (("--model-args", "width"), ["no JSON object", """'{"num_classes": 10}'"""]),
        (("--model-args", '{"depth": 3}'), ["MyNet(depth=3) failed", "--model-args"]),
        (("--model-args", '{"width": 3}'), ["size mismatches", "[2, 1, 3, 3] in the file", "--model-args"]),
        (("--model-args", '{"num_classes": 7}'), ["size mismatches"]),
        (("--mean", "0.5"), ["--mean and --std belong together"]),
        (("--mean", "x", "--std", "1"), ["--mean 'x' is no list of numbers"]),
        (("--mean", "0", "--std", "0"), ["give numbers above 0"]),
        (("--mean", "0,0,0", "--std", "1,1,1"), ["3 means for 1 channels"]),
        (("--weights-key", "ema"), ["no state dict under 'ema'"]),
        (("--dataset", "cifar10"), ["on images 3,32,32 of cifar10 fails", "it fits digits"]),
    ],
)
def test_options_that_do_not_fit(more: tuple[str, ...], parts: list[str]) -> None:
    refused(dry(*more), *parts)


def test_a_network_for_images_of_any_size_is_not_guessed_at(here: Path) -> None:
    torch.save(nn.Sequential(OrderedDict(head=nn.Linear(1, 10))).state_dict(), "any.pt")
    result = dry(model="mynet:AnySize", weights="any.pt")
    refused(result, "the images of digits, fashionmnist and mnist alike", "--dataset digits")
    assert found("--dataset", "digits", model="mynet:AnySize", weights="any.pt").exit_code == 0


# ------------------------------------------------------------------------------------------------------ hostile code
@pytest.mark.parametrize(
    ("name", "code", "parts"),
    [
        ("raises", "raise ValueError('no luck')", ["does not import (ValueError: no luck)"]),
        ("exits", "import sys; sys.exit(0)", ["does not import (SystemExit: 0)"]),
        ("broken", "class MyNet(", ["does not import (SyntaxError"]),
        ("random", NET, ["random is a module of Python itself; rename the file"]),
        ("robbench", NET, ["a module 'robbench' is loaded already from", "rename one"]),
        ("torch", NET, ["a module 'torch' is loaded already from"]),
        ("quits", "def MyNet(): raise SystemExit(0)", ["MyNet() failed (SystemExit: 0)"]),
        ("numbers_only", "MyNet = 3", ["is a int, which cannot be called"]),
        ("text", "def MyNet(): return 'x'", ["returned a str, not a torch.nn.Module"]),
    ],
)
def test_code_that_is_no_network(name: str, code: str, parts: list[str], here: Path) -> None:
    (here / f"{name}.py").write_text(code)
    refused(dry(model=f"{name}:MyNet"), *parts)


def test_what_code_prints_is_not_output(here: Path) -> None:
    (here / "loud.py").write_text(
        "print('hello')\n" + NET.replace("super().__init__()", "super().__init__(); print('hi')")
    )
    result = found(model="loud:MyNet")
    assert result.exit_code == 0, result.output
    assert "hello" in result.stderr
    assert "hi\n" in result.stderr
    assert "hello" not in result.stdout
    assert "hi\n" not in result.stdout


def _directory(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("write", "parts"),
    [
        (lambda path: path.write_text("no weights\n" * 9), ["is not a checkpoint that torch.save wrote"]),
        (lambda path: path.write_bytes(b""), ["is not a checkpoint that torch.save wrote"]),
        (lambda path: path.write_bytes(b"PK\5\6" + bytes(18)), ["is not a checkpoint that torch.save wrote"]),
        (_directory, ["is a folder"]),
        (
            lambda path: torch.save(nn.Linear(2, 2), path),
            ["more than tensors", "weights_only=False", "'weights.pt'"],
        ),
        (lambda path: torch.save(state(width=3), path), ["size mismatches"]),
        (lambda path: torch.save({"epoch": 3}, path), ["no state dict (it is a dict of epoch)"]),
        (lambda path: torch.save([1.0], path), ["it is a list"]),
        (
            lambda path: torch.save({"state_dict": state(), "args": SimpleNamespace(lr=1)}, path),
            ["SimpleNamespace", "c['state_dict']"],
        ),
    ],
    ids=["text", "empty", "zip", "folder", "module", "other class", "no weights", "list", "options"],
)
def test_files_that_hold_no_weights_of_the_class(
    write: Callable[[Path], object], parts: list[str], here: Path
) -> None:
    write(here / "bad.pt")
    refused(dry(weights="bad.pt"), "bad.pt" if "size" not in parts[0] else "MyNet-bad", *parts)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # deprecated, but such files are around
def test_torchscript_is_named(here: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), here / "script.pt")
    refused(dry(weights="script.pt"), "TorchScript", "torch.jit.load('script.pt').state_dict()")


# ---------------------------------------------------------------------------------------------------- checkpoints
def wrapped(prefix: str, seed: int = 0) -> dict[str, Tensor]:
    return {f"{prefix}{name}": value for name, value in state(seed).items()}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (state(), "mynet.pt,"),
        ({"state_dict": state()}, "(entry state_dict),"),
        ({"state_dict": [OrderedDict(state())], "epoch": 3}, "(entry state_dict.0),"),
        (
            {"model": state(), "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}},
            "(entry model),",
        ),
        ({"net": wrapped("module."), "acc": 0.9}, "(entry net, names without 'module.'),"),
        (wrapped("_orig_mod.module."), "(names without '_orig_mod.module.'),"),
        ({"model_ema": state()}, "(entry model_ema, an average of weights),"),
        (
            {
                "state_dict": wrapped("model."),
                "hyper_parameters": {"lr": 0.1},
                "pytorch-lightning_version": "2",
            },
            "(entry state_dict, names without 'model.'),",
        ),
        ({"model": state(), "ema": {"decay": 0.9, "shadow": state()}}, "(entry model),"),
    ],
)
def test_checkpoints_as_people_have_them(content: object, said: str, here: Path) -> None:
    torch.save(content, here / "mynet.pt")
    result = found()
    assert result.exit_code == 0, result.output
    assert f"mynet:MyNet with mynet.pt {said}".replace("mynet.pt mynet.pt,", "mynet.pt,") in result.stderr


def test_safetensors(here: Path) -> None:
    save_file(wrapped("net."), here / "mynet.safetensors")
    result = found(weights="mynet.safetensors")
    assert result.exit_code == 0, result.output
    assert "names without 'net.'" in result.stderr


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"state_dict": state(), "state_dict_ema": state(1)}, ["state_dict", "state_dict_ema"]),
        ({"model": wrapped("module."), "model_ema": state(1), "epoch": 1}, ["model", "model_ema"]),
        ({"model": state(), "ema": {"shadow": state(1)}}, ["model", "ema.shadow"]),
    ],
)
def test_weights_and_their_average_are_not_chosen_between(
    content: object, keys: list[str], here: Path
) -> None:
    torch.save(content, here / "mynet.pt")
    refused(dry(), " and ".join(keys), " or ".join(f"--weights-key {key}" for key in keys))
    loaded = []
    for key in keys:
        result = invoked("init", "mynet:MyNet", "--weights", "mynet.pt", "--weights-key", key, "--name", key)
        assert result.exit_code == 0, result.output
        assert f"entry {key}" in result.stderr
        loaded.append(read_entry(here / f"{key}.yaml").card)
    assert [card.weights.key for card in loaded] == keys
    assert loaded[0].function_hash != loaded[1].function_hash


def test_a_name_more_than_the_network_has_is_never_dropped() -> None:
    module = nn.Linear(2, 2)
    averaged = {"n_averaged": torch.tensor(3)} | {f"module.{n}": v for n, v in module.state_dict().items()}
    layout = find_layout({"net": averaged}, module, None, "file")
    assert layout.key == "net"
    (Path("mynet.py")).write_text(NET)
    torch.save({"n_averaged": torch.tensor(3)} | wrapped("module."), "mynet.pt")
    refused(dry(), "4 missing", "5 unexpected (n_averaged, ")


# ------------------------------------------------------------------------------------------------------------ cards
def test_init_writes_a_card_that_runs_from_anywhere(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("--model", "mynet:MyNet", "--weights", "mynet.pt").exit_code == 0
    result = invoked("init", "mynet:MyNet", "--weights", "mynet.pt", "--out", "cards", "--name", "ours")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        f"CARD {here / 'cards' / 'ours.yaml'}",
        "Use it: robbench run --model cards/ours.yaml --attacks pgd20,aa",
    ]
    card = yaml.safe_load((here / "cards" / "ours.yaml").read_text())
    assert card["architecture"]["name"] == "../mynet.py:MyNet"
    assert card["weights"]["file"] == "../mynet.pt"
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    forget(here)
    result = run("--model", here / "cards" / "ours.yaml")
    assert result.exit_code == 0, result.output
    shown = invoked("show", here / "cards" / "ours.yaml")
    assert shown.exit_code == 0
    assert "name: ours" in shown.stdout
    monkeypatch.chdir(here)
    assert set(cells()) == {
        json.loads(p.read_text())["hash"] for p in Path("elsewhere/out/cells").glob("*/cell.json")
    }


def test_init_overwrites_nothing(here: Path) -> None:
    init = ("init", "mynet:MyNet", "--weights", "mynet.pt")
    assert invoked(*init).exit_code == 0
    assert invoked(*init).exit_code == 0  # it says the same
    before = Path("mynet.yaml").read_text()
    torch.save(state(1), "mynet.pt")
    refused(invoked(*init), "mynet.yaml exists and says something else")
    assert Path("mynet.yaml").read_text() == before
    refused(invoked(*init, "--name", "../evil"), "--name '../evil' is no name of a model")
    refused(invoked("init", "mynet:MyNet"), "--weights FILE")
    refused(invoked("init", "mynet", "--weights", "mynet.pt"), "give module:Class")
    assert sorted(os.listdir()) == ["mynet.pt", "mynet.py", "mynet.yaml"]


def test_a_card_is_held_to_its_weights_and_source_and_shows_the_right_hashes(here: Path) -> None:
    assert invoked("init", "mynet:MyNet", "--weights", "mynet.pt").exit_code == 0
    card, path = yaml.safe_load(Path("mynet.yaml").read_text()), here / "mynet.py"
    path.write_text(NET.replace("self.body(x)", "self.body(x) / 2"))
    forget(here)
    refused(
        run("--model", "mynet.yaml"), "is not the one that its card pins", f"`sha256: {sha256_file(path)}`"
    )
    path.write_text(NET)
    torch.save(state(1), "mynet.pt")
    right = f"`sha256: {sha256_file(here / 'mynet.pt')}`"
    refused(run("--model", "mynet.yaml"), "has sha256", right)
    for wrong in ({}, {"sha256": "abc"}, {"sha256": ""}):
        weights = {key: value for key, value in card["weights"].items() if key != "sha256"} | wrong
        Path("mynet.yaml").write_text(yaml.safe_dump({**card, "weights": weights}))
        refused(run("--model", "mynet.yaml"), "key weights.sha256", right)


def test_the_address_of_code_that_a_card_does_not_pin_depends_on_it_too(here: Path) -> None:
    assert found().exit_code == 0
    path, pinned = here / "cards" / "found.yaml", address()
    card = yaml.safe_load(path.read_text())
    del card["architecture"]["sha256"]
    path.write_text(yaml.safe_dump(card))
    of_card = find_model(str(path), {}).card
    assert of_card.function_hash == pinned
    (here / "mynet.py").write_text(NET.replace("self.body(x)", "self.body(x) / 2"))
    assert find_model(str(path), {}).card.function_hash != pinned
    assert "sha256" not in read_entry(path).card.architecture.model_dump()


def test_a_key_does_not_need_its_format(here: Path) -> None:
    torch.save({"net": state()}, "mynet.pt")
    assert invoked("init", "mynet:MyNet", "--weights", "mynet.pt").exit_code == 0
    card = yaml.safe_load(Path("mynet.yaml").read_text())
    del card["weights"]["format"]
    Path("mynet.yaml").write_text(yaml.safe_dump(card))
    load_model(read_entry(here / "mynet.yaml"))


# ------------------------------------------------------------------------------------------------------------ names
def test_the_data_set_is_that_of_the_cards(here: Path) -> None:
    several = run("--model", "digits-at,trades-mnist")
    refused(several, "2 data sets: digits (digits-at), mnist (trades-mnist)")
    missing = run("--model", "trades-mnist")
    assert "mnist" in missing.stderr.splitlines()[0], missing.output


def test_names_as_people_type_them(here: Path) -> None:
    result = run("--model", "digits_AT", attacks="PGD-20,natural", dry=True)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines() == [
        "clean accuracy is a column of every table and needs no attack; natural is left out",
        "--attacks PGD-20 is pgd20 here",
        "--model digits_AT is digits-at here",
    ]
    refused(run("--model", "digits-at", attacks="clean"), "--attacks clean", "needs no attack")
    shown = invoked("show", "CIFAR-10")
    assert (shown.exit_code, shown.stderr) == (0, "show CIFAR-10 is cifar10 here\n")


@pytest.mark.parametrize("written", ["PGD-20", "pgd_20", "PGD20", "pgd20-linf", "Pgd 20"])
def test_spellings_of_an_attack(written: str) -> None:
    from robbench.specs import attack_name, threat_models

    assert attack_name(written, threat_models()) == "pgd20"


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("autoattack", "aa"), ("AutoAttack", "aa"), ("AA", "aa"), ("auto_attack-l2", "aa-l2"), ("fgsm_linf", "fgsm"),
        ("square-attack", "square"), ("MI-FGSM", "mim"), ("APGD_CE", "apgd-ce"), ("corruptions", "corruptions"),
        ("cw", "cw-l2"), ("Carlini-Wagner", "cw-l2"), ("DDN", "ddn-l2"), ("L2-DeepFool", "deepfool-l2"),
    ],
)  # fmt: skip
def test_other_names_of_attacks(written: str, found: str) -> None:
    from robbench.specs import attack_name, threat_models

    assert attack_name(written, threat_models()) == found


@pytest.mark.parametrize(
    ("written", "suggested"),
    [
        ("pgd", "did you mean 'pgd10', 'pgd20' or 'pgd50'?"),
        ("deepfool", "did you mean 'deepfool-l2'?"),
        ("FMN", "did you mean 'fmn-l2'?"),
        ("AA+", "unknown attack 'AA+'; did you mean 'aa'"),
        ("xyzzy", "unknown attack 'xyzzy'; robbench list attacks has all"),
    ],
)
def test_names_of_no_attack(written: str, suggested: str) -> None:
    from robbench.specs import attack_name, threat_models

    with pytest.raises(UserError) as caught:
        attack_name(written, threat_models())
    assert suggested in str(caught.value)
    assert str(caught.value).count("'") <= 8


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("PGD-20", "pgd20"), ("autoattack@8/255", "aa@8/255"), ("fgsm_linf", "fgsm"), ("natural", "clean"),
        ("Worst Case", "worst-case"), ("aa@0.1", "aa@0.1"),
    ],
)  # fmt: skip
def test_names_of_a_runs_columns_are_read_as_those_of_attacks(written: str, found: str) -> None:
    from robbench.specs import attack_among

    columns = ("pgd20", "aa@8/255", "aa@0.1", "aa@01", "fgsm", "clean", "worst-case")
    assert attack_among(written, columns) == found


@pytest.mark.parametrize("written", ["aa", "aa@0.10", "aa@1.0", "pgd20@8/255", "aa@"])
def test_a_budget_is_never_taken_for_another(written: str) -> None:
    from robbench.specs import attack_among

    with pytest.raises(UserError, match="unknown attack of the run"):
        attack_among(written, ("pgd20", "aa@10", "aa@0.1"), "attack of the run")


def test_names_as_people_type_them_from_python() -> None:
    from robbench.evaluation.request import resolve_attacks

    with python_arguments():
        found = resolve_attacks("clean,PGD-20,fgsm_linf,corruptions", "cifar10", None, None)
        with pytest.raises(UserError, match="attacks=clean: clean accuracy is a column of every table"):
            resolve_attacks(["clean"], "digits", None, None)
        with pytest.raises(UserError, match="did you mean 'deepfool-l2'"):
            resolve_attacks("deepfool", "digits", None, None)
        assert [spec.name for spec in resolve_attacks("cw", "digits", None, None)] == ["cw-l2"]
    assert [spec.name for spec in found[:2]] == ["pgd20", "fgsm"]
    assert len(found) > 70
