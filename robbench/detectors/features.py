"""Features of a classifier: what its layers give for images.

A layer is named as in `classifier.named_modules()`: "8" is the output of module 8, "9:input" what goes into module 9.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robbench.core.errors import UserError, unknown_name
from robbench.core.foreign import foreign_code
from robbench.models.classifiers import Normalize

Maps = Literal["flatten", "mean"]
INPUT = ":input"
# Modules whose output is their input, seen otherwise.
PASSING = (nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d, Normalize)


def read_layers(
    classifier: nn.Module, layers: Sequence[str], images: Tensor, maps: Maps = "flatten"
) -> tuple[list[Tensor], Tensor]:
    """Features [N,D] of every layer, float64, and logits [N,K], differentiable in the images [N,C,H,W].

    maps: features with further dimensions, as those of convolutions, are flattened or averaged over these.
    """
    seen: dict[str, list[Tensor]] = {layer: [] for layer in layers}
    with _listening(classifier, layers, lambda layer, value: seen[layer].append(_copy(layer, value))):
        logits = _forward(classifier, images)
    return [_one_row_each(layer, seen[layer], len(images), maps) for layer in layers], logits


def require_layers(classifier: nn.Module, layers: Sequence[str], images: Tensor) -> None:
    """`UserError` unless every layer exists and gives one row of numbers per image; tried on `images` [N,C,H,W]."""
    known = dict(classifier.named_modules())
    for layer in layers:
        if layer.removesuffix(INPUT) not in known or not layer:
            raise unknown_name("layer", layer, filter(None, known), _step(known))
    if len(set(layers)) < len(layers):
        raise UserError(f"--layer {','.join(layers)} names a layer twice; name each once")
    with foreign_code("reading the layers of the classifier", "name another --layer"), torch.no_grad():
        read_layers(classifier, layers, images)


def last_hidden_layer(classifier: nn.Module, images: Tensor) -> str:
    """Name of what goes into the linear or convolutional module that returns the logits."""
    called: list[tuple[str, Tensor]] = []
    last = [name for name, part in classifier.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    with torch.no_grad(), _listening(classifier, last, lambda name, value: called.append((name, value))):
        logits = _forward(classifier, images)
    found = [name for name, value in called if value.flatten(1).shape == logits.shape]
    if not found or sum(name == found[-1] for name, _ in called) > 1:
        raise UserError(
            "the classifier has no linear layer that returns its logits, so that its last hidden layer is not known; "
            "name it with --layer"
        )
    return found[-1] + INPUT


def computing_layers(classifier: nn.Module, images: Tensor) -> tuple[str, ...]:
    """Names of the innermost modules that compute something, in the order in which they run; without those that run
    more than once."""
    called: list[str] = []

    def note(name: str, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point() and len(value) == len(images):
            called.append(name)

    inner = [
        name
        for name, part in classifier.named_modules()
        if name and not any(part.children()) and not isinstance(part, PASSING)
    ]
    with torch.no_grad(), _listening(classifier, inner, note):
        _forward(classifier, images)
    return tuple(name for name in called if called.count(name) == 1)


def _forward(classifier: nn.Module, images: Tensor) -> Tensor:
    """Logits [N,K] of images in the classifier's own precision."""
    weights = next(classifier.parameters(), images)
    logits: Tensor = classifier(images.to(weights.dtype))
    return logits


@contextmanager
def _listening(
    classifier: nn.Module, layers: Sequence[str], tell: Callable[[str, Any], None]
) -> Iterator[None]:
    """Inside, `tell(layer, value)` is called with what every forward gives for `layers`."""
    modules, handles = dict(classifier.named_modules()), []
    try:
        for layer in layers:
            handles.append(_hook(modules[layer.removesuffix(INPUT)], layer, tell))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, layer: str, tell: Callable[[str, Any], None]) -> Any:
    if layer.endswith(INPUT):
        return module.register_forward_pre_hook(lambda _, given: tell(layer, given[0]))
    return module.register_forward_hook(lambda _, given, out: tell(layer, out))


def _copy(layer: str, value: Any) -> Tensor:
    """`value` in float64; a copy, since the next module may work in place."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        raise UserError(f"layer {layer!r} gives a {type(value).__name__}, no numbers; name another --layer")
    return value.to(torch.float64, copy=True)


def _one_row_each(layer: str, seen: list[Tensor], n: int, maps: Maps) -> Tensor:
    if len(seen) != 1:
        raise UserError(f"layer {layer!r} runs {len(seen)} times a forward, not once; name another --layer")
    values = seen[0]
    if values.ndim < 2 or len(values) != n or not values[:1].numel():
        raise UserError(
            f"layer {layer!r} gives {list(values.shape)} for {n} images, not a row each; name another --layer"
        )
    return values.flatten(2).mean(2) if maps == "mean" and values.ndim > 2 else values.flatten(1)


def _step(known: dict[str, nn.Module]) -> str:
    names = [name for name in known if name]
    listed = ", ".join(names[-4:])
    return (
        f"the classifier has {len(names)} modules, the last are {listed}; NAME{INPUT} is what goes into one"
    )
