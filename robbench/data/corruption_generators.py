"""The fifteen corruptions of CIFAR-10-C made here for any images, a benchmark of its own beside the published files.

Severities are those that the published files were made with (Hendrycks and Dietterich 2019). They are for 32 x 32
images; on others all lengths (radii, shifts, standard deviations of blurs) grow and shrink with the shorter side, which
makes blurs of 8 x 8 images weak. What differs from the published files:

* every image has random numbers of its own, keyed by seed, corruption, severity and sample id;
* frost has a procedural texture (`frost_texture`) in place of six photographs;
* zoom blur enlarges around the exact centre, and motion blurs the unrounded image;
* values are rounded to 8 bits, where the published ones are cut off.

As published, severities are drawn independently of each other, and the elastic transform moves an image less from
severity 1 to 5 while it becomes rougher.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from robbench.core.random import SampleRandom
from robbench.data.corruption_fields import (
    Floats,
    disk_kernel,
    filtered,
    frost_texture,
    grid_of,
    motion_kernel,
    plasma_map,
    sampled,
    scale_of,
    zoomed,
)
from robbench.data.corruption_names import Headline

Bytes = NDArray[np.uint8]
Random = np.random.Generator
SMALLEST = 8  # pixels of a side
_LUMA = np.array([0.299, 0.587, 0.114])
_ICE = np.array([0.85, 0.93, 1.0])  # colour of frost


@dataclass(frozen=True)
class Generator:
    """A corruption. make: (image [H,W,C] in [0,1], *constants of a severity, random numbers) -> image of the same
    shape, which may leave [0,1]. severities: constants of the five."""

    make: Callable[..., Floats]
    severities: tuple[tuple[float, ...], ...]


def generated_images(corruption: Headline, severity: int, x: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Corrupted images [n,C,H,W], float32 multiples of 1/255 on the CPU.

    x: clean images [n,C,H,W] in [0,1], 1 or 3 channels, sides of at least 8; ids: their sample ids [n]; severity: 1 to
    5. An image depends on its own pixels, `seed` and id alone.
    """
    numbers = SampleRandom(seed, f"generated-corruption/{corruption}/{severity}")
    clean = x.detach().cpu().permute(0, 2, 3, 1).numpy().astype(np.float64)
    found = np.zeros(clean.shape, np.uint8)
    for row, sample in enumerate(ids.tolist()):
        found[row] = corrupt(clean[row], corruption, severity, numbers.generator(sample))
    return torch.from_numpy(found).permute(0, 3, 1, 2).contiguous().to(torch.float32) / 255


def corrupt(image: Floats, corruption: Headline, severity: int, rng: Random) -> Bytes:
    """One image [H,W,C] in [0,1], 1 or 3 channels, corrupted and rounded to 8 bits. severity: 1 to 5."""
    generator = GENERATORS[corruption]
    return to_bytes(generator.make(image, *generator.severities[severity - 1], rng))


def to_bytes(image: Floats) -> Bytes:
    """Pixels in [0,1] as 8-bit values, after clipping; halves are rounded up."""
    return np.floor(255 * np.clip(image, 0, 1) + 0.5).astype(np.uint8)


def gaussian_noise(image: Floats, deviation: float, rng: Random) -> Floats:
    """Normal noise on every value."""
    return image + deviation * rng.standard_normal(image.shape)


def shot_noise(image: Floats, photons: float, rng: Random) -> Floats:
    """Poisson noise; `photons` are counted in a white pixel."""
    return rng.poisson(image * photons) / photons


def impulse_noise(image: Floats, share: float, rng: Random) -> Floats:
    """A share of the values becomes 0 or 1, with equal probabilities."""
    hit, white = rng.random(image.shape) < share, rng.random(image.shape) < 0.5
    return np.where(hit, white.astype(np.float64), image)


def defocus_blur(image: Floats, radius: float, blur: float, rng: Random) -> Floats:
    """The mean over a disk with a soft rim."""
    return filtered(image, disk_kernel(radius, blur, scale_of(image)), "reflect")


def glass_blur(image: Floats, sigma: float, shift: float, rounds: float, rng: Random) -> Floats:
    """Pixels inside the border take the value of one up to `shift` up or left of them or less than that down or right,
    between two Gaussian blurs. (The published code means to exchange the two and copies one.)"""
    scale = scale_of(image)
    reach, sigmas = max(1, round(shift * scale)), (sigma * scale, sigma * scale, 0)
    found = gaussian_filter(image, sigmas, mode="nearest")
    rows, columns = (places.astype(np.int64) for places in grid_of(image))
    height, width = rows.shape
    inside = (rows > reach) & (columns > reach) & (rows <= height - reach) & (columns <= width - reach)
    for _ in range(int(rounds)):
        moves = rng.integers(-reach, reach, (2, height, width))
        moved = inside & (rng.random((height, width)) < shift * scale / reach)
        down, right = np.where(moved, moves, 0)
        found = found[rows + down, columns + right]
    blurred: Floats = gaussian_filter(found, sigmas, mode="nearest")
    return blurred


def motion_blur(image: Floats, radius: float, sigma: float, rng: Random) -> Floats:
    """Half a Gaussian along a line at up to 45 degrees from the horizontal."""
    return filtered(image, motion_kernel(radius, sigma, rng.uniform(-45, 45), scale_of(image)), "edge")


def zoom_blur(image: Floats, largest: float, rng: Random) -> Floats:
    """The mean of the image and of itself enlarged 1, 1.01, ... times."""
    factors = [1 + step / 100 for step in range(round(100 * (largest - 1)) + 1)]
    return (image + sum(zoomed(image, factor) for factor in factors)) / (len(factors) + 1)


