"""Generated corruptions: what holds for all of them, and each against its definition, PIL, colorsys or scipy.stats."""

import colorsys
import io
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torch import Tensor

from robbench.data import load_dataset
from robbench.data.corruption_fields import motion_kernel, plasma_map, zoomed
from robbench.data.corruption_generators import GENERATORS, corrupt, generated_images
from robbench.data.corruption_names import Headline

NAMES = get_args(Headline)
FIXED = (
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
)  # nothing random
KEEP_FLAT = (
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "contrast",
    "elastic_transform",
    "pixelate",
)
SHAPES = [(1, 8, 8), (3, 9, 13), (1, 28, 28), (3, 33, 32), (3, 224, 200)]
# Their published constants trade one effect for another (less blur and more shift, thicker and darker ice).
NOT_MONOTONE = ("glass_blur", "motion_blur", "snow", "frost", "elastic_transform")


def by_severity(*values: float) -> list[tuple[int, float]]:
    return list(enumerate(values, start=1))


def cloudy(n: int, shape: tuple[int, int, int] = (3, 32, 32)) -> Tensor:
    """Images [n,C,H,W] of 8-bit values whose amplitudes fall with frequency, as those of photographs."""
    rng, (channels, height, width) = np.random.default_rng(5), shape
    size = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)) + 1 / max(height, width)
    waves = np.fft.fft2(rng.standard_normal((n, channels, height, width))) / size
    images = np.fft.ifft2(waves).real
    images = (images - images.mean((2, 3), keepdims=True)) / images.std((2, 3), keepdims=True)
    return torch.from_numpy(np.clip(0.5 + 0.2 * images, 0, 1) * 255).round().float() / 255


def distances(x: Tensor, name: Headline, severity: int) -> Tensor:
    return (generated_images(name, severity, x, torch.arange(len(x)), 0) - x).flatten(1).norm(dim=1)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_images_of_any_size_stay_8_bit_images_of_their_own(shape: tuple[int, int, int]) -> None:
    x = cloudy(2, shape)
    for name in NAMES:
        for severity in (1, 5):
            found = generated_images(name, severity, x, torch.tensor([7, 3]), 1)
            assert (found.shape, found.dtype) == (x.shape, torch.float32)
            assert 0 <= float(found.min()) <= float(found.max()) <= 1
            assert torch.equal(found, (found * 255).round() / 255)
            assert not torch.equal(found, x) or (name, severity) == ("defocus_blur", 1), (name, severity)


@pytest.mark.parametrize("name", NAMES)
def test_an_image_depends_on_seed_id_and_severity_alone(name: Headline) -> None:
    x, ids = cloudy(3), torch.tensor([4, 90_000, 6])
    found = generated_images(name, 3, x, ids, 0)
    order = torch.tensor([2, 0])
    assert torch.equal(generated_images(name, 3, x[order], ids[order], 0), found[order])
    same = x[:1].repeat(2, 1, 1, 1)
    twice = generated_images(name, 3, same, torch.tensor([1, 2]), 0)
    assert torch.equal(twice[0], twice[1]) == (name in FIXED)
    assert torch.equal(generated_images(name, 3, x, ids, 1), found) == (name in FIXED)


@pytest.mark.parametrize("name", NAMES)
def test_a_higher_severity_moves_images_further(name: Headline) -> None:
    x = cloudy(16)
    means = [float(distances(x, name, severity).mean()) for severity in range(1, 6)]
    if name == "elastic_transform":
        assert means[4] < means[0], "the published constants: smaller and rougher moves"
    elif name in NOT_MONOTONE:
        assert means[4] > means[0]
    else:
        assert (np.diff(means) > 0).all(), means


@pytest.mark.parametrize("name", NAMES)
def test_flat_images(name: Headline) -> None:
    """What moves pixels or averages them leaves a flat image as it is; black stays black in fog, and nothing fails."""
    grey = np.full((13, 9, 3), 100 / 255)
    if name in KEEP_FLAT:
        for severity in range(1, 6):
            assert (corrupt(grey, name, severity, np.random.default_rng(0)) == 100).all()
    for level in (0.0, 1.0):
        found = corrupt(np.full((8, 8, 1), level), name, 5, np.random.default_rng(0))
        assert name != "fog" or level or (found == 0).all()


# ------------------------------------------------------------------------------------------ noise
GREY = np.full((100, 100, 3), 0.4)


def noise(name: Headline, severity: int) -> np.ndarray:
    return corrupt(GREY, name, severity, np.random.default_rng(severity)).ravel() / 255


