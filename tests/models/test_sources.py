"""Names with a colon: code that a card names, torchvision's models and timm's."""

import hashlib
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models
import yaml
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms.functional import normalize

from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.models.code import has_scheme
from robbench.models.entry import ModelRequest, ZooEntry
from robbench.models.libraries.torchvision import OLD_DENSENET, SCHEME
from robbench.models.loading import build_architecture, load_model
from robbench.models.sources import build_named, named_model
from robbench.models.zoo import find_model, read_entry, zoo_entries

SHAPE = (1, 8, 8)
IMAGENET = ModelRequest("images", (3, 224, 224), 1000)
CODE = """
import torch
from torch import nn

class Linear(nn.Module):
    def __init__(self, classes=10, scale=1.0):
        super().__init__()
        self.layer, self.scale = nn.Linear(64, classes), scale

    def forward(self, x):
        return self.scale * self.layer(x.flatten(1))

class Pair(Linear):
    def forward(self, x):
        return super().forward(x), x

class Vector(Linear):
    def forward(self, x):
        return super().forward(x)[0]

class Crash(Linear):
    def forward(self, x):
        return self.layer(x)

class Namespace:
    @staticmethod
    def build():
        return Linear()

def text():
    return "no module"

number = 3
"""


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Empty caches, no checkpoints named; modules that a test imports from its folder are forgotten after it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("ROBBENCH_CHECKPOINTS", raising=False)
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def card_with(folder: Path, architecture: str, code: str = CODE, **changes: Any) -> ZooEntry:
    """A card of `architecture` beside `their_models.py` and weights of its linear layer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "their_models.py").write_text(code)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        layer = nn.Linear(64, 10)
    torch.save({f"layer.{name}": value for name, value in layer.state_dict().items()}, folder / "m.pt")
    card = {
        "name": "mine",
        "kind": "classifier",
        "description": "from elsewhere",
        "dataset": "digits",
        "defense": "standard",
        "architecture": {"name": architecture, "arguments": changes.pop("arguments", {})},
        "input_shape": list(SHAPE),
        "classes": 10,
        "weights": {"file": "m.pt", "sha256": digest(folder / "m.pt"), "format": "state-dict"},
        **changes,
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    return read_entry(folder)


def refused(entry: ZooEntry, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load_model(entry)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("model 'mine'", *parts):
        assert part in message, message


# ----------------------------------------------------------------------------------------------------- module:callable
def test_code_beside_a_card(tmp_path: Path) -> None:
    entry = card_with(tmp_path, "their_models:Linear", arguments={"scale": 2.0})
    x = torch.rand(3, *SHAPE)
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    expected = 2 * (x.flatten(1) @ state["layer.weight"].T + state["layer.bias"])
    torch.testing.assert_close(load_model(entry).module(x), expected)
    assert str(tmp_path) not in sys.path
    assert not load_model(entry).module.training


def test_code_of_an_installed_package_and_of_a_nested_name(tmp_path: Path) -> None:
    entry = card_with(tmp_path / "a", "their_models:Namespace.build")
    assert load_model(entry).module(torch.rand(1, *SHAPE)).shape == (1, 10)
    hub = card_with(
        tmp_path / "b", "torchvision.ops.misc:MLP", arguments={"in_channels": 64, "hidden_channels": [10]}
    )
    refused(hub, "do not fit architecture 'torchvision.ops.misc:MLP'", "layer.weight")


@pytest.mark.parametrize(
    ("architecture", "parts"),
    [
        (
            "no_such_package.nets:Net",
            ["does not import", "ModuleNotFoundError", "no_such_package.py beside the card"],
        ),
        (
            "their_models:Liner",
            ["unknown class or function of module 'their_models'", "did you mean 'Linear'?"],
        ),
        ("their_models:number", ["is a int, which cannot be called"]),
        ("their_models:text", ["returned a str, not a torch.nn.Module"]),
        ("their_models:", ["is no module:callable"]),
        (":Linear", ["is no module:callable"]),
        ("their models:Linear", ["is no module:callable"]),
        ("../their_models:Linear", ["is no module:callable"]),
        ("their_models:Pair", ["returns a tuple, not a tensor of logits"]),
        ("their_models:Vector", ["returns shape [10] for two images, not [2,10]"]),
        ("their_models:Crash", ["fails on images (1, 8, 8)", "RuntimeError"]),
        ("timm:", ["names none"]),
    ],
)
def test_code_that_gives_no_classifier(architecture: str, parts: list[str], tmp_path: Path) -> None:
    refused(card_with(tmp_path, architecture), *parts)


def test_arguments_the_code_refuses(tmp_path: Path) -> None:
    refused(
        card_with(tmp_path, "their_models:Linear", arguments={"depth": 3}), "depth=3", "TypeError", "correct"
    )


def test_wrong_number_of_outputs(tmp_path: Path) -> None:
    entry = card_with(tmp_path, "their_models:Linear", classes=7)
    refused(entry, "returns shape [2, 10] for two images, not [2,7]", "correct classes")


def test_code_that_does_not_import(tmp_path: Path) -> None:
    entry = card_with(tmp_path / "a", "their_models:Linear", code="import no_such_dependency\n")
    refused(entry, "does not import", "no_such_dependency", "install what it needs")
    refused(
        card_with(tmp_path / "b", "their_models:Linear", code="def ("), "SyntaxError", "repair that module"
    )


def test_code_that_ends_the_program(tmp_path: Path) -> None:
    """A script that parses its arguments when it is imported must not end the run as if it were done."""
    script = card_with(tmp_path / "a", "their_models:Linear", code="import sys\nsys.exit(0)\n")
    refused(script, "does not import", "SystemExit", "repair that module")
    refused(card_with(tmp_path / "b", "sys:exit"), "sys:exit() failed", "SystemExit")


def test_code_that_may_not_run_is_refused_before_its_weights_are_wanted(tmp_path: Path) -> None:
    entry = card_with(tmp_path, "their_models:Linear")
    (tmp_path / entry.card.weights.file).unlink()
    refused(replace(entry, trusted=False), "is code, which runs only from a card that you name")


def test_two_cards_with_files_of_one_name(tmp_path: Path) -> None:
    load_model(card_with(tmp_path / "a", "their_models:Linear"))
    refused(
        card_with(tmp_path / "b", "their_models:Linear"), "is loaded already from", "rename one of the files"
    )


def test_code_runs_only_for_a_card_the_user_names(tmp_path: Path) -> None:
    """A folder of models (--zoo) may be a download; its cards are listed, and run no code before one is named."""
    ran = tmp_path / "ran"
    code = f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n{CODE}"
    folder = card_with(tmp_path / "zoo" / "mine", "their_models:Linear", code=code).folder
    entry = zoo_entries(tmp_path / "zoo")["mine"]
    refused(entry, "is code", f"--model {folder / 'card.yaml'}")
    from robbench.cli.doctor import _model

    assert _model("mine", entry).state == "missing"
    for command in (("list", "models"), ("show", "mine")):
        assert CliRunner().invoke(main, [*command, "--zoo", str(tmp_path / "zoo")]).exit_code == 0
    assert not ran.exists()
    load_model(find_model(str(folder), zoo_entries()))
    assert ran.exists()


def test_a_run_of_code_beside_a_card(tmp_path: Path) -> None:
    card_with(tmp_path / "mine", "their_models:Linear")
    run = [
        "run",
        "--attacks",
        "fgsm",
        "--n",
        "5",
        "--out",
        str(tmp_path / "out"),
        "--model",
        str(tmp_path / "mine"),
    ]
    result = CliRunner().invoke(main, run)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "mine" in result.stdout


# --------------------------------------------------------------------------------------------------------- torchvision
@pytest.fixture
def squeezenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Random weights of torchvision's smallest network in torch.hub's cache, under the name its default would have."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = torchvision.models.squeezenet1_1().state_dict()
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    torch.save(state, folder / "new.pth")
    path = folder / f"squeezenet1_1-{digest(folder / 'new.pth')[:8]}.pth"
    (folder / "new.pth").rename(path)
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    monkeypatch.setattr(weights.value, "url", f"http://127.0.0.1:9/models/{path.name}")
    return path


def test_torchvision_model_is_what_torchvision_loads(squeezenet: Path) -> None:
    entry = named_model("torchvision:squeezenet1_1", IMAGENET)
    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    reference = torchvision.models.get_model("squeezenet1_1", weights=weights).eval()
    x = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(normalize(x, weights.transforms().mean, weights.transforms().std))
        torch.testing.assert_close(load_model(entry).module(x), expected)
    card = entry.card
    assert (card.name, card.dataset, card.classes) == ("torchvision-squeezenet1_1", "images", 1000)
    assert card.weights.sha256 == digest(squeezenet)
    again = ZooEntry(type(card).model_validate(card.model_dump(mode="json")), squeezenet.parent)
    assert again.card.function_hash == card.function_hash  # the card of a run folder loads again
    load_model(again)


def test_torchvision_weights_in_the_folder_of_checkpoints(squeezenet: Path, tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    squeezenet.rename(held / squeezenet.name)
    entry = named_model("torchvision:squeezenet1_1", ModelRequest("images", checkpoints=held))
    assert entry.folder == held
    load_model(entry)


def test_torchvision_refuses_a_file_whose_hash_is_not_in_its_name(squeezenet: Path) -> None:
    squeezenet.write_bytes(squeezenet.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"squeezenet1_1.*has sha256 .*delete it"):
        named_model("torchvision:squeezenet1_1", IMAGENET)


def test_torchvision_without_a_network(squeezenet: Path) -> None:
    squeezenet.unlink()
    with pytest.raises(UserError) as caught:
        named_model("torchvision:squeezenet1_1", IMAGENET)
    message = str(caught.value)
    assert "\n" not in message
    for part in (f"http://127.0.0.1:9/models/{squeezenet.name}: no connection", f"put it at {squeezenet}"):
        assert part in message
    assert list(squeezenet.parent.iterdir()) == []


@pytest.mark.parametrize(
    "requested", [ModelRequest("digits", (1, 8, 8), 10), ModelRequest("images", (3, 224, 224), 10)]
)
def test_torchvision_refuses_other_images_before_any_download(requested: ModelRequest) -> None:
    with pytest.raises(UserError) as caught:
        named_model("torchvision:resnet50", requested)
    for part in (
        "'torchvision:resnet50'",
        "(3, 224, 224) of 1000 classes",
        f"{requested.shape} of {requested.classes}",
    ):
        assert part in str(caught.value)


def test_run_refuses_a_data_set_of_other_images(tmp_path: Path) -> None:
    run = ["run", "--attacks", "fgsm", "--model", "torchvision:resnet50", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, run)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "digits has (1, 8, 8) of 10" in result.stderr


@pytest.mark.slow
def test_a_run_of_a_torchvision_model(squeezenet: Path, tmp_path: Path) -> None:
    """On a data set of its size and classes; the tables and cards of the run name it, and a second run resumes."""
    folder = tmp_path / "data"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    np.savez(folder / "test.npz", x=pixels, y=np.arange(3))
    card = {
        "name": "few",
        "class_names": [f"class {index}" for index in range(1000)],
        "layout": "NHWC",
        "splits": {"test": {"file": "test.npz", "sha256": digest(folder / "test.npz")}},
    }
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    run = [
        "run",
        "--data",
        str(folder),
        "--model",
        "torchvision:squeezenet1_1",
        "--attacks",
        "fgsm",
        "--n",
        "3",
    ]
    run += ["--epsilon", "1/255", "--out", str(tmp_path / "out")]
    for _ in range(2):
        result = CliRunner().invoke(main, run)
        assert (result.exit_code, result.stderr) == (0, "")
    assert "torchvision-squeezenet1_1" in result.stdout
    stored = yaml.safe_load((tmp_path / "out" / "cards" / "torchvision-squeezenet1_1.yaml").read_text())
    assert stored["weights"]["sha256"] == digest(squeezenet)
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 1


def test_names_of_other_libraries_that_are_none() -> None:
    with pytest.raises(UserError, match="unknown torchvision model 'resnet51'; did you mean 'resnet50'"):
        named_model("torchvision:resnet51", IMAGENET)
    with pytest.raises(UserError, match="give torchvision:NAME"):
        named_model("torchvision:", IMAGENET)
    with pytest.raises(UserError, match="in robbench run only"):
        find_model("torchvision:resnet50", zoo_entries())
    with pytest.raises(UserError, match="unknown model 'tochvision:resnet50'"):
        find_model("tochvision:resnet50", zoo_entries(), requested=IMAGENET)
    assert not has_scheme("resnet50")


def test_torchvision_architecture_of_a_card(tmp_path: Path) -> None:
    """A network for 32x32 images of 10 classes with somebody's weights, as cards describe it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.shufflenet_v2_x0_5(num_classes=10).eval()
    entry = card_with(tmp_path, "torchvision:shufflenet_v2_x0_5", input_shape=[3, 32, 32])
    torch.save(network.state_dict(), tmp_path / "m.pt")
    weights = {"file": "m.pt", "sha256": digest(tmp_path / "m.pt"), "format": "state-dict"}
    entry = card_with_weights(entry, weights)
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(load_model(entry).module(x), network(x))
    refused(
        card_with(tmp_path, "torchvision:shuflenet"),
        "unknown torchvision architecture of model 'mine', 'shuflenet'",
    )
    refused(
        card_with(tmp_path, "torchvision:shufflenet_v2_x0_5", arguments={"depth": 1}),
        "cannot be built",
        "depth=1",
    )