def snow(
    image: Floats,
    mean: float,
    deviation: float,
    size: float,
    threshold: float,
    radius: float,
    sigma: float,
    clear: float,
    rng: Random,
) -> Floats:
    """Flakes drawn out downwards, and themselves turned by 180 degrees, over a whitened image.

    mean, deviation: of the noise whose values above `threshold` are flakes; size: of a flake; radius, sigma: of their
    motion; clear: weight of the image that is not whitened.
    """
    scale = scale_of(image)
    noise = rng.normal(mean, deviation, (*image.shape[:2], 1))
    flakes = np.clip(zoomed(noise, size * max(1.0, scale)), 0, 1)
    flakes[flakes < threshold] = 0
    flakes = filtered(flakes, motion_kernel(radius, sigma, rng.uniform(45, 135), scale), "edge")
    grey = image if image.shape[2] == 1 else (image @ _LUMA)[..., None]
    white = np.maximum(image, 1.5 * grey + 0.5)
    return clear * image + (1 - clear) * white + flakes + flakes[::-1, ::-1]


def frost(image: Floats, clear: float, ice: float, rng: Random) -> Floats:
    """A procedural texture of ice over a darkened image."""
    texture = frost_texture((image.shape[0], image.shape[1]), rng)[..., None]
    return clear * image + ice * texture * (_ICE if image.shape[2] == 3 else 1.0)


def fog(image: Floats, thickness: float, decay: float, rng: Random) -> Floats:
    """A cloud added to the image, which is then darkened to the brightness it had."""
    brightest = float(image.max())
    cloud = plasma_map((image.shape[0], image.shape[1]), decay, rng)[..., None]
    return (image + thickness * cloud) * brightest / (brightest + thickness)


def brightness(image: Floats, more: float, rng: Random) -> Floats:
    """The largest channel (HSV's value) raised by `more` up to 1, hue and saturation unchanged."""
    value = image.max(2, keepdims=True)
    raised = np.minimum(value + more, 1)
    found: Floats = np.where(value > 0, image * (raised / np.where(value > 0, value, 1)), raised)
    return found


def contrast(image: Floats, share: float, rng: Random) -> Floats:
    """Distances from each channel's mean, which is summed exactly, become `share` of what they were."""
    values = image.reshape(-1, image.shape[2]).T
    means = np.array([math.fsum(channel) / len(channel) for channel in values.tolist()])
    found: Floats = (image - means) * share + means
    return found


def elastic_transform(image: Floats, size: float, sigma: float, affine: float, rng: Random) -> Floats:
    """An affine map whose three anchors move by up to `affine`, then smooth random shifts of about `size`; all three
    numbers in sides of the image."""
    side = min(image.shape[:2])
    image = sampled(image, *_affine_places(image, affine * side, rng), "mirror")
    shifts = rng.uniform(-1, 1, (2, *image.shape[:2]))
    down, right = (
        size * side * gaussian_filter(shift, sigma * side, mode="reflect", truncate=3) for shift in shifts
    )
    rows, columns = grid_of(image)
    return sampled(image, rows + down, columns + right, "reflect")


def _affine_places(image: Floats, most: float, rng: Random) -> tuple[Floats, Floats]:
    """Where each pixel [H,W] of the mapped image is in `image`: rows and columns."""
    centre = np.array(image.shape[:2]) // 2
    arm = min(image.shape[:2]) // 3
    anchors = centre + arm * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved = anchors + rng.uniform(-most, most, (3, 2))
    back = np.linalg.solve(np.column_stack([moved, np.ones(3)]), anchors)
    rows, columns = grid_of(image)
    return rows * back[0, 0] + columns * back[1, 0] + back[2, 0], rows * back[0, 1] + columns * back[
        1, 1
    ] + back[2, 1]


def pixelate(image: Floats, share: float, rng: Random) -> Floats:
    """The image at a share of its size, and back."""
    picture = _picture(image)
    small = picture.resize((int(picture.width * share), int(picture.height * share)), Image.Resampling.BOX)
    return _pixels(small.resize(picture.size, Image.Resampling.BOX))


def jpeg_compression(image: Floats, quality: float, rng: Random) -> Floats:
    """The image written as JPEG and read again."""
    content = io.BytesIO()
    _picture(image).save(content, "JPEG", quality=int(quality))
    with Image.open(content) as picture:
        return _pixels(picture)


def _picture(image: Floats) -> Image.Image:
    values = to_bytes(image)
    return Image.fromarray(values[..., 0] if values.shape[2] == 1 else values)


def _pixels(picture: Image.Image) -> Floats:
    values = np.asarray(picture, dtype=np.float64) / 255
    return values[..., None] if values.ndim == 2 else values


def _single(*values: float) -> tuple[tuple[float, ...], ...]:
    return tuple((value,) for value in values)


GENERATORS: dict[Headline, Generator] = {
    "gaussian_noise": Generator(gaussian_noise, _single(0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": Generator(shot_noise, _single(500, 250, 100, 75, 50)),
    "impulse_noise": Generator(impulse_noise, _single(0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": Generator(defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": Generator(glass_blur, ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))),
    "motion_blur": Generator(motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": Generator(zoom_blur, _single(1.05, 1.10, 1.15, 1.20, 1.25)),
    "snow": Generator(
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": Generator(frost, ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))),
    "fog": Generator(fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": Generator(brightness, _single(0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": Generator(contrast, _single(0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": Generator(
        elastic_transform,
        ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    ),
    "pixelate": Generator(pixelate, _single(0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": Generator(jpeg_compression, _single(80, 65, 58, 50, 40)),
}
