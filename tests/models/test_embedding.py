"""Networks of ER-Classifier: sizes written out from the tables, parts, pixel ranges."""

import itertools

import pytest
import torch
from torch import nn

from robbench.models.classifiers import ARCHITECTURES
from robbench.models.embedding import VGG16, VGG19, EmbeddingClassifier

# (shape, classes, embedding of the full size, convolutions, linear layers): Tables 7 and 8.
NETWORKS = {
    "er-mnist": ((1, 28, 28), 10, 4, 4, 1 + 3),
    "er-digits": ((1, 8, 8), 10, 8, 3, 1 + 3),
    "er-cifar10": ((3, 32, 32), 10, 16, 16, 1 + 4),
    "er-stl10": ((3, 96, 96), 10, 16, 6, 1 + 3),
    "er-tiny-imagenet": ((3, 64, 64), 200, 20, 13, 1 + 3),
    "er-mnist-baseline": ((1, 28, 28), 10, None, 4, 4),
    "er-cifar10-baseline": ((3, 32, 32), 10, None, 16, 1),
    "er-stl10-baseline": ((3, 96, 96), 10, None, 6, 4),
    "er-tiny-imagenet-baseline": ((3, 64, 64), 200, None, 13, 4),
}


def built(name: str, **arguments: object) -> EmbeddingClassifier:
    shape, classes, *_ = NETWORKS[name]
    network = ARCHITECTURES.get(name)(shape, classes, **arguments)
    assert isinstance(network, EmbeddingClassifier)
    return network.eval()


def count(network: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in network.modules())


@pytest.mark.parametrize("name", list(NETWORKS))
def test_layers_are_those_of_the_tables(name: str) -> None:
    shape, classes, embedding, convolutions, linear = NETWORKS[name]
    network = built(name, width=1 / 16)
    assert (count(network, nn.Conv2d), count(network, nn.Linear)) == (convolutions, linear)
    x = torch.rand(2, *shape)
    with torch.no_grad():
        z = network.encoder(x)
        assert z.shape == (2, network.dimension)
        assert embedding in (None, network.dimension)
        assert torch.equal(network.classifier(z), network(x))
        assert network(x).shape == (2, classes)


def test_the_full_sizes_are_those_of_the_public_code() -> None:
    """Parameters written out: weights, gains and offsets of batch norm, biases where there are some."""
    convolutions = 16 * (1 * 128 + 128 * 256 + 256 * 512 + 512 * 1024) + 2 * (256 + 512 + 1024)
    head = 5 * 500 + 2 * 500 + 501 * 256 + 2 * 256 + 257 * 10
    mnist = built("er-mnist")
    assert sum(p.numel() for p in mnist.parameters()) == convolutions + 1025 * 4 + head
    channels = [3, *(c for c in VGG19 if c)]
    stack = sum(9 * a * b + b for a, b in itertools.pairwise(channels))
    cifar_head = 17 * 512 + 2 * 513 * 512 + 513 * 10
    assert sum(p.numel() for p in built("er-cifar10").parameters()) == stack + 513 * 16 + cifar_head
    kinds = [type(layer).__name__ for layer in built("er-cifar10", width=1 / 16).classifier.children()]
    assert kinds == ["Linear", "Dropout", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Linear"]


def test_batch_norm_is_where_the_tables_have_it() -> None:
    counts = {name: count(built(name, width=1 / 16).encoder, nn.BatchNorm2d) for name in NETWORKS}
    assert counts == {
        "er-mnist": 3,
        "er-digits": 2,
        "er-cifar10": 0,
        "er-stl10": 5,
        "er-tiny-imagenet": 13,
        "er-mnist-baseline": 0,
        "er-cifar10-baseline": 16,
        "er-stl10-baseline": 6,
        "er-tiny-imagenet-baseline": 13,
    }
    assert [len([c for c in stack if c]) for stack in (VGG16, VGG19)] == [13, 16]
    assert [stack.count(0) for stack in (VGG16, VGG19)] == [5, 5]


def test_images_are_scaled_inside() -> None:
    """[-1,1] where the paper trains on it; ImageNet's mean and deviation for CIFAR-10."""
    x = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(built("er-mnist", width=1 / 16).encoder[0](x), 2 * x - 1)
    x = torch.rand(2, 3, 32, 32)
    red = (x[:, 0] - 0.485) / 0.229
    torch.testing.assert_close(built("er-cifar10", width=1 / 16).encoder[0](x)[:, 0], red)


def test_the_signal_survives_sixteen_layers_without_batch_norm() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, x = built("er-cifar10", width=1 / 8), torch.rand(16, 3, 32, 32)
    with torch.no_grad():
        assert float(network.encoder(x).std(0).mean()) > 1e-3  # 2e-8 with PyTorch's default start
