"""Classifiers with an embedding: an encoder into few dimensions, and a classifier of what it returns.

The networks of ER-Classifier (supplement, Tables 7 and 8) and one for digits. The parts are the layers "encoder"
and "classifier"; images in [0,1] are scaled inside the encoder. `width` multiplies the channels of convolutions and the
units of hidden layers. The tables list layers without sizes. Those of MNIST, CIFAR-10 and STL-10 in Table 8 are of the
authors' public code; those of Table 7 and of Tiny ImageNet's classifier are ours.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.models.classifiers import ARCHITECTURES, Normalize

Shape = tuple[int, int, int]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
POOL = 0  # in a list of channels: a max-pool of 2x2 pixels
VGG16 = (64, 64, POOL, 128, 128, POOL, *(256,) * 3, POOL, *(512,) * 3, POOL, *(512,) * 3, POOL)
VGG19 = (64, 64, POOL, 128, 128, POOL, *(256,) * 4, POOL, *(512,) * 4, POOL, *(512,) * 4, POOL)
STL_SIDE = 96  # the least that six strided convolutions leave a pixel of
STL_BASELINE = (64, POOL, 128, POOL, 256, POOL, 512, POOL, 512, POOL, 512)


class EmbeddingClassifier(nn.Module):
    """`classifier` of the embedding that `encoder` returns.

    encoder: images [N,C,H,W] in [0,1] to embeddings [N,D]. classifier: these to logits [N,K]. dimension: D.
    """

    def __init__(self, encoder: nn.Module, classifier: nn.Module, dimension: int) -> None:
        super().__init__()
        self.encoder, self.classifier, self.dimension = encoder, classifier, dimension

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.encoder(x))
        return logits


def require_embedding(model: nn.Module, purpose: str) -> EmbeddingClassifier:
    """`model`, if it is a classifier with an embedding; else `UserError`. purpose: what needs one ("defense 'er'")."""
    if not isinstance(model, EmbeddingClassifier):
        raise UserError(
            f"{purpose} trains an encoder and a classifier and this architecture has no such parts; name one that has "
            f"(--architecture er-digits, er-mnist, er-cifar10, er-stl10, er-tiny-imagenet), or its recipe"
        )
    return model


@ARCHITECTURES.register("er-mnist")
def er_mnist(input_shape: Shape, classes: int, embedding: int = 4, width: float = 1.0) -> nn.Module:
    """4 convolutions (4x4, stride 2; 128, 256, 512, 1024; batch norm on the last three), linear to the embedding;
    linear layers of 500, 256 and `classes` units with batch norm. Images scaled to [-1,1]."""
    layers, features = _strided(input_shape, [_sized(128 << level, width) for level in range(4)])
    encoder = nn.Sequential(_centred(input_shape), *layers, nn.Flatten(), nn.Linear(features, embedding))
    return EmbeddingClassifier(encoder, _normalised_head(embedding, classes, width), embedding)


@ARCHITECTURES.register("er-digits")
def er_digits(input_shape: Shape, classes: int, embedding: int = 8, width: float = 0.25) -> nn.Module:
    """`er-mnist` with three convolutions instead of four, for 8x8 images; a quarter of its width by default."""
    layers, features = _strided(input_shape, [_sized(128 << level, width) for level in range(3)])
    encoder = nn.Sequential(_centred(input_shape), *layers, nn.Flatten(), nn.Linear(features, embedding))
    return EmbeddingClassifier(encoder, _normalised_head(embedding, classes, width), embedding)


@ARCHITECTURES.register("er-stl10")
def er_stl10(input_shape: Shape, classes: int, embedding: int = 16, width: float = 1.0) -> nn.Module:
    """6 convolutions for 96x96 images (five 4x4 with stride 2, 128 to 2048, then 3x3 with stride 2 and no padding;
    batch norm on all but the first), linear to the embedding; the classifier of `er-mnist`. Images scaled to [-1,1]."""
    layers, _ = _strided(input_shape, [_sized(128 << level, width) for level in range(5)])
    last = _sized(2048, width)
    if min(input_shape[1:]) < STL_SIDE:
        raise ValueError(f"images have at least {STL_SIDE}x{STL_SIDE} pixels")
    rows, columns = (((side >> 5) - 3) // 2 + 1 for side in input_shape[1:])
    layers += [nn.Conv2d(last, last, 3, 2, bias=False), nn.BatchNorm2d(last), nn.ReLU()]
    projection = nn.Linear(last * rows * columns, embedding)
    encoder = nn.Sequential(_centred(input_shape), *layers, nn.Flatten(), projection)
    return EmbeddingClassifier(encoder, _normalised_head(embedding, classes, width), embedding)


@ARCHITECTURES.register("er-cifar10")
def er_cifar10(input_shape: Shape, classes: int, embedding: int = 16, width: float = 1.0) -> nn.Module:
    """VGG-19's 16 convolutions without batch norm, linear to the embedding; linear layers of 512, 512, 512 and
    `classes` units, dropout after the first two, no ReLU after the first. ImageNet mean and std for colour images.

    The authors start its convolutions from a file of their own. Here they start as torchvision starts VGG (He et al.
    2015): PyTorch's default start would make the signal vanish in 16 layers.
    """
    layers, features = _stack(input_shape, VGG19, width, batch_norm=False)
    for layer in layers:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
    encoder = nn.Sequential(*_imagenet(input_shape), *layers, nn.Flatten(), nn.Linear(features, embedding))
    hidden = _sized(512, width)
    classifier = nn.Sequential(
        nn.Linear(embedding, hidden),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )
    return EmbeddingClassifier(encoder, classifier, embedding)


@ARCHITECTURES.register("er-tiny-imagenet")
def er_tiny_imagenet(input_shape: Shape, classes: int, embedding: int = 20, width: float = 1.0) -> nn.Module:
    """VGG-16's 13 convolutions with batch norm and 5 max-pools, linear to the embedding; the classifier of `er-mnist`,
    whose sizes the paper does not state for Tiny ImageNet."""
    layers, features = _stack(input_shape, VGG16, width, batch_norm=True)
    encoder = nn.Sequential(*_imagenet(input_shape), *layers, nn.Flatten(), nn.Linear(features, embedding))
    return EmbeddingClassifier(encoder, _normalised_head(embedding, classes, width), embedding)


@ARCHITECTURES.register("er-mnist-baseline")
def er_mnist_baseline(input_shape: Shape, classes: int, width: float = 1.0) -> nn.Module:
    """Table 7, MNIST: 4 convolutions (those of `er-mnist` without batch norm) and 4 linear layers."""
    layers, features = _strided(
        input_shape, [_sized(128 << level, width) for level in range(4)], batch_norm=False
    )
    return _baseline([_centred(input_shape), *layers], features, [500, 500, 256], classes, width)


@ARCHITECTURES.register("er-cifar10-baseline")
def er_cifar10_baseline(input_shape: Shape, classes: int, width: float = 1.0) -> nn.Module:
    """Table 7, CIFAR-10: VGG-19 with batch norm, one linear layer."""
    layers, features = _stack(input_shape, VGG19, width, batch_norm=True)
    return _baseline([*_imagenet(input_shape), *layers], features, [], classes, width)


@ARCHITECTURES.register("er-stl10-baseline")
def er_stl10_baseline(input_shape: Shape, classes: int, width: float = 1.0) -> nn.Module:
    """Table 7, STL-10: 6 convolutions 3x3 with batch norm, 5 max-pools, 4 linear layers."""
    layers, features = _stack(input_shape, STL_BASELINE, width, batch_norm=True)
    return _baseline([_centred(input_shape), *layers], features, [512, 512, 256], classes, width)


@ARCHITECTURES.register("er-tiny-imagenet-baseline")
def er_tiny_imagenet_baseline(input_shape: Shape, classes: int, width: float = 1.0) -> nn.Module:
    """Table 7, Tiny ImageNet: VGG-16's 13 convolutions with batch norm, 5 max-pools, 4 linear layers."""
    layers, features = _stack(input_shape, VGG16, width, batch_norm=True)
    return _baseline([*_imagenet(input_shape), *layers], features, [512, 512, 512], classes, width)


