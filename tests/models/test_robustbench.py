"""RobustBench's models: its own classes built directly, and its own loader, give the same logits; what is refused."""

import copy
import json
import subprocess
import sys
from collections import OrderedDict
from importlib.util import find_spec

import pytest
import torch
import yaml
from torch import nn

from robbench.core.errors import UserError
from robbench.core.resources import sha256_file
from robbench.models.entry import ModelRequest
from robbench.models.libraries import robustbench as bridge
from robbench.models.libraries import robustbench_package as importing
from robbench.models.loading import load_model
from robbench.models.sources import named_model
from robbench.models.zoo import read_entry

FAST = "cifar10/Linf/Wong2020Fast"
CONSTANTS = ("mu", "sigma")


@pytest.fixture(scope="module")
def package():
    if importing.providers() != {"robustbench"}:
        pytest.skip(
            "pip install 'robbench[robustbench]', without torchattacks, which brings a copy of its own"
        )
    return importing.import_robustbench("the test")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache of downloads, empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ROBBENCH_CHECKPOINTS", raising=False)
    return tmp_path / "cache" / "robbench" / "checkpoints"


@pytest.fixture
def small(package, monkeypatch):
    """Puts a network of 0.08 M parameters in the place of a published one, under its name; returns such a network."""
    from robustbench.model_zoo.architectures.wide_resnet import WideResNet

    class Normalised(WideResNet):
        def __init__(self):
            super().__init__(depth=10, widen_factor=1)
            self.register_buffer("mu", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
            self.register_buffer("sigma", torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1))

        def forward(self, x):
            return super().forward((x - self.mu) / self.sigma)

    def replace(qualified, build=Normalised):
        monkeypatch.setitem(record_of(package, qualified), "model", build)
        return random_network(build)

    return replace


def record_of(package, qualified):
    return next(m.record for m in bridge.published_models(package) if m.qualified == qualified)


