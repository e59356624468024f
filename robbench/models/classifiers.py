"""Classifiers as the papers use them. Inputs are images in [0,1]; any normalisation sits inside."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.core.registry import Registry

Builder = Callable[..., nn.Module]
ARCHITECTURES: Registry[Builder] = Registry("architecture", "robbench.models")

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Normalize(nn.Module):
    """(x - mean) / std per channel; x: [N,C,H,W] in [0,1]."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class LogitSubset(nn.Module):
    """`module` restricted to some of its logits [N,K]: what a model says of data of some of its classes."""

    indices: Tensor

    def __init__(self, module: nn.Module, indices: tuple[int, ...]) -> None:
        super().__init__()
        self.module, self.least = module, max(indices) + 1
        self.register_buffer("indices", torch.tensor(indices), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.module(x)
        if logits.shape[1] < self.least:
            raise UserError(
                f"the model returns {logits.shape[1]} logits, and `classes` of the data set names logit "
                f"{self.least - 1}; correct `classes`, or name another model"
            )
        return logits.index_select(1, self.indices)


@ARCHITECTURES.register("digits-cnn")
def digits_cnn(input_shape: tuple[int, int, int], classes: int, width: int = 16) -> nn.Module:
    """Three 3x3 convolutions (the second with stride 2) and two linear layers; 0.26 M multiply-adds for 1x8x8.

    No batch norm, so that training and evaluation mode are the same function.
    """
    channels, height, image_width = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * ((height + 1) // 2) * ((image_width + 1) // 2), 64),
        nn.ReLU(),
        nn.Linear(64, classes),
    )


@ARCHITECTURES.register("conv3")
def conv3(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The 3-conv CNN of Yuksel et al. for Fashion-MNIST: [conv 4x4 stride 2 pad 1, BN, ReLU] of 16, 32, 64
    channels, then 576-100-classes with no activation between the two linear layers; no input standardisation."""
    channels, height, width = input_shape
    layers: list[nn.Module] = []
    for out in (16, 32, 64):
        layers += [nn.Conv2d(channels, out, 4, stride=2, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
        channels, height, width = out, height // 2, width // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * height * width, 100), nn.Linear(100, classes))


@ARCHITECTURES.register("lenet5")
def lenet5(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """LeNet-5 with ReLU and average pooling for 28x28 images; last layer 84 -> classes without activation
    (the paper's table prints 120 -> 10)."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 6, 5, padding=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * ((input_shape[1] // 2 - 4) // 2) * ((input_shape[2] // 2 - 4) // 2), 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, classes),
    )


class BasicBlock(nn.Module):
    """Post-activation residual block, 1x1 convolution shortcut where shapes change (He et al. 2016)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + self.shortcut(x))


class PreActBlock(nn.Module):
    """Pre-activation residual block (He et al. 2016b, figure 4e): BN and ReLU come before each convolution; where
    shapes change, the 1x1 shortcut starts from the activated input."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        changes = stride != 1 or channels != out
        self.shortcut = nn.Conv2d(channels, out, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        active = torch.relu(self.bn1(x))
        out: Tensor = self.conv2(torch.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


def _normalised(channels: int) -> list[nn.Module]:
    """CIFAR mean and standard deviation for colour images, nothing for grey ones."""
    return [Normalize(CIFAR_MEAN, CIFAR_STD)] if channels == 3 else []


def _blocks(
    block: Callable[[int, int, int], nn.Module], widths: tuple[int, ...], counts: tuple[int, ...]
) -> list[nn.Module]:
    """`counts` blocks a width; the first of every level but the first has stride 2."""
    layers, channels = [], widths[0]
    for level, (width, count) in enumerate(zip(widths, counts, strict=True)):
        for number in range(count):
            layers.append(block(channels, width, 2 if level and not number else 1))
            channels = width
    return layers


def _resnet(
    input_shape: tuple[int, int, int], classes: int, widths: tuple[int, ...], blocks: tuple[int, ...]
) -> nn.Module:
    stem = nn.Sequential(
        nn.Conv2d(input_shape[0], widths[0], 3, 1, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
    )
    layers = [*_normalised(input_shape[0]), stem, *_blocks(BasicBlock, widths, blocks)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))


@ARCHITECTURES.register("resnet18")
def resnet18(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """ResNet-18 for 32x32 images: 3x3 stem, no max-pool, CIFAR mean/std inside (IJSAT; Yuksel et al.)."""
    return _resnet(input_shape, classes, (64, 128, 256, 512), (2, 2, 2, 2))


@ARCHITECTURES.register("resnet20-wide")
def resnet20_wide(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The "ResNet-20" of Yuksel et al.: blocks [3,3,3] with widths 64/128/256 (not He et al.'s 16/32/64)."""
    return _resnet(input_shape, classes, (64, 128, 256), (3, 3, 3))


@ARCHITECTURES.register("preact-resnet18")
def preact_resnet18(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """PreAct-ResNet-18 for 32x32 images (He et al. 2016b; Kireev et al.'s CIFAR network): a bare 3x3 stem, BN and ReLU
    once more before the pooling, CIFAR mean/std inside."""
    widths = (64, 128, 256, 512)
    return nn.Sequential(
        *_normalised(input_shape[0]),
        nn.Conv2d(input_shape[0], widths[0], 3, 1, 1, bias=False),
        *_blocks(PreActBlock, widths, (2, 2, 2, 2)),
        nn.BatchNorm2d(widths[-1]),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(widths[-1], classes),
    )


@ARCHITECTURES.register("resnet50")
def resnet50(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """torchvision's ResNet-50 (7x7 stem with stride 2, max-pool) for images of 64 pixels and more, trained from scratch
    on images scaled to [-1,1], as DMAT and IJSAT do on OM-ImageNet: no mean and deviation of the data set."""
    from torchvision.models import resnet50 as build

    network = build(weights=None, num_classes=classes)
    if input_shape[0] != 3:
        network.conv1 = nn.Conv2d(input_shape[0], 64, 7, 2, 3, bias=False)
    half = (0.5,) * input_shape[0]
    return nn.Sequential(Normalize(half, half), network)
