"""Feature extractors for Fréchet distances: the Inception network of FID, or a classifier of the zoo."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.core.download import download, wrong_digest
from robbench.core.errors import UserError
from robbench.core.resources import cache_folder, sha256_file
from robbench.core.schema import canonical_hash
from robbench.models.entry import ZooEntry
from robbench.models.loading import load_model

INCEPTION = "inception"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
# Its first 8 digits are in the file's name, as torch.hub wants it.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_BYTES = 128 << 20  # more than it has, 91 MiB


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network that turns images into features.

    Attributes:
        label: name of its distance: "FID" for the official Inception network alone, else "frechet[...]".
        sha256: of its weights file.
        function_hash: of everything its features depend on.
        module: maps images [n,C,H,W] in [0,1] to features [n,d].
        device: of the module.
        notes: footnotes of its distances.
    """

    label: str
    sha256: str
    function_hash: str
    module: nn.Module
    device: torch.device
    notes: tuple[str, ...] = ()

    def __call__(self, images: Tensor) -> NDArray[np.float32]:
        """Features [n,d] of images [n,C,H,W] in [0,1], in one batch; `UserError` for pixels outside [0,1]."""
        if not bool(((images >= 0) & (images <= 1)).all()):
            raise UserError("images hold pixels outside [0, 1] or NaN; give images with pixels in [0, 1]")
        try:
            with torch.no_grad():
                features: NDArray[np.float32] = self.module(images.to(self.device)).float().cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"{self.label}: out of GPU memory with {len(images)} images; give a smaller --batch-size"
            ) from error
        return features


def quantise(images: Tensor) -> Tensor:
    """Images in [0,1] rounded to 8 bits, half up, as saved to a PNG file (torchvision's `save_image`)."""
    return images.mul(255).add(0.5).clamp(0, 255).floor() / 255


class InceptionPool3(nn.Module):
    """pytorch-fid's Inception up to its last average pool: 2,048 features per image.

    Images [n,C,H,W] in [0,1], grey or RGB, are quantised to 8 bits, grey ones repeated to three channels; resizing
    to 299x299 and scaling to [-1,1] are pytorch-fid's own.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[1] not in (1, 3):
            raise UserError(
                f"images have {images.shape[1]} channels, Inception takes 1 or 3; give --features MODEL instead"
            )
        features: Tensor = self.network(quantise(images).expand(-1, 3, -1, -1))[0]
        return features.flatten(1)


def inception_extractor(weights: Path | None = None, device: torch.device | str = "cpu") -> FeatureExtractor:
    """FID's network, with weights downloaded once to the user's cache, or read from the file `weights`.

    Distances of any other file than the official one are "frechet[inception:<sha8>]", not FID.
    """
    path = weights if weights is not None else official_weights()
    if not path.is_file():
        raise UserError(
            f"--fid-weights {str(path)!r} is not a file; give {INCEPTION_FILE} from {INCEPTION_URL}"
        )
    digest = sha256_file(path)
    official = digest == INCEPTION_SHA256
    note = f"{path.name} (sha256 {digest[:8]}) is not FID's official network: these distances are no FID"
    target = torch.device(device)
    return FeatureExtractor(
        label="FID" if official else f"frechet[{INCEPTION}:{digest[:8]}]",
        sha256=digest,
        function_hash=canonical_hash({"network": "pytorch-fid pool3, 8 bits", "weights": digest}),
        module=InceptionPool3(_inception(path)).eval().requires_grad_(False).to(target),
        device=target,
        notes=() if official else (note,),
    )


def official_weights() -> Path:
    """FID's weights file in the user's cache, downloaded when absent; `UserError` when that fails."""
    path = cache_folder("weights") / INCEPTION_FILE
    if not path.exists():
        download(
            (INCEPTION_URL,),
            path,
            lambda file: wrong_digest(file, INCEPTION_SHA256),
            f"{INCEPTION_FILE}, which FID needs,",
            INCEPTION_BYTES,
            "or name it with --fid-weights FILE",
        )
    elif (problem := wrong_digest(path, INCEPTION_SHA256)) is not None:
        raise UserError(
            f"{path} {problem}; remove it to download it again, or name another network with --fid-weights FILE"
        )
    return path


def _inception(path: Path) -> nn.Module:
    """pytorch-fid's network with the weights in `path`; `UserError` when the file does not fit."""
    from pytorch_fid.inception import InceptionV3

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with _serve_weights(state):
            network: nn.Module = InceptionV3(resize_input=True, normalize_input=True)
    except Exception as error:  # a file of another kind can make the reader raise anything
        text = " ".join(str(error).split())[:120]
        reason = f"{type(error).__name__}: {text}"
        raise UserError(
            f"{path} does not hold the weights of pytorch-fid's Inception ({reason}); "
            f"give {INCEPTION_FILE} from {INCEPTION_URL}"
        ) from error
    return network


@contextmanager
def _serve_weights(state: Any) -> Iterator[None]:
    """Inside, pytorch-fid 0.3 gets `state` in place of the unchecked download with which it builds its network."""
    from pytorch_fid import inception

    loader = inception.load_state_dict_from_url
    inception.load_state_dict_from_url = lambda *_, **__: state
    try:
        yield
    finally:
        inception.load_state_dict_from_url = loader


class PenultimateFeatures(nn.Module):
    """The input of the last linear layer that a classifier calls: its penultimate features, [n,d].

    Raises `UserError` when the classifier has no linear layer, or calls none.
    """

    def __init__(self, classifier: nn.Module, name: str) -> None:
        super().__init__()
        self.classifier, self.name = classifier, name
        self._latest: Tensor | None = None
        layers = [layer for layer in classifier.modules() if isinstance(layer, nn.Linear)]
        if not layers:
            raise self._no_layer()
        for layer in layers:  # the last one called, which need not be the last one registered
            layer.register_forward_hook(self._keep)

    def _no_layer(self) -> UserError:
        return UserError(
            f"--features {self.name!r} has no linear layer at its end, so no penultimate features; name another model"
        )

    def _keep(self, _layer: nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        self._latest = inputs[0]

    def forward(self, images: Tensor) -> Tensor:
        self._latest = None
        self.classifier(images)
        latest, self._latest = self._latest, None
        if latest is None or len(latest) != len(images):
            raise self._no_layer()
        return latest.flatten(1)


def classifier_extractor(
    entry: ZooEntry, shape: tuple[int, int, int], device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """Penultimate features of a zoo classifier for images of `shape`; its distances are "frechet[<name>]".

    Images are not quantised, as in attacks on the classifier. `UserError` for a flow or another shape.
    """
    card = entry.card
    if card.kind != "classifier":
        raise UserError(
            f"--features {card.name!r} is a {card.kind}, not a classifier; see robbench list models"
        )
    if card.input_shape != shape:
        raise UserError(
            f"--features {card.name!r} takes {card.dataset} images {card.input_shape}, not {shape}; "
            f"name a model of this data set, or {INCEPTION}"
        )
    target = torch.device(device)
    return FeatureExtractor(
        label=f"frechet[{card.name}]",
        sha256=card.weights.sha256,
        function_hash=canonical_hash({"network": "penultimate", "model": card.function_hash}),
        module=PenultimateFeatures(load_model(entry, target).module, card.name).eval(),
        device=target,
    )