def random_network(build, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = build().eval()
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.uniform_(-0.1, 0.1)
                layer.running_var.uniform_(0.5, 1.5)
    return network


def learned(network, prefix="", keep=False):
    """A state dict as it was published: without the constants that RobustBench's classes set themselves, or with."""
    kept = ((name, value) for name, value in network.state_dict().items() if keep or name not in CONSTANTS)
    return OrderedDict((prefix + name, value) for name, value in kept)


def save(folder, qualified, content):
    path = folder / "models" / f"{qualified}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def load(qualified, folder, dataset="cifar10"):
    return load_model(named_model(f"robustbench:{qualified}", requested(dataset, checkpoints=folder))).module


def requested(dataset="cifar10", shape=(3, 32, 32), classes=10, checkpoints=None):
    return ModelRequest(dataset, shape, classes, checkpoints)


def images(n=3):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def same(one, other):
    with torch.no_grad():
        torch.testing.assert_close(one(images()), other(images()), rtol=1e-5, atol=1e-5)


def refusal(act, *arguments):
    with pytest.raises(UserError) as caught:
        act(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ----------------------------------------------------------------------------------------------------- the package
def test_importing_it_leaves_no_stand_in_behind(package):
    for name in ("autoattack", "autoattack.state", "pkg_resources"):
        assert name not in sys.modules or find_spec(name.partition(".")[0]) is not None
    find = package.loaders.pkg_resources.resource_filename
    with open(find("robustbench.loaders", "helper_files/imagenet_class_to_id_map.json")) as stream:
        assert len(json.load(stream)) == 1000


def test_absent_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importing, "_importable", lambda name: False)
    message = refusal(named_model, f"robustbench:{FAST}", requested())
    assert message.startswith(f"--model 'robustbench:{FAST}' needs the package robustbench")
    assert "pip install 'robbench[robustbench]'" in message


def test_a_copy_that_another_package_brings_is_refused(monkeypatch):
    monkeypatch.setattr(importing, "_importable", lambda name: True)
    monkeypatch.setattr(importing, "providers", lambda: {"torchattacks", "robustbench"})
    message = refusal(named_model, f"robustbench:{FAST}", requested())
    assert "torchattacks has put an altered copy" in message
    assert "pip uninstall torchattacks robustbench, then pip install 'robbench[robustbench]'" in message


def test_a_package_that_does_not_import_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "robustbench").mkdir()
    (tmp_path / "robustbench" / "__init__.py").write_text("import autoattack\nimport a_thing\n")
    for name in [name for name in sys.modules if name.partition(".")[0] == "robustbench"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(importing, "providers", set)
    message = refusal(named_model, f"robustbench:{FAST}", requested())
    assert "does not import (ModuleNotFoundError: No module named 'a_thing')" in message
    assert "autoattack" not in sys.modules or find_spec("autoattack") is not None
    monkeypatch.delitem(sys.modules, "robustbench", raising=False)


# ------------------------------------------------------------------------------------------------------ same logits
def test_same_logits_as_its_own_class(package, tmp_path):
    network = random_network(record_of(package, FAST)["model"])
    path = save(tmp_path, FAST, learned(network))
    entry = named_model("robustbench:cifar10/Linf/Wong2020Fast", requested(checkpoints=tmp_path))
    assert entry.card.weights.sha256 == sha256_file(path)
    assert (entry.card.input_shape, entry.card.classes) == ((3, 32, 32), 10)
    module = load_model(entry).module
    assert type(module).__name__ == "Wong2020FastNet"
    same(module, network)
    same(copy.deepcopy(module), network)
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_it_unpickles_in_a_process_that_has_not_imported_robustbench(package, tmp_path):
    network = random_network(record_of(package, "cifar10/L2/Rice2020Overfitting")["model"])
    save(tmp_path, "cifar10/L2/Rice2020Overfitting", learned(network))
    torch.save(load("cifar10/L2/Rice2020Overfitting", tmp_path), tmp_path / "module.pt")
    torch.save(images(), tmp_path / "images.pt")
    code = (
        "import torch; module, x = (torch.load(f, weights_only=False) for f in ('module.pt', 'images.pt')); "
        "torch.save(module(x).detach(), 'logits.pt')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.load(tmp_path / "logits.pt"), network(images()), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(
    ("qualified", "published", "key"),
    [
        ("cifar10/Linf/Wong2020Fast", lambda n: learned(n), None),
        (
            "cifar10/Linf/Carmon2019Unlabeled",
            lambda n: {"state_dict": learned(n, "module.", keep=True), "epoch": 9},
            "state_dict",
        ),
        ("cifar10/Linf/Chen2020Efficient", lambda n: {"state_dict": learned(n, "model.")}, "state_dict"),
        ("cifar10/Linf/Andriushchenko2020Understanding", lambda n: {"last": learned(n), "best": {}}, "last"),
        ("cifar10/corruptions/Kireev2021Effectiveness_RLAT", lambda n: {"last": learned(n)}, "last"),
        (
            "cifar10/corruptions/Diffenderfer2021Winning_LRR",
            lambda n: {**learned(n, "module."), "module.conv1.scores": torch.ones(2)},
            None,
        ),
        ("cifar10/L2/Augustin2020Adversarial", lambda n: n.state_dict(), None),
    ],
)
def test_same_logits_as_its_own_loader(package, small, tmp_path, qualified, published, key):
    network = small(qualified)
    save(tmp_path, qualified, published(network))
    entry = named_model(f"robustbench:{qualified}", requested(checkpoints=tmp_path))
    assert entry.card.weights.key == key
    module = load_model(entry).module
    same(module, network)
    _, threat, name = qualified.split("/")
    same(module, package.utils.load_model(name, tmp_path / "models", "cifar10", threat))


def test_a_network_behind_a_normalisation_layer(package, small, tmp_path):
    from robustbench.model_zoo.architectures.utils_architectures import normalize_model
    from robustbench.model_zoo.architectures.wide_resnet import WideResNet

    qualified = "imagenet/Linf/Salman2020Do_R18"
    network = small(
        qualified, lambda: normalize_model(WideResNet(10, widen_factor=1), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    )
    save(tmp_path, qualified, {"state_dict": learned(network.model, "module.")})
    entry = named_model(f"robustbench:{qualified}", ModelRequest("imagenet", None, None, tmp_path))
    assert (entry.card.input_shape, entry.card.classes) == ((3, 224, 224), 1000)
    module = bridge.architecture(qualified, entry.card)
    content = torch.load(tmp_path / "models" / f"{qualified}.pt", weights_only=True)
    module.load_state_dict(content["state_dict"], strict=True)
    same(module.eval(), network)
    same(module, package.utils.load_model("Salman2020Do_R18", tmp_path / "models", "imagenet"))


def test_an_ensemble_of_several_files(package, small, tmp_path):
    from robustbench.model_zoo.architectures.wide_resnet import WideResNet

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.models = nn.ModuleList(WideResNet(10, widen_factor=1) for _ in range(3))

        def forward(self, x):
            return sum(model(x).softmax(1) for model in self.models) / 3

    qualified = "cifar10/Linf/Chen2020Adversarial"
    network = small(qualified, Both)
    for number, member in enumerate(network.models):
        path = save(tmp_path, qualified, {"state_dict": member.state_dict()})
        path.rename(path.with_name(f"{path.name}_m{number}.pt"))
    entry = named_model(f"robustbench:{qualified}", requested(checkpoints=tmp_path))
    same(load_model(entry).module, network)
    changed = path.with_name(f"{path.name}_m2.pt")
    torch.save({"state_dict": network.models[0].state_dict()}, changed)
    other = named_model(f"robustbench:{qualified}", requested(checkpoints=tmp_path))
    assert other.card.weights.sha256 != entry.card.weights.sha256
    changed.write_bytes(changed.read_bytes()[:1000])
    assert "is not a checkpoint" in refusal(load, qualified, tmp_path)


def test_a_model_that_timm_keeps(package, tmp_path):
    import timm

    qualified = "cifar10/Linf/Debenedetti2022Light_XCiT-S12"
    network = random_network(
        lambda: timm.create_model("debenedetti2022light_xcit_s12_cifar10_linf", num_classes=10)
    )
    save(tmp_path, qualified, {"model": network.model.state_dict()})
    same(load(qualified, tmp_path), network)


# ------------------------------------------------------------------------------------------------------ a card of it
@pytest.fixture
def card(package, small, tmp_path):
    """The path of a card with weights beside it, and the network."""
    network = small(FAST)
    torch.save({"net": learned(network, "module.")}, tmp_path / "mine.pt")
    fields = {
        "schema_version": 1,
        "name": "mine",
        "kind": "classifier",
        "description": "trained by us in RobustBench's architecture",
        "dataset": "cifar10",
        "defense": "at",
        "architecture": {"name": "robustbench:cifar10/Linf/Wong2020Fast"},
        "input_shape": [3, 32, 32],
        "classes": 10,
        "weights": {
            "file": "mine.pt",
            "sha256": sha256_file(tmp_path / "mine.pt"),
            "format": "state-dict",
            "key": "net",
        },
    }

    def write(**changes):
        (tmp_path / "card.yaml").write_text(yaml.safe_dump(fields | changes))
        return tmp_path / "card.yaml"

    return write, network


def test_a_card_names_an_architecture_and_pins_its_weights(card, tmp_path):
    write, network = card
    same(load_model(read_entry(write())).module, network)
    arguments = {"name": f"robustbench:{FAST}", "arguments": {"depth": 3}}
    assert "depth" in refusal(load_model, read_entry(write(architecture=arguments)))
    unknown = refusal(load_model, read_entry(write(architecture={"name": "robustbench:Wong2020Fats"})))
    assert "did you mean Wong2020Fast" in unknown
    torch.save({"net": learned(random_network(type(network), 1))}, tmp_path / "mine.pt")
    assert "sha256" in refusal(load_model, read_entry(write()))


# -------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("name", "dataset", "parts"),
    [
        (
            "Carmon2019Unlabelled",
            "cifar10",
            ["unknown RobustBench model", "did you mean Carmon2019Unlabeled"],
        ),
        ("cifar10/Linf/Carmon2019Unlabelled", "cifar10", ["did you mean cifar10/Linf/Carmon2019Unlabeled"]),
        (
            "Rice2020Overfitting",
            "cifar10",
            ["names 2 models", f"robustbench:{'cifar10/L2/Rice2020Overfitting'}"],
        ),
        ("Salman2020Do_R18", "cifar10", ["was not trained on cifar10", "imagenet/Linf/Salman2020Do_R18"]),
        ("cifar10/Linf/Standard", "cifar100", ["was not trained on cifar100"]),
        ("Wong2020Fast", "digits", ["was not trained on digits", "cifar10/Linf/Wong2020Fast"]),
        ("imagenet/Linf/Standard_R50", "imagenet", ["torchvision:resnet50"]),
        ("qqq", "cifar10", ["robustbench.github.io"]),
    ],
)
def test_names_that_are_refused(package, name, dataset, parts):
    shape = {"digits": (1, 8, 8), "imagenet": (3, 224, 224)}.get(dataset, (3, 32, 32))
    classes = {"cifar100": 100, "imagenet": 1000}.get(dataset, 10)
    message = refusal(named_model, f"robustbench:{name}", requested(dataset, shape, classes))
    assert all(part in message for part in parts), message


def test_ones_own_images_of_the_same_kind_take_its_models(package, small, tmp_path):
    network = small("cifar10/Linf/Carmon2019Unlabeled")
    save(tmp_path, "cifar10/Linf/Carmon2019Unlabeled", learned(network))
    same(load("Carmon2019Unlabeled", tmp_path, "my-photos"), network)


class Code:
    def __reduce__(self):
        return (print, ("this ran",))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<!doctype html><title>Google Drive - Quota exceeded</title>", "is an HTML page, not weights"),
        (b"PK\x03\x04 cut off", "is not a checkpoint that torch.save wrote"),
        (Code(), "can run code and is refused"),
        ({"conv1.weight": torch.ones(1)}, "shape"),
        ({"state_dict": {}}, "no state dict"),
    ],
)
def test_corrupted_weights(package, small, tmp_path, capsys, content, reason):
    small(FAST)
    path = save(tmp_path, FAST, content)
    if isinstance(content, bytes):
        path.write_bytes(content)
    assert reason in refusal(load, FAST, tmp_path)
    assert path.exists()
    assert "this ran" not in capsys.readouterr().out


