"""Feature extractors: Inception against pytorch-fid's own code on PNG files, classifiers against their own layers."""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.models.loading import load_model
from robbench.models.zoo import find_model, zoo_entries
from robbench.run import features
from robbench.run.features import (
    INCEPTION_FILE,
    INCEPTION_SHA256,
    FeatureExtractor,
    PenultimateFeatures,
    classifier_extractor,
    inception_extractor,
    official_weights,
    quantise,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty user cache; returns the folder of weights in it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "robbench" / "weights"


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of FID's architecture under the name that pytorch-fid looks for, in a torch hub folder."""
    from pytorch_fid import inception
    from torchvision.models import inception_v3

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = inception_v3(num_classes=1008, aux_logits=False, weights=None, init_weights=False)
        network.Mixed_5b = inception.FIDInceptionA(192, pool_features=32)
        network.Mixed_5c = inception.FIDInceptionA(256, pool_features=64)
        network.Mixed_5d = inception.FIDInceptionA(288, pool_features=64)
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            setattr(network, f"Mixed_{name}", inception.FIDInceptionC(768, channels_7x7=width))
        network.Mixed_7b = inception.FIDInceptionE_1(1280)
        network.Mixed_7c = inception.FIDInceptionE_2(2048)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d):  # or the signal dies away in 90 layers
                layer.running_var.fill_(0.1)
    path = tmp_path_factory.mktemp("torch") / "hub" / "checkpoints" / INCEPTION_FILE
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    return path


def random_images(n: int, channels: int = 3, side: int = 32) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(n))


# ----------------------------------------------------------------------------------------------------- Inception
def written(images: Tensor, folder: Path) -> list[Path]:
    """The images as PNG files, by torchvision's own writer."""
    from torchvision.utils import save_image

    paths = [folder / f"{number}.png" for number in range(len(images))]
    for image, path in zip(images, paths, strict=True):
        save_image(image, path)
    return paths


