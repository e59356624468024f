"""Feature extractors for Fréchet distances: the Inception network of FID, or a classifier of the zoo."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from shutil import copyfileobj
from typing import Any
from urllib.request import urlopen

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from robbench.core.download import LimitedFile, TooLarge
from robbench.core.errors import UserError
from robbench.core.resources import cache_folder, sha256_file, write_atomically
from robbench.core.schema import canonical_hash
from robbench.models.entry import ZooEntry
from robbench.models.loading import load_model

INCEPTION = "inception"
INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
# Its first 8 digits are in the file's name, as torch.hub wants it.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
DOWNLOAD_SECONDS = 30
INCEPTION_BYTES = 128 << 20  # more than it has, 91 MiB


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network that turns images into features.

    label: what its distance is called: "FID" for the official Inception network alone, else "frechet[...]". sha256:
    of its weights file. function_hash: of all that its features depend on. notes: what a reader of a distance must
    know about it. module: images [n,C,H,W] in [0,1] to features [n,d].
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


# ------------------------------------------------------------------------------------------------------ Inception
def quantised(images: Tensor) -> Tensor:
    """Images in [0,1] as a PNG file gives them back: 8 bits, rounded half up (torchvision's `save_image`)."""
    return images.mul(255).add(0.5).clamp(0, 255).floor() / 255


class InceptionPool3(nn.Module):
    """pytorch-fid's Inception up to its last average pool: 2,048 features an image.

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
        features: Tensor = self.network(quantised(images).expand(-1, 3, -1, -1))[0]
        return features.flatten(1)


def inception_extractor(weights: Path | None = None, device: torch.device | str = "cpu") -> FeatureExtractor:
    """FID's network, its weights downloaded once to the user's cache, or read from the file `weights`.

    Another file than the official one gives another network: its distances are "frechet[inception:<sha8>]", not FID.
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
        _download(path)
    elif (digest := sha256_file(path)) != INCEPTION_SHA256:
        raise UserError(
            f"{path} has sha256 {digest[:12]}..., not {INCEPTION_SHA256[:12]}...; remove it to download it again, or "
            f"name another network with --fid-weights FILE"
        )
    return path


def _download(path: Path) -> None:
    """Fetch the official weights to `path`; nothing stays there unless their sha256 is right."""

    def fetch(temporary: Path) -> None:
        download(INCEPTION_URL, temporary)
        digest = sha256_file(temporary)
        if digest != INCEPTION_SHA256:
            raise UserError(
                f"{INCEPTION_URL} gave a file with sha256 {digest[:12]}..., not {INCEPTION_SHA256[:12]}...; "
                f"try again, or put {INCEPTION_FILE} at {path}"
            )

    try:
        write_atomically(path, fetch)
    except (OSError, HTTPException, TooLarge) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"FID needs {INCEPTION_FILE}, and it could not be downloaded ({reason}); get it from {INCEPTION_URL} and "
            f"put it at {path}, or name it with --fid-weights FILE"
        ) from error


def download(url: str, path: Path) -> None:
    """Write what `url` serves to `path`; OSError or HTTPException when the network fails, `TooLarge` for
    another file."""
    with urlopen(url, timeout=DOWNLOAD_SECONDS) as response, LimitedFile(path, INCEPTION_BYTES) as stream:
        copyfileobj(response, stream, 1 << 20)


def _inception(path: Path) -> nn.Module:
    """pytorch-fid's network with the weights in `path`; `UserError` when the file does not fit."""
    from pytorch_fid.inception import InceptionV3

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with _served(state):
            network: nn.Module = InceptionV3(resize_input=True, normalize_input=True)
    except Exception as error:  # a file that is something else can make the reader fail in any way
        text = " ".join(str(error).split())[:120]
        reason = f"{type(error).__name__}: {text}"
        raise UserError(
            f"{path} does not hold the weights of pytorch-fid's Inception ({reason}); "
            f"give {INCEPTION_FILE} from {INCEPTION_URL}"
        ) from error
    return network


@contextmanager
def _served(state: Any) -> Iterator[None]:
    """pytorch-fid 0.3 builds its network only together with a download that checks nothing: hand it `state` there."""
    from pytorch_fid import inception

    loader = inception.load_state_dict_from_url
    inception.load_state_dict_from_url = lambda *_, **__: state
    try:
        yield
    finally:
        inception.load_state_dict_from_url = loader


# ----------------------------------------------------------------------------------------------------- classifiers
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

    Images are not quantised: the classifier sees what it is attacked with. `UserError` for a flow or another shape.
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