def test_missing_and_additional_tensors_are_refused_by_name(package, small, tmp_path):
    network = small(FAST)
    without = {name: value for name, value in learned(network).items() if name != "fc.bias"}
    save(tmp_path, FAST, without)
    assert "1 missing (fc.bias)" in refusal(load, FAST, tmp_path)
    save(tmp_path, FAST, learned(network) | {"extra.weight": torch.ones(1)})
    assert "1 unexpected (extra.weight)" in refusal(load, FAST, tmp_path)


# --------------------------------------------------------------------------------------------------------- download
def test_a_download_is_kept_and_used_again(package, small, cache, tmp_path, monkeypatch):
    network, asked = small(FAST), []
    source = save(tmp_path, FAST, learned(network))

    def download(id, output, **options):
        asked.append(id)
        output.write(source.read_bytes())

    monkeypatch.setattr("gdown.download", download)
    for _ in range(2):
        same(load(FAST, None), network)
    assert asked == [record_of(package, FAST)["gdrive_id"]]
    assert [path.name for path in (cache / "models/cifar10/Linf").iterdir()] == ["Wong2020Fast.pt"]


def _page(output):
    output.write(b"\n<!DOCTYPE html><html>Too many users have viewed or downloaded this file recently</html>")


def _nothing(output):
    pass


def _failure(output):
    output.write(b"half")
    raise RuntimeError("Failed to retrieve\n\nfile url")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(_page, "an HTML page"), (_nothing, "empty"), (_failure, "Failed to retrieve file url")],
)
def test_a_failed_download_says_where_to_put_the_file_and_leaves_none(
    package, cache, monkeypatch, answer, reason
):
    monkeypatch.setattr("gdown.download", lambda id, output, **options: answer(output))
    message = refusal(load, FAST, None)
    target = cache / "models" / f"{FAST}.pt"
    for part in (
        reason,
        str(target),
        f"models/{FAST}.pt",
        record_of(package, FAST)["gdrive_id"],
        "--checkpoints",
    ):
        assert part in message
    assert list(target.parent.iterdir()) == []