@pytest.mark.parametrize(("severity", "deviation"), by_severity(0.04, 0.06, 0.08, 0.09, 0.10))
def test_gaussian_noise_is_normal(severity: int, deviation: float) -> None:
    found = noise("gaussian_noise", severity)
    expected = np.hypot(deviation, 1 / 255 / 12**0.5)  # rounding adds its own
    assert abs(found.mean() - 0.4) < 4 * expected / len(found) ** 0.5
    assert found.std() == pytest.approx(expected, rel=0.02)
    dithered = found + (np.random.default_rng(0).random(len(found)) - 0.5) / 255
    assert stats.kstest(dithered, stats.norm(0.4, expected).cdf).pvalue > 1e-3


@pytest.mark.parametrize(("severity", "photons"), by_severity(500, 250, 100, 75, 50))
def test_shot_noise_is_poisson(severity: int, photons: int) -> None:
    found, law = noise("shot_noise", severity), stats.poisson(0.4 * photons)
    assert abs(found.mean() - 0.4) < 4 * law.std() / photons / len(found) ** 0.5 + 1e-4
    assert found.std() == pytest.approx(law.std() / photons, rel=0.03)
    assert stats.skew(found) == pytest.approx(float(law.stats("s")), abs=0.1)


@pytest.mark.parametrize(("severity", "share"), by_severity(0.01, 0.02, 0.03, 0.05, 0.07))
def test_impulse_noise_is_salt_and_pepper(severity: int, share: float) -> None:
    found = noise("impulse_noise", severity)
    assert set(np.unique(found)) == {0, 102 / 255, 1}
    for level in (0, 1):
        assert stats.binomtest(int((found == level).sum()), len(found), share / 2).pvalue > 1e-3


# ------------------------------------------------------------------------------------------ colours and compression
PHOTO = (cloudy(1)[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)


def photo(name: Headline, severity: int) -> np.ndarray:
    return corrupt(PHOTO / 255, name, severity, np.random.default_rng(1)).astype(int)


@pytest.mark.parametrize(("severity", "more"), by_severity(0.05, 0.1, 0.15, 0.2, 0.3))
def test_brightness_raises_the_value_of_hsv(severity: int, more: float) -> None:
    expected = np.empty(PHOTO.shape)
    for place in np.ndindex(PHOTO.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(PHOTO[place] / 255))
        expected[place] = colorsys.hsv_to_rgb(hue, saturation, min(1, value + more))
    assert np.abs(photo("brightness", severity) - 255 * expected).max() <= 0.5 + 1e-9
    grey = corrupt(PHOTO[..., :1] / 255, "brightness", severity, np.random.default_rng(1))
    assert np.abs(grey - 255 * np.minimum(PHOTO[..., :1] / 255 + more, 1)).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("severity", "share"), by_severity(0.75, 0.5, 0.4, 0.3, 0.15))
def test_contrast_shrinks_around_the_mean(severity: int, share: float) -> None:
    mean = PHOTO.mean((0, 1))
    assert np.abs(photo("contrast", severity) - (mean + share * (PHOTO - mean))).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("severity", "side"), by_severity(30, 28, 27, 24, 20))
def test_pixelate_and_jpeg_are_those_of_pil(severity: int, side: int) -> None:
    picture = Image.fromarray(PHOTO)
    small = picture.resize((side, side), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
    np.testing.assert_array_equal(photo("pixelate", severity), np.asarray(small))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=(80, 65, 58, 50, 40)[severity - 1])
    np.testing.assert_array_equal(photo("jpeg_compression", severity), np.asarray(Image.open(content)))


# ------------------------------------------------------------------------------------------ blurs, weather, shifts
def test_defocus_of_radius_1_is_the_mean_over_a_cross() -> None:
    x = PHOTO.astype(float)
    cross = (x[1:-1, 1:-1] + x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:]) / 5
    assert np.abs(photo("defocus_blur", 4)[1:-1, 1:-1] - cross).max() <= 0.51


@pytest.mark.parametrize("scale", [0.25, 0.875, 1, 7])
def test_motion_goes_one_way_as_far_as_the_image_is_large(scale: float) -> None:
    kernel = motion_kernel(9, 2.5, 90, scale)
    down, right = np.indices(kernel.shape) - len(kernel) // 2
    assert kernel.sum() == pytest.approx(1)
    assert kernel[down < 0].sum() == kernel[right != 0].sum() == 0
    half = np.exp(-(np.arange(19) ** 2) / (2 * 2.5**2))
    mean = float((half * np.arange(19)).sum() / half.sum())
    assert (kernel * down).sum() == pytest.approx(mean * scale, rel=0.25)


def test_glass_takes_the_pixel_left_above_or_itself() -> None:
    found = photo("glass_blur", 1)
    neighbours = [PHOTO[1:-1, 1:-1], PHOTO[:-2, 1:-1], PHOTO[1:-1, :-2], PHOTO[:-2, :-2]]
    inner = found[1:-1, 1:-1]
    assert np.any([(inner == other).all(2) for other in neighbours], axis=0).all()
    assert (found[:2] == PHOTO[:2]).all()
    assert (found[:, :2] == PHOTO[:, :2]).all()