def _sized(units: int, width: float) -> int:
    """`units` times `width`, rounded, as a network has no fractions of units."""
    return round(units * width)


def _centred(input_shape: Shape) -> Normalize:
    """[0,1] to [-1,1]."""
    half = (0.5,) * input_shape[0]
    return Normalize(half, half)


def _imagenet(input_shape: Shape) -> list[nn.Module]:
    """ImageNet's mean and standard deviation for colour images, nothing for others."""
    return [Normalize(IMAGENET_MEAN, IMAGENET_STD)] if input_shape[0] == 3 else []


def _strided(
    input_shape: Shape, widths: Iterable[int], batch_norm: bool = True
) -> tuple[list[nn.Module], int]:
    """([4x4 convolution with stride 2, batch norm on all but the first, ReLU] of every width, number of their outputs).

    Convolutions that a batch norm may follow have no bias, the first one neither, as in the authors' code.
    """
    channels, height, columns = input_shape
    layers: list[nn.Module] = []
    for level, out in enumerate(widths):
        layers.append(nn.Conv2d(channels, out, 4, 2, 1, bias=not batch_norm))
        layers += [nn.BatchNorm2d(out), nn.ReLU()] if batch_norm and level else [nn.ReLU()]
        channels, height, columns = out, height // 2, columns // 2
    return layers, channels * height * columns


def _stack(
    input_shape: Shape, channels: Iterable[int], width: float, batch_norm: bool
) -> tuple[list[nn.Module], int]:
    """([3x3 convolution, batch norm where asked for, ReLU] of all `channels` with their pools, number of outputs)."""
    before, height, columns = input_shape
    layers: list[nn.Module] = []
    for wanted in channels:
        if wanted == POOL:
            layers.append(nn.MaxPool2d(2))
            height, columns = height // 2, columns // 2
            continue
        out = _sized(wanted, width)
        layers += [nn.Conv2d(before, out, 3, padding=1), *([nn.BatchNorm2d(out)] if batch_norm else [])]
        layers.append(nn.ReLU())
        before = out
    return layers, before * height * columns


def _normalised_head(embedding: int, classes: int, width: float) -> nn.Module:
    """Linear layers of 500, 256 and `classes` units, batch norm and ReLU between them."""
    first, second = _sized(500, width), _sized(256, width)
    return nn.Sequential(
        nn.Linear(embedding, first),
        nn.BatchNorm1d(first),
        nn.ReLU(),
        nn.Linear(first, second),
        nn.BatchNorm1d(second),
        nn.ReLU(),
        nn.Linear(second, classes),
    )


def _baseline(
    layers: list[nn.Module], features: int, hidden: list[int], classes: int, width: float
) -> nn.Module:
    """Convolutions and hidden linear layers as encoder, the last linear layer as classifier."""
    parts = [*layers, nn.Flatten()]
    for units in hidden:
        parts += [nn.Linear(features, _sized(units, width)), nn.ReLU()]
        features = _sized(units, width)
    return EmbeddingClassifier(nn.Sequential(*parts), nn.Linear(features, classes), features)
