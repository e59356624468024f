"""Architectures of public checkpoints: names and shapes of their files, a forward pass written a second time with plain
functions, and, where the files are at hand, the accuracy their authors report."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from robbench.cards import Architecture
from robbench.data import load_dataset, sample_ids
from robbench.data.base import Split
from robbench.models.loading import build_architecture, load_model
from robbench.models.zoo import zoo_entries

State = dict[str, Tensor]
Forward = Callable[[State, Tensor], Tensor]
CIFAR, GREY = (3, 32, 32), (1, 28, 28)


def trades(state: State, x: Tensor) -> Tensor:
    def conv(h: Tensor, i: int) -> Tensor:
        name = f"feature_extractor.conv{i}"
        return F.relu(F.conv2d(h, state[f"{name}.weight"], state[f"{name}.bias"]))

    def linear(h: Tensor, i: int) -> Tensor:
        return F.linear(h, state[f"classifier.fc{i}.weight"], state[f"classifier.fc{i}.bias"])

    h = F.max_pool2d(conv(conv(x, 1), 2), 2)
    h = F.max_pool2d(conv(conv(h, 3), 4), 2)
    return linear(F.relu(linear(F.relu(linear(h.flatten(1), 1)), 2)), 3)


def convex(state: State, x: Tensor) -> Tensor:
    h = F.relu(F.conv2d(x, state["0.weight"], state["0.bias"], stride=2, padding=1))
    h = F.relu(F.conv2d(h, state["2.weight"], state["2.bias"], stride=2, padding=1))
    h = F.relu(F.linear(h.flatten(1), state["5.weight"], state["5.bias"]))
    return F.linear(h, state["7.weight"], state["7.bias"])


def resnet20(state: State, x: Tensor) -> Tensor:
    def normal(h: Tensor, name: str) -> Tensor:
        part = [state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")]
        return F.batch_norm(h, *part)

    def conv(h: Tensor, name: str, stride: int = 1) -> Tensor:
        return F.conv2d(h, state[f"{name}.weight"], stride=stride, padding=1)

    h = F.relu(normal(conv(x, "conv1"), "bn1"))
    for level, width in ((1, 16), (2, 32), (3, 64)):
        for block in range(3):
            at, skip = f"layer{level}.{block}", h
            if level > 1 and block == 0:  # zeros for the new channels, half on either side
                zero = torch.zeros_like(h[:, : width // 4, ::2, ::2])
                skip = torch.cat([zero, h[:, :, ::2, ::2], zero], dim=1)
            h = conv(h, f"{at}.conv1", 2 if level > 1 and block == 0 else 1)
            h = F.relu(normal(h, f"{at}.bn1"))
            h = F.relu(normal(conv(h, f"{at}.conv2"), f"{at}.bn2") + skip)
    pooled = F.avg_pool2d(h, h.shape[-1]).flatten(1)
    return F.linear(pooled, state["linear.weight"], state["linear.bias"])


FORWARDS: dict[str, tuple[Forward, tuple[int, int, int]]] = {
    "trades-small-cnn": (trades, GREY),
    "convex-small-cnn": (convex, GREY),
    "resnet20-option-a": (resnet20, CIFAR),
}


def build(name: str, shape: tuple[int, int, int], classes: int = 10) -> nn.Module:
    return build_architecture(Architecture(name=name), shape, classes, None)


@pytest.mark.parametrize("name", FORWARDS)
def test_forward_equals_plain_functions_on_a_random_state_dict(name: str) -> None:
    forward, shape = FORWARDS[name]
    model = build(name, shape).double().eval()
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.randn(value.shape, generator=generator, dtype=torch.float64) * 0.2
        + (1.0 if "bn" in key and "weight" in key else 0.0)
        for key, value in model.state_dict().items()
        if not key.endswith("num_batches_tracked")
    }
    state |= {key: value.abs() + 0.5 for key, value in state.items() if key.endswith("running_var")}
    model.load_state_dict(state, strict=False)
    x = torch.rand(3, *shape, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), forward(state, x), rtol=1e-9, atol=1e-9)


PUBLISHED_SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "trades-small-cnn": {
        "feature_extractor.conv1.weight": (32, 1, 3, 3),
        "feature_extractor.conv1.bias": (32,),
        "feature_extractor.conv2.weight": (32, 32, 3, 3),
        "feature_extractor.conv2.bias": (32,),
        "feature_extractor.conv3.weight": (64, 32, 3, 3),
        "feature_extractor.conv3.bias": (64,),
        "feature_extractor.conv4.weight": (64, 64, 3, 3),
        "feature_extractor.conv4.bias": (64,),
        "classifier.fc1.weight": (200, 1024),
        "classifier.fc1.bias": (200,),
        "classifier.fc2.weight": (200, 200),
        "classifier.fc2.bias": (200,),
        "classifier.fc3.weight": (10, 200),
        "classifier.fc3.bias": (10,),
    },
    "convex-small-cnn": {
        "0.weight": (16, 1, 4, 4),
        "0.bias": (16,),
        "2.weight": (32, 16, 4, 4),
        "2.bias": (32,),
        "5.weight": (100, 1568),
        "5.bias": (100,),
        "7.weight": (10, 100),
        "7.bias": (10,),
    },
}


@pytest.mark.parametrize("name", PUBLISHED_SHAPES)
def test_names_and_shapes_are_those_of_the_published_file(name: str) -> None:
    found = {key: tuple(value.shape) for key, value in build(name, GREY).state_dict().items()}
    assert found == PUBLISHED_SHAPES[name]


def test_resnet20_has_nine_blocks_and_no_parameters_in_shortcuts() -> None:
    state = build("resnet20-option-a", CIFAR).state_dict()
    kernels = {key: tuple(value.shape[:2]) for key, value in state.items() if "conv" in key}
    expected = {"conv1.weight": (16, 3)}
    for level, (before, width) in enumerate(((16, 16), (16, 32), (32, 64)), 1):
        for block in range(3):
            expected[f"layer{level}.{block}.conv1.weight"] = (width, width if block else before)
            expected[f"layer{level}.{block}.conv2.weight"] = (width, width)
    assert kernels == expected
    assert {key.split(".")[-2] for key in state} == {"conv1", "conv2", "bn1", "bn2", "linear"}
    parameters = [value for key, value in state.items() if "running" not in key and "tracked" not in key]
    assert sum(value.numel() for value in parameters) == 269_722  # He et al. print 0.27 M


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize(("shape", "classes"), [((1, 20, 28), 4), ((3, 32, 24), 7)])
def test_other_images_and_numbers_of_classes(name: str, shape: tuple[int, int, int], classes: int) -> None:
    assert build(name, shape, classes).eval()(torch.rand(2, *shape)).shape == (2, classes)


# ------------------------------------------------------------------------------------------------- real files
@pytest.fixture(scope="module")
def checkpoints(shared: Path) -> Path:
    folder = shared / "checkpoints"
    if not folder.is_dir():
        pytest.skip("../shared/checkpoints with downloaded weights is absent")
    return folder


@cache
def held_out(dataset: str, data: Path) -> Split:
    if dataset != "cifar10":
        return load_dataset(dataset, data).test
    with np.load(data / "cifar10" / "test.npz") as file:  # 50,000 training images would take seconds
        x, y = torch.from_numpy(file["x"]).permute(0, 3, 1, 2), torch.from_numpy(file["y"])
    return Split(torch.arange(len(x)), y.long(), x, 256)


@pytest.mark.parametrize(
    ("name", "published", "key", "prefix"),
    [
        ("trades-mnist", 99.48, None, ""),
        ("convex-mnist", 98.20, None, ""),
        ("convex-fashionmnist", 78.27, None, ""),
        ("resnet20-cifar10", 91.73, "state_dict", "module."),
    ],
)
def test_published_accuracy(
    name: str, published: float, key: str | None, prefix: str, shared: Path, checkpoints: Path
) -> None:
    """400 images by seed: within three standard errors. Logits: those of the file through plain functions."""
    entry = zoo_entries(checkpoints=checkpoints)[name]
    model = load_model(entry).module
    test = held_out(entry.card.dataset, shared / "data")
    x, y = test.by_ids(sample_ids(test, 400, seed=0))
    with torch.no_grad():
        logits = model(x)
    share = published / 100.0
    error = 3.0 * (share * (1.0 - share) / len(x)) ** 0.5
    assert float((logits.argmax(1) == y).float().mean()) == pytest.approx(share, abs=error)

    content = torch.load(checkpoints / entry.card.weights.file, map_location="cpu", weights_only=True)
    state = {n.removeprefix(prefix): v for n, v in (content if key is None else content[key]).items()}
    if (
        entry.card.preprocessing is not None
    ):  # ImageNet's mean and standard deviation, as its trainer.py has them
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        x = (x - mean[:, None, None]) / std[:, None, None]
    expected = FORWARDS[entry.card.architecture.name][0](state, x)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["trades-mnist", "convex-mnist", "convex-fashionmnist", "resnet20-cifar10"])
def test_cards_say_where_the_weights_come_from(name: str) -> None:
    card = zoo_entries()[name].card
    assert card.source.startswith("https://github.com/")
    assert card.license in ("MIT", "BSD-2-Clause")
    assert card.golden is not None
    assert all(
        url.startswith("https://") and url.endswith(Path(card.weights.file).name) for url in card.weights.urls
    )
    assert next(m.metric for m in card.measurements if m.note.startswith("published")) == "accuracy"