@pytest.mark.parametrize("argument", ["weights", "pretrained", "checkpoint_path", "num_classes"])
def test_arguments_of_a_card_load_no_weights(argument: str, tmp_path: Path) -> None:
    entry = card_with(tmp_path, "torchvision:shufflenet_v2_x0_5", arguments={argument: "DEFAULT"})
    refused(entry, f"set '{argument}'", "remove it")


def test_versions_inside_a_file_survive_its_prefix(tmp_path: Path) -> None:
    """A MNASNet file is read according to the version it records for the network, not for DataParallel around it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = torchvision.models.mnasnet0_5(num_classes=10).eval()
    entry = card_with(tmp_path, "torchvision:mnasnet0_5", input_shape=[3, 32, 32])
    torch.save(nn.DataParallel(network).state_dict(), tmp_path / "m.pt")
    weights = {
        "file": "m.pt",
        "sha256": digest(tmp_path / "m.pt"),
        "format": "state-dict",
        "prefix": "module.",
    }
    x = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(load_model(card_with_weights(entry, weights)).module(x), network(x))


def card_with_weights(entry: ZooEntry, weights: dict[str, Any]) -> ZooEntry:
    card = yaml.safe_load((entry.folder / "card.yaml").read_text()) | {"weights": weights}
    (entry.folder / "card.yaml").write_text(yaml.safe_dump(card))
    return read_entry(entry.folder)


def test_densenet_files_with_the_old_names_load_strictly(tmp_path: Path) -> None:
    """The files on torchvision's server say denselayer1.norm.1 where the modules of today say denselayer1.norm1."""
    assert SCHEME.architecture is not None
    card = card_with(tmp_path, "torchvision:densenet121", input_shape=[3, 224, 224]).card
    with torch.device("meta"):
        module = SCHEME.architecture("densenet121", card)
    state = module.state_dict()
    old = {
        name.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for name, value in state.items()
    }
    assert sum(bool(OLD_DENSENET.match(name)) for name in old) > 50
    module.load_state_dict(old, strict=True, assign=True)


