"""Fog: a fractal height map laid over the image (Kang et al. 2019, section 3)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robbench.attacks.named import ATTACKS
from robbench.attacks.search.constraints import Constraint, Range
from robbench.attacks.search.geometry import Noise
from robbench.attacks.search.rendered import Renderer, Shape
from robbench.attacks.unforeseen.base import FixedStepParameters, RenderedAttack
from robbench.attacks.unforeseen.draws import fractions

WIBBLE, DECAY = (
    100.0,
    2.0,
)  # largest random height of the first level; how much smaller that of the next one is
FLAT = 1e-6  # heights that differ by less are a flat map, whose fog is 0


@dataclass(frozen=True)
class Fog(Renderer):
    """x' = (x + e F(v)) / (M + e), e = epsilon / 255: F the fog in [0,1], M the largest x of each channel.

    F is a map of the diamond-square algorithm whose random numbers are the variables v in [0,1], three groups a level
    of 1, 4, 16, ... numbers, normalised to [0,1] per sample, of which the centre is used. The side of the map is the
    smallest power of two above the longer side of the image: 256 at 224 and 64 at 32 pixels, where 16 are cropped on
    every side; 16 at 8 (4 cropped), 32 at 28 (2 cropped). A crop of an odd number takes the larger half from the bottom
    and the right.

    The division brightens dark images also without fog, so that no budget renders the clean image. The public code
    takes one of the four neighbours of an edge two places off; here all four are the nearest.

    Attributes:
        epsilon: intensity of the fog on pixels 0..255.
    """

    epsilon: float
    unit = "pixels 0..255 of fog"
    usual = (1.0, 65536.0)
    contains_clean = False

    def shape(self, image: Shape) -> tuple[int, ...]:
        return (_map_side(image) ** 2 - 1,)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        return (Range("fog variables", 0.0, 1.0),)

    def start(self, image: Shape, noise: Noise) -> Tensor:
        return fractions(noise, self.shape(image))

    def render(self, x: Tensor, scene: Mapping[str, Tensor], variables: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        side = _map_side((channels, height, width))
        top, left = (side - height) // 2, (side - width) // 2
        fog = normalise_heights(diamond_square(variables))[..., top : top + height, left : left + width]
        intensity, brightest = self.epsilon / 255, x.amax((2, 3), keepdim=True)
        return (x + intensity * fog) / (brightest + intensity).clamp(min=FLAT)  # a black image without fog


def _map_side(image: Shape) -> int:
    return 1 << max(image[1:]).bit_length()


def diamond_square(variables: Tensor) -> Tensor:
    """Heights [n,1,S,S] of variables [n,S*S-1] in [0,1], on a torus; a variable of 1/2 adds nothing to the mean of the
    four nearest points of its level."""
    corners, wibble, start = variables.new_zeros((len(variables), 1, 1, 1)), WIBBLE, 0
    while start < variables.shape[1]:
        side = corners.shape[-1]
        own = variables[:, start : start + 3 * side**2].reshape(-1, 3, side, side) * (2 * wibble) - wibble
        rows = corners + corners.roll(-1, 2)
        centres = (rows + rows.roll(-1, 3)) / 4 + own[:, 0:1]
        right = (corners + corners.roll(-1, 3) + centres + centres.roll(1, 2)) / 4 + own[:, 1:2]
        below = (rows + centres + centres.roll(1, 3)) / 4 + own[:, 2:3]
        corners = nn.functional.pixel_shuffle(torch.cat([corners, right, below, centres], 1), 2)
        start, wibble = start + 3 * side**2, wibble / DECAY
    return corners


def normalise_heights(heights: Tensor) -> Tensor:
    """Heights [n,1,S,S] moved and scaled to [0,1] per sample; 0 for flat ones."""
    lowest = heights.amin((1, 2, 3), keepdim=True)
    return (heights - lowest) / (heights.amax((1, 2, 3), keepdim=True) - lowest).clamp(min=FLAT)


@ATTACKS.register("fog")
class FogAttack(RenderedAttack):
    """Fog, sign steps of a fixed size on the random numbers of its map."""

    Parameters = FixedStepParameters
    renders = Fog

    def renderer(self, epsilon: float) -> Fog:
        return Fog(epsilon)
