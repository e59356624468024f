"""What generated corruptions are made of: filters, maps of noise, sampling between pixels.

Images and maps are float64, [H,W,C] and [H,W]. Lengths are stated for images of 32 x 32; on other images they grow and
shrink with the shorter side (`scale_of`).
"""

import math
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d, map_coordinates

Floats = NDArray[np.float64]
SIDE = 32  # of the images that the published severities are for


def scale_of(image: Floats) -> float:
    """Length on this image of one pixel of a 32 x 32 image."""
    height, width = int(image.shape[0]), int(image.shape[1])
    return min(height, width) / SIDE


def disk_kernel(radius: float, blur: float, scale: float) -> Floats:
    """A disk whose rim is softened by a Gaussian of standard deviation `blur`; lengths in pixels at 32 x 32."""
    detail = max(1.0, scale)
    soft = max(1, round(detail))
    reach = math.ceil(radius * detail) + soft
    steps = np.arange(-reach, reach + 1)
    disk = (steps[:, None] ** 2 + steps**2 <= (radius * detail) ** 2).astype(np.float64)
    line = np.exp(-(np.arange(-soft, soft + 1) ** 2) / (2 * (blur * detail) ** 2))
    for axis in (0, 1):
        disk = correlate1d(disk, line, axis, mode="constant")
    return _kernel(np.stack(np.meshgrid(steps, steps, indexing="ij"), -1).reshape(-1, 2), disk.ravel(), scale)


def motion_kernel(radius: float, sigma: float, degrees: float, scale: float) -> Floats:
    """Half a Gaussian along a line in one direction, 2 radius + 1 steps long; lengths in pixels at 32 x 32."""
    detail = max(1.0, scale)
    steps = np.arange(2 * math.ceil(radius * detail) + 1)
    angle = math.radians(degrees)
    offsets = np.rint(steps[:, None] * np.array([math.sin(angle), math.cos(angle)]))
    return _kernel(offsets, np.exp(-(steps**2) / (2 * (sigma * detail) ** 2)), scale)


def _kernel(offsets: NDArray[Any], weights: Floats, scale: float) -> Floats:
    """A kernel [2r+1,2r+1] with sum 1 of weights [t] at whole `offsets` [t,2]. On images below 32 x 32 these
    shrink, and a weight between pixels is shared by the four around it, so that kernels narrower than a pixel blur."""
    places = offsets * min(1.0, scale)
    corners = np.floor(places).astype(np.int64)
    part = places - corners
    reach = int(np.abs(corners).max()) + 1
    kernel: Floats = np.zeros((2 * reach + 1, 2 * reach + 1))
    for down, right in product((0, 1), (0, 1)):
        shares = np.abs(1 - down - part[:, 0]) * np.abs(1 - right - part[:, 1])
        np.add.at(kernel, (corners[:, 0] + reach + down, corners[:, 1] + reach + right), shares * weights)
    kernel /= kernel.sum()
    return kernel


def filtered(image: Floats, kernel: Floats, border: Literal["edge", "reflect"]) -> Floats:
    """An image [H,W,C] convolved with a kernel [2r+1,2r+1]. border: as in `numpy.pad`."""
    from scipy.signal import fftconvolve  # takes a second to import, which every command would wait for

    reach = len(kernel) // 2
    padded = np.pad(image, ((reach, reach), (reach, reach), (0, 0)), mode=border)
    found: Floats = fftconvolve(padded, kernel[..., None], mode="valid", axes=(0, 1))
    return found


def sampled(
    image: Floats, rows: Floats, columns: Floats, border: Literal["nearest", "mirror", "reflect"]
) -> Floats:
    """An image [H,W,C] at places [H,W] between its pixels, linearly. border: as in `scipy.ndimage`."""
    channels = [
        map_coordinates(image[..., channel], [rows, columns], order=1, mode=border)
        for channel in range(image.shape[2])
    ]
    stacked: Floats = np.stack(channels, -1)
    return stacked


def grid_of(image: Floats) -> tuple[Floats, Floats]:
    """Rows and columns [H,W] of the pixels of an image."""
    places: Floats = np.indices(image.shape[:2], dtype=np.float64)
    return places[0], places[1]


def zoomed(image: Floats, factor: float) -> Floats:
    """An image [H,W,C] enlarged `factor` >= 1 times around its centre and cropped to its size."""
    for axis in (0, 1):
        side = image.shape[axis]
        places = (side - 1) / 2 * (1 - 1 / factor) + np.arange(side) / factor
        low = np.floor(places).astype(np.int64)
        part = np.expand_dims(places - low, [one for one in (0, 1, 2) if one != axis])
        image = image.take(low, axis) * (1 - part) + image.take(np.minimum(low + 1, side - 1), axis) * part
    return image


def plasma_map(shape: tuple[int, int], decay: float, rng: np.random.Generator) -> Floats:
    """A cloud in [0,1]: midpoint displacement (diamonds and squares) on a torus whose side is a power of two, cropped
    to `shape`; each octave moves its points `decay` squared times less than the one before."""
    heights: Floats = np.zeros((1, 1))
    size = 1.0
    while len(heights) < max(shape):
        heights, size = _with_midpoints(heights, size, rng), size / decay**2
    heights -= heights.min()
    heights /= heights.max()
    return heights[: shape[0], : shape[1]]


def _with_midpoints(corners: Floats, size: float, rng: np.random.Generator) -> Floats:
    """Heights [S,S] on a grid [2S,2S]: new points are the mean of four neighbours, moved by up to `size`."""
    side = len(corners)
    moves = rng.uniform(-size, size, (3, side, side))
    above = corners + np.roll(corners, -1, 0)
    centres = (above + np.roll(above, -1, 1)) / 4 + moves[0]
    beside = corners + np.roll(corners, -1, 1)
    found = np.empty((2 * side, 2 * side))
    found[::2, ::2], found[1::2, 1::2] = corners, centres
    found[::2, 1::2] = (beside + centres + np.roll(centres, 1, 0)) / 4 + moves[1]
    found[1::2, ::2] = (above + centres + np.roll(centres, 1, 1)) / 4 + moves[2]
    return found


def frost_texture(shape: tuple[int, int], rng: np.random.Generator) -> Floats:
    """A texture [H,W] in [0,1] that stands for the photographs of frost, which are not shipped: the ridges of a cloud
    with needles of ice in three directions."""
    scale = min(shape) / SIDE
    ridges = 1 - np.abs(2 * plasma_map(shape, 1.5, rng) - 1)
    needles = np.zeros(shape)
    for degrees in rng.uniform(0, 180, 3):
        seeds = (rng.random((*shape, 1)) < 0.06 / max(1.0, scale)).astype(np.float64)
        drawn = filtered(seeds, motion_kernel(6, 4, degrees, scale), "edge")[..., 0]
        needles = np.maximum(needles, 3 * drawn)
    return np.clip(0.2 + 0.5 * ridges + 0.6 * needles, 0, 1)
