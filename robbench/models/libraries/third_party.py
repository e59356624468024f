"""Architectures of public checkpoints, with the parameter names of the code they were published with.

Inputs are images in [0,1]; what a checkpoint wants done to them first is its card's `preprocessing`. Every builder
takes other image sizes and numbers of classes too.
"""

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TradesSmallCNN(nn.Module):
    """SmallCNN of TRADES (Zhang et al. 2019; yaodongyu/TRADES, models/small_cnn.py).

    Two convolutions 3x3 of 32 channels, max-pool, two of 64, max-pool, all without padding; linear layers of 200, 200
    and `classes` units, dropout after the first.
    """

    def __init__(self, input_shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, height, width = input_shape
        rows, columns = (((side - 4) // 2 - 4) // 2 for side in (height, width))
        self.feature_extractor = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv1=nn.Conv2d(channels, 32, 3),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 32, 3),
                relu2=nn.ReLU(),
                maxpool1=nn.MaxPool2d(2),
                conv3=nn.Conv2d(32, 64, 3),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(64, 64, 3),
                relu4=nn.ReLU(),
                maxpool2=nn.MaxPool2d(2),
            )
        )
        self.classifier = nn.Sequential(
            OrderedDict[str, nn.Module](
                fc1=nn.Linear(64 * rows * columns, 200),
                relu1=nn.ReLU(),
                drop=nn.Dropout(0.5),
                fc2=nn.Linear(200, 200),
                relu2=nn.ReLU(),
                fc3=nn.Linear(200, classes),
            )
        )

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.feature_extractor(x).flatten(1))
        return logits


def convex_small_cnn(input_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The small network of Wong & Kolter 2018 (locuslab/convex_adversarial, examples/problems.py): convolutions 4x4
    with stride 2 and padding 1 of 16 and 32 channels, linear layers of 100 and `classes` units."""
    channels, height, width = input_shape
    return nn.Sequential(
        nn.Conv2d(channels, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * (height // 4) * (width // 4), 100),
        nn.ReLU(),
        nn.Linear(100, classes),
    )


class OptionABlock(nn.Module):
    """Post-activation residual block whose shortcut has no parameters (He et al. 2016, option A): where shapes change
    it takes every second row and column and pads with zero channels, half before and half after."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.padding = stride, (out - channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding))
        return torch.relu(out + shortcut)


class OptionAResNet(nn.Module):
    """ResNet of He et al. 2016 for 32x32 images: widths 16/32/64, `blocks` a width (3: ResNet-20), 0.27 M parameters.

    As in akamaster/pytorch_resnet_cifar10, resnet.py. No normalisation inside: see the module docstring.
    """

    def __init__(self, input_shape: tuple[int, int, int], classes: int, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(input_shape[0], 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _level(16, 16, blocks, 1)
        self.layer2 = _level(16, 32, blocks, 2)
        self.layer3 = _level(32, 64, blocks, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer3(self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x))))))
        logits: Tensor = self.linear(h.mean((2, 3)))
        return logits


def _level(channels: int, out: int, blocks: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        OptionABlock(channels, out, stride), *(OptionABlock(out, out, 1) for _ in range(blocks - 1))
    )