@pytest.mark.parametrize("name", ["googlenet", "vit_b_32"])
def test_arguments_that_belong_to_weights(name: str) -> None:
    """What torchvision's own builder sets when it is given these weights."""
    from robbench.models.libraries.torchvision import _arguments

    weights = torchvision.models.get_model_weights(name).DEFAULT
    with torch.device("meta"):
        module = torchvision.models.get_model(name, **_arguments(name, weights.transforms().crop_size[0]))
    if name == "googlenet":
        assert module.transform_input
    else:
        assert module.image_size == weights.meta["min_size"][0]


# ------------------------------------------------------------------------------------------------------- documentation
DOCS = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BLOCKS = re.findall(
    r"^```(yaml|python)\n(.*?)^```", DOCS.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
)
CARDS = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card["name"])
def test_cards_of_the_documentation_load(card: dict[str, Any], tmp_path: Path) -> None:
    """Every card in docs/models.md, with weights saved the way it says and their sha256 in place of the zeros."""
    if card["name"] == "my-flow":
        pytest.skip("tests/models/test_flow_checks.py and its neighbours run the documented flow")
    (tmp_path / "my_models.py").write_text(next(text for language, text in BLOCKS if language == "python"))
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(card))
    entry, weights = read_entry(tmp_path), card["weights"]
    parts = (entry.card.architecture, entry.card.input_shape, entry.card.classes, None)
    module = build_named(entry) if ":" in card["architecture"]["name"] else build_architecture(*parts)
    state = {weights.get("prefix", "") + name: value for name, value in module.state_dict().items()}
    path = tmp_path / weights["file"]
    path.parent.mkdir(exist_ok=True)
    if weights.get("format") == "state-dict":
        torch.save({weights["key"]: state} if "key" in weights else state, path)
    else:
        save_file(state, path)
    loaded = load_model(card_with_weights(entry, {**weights, "sha256": digest(path)}))
    x = torch.rand(2, *card["input_shape"])
    mean, std = (card.get("preprocessing", {"mean": [0.0], "std": [1.0]})[key] for key in ("mean", "std"))
    module.eval()
    torch.testing.assert_close(loaded.module(x), module(normalize(x, mean, std)))


