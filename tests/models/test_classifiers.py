"""The papers' classifiers against torchvision's networks and against their own formulas written out."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, batch_norm, conv2d, linear
from torchvision.models.resnet import BasicBlock, ResNet

from robbench.models.classifiers import ARCHITECTURES, CIFAR_MEAN, CIFAR_STD, preact_resnet18


def stirred(model: nn.Module) -> nn.Module:
    """`model` in eval mode with batch-norm statistics and gains that are not those of a fresh one."""
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.is_floating_point() and value.ndim == 1 and "mean" not in name:
                value.add_(0.2 * torch.rand_like(value))
    return model.eval()


def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(CIFAR_MEAN)[:, None, None]) / torch.tensor(CIFAR_STD)[:, None, None]


def cifar_resnet(blocks: list[int]) -> ResNet:
    """torchvision's network with what the papers change: 3x3 stem, no max-pool, as many levels as `blocks`."""
    network = ResNet(BasicBlock, [*blocks, 1, 1][:4], num_classes=10)
    network.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    network.maxpool = nn.Identity()
    if len(blocks) == 3:
        network.layer4, network.fc = nn.Identity(), nn.Linear(256, 10)
    return network


@pytest.mark.parametrize(("name", "blocks"), [("resnet18", [2, 2, 2, 2]), ("resnet20-wide", [3, 3, 3])])
def test_cifar_resnets_are_torchvision_s_with_another_stem(name: str, blocks: list[int]) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs, x = stirred(cifar_resnet(blocks)), torch.rand(3, 3, 32, 32)
    ours = ARCHITECTURES.get(name)((3, 32, 32), 10).eval()
    copied = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    ours.load_state_dict(copied)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(normalised(x)), rtol=1e-4, atol=1e-4)


def test_preact_resnet18_is_its_formula() -> None:
    """Every block written out with functional calls: x + conv(relu(bn(conv(relu(bn(x))))))."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = stirred(preact_resnet18((3, 32, 32), 10)), torch.rand(2, 3, 32, 32)
    state = model.state_dict()

    def active(value: Tensor, name: str) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        return batch_norm(value, *(state[f"{name}.{key}"] for key in keys)).relu()

    value = conv2d(normalised(x), state["1.weight"], padding=1)
    for number in range(8):
        name, stride = f"{number + 2}", 2 if number in (2, 4, 6) else 1
        first = active(value, f"{name}.bn1")
        inner = active(conv2d(first, state[f"{name}.conv1.weight"], stride=stride, padding=1), f"{name}.bn2")
        if stride == 2:
            value = conv2d(first, state[f"{name}.shortcut.weight"], stride=2)
        value = value + conv2d(inner, state[f"{name}.conv2.weight"], padding=1)
    pooled = adaptive_avg_pool2d(active(value, "10"), 1).flatten(1)
    with torch.no_grad():
        expected = linear(pooled, state["14.weight"], state["14.bias"])
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert not any(key.startswith("2.shortcut") for key in state)


# Multiply-adds are not in the papers; parameters follow from the layers they list.
PARAMETERS = {
    # 5x5 6, 5x5 16, 400-120-84-10
    ("lenet5", (1, 28, 28)): 6 * 26 + 16 * 151 + 401 * 120 + 121 * 84 + 85 * 10,
    # 4x4 16, 32, 64 with batch norm, 576-100-10
    ("conv3", (1, 28, 28)): 16 * 17 + 32 * 257 + 64 * 513 + 2 * 112 + 577 * 100 + 101 * 10,
    ("resnet18", (3, 32, 32)): 11_173_962,
    ("preact-resnet18", (3, 32, 32)): 11_172_170,
    ("resnet50", (3, 64, 64)): 23_508_032 + 2049 * 10,
}


@pytest.mark.parametrize(("name", "shape"), list(PARAMETERS))
def test_sizes(name: str, shape: tuple[int, int, int]) -> None:
    model = ARCHITECTURES.get(name)(shape, 10).eval()
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name, shape]
    with torch.no_grad():
        assert model(torch.rand(1, *shape)).shape == (1, 10)


def test_resnet50_sees_images_between_minus_one_and_one() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = stirred(ARCHITECTURES.get("resnet50")((3, 64, 64), 10)), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), model[1](2 * x - 1), rtol=1e-4, atol=1e-4)