def test_zoom_keeps_the_centre_and_enlarges_a_ramp() -> None:
    ramp = np.repeat(np.linspace(0, 1, 33)[None, :, None], 33, 0)
    for factor in (1.0, 1.1, 1.25):
        np.testing.assert_allclose(zoomed(ramp, factor), 0.5 + (ramp - 0.5) / factor, atol=1e-12)


@pytest.mark.parametrize(("severity", "thickness"), by_severity(0.2, 0.5, 0.75, 1, 1.5))
def test_fog_is_a_cloud_between_none_and_its_thickness(severity: int, thickness: float) -> None:
    x, found = PHOTO / 255, photo("fog", severity) / 255
    cloud = found * (x.max() + thickness) / x.max() - x
    assert cloud.min() == pytest.approx(0, abs=0.02)
    assert cloud.max() == pytest.approx(thickness, abs=0.02)
    assert np.ptp(cloud, axis=2).max() < 0.02, "the same in all channels"


def test_clouds_of_a_smaller_decay_are_rougher() -> None:
    clouds = [plasma_map((32, 32), decay, np.random.default_rng(2)) for decay in (1.75, 3)]
    rough = [float(np.abs(np.diff(cloud, axis=0)).mean()) for cloud in clouds]
    assert rough[0] > 1.5 * rough[1]
    assert all((cloud.min(), cloud.max()) == (0, 1) for cloud in clouds)


def test_elastic_moves_become_rougher() -> None:
    """Of a ramp, what is left after the best affine map."""
    ramp = np.repeat(np.linspace(0, 1, 64)[None, :, None], 64, 0)
    rows, columns = np.indices((64, 64))[:, 16:48, 16:48]
    basis = np.column_stack([rows.ravel(), columns.ravel(), np.ones(32 * 32)])
    left = []
    for severity in range(1, 6):
        found = [
            corrupt(ramp, "elastic_transform", severity, np.random.default_rng(i))[16:48, 16:48].ravel()
            for i in range(6)
        ]
        fits = [basis @ np.linalg.lstsq(basis, one.astype(float), rcond=None)[0] for one in found]
        left.append(np.mean([np.abs(one - fit).mean() for one, fit in zip(found, fits, strict=True)]))
    assert left[0] < 0.5, "severity 1 is affine"
    assert (np.diff(left) > 0).all()


@pytest.mark.parametrize("name", ["snow", "frost"])
def test_snow_and_frost_whiten_dark_images(name: Headline) -> None:
    dark = np.full((32, 32, 3), 0.2)
    means = [
        float(corrupt(dark, name, severity, np.random.default_rng(3)).mean()) / 255 for severity in (1, 5)
    ]
    assert 0.2 < means[0] < means[1]


def test_numbers_of_this_version() -> None:
    """Mean changes of one image at severity 3. Others mean another `generator` in GeneratedCorruptionParameters."""
    x = cloudy(1)
    found = {
        name: 255 * float((generated_images(name, 3, x, torch.tensor([0]), 0) - x).abs().mean())
        for name in GENERATORS
    }
    assert found == pytest.approx(OF_VERSION_1, abs=0.05)


OF_VERSION_1 = {
    "gaussian_noise": 16.01,
    "shot_noise": 13.64,
    "impulse_noise": 4.54,
    "defocus_blur": 15.91,
    "glass_blur": 27.59,
    "motion_blur": 25.58,
    "zoom_blur": 23.82,
    "snow": 27.63,
    "frost": 58.35,
    "fog": 20.69,
    "brightness": 27.37,
    "contrast": 24.53,
    "elastic_transform": 37.42,
    "pixelate": 11.09,
    "jpeg_compression": 29.39,
}


# ------------------------------------------------------------------------------------------ published files
def test_beside_the_published_files(shared: Path) -> None:
    """Mean L2 distances of 200 test images, generated and published, within a factor of 1.5; frost is of other ice."""
    folder = shared / "data" / "CIFAR-10-C"
    if not (folder / "fog.npy").is_file():
        pytest.skip("CIFAR-10-C is absent from ../shared/data")
    test = load_dataset("cifar10", shared / "data").test
    ids = test.ids[:200]
    x, _ = test.by_ids(ids.tolist())
    for name in NAMES:
        array = np.load(folder / f"{name}.npy", mmap_mode="r")
        for severity in range(1, 6):
            rows = array[(severity - 1) * (len(array) // 5) + ids.numpy()]
            published = torch.from_numpy(rows.astype(np.float32) / 255).permute(0, 3, 1, 2)
            ours = generated_images(name, severity, x, ids, 0)
            means = [float((images - x).flatten(1).norm(dim=1).mean()) for images in (ours, published)]
            print(f"{name:18} {severity} {means[0]:8.3f} {means[1]:8.3f}")
            assert name == "frost" or 1 / 1.5 < means[0] / means[1] < 1.5