def test_inception_is_pytorch_fid_on_png_files(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colour and grey images against pytorch-fid's own network, loader and reading of files."""
    from pytorch_fid.fid_score import get_activations
    from pytorch_fid.inception import InceptionV3

    monkeypatch.setenv("TORCH_HOME", str(weights.parents[2]))
    peer = InceptionV3()
    extractor = inception_extractor(weights)
    for images in (random_images(2), random_images(2, channels=1, side=8)):
        paths = written(images, tmp_path)
        expected = get_activations(paths, peer, batch_size=2, num_workers=0)
        found = extractor(images)
        assert found.shape == (2, 2048)
        assert np.abs(expected[0] - expected[1]).max() > 1e-3 * np.abs(expected).max() > 0
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_quantised_is_what_a_png_file_gives_back(tmp_path: Path) -> None:
    levels = torch.arange(256, dtype=torch.float32)
    values = [
        torch.rand(1088, generator=torch.Generator().manual_seed(0)),
        levels,
        (levels + 0.5).clamp(max=255),
    ]
    images = torch.cat([values[0], values[1] / 255, values[2] / 255]).reshape(1, 1, 40, 40)
    path = written(images, tmp_path)[0]
    stored = torch.from_numpy(np.array(Image.open(path).convert("L"))).to(torch.float32) / 255
    assert torch.equal(quantise(images)[0, 0], stored)
    assert torch.equal(quantise(quantise(images)), quantise(images))


def test_another_network_is_never_called_fid(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    foreign = inception_extractor(weights)
    assert foreign.label == f"frechet[inception:{digest[:8]}]"
    assert foreign.sha256 == digest
    assert len(foreign.notes) == 1
    assert "no FID" in foreign.notes[0]
    monkeypatch.setattr(features, "INCEPTION_SHA256", digest)
    official = inception_extractor(weights)
    assert (official.label, official.notes, official.sha256) == ("FID", (), digest)


def test_name_url_and_hash_are_pytorch_fids() -> None:
    from pytorch_fid.inception import FID_WEIGHTS_URL

    assert features.INCEPTION_URL == FID_WEIGHTS_URL
    assert Path(INCEPTION_FILE).stem.rpartition("-")[2] == INCEPTION_SHA256[:8]


def test_building_it_leaves_pytorch_fid_as_it_was(weights: Path, tmp_path: Path) -> None:
    from pytorch_fid import inception

    before = inception.load_state_dict_from_url
    inception_extractor(weights)
    torch.save({}, tmp_path / "empty.pth")
    with pytest.raises(UserError, match="does not hold the weights"):
        inception_extractor(tmp_path / "empty.pth")
    assert inception.load_state_dict_from_url is before


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_wrong_weights_file_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    contents: list[Any] = [Evil(tmp_path / "ran"), nn.Linear(2, 2).state_dict(), torch.ones(3), [1, 2]]
    for content in contents:
        torch.save(content, path)
        with pytest.raises(UserError, match=r"weights\.pth does not hold the weights") as caught:
            inception_extractor(path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
    for raw in (b"", b"not a pickle", b"\x80\x02}q\x00"):
        path.write_bytes(raw)
        with pytest.raises(UserError, match=r"weights\.pth does not hold the weights"):
            inception_extractor(path)
    with pytest.raises(UserError, match=r"--fid-weights .*absent\.pth' is not a file"):
        inception_extractor(tmp_path / "absent.pth")


def test_images_must_have_one_or_three_channels_in_range(weights: Path) -> None:
    extractor = inception_extractor(weights)
    with pytest.raises(UserError, match="4 channels"):
        extractor(random_images(1, channels=4))
    for bad in (-0.01, 1.01, float("nan")):
        images = random_images(2)
        images[1, 0, 3, 3] = bad
        with pytest.raises(UserError, match=r"outside \[0, 1\] or NaN"):
            extractor(images)


# ------------------------------------------------------------------------------------------------------ download
def test_offline_names_file_url_and_place(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(UserError) as caught:
        inception_extractor()
    message = str(caught.value)
    for part in (INCEPTION_FILE, features.INCEPTION_URL, str(cache / INCEPTION_FILE), "--fid-weights FILE"):
        assert part in message
    assert "\n" not in message
    assert list(cache.iterdir()) == []


def test_downloaded_once_and_checked(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "served.pth"
    served.write_bytes(b"weights")
    monkeypatch.setattr(features, "INCEPTION_URL", served.as_uri())
    with pytest.raises(UserError, match=r"has sha256 .*, not 6726825d"):
        official_weights()
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(b"weights").hexdigest())
    assert official_weights() == cache / INCEPTION_FILE
    served.unlink()
    assert official_weights().read_bytes() == b"weights"


def test_a_damaged_cached_file_is_refused(cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / INCEPTION_FILE).write_bytes(b"half a file")
    with pytest.raises(UserError, match=r"6726825d\.pth has sha256 .*; remove it to download it again"):
        inception_extractor()


def test_cached_weights_are_used(cache: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir(parents=True)
    shutil.copy(weights, cache / INCEPTION_FILE)
    monkeypatch.setattr(features, "INCEPTION_SHA256", hashlib.sha256(weights.read_bytes()).hexdigest())
    assert inception_extractor().label == "FID"


# ----------------------------------------------------------------------------------------------------- classifiers
def test_a_classifier_gives_its_penultimate_features(digits) -> None:
    entry = find_model("digits-standard", zoo_entries())
    extractor = classifier_extractor(entry, digits.shape)
    module = load_model(entry).module
    images = digits.test.x(torch.arange(5))
    found = extractor(images)
    assert extractor.label == "frechet[digits-standard]"
    assert extractor.sha256 == entry.card.weights.sha256
    assert found.shape == (5, 64)
    torch.testing.assert_close(module[-1](torch.from_numpy(found)), module(images), rtol=0, atol=1e-5)


class Backwards(nn.Module):
    """Registers its last layer first."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(5, 2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x.flatten(1)))


def test_the_last_layer_called_counts() -> None:
    module, images = Backwards(), random_images(3, 1, 2)
    assert torch.equal(PenultimateFeatures(module, "b")(images), module.first(images.flatten(1)))


@pytest.mark.parametrize("layers", [(nn.Flatten(), nn.Softmax(1)), (nn.Conv2d(1, 10, 8), nn.Flatten())])
def test_no_linear_layer_is_refused(layers: tuple[nn.Module, ...]) -> None:
    with pytest.raises(UserError, match="'bare' has no linear layer at its end"):
        PenultimateFeatures(nn.Sequential(*layers), "bare")


class Unused(Backwards):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)


def test_a_linear_layer_that_is_never_called_is_refused() -> None:
    with pytest.raises(UserError, match="no linear layer at its end"):
        PenultimateFeatures(Unused(), "idle")(random_images(2, 1, 2))


def test_flows_and_other_shapes_are_refused() -> None:
    entries = zoo_entries()
    with pytest.raises(UserError, match="'digits-glow' is a flow, not a classifier"):
        classifier_extractor(entries["digits-glow"], (1, 8, 8))
    with pytest.raises(UserError, match=r"takes fashionmnist images \(1, 28, 28\), not \(1, 8, 8\)"):
        classifier_extractor(entries["fashionmnist-standard"], (1, 8, 8))


def test_out_of_gpu_memory_says_what_to_do() -> None:
    class Exhausted(nn.Module):
        def forward(self, _x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

    extractor = FeatureExtractor("FID", "0" * 64, "0" * 64, Exhausted(), torch.device("cpu"))
    with pytest.raises(UserError, match="2 images; give a smaller --batch-size"):
        extractor(random_images(2))


@pytest.mark.slow
def test_fid_of_a_run_end_to_end(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digits
) -> None:
    """FID's architecture on a run of a few images, against the definition on the same features."""
    from robbench.cli.run import run_matrix
    from robbench.run import frechet
    from robbench.run.request import RunRequest
    from robbench.store.frechet_records import load_frechet
    from robbench.store.ledger import load_run

    class Silent:
        def advanced(self, what: str, done: int, total: int) -> None: ...
        def message(self, line: str) -> None:
            raise AssertionError(line)

    chosen = RunRequest(("fgsm",), models=("digits-standard",), n=3, device="cpu", keep_examples=3)
    assert run_matrix(chosen, tmp_path / "run") == 0
    reference = digits.train.subset(torch.arange(4))
    monkeypatch.setattr(frechet, "_reference_splits", lambda _dataset: (reference,))
    request = frechet.FrechetRequest(fid_weights=weights, device="cpu", batch_size=2)
    clean, cell = frechet.score_run(tmp_path / "run", request, Silent())
    assert load_frechet(tmp_path / "run") == [clean, cell]
    assert clean.extractor.startswith("frechet[inception:")
    assert any("3 images for 2048 features" in note for note in clean.notes)
    assert (clean.n, clean.reference_n, cell.attack) == (3, 4, "fgsm")
    extractor = inception_extractor(weights)
    ids = load_run(tmp_path / "run").sample_ids
    pair = (extractor(digits.test.by_ids(ids)[0]), extractor(reference.x(torch.arange(4))))
    # |mu - nu|^2 + |A|_* + |B|_* - 2 |A^(1/2) B^(1/2)|_* with centred rows as factors, which stay small
    a, b = ((f.astype(np.float64) - f.mean(axis=0, dtype=np.float64)) / np.sqrt(len(f) - 1) for f in pair)
    shift = pair[0].mean(axis=0, dtype=np.float64) - pair[1].mean(axis=0, dtype=np.float64)
    expected = shift @ shift + (a**2).sum() + (b**2).sum() - 2 * np.linalg.norm(a @ b.T, "nuc")
    assert clean.value == pytest.approx(expected, rel=1e-4)
    assert cell.value not in (None, clean.value)