def test_the_documentation_shows_every_way() -> None:
    assert [card["name"] for card in CARDS] == ["my-digits", "my-cnn", "my-flow", "downloaded"]
    assert {"key", "prefix", "format"} <= CARDS[0]["weights"].keys()
    assert len(CARDS[3]["weights"]["urls"]) == 2


# ---------------------------------------------------------------------------------------------------------------- timm
def test_timm_is_optional(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs the package timm .*pip install timm"):
        named_model("timm:resnet10t", IMAGENET)
    refused(card_with(tmp_path, "timm:resnet10t"), "pip install timm")


@pytest.fixture
def timm() -> Any:
    return pytest.importorskip("timm", reason="timm is absent: pip install timm")


def test_timm_architecture_of_a_card(timm: Any, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model("resnet10t", num_classes=10, in_chans=1).eval()
    entry = card_with(tmp_path, "timm:resnet10t", input_shape=[1, 32, 32])
    torch.save(network.state_dict(), tmp_path / "m.pt")
    weights = {"file": "m.pt", "sha256": digest(tmp_path / "m.pt"), "format": "state-dict"}
    entry = card_with_weights(entry, weights)
    x = torch.rand(2, 1, 32, 32)
    torch.testing.assert_close(load_model(entry).module(x), network(x))
    refused(card_with(tmp_path, "timm:resnet10tt"), "timm has no architecture 'resnet10tt'")
    refused(card_with(tmp_path, "timm:resnet10t", arguments={"nothing": 1}), "cannot be built", "nothing=1")


def test_timm_model_is_what_timm_loads(timm: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With timm's own loading replaced by random weights: what is kept, and that it is asked for once."""
    real, asked = timm.create_model, []

    def create(name: str, pretrained: bool = False, **options: Any) -> nn.Module:
        asked.append(pretrained)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            module: nn.Module = real(name, pretrained=False, **options)
            return module

    monkeypatch.setattr(timm, "create_model", create)
    data = timm.data.resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg("resnet10t").to_dict())
    requested = ModelRequest("images", tuple(data["input_size"]), 1000)
    entry = named_model("timm:resnet10t", requested)
    x = torch.rand(1, *data["input_size"])
    with torch.no_grad():
        expected = create("resnet10t").eval()(normalize(x, data["mean"], data["std"]))
        torch.testing.assert_close(load_model(entry).module(x), expected)
    again = named_model("timm:resnet10t", requested)
    assert asked.count(True) == 1
    assert again.card == entry.card
    assert entry.folder == tmp_path / "cache" / "robbench" / "checkpoints"


def test_timm_names_and_images(timm: Any) -> None:
    with pytest.raises(UserError, match="unknown timm model 'resnet10tt'; did you mean resnet10t"):
        named_model("timm:resnet10tt", IMAGENET)
    with pytest.raises(
        UserError, match=r"resnet10t.nope': timm has no weights of that name; it has: resnet10t.c3"
    ):
        named_model("timm:resnet10t.nope", IMAGENET)
    with pytest.raises(UserError, match="was trained on images"):
        named_model("timm:resnet10t", ModelRequest("digits", SHAPE, 10))


def test_timm_without_a_network(timm: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("We couldn't connect to the hub")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(UserError) as caught:
        named_model("timm:resnet10t", ModelRequest("images"))
    file = tmp_path / "cache" / "robbench" / "checkpoints" / "timm" / "resnet10t.c3_in1k.safetensors"
    for part in ("https://huggingface.co/timm/resnet10t", "couldn't connect", str(file), "--checkpoints"):
        assert part in str(caught.value)
    assert not file.exists()
