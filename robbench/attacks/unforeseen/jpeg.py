"""JPEG: the coefficients of a JPEG image of quality 50 move (Kang et al. 2019, section 3)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from robbench.attacks.named import ATTACKS
from robbench.attacks.search.constraints import Ball, Constraint, Range
from robbench.attacks.search.geometry import Noise, random_start
from robbench.attacks.search.geometry_l1 import furthest_point
from robbench.attacks.search.rendered import Renderer, Shape
from robbench.attacks.unforeseen.base import RenderedAttack
from robbench.core.errors import UserError
from robbench.specs import Norm

SIDE = 8  # of a block
# Steps of quantisation of quality 50: the tables of ITU-T T.81, annex K, row by row.
LUMINANCE = (
    *(16, 11, 10, 16, 24, 40, 51, 61),
    *(12, 12, 14, 19, 26, 58, 60, 55),
    *(14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62),
    *(18, 22, 37, 56, 68, 109, 103, 77),
    *(24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101),
    *(72, 92, 95, 98, 112, 100, 103, 99),
)
CHROMINANCE = (
    *(17, 18, 24, 47, 99, 99, 99, 99),
    *(18, 21, 26, 66, 99, 99, 99, 99),
    *(24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, 99, 99, 99, 99, 99, 99),
    *(99,) * 32,
)
# Cb and Cr, without their offset, of red, green and blue, and back (JFIF).
TO_CHROMA = ((-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
FROM_CHROMA = ((0.0, 1.402), (-0.344136, -0.714136), (1.772, 0.0))
LARGEST = 2.0


@dataclass(frozen=True)
class JpegCoefficients(Renderer):
    """x' decodes coefficients + v / 2: luminance and chrominance in blocks of 8 x 8, chrominance at half the resolution
    (4:2:0), coefficients in steps of quality 50. ||v|| <= epsilon; for l2 and l1 also |v_i| <= 2, a step at most.

    As in the public code coefficients are not rounded: one that v moves by half a step, |v_i| = 1, is as far off as
    JPEG's own rounding puts it. Decoding is linear, so that x' is the image of v = 0 plus the decoded v / 2. That image
    is x itself for one channel, which is luminance alone; for three channels it is x with its chrominance averaged over
    2 x 2 pixels. Planes whose sides are no multiples of 8 are continued by their last row and column, as encoders do.

    Attributes:
        norm: of the ball over all coefficients of an image.
        epsilon: its radius, in half steps of quantisation.
    """

    norm: Norm
    epsilon: float
    unit = "half steps of quantisation at quality 50"
    contains_clean = False

    @property
    def usual(self) -> tuple[float, float]:
        return {"linf": (0.01, 16.0), "l2": (0.1, 1e3)}.get(self.norm, (1.0, 1e6))

    def shape(self, image: Shape) -> tuple[int, ...]:
        channels, height, width = image
        if channels not in (1, 3) or min(height, width) < SIDE:
            raise UserError(
                f"images {image}: the jpeg attacks take 1 or 3 channels (luminance, or red, green and blue) and sides "
                f"of at least {SIDE} pixels, a block; leave them out"
            )
        return (sum(_counts(image)),)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        ball = Ball("JPEG coefficients", self.norm, self.epsilon)
        if self.norm == "linf":
            return (ball,)
        return ball, Range("JPEG coefficients", -LARGEST, LARGEST)

    def start(self, image: Shape, noise: Noise) -> Tensor:
        return random_start("uniform", self.norm, self.epsilon, self.shape(image), noise)

    def scene(self, x: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        """For three channels `undisturbed` [n,3,H,W], the image of v = 0, which needs computing once."""
        return {"undisturbed": average_chroma(x)} if x.shape[1] == 3 else {}

    def render(self, x: Tensor, scene: Mapping[str, Tensor], variables: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        light, colour = torch.split(variables, list(_counts((channels, height, width))), dim=1)
        luma = _decode(light[:, None], LUMINANCE, height, width)
        if channels == 1:
            return x + luma
        chroma = _decode(colour.reshape(len(x), 2, -1), CHROMINANCE, -(-height // 2), -(-width // 2))
        return scene["undisturbed"] + luma + _upsample(_mix(chroma, FROM_CHROMA), height, width)

    def vertex(self, x: Tensor, variables: Tensor, gradient: Tensor) -> Tensor:
        """See `Renderer`; for norm l1."""
        return furthest_point(gradient, torch.full_like(gradient, LARGEST), self.epsilon)


def average_chroma(x: Tensor) -> Tensor:
    """Images [n,3,H,W] with Cb and Cr replaced by their averages over 2 x 2 pixels (4:2:0)."""
    height, width = x.shape[2:]
    chroma = _mix(x, TO_CHROMA)
    even = nn.functional.pad(chroma, (0, width % 2, 0, height % 2), mode="replicate")
    averaged = _upsample(nn.functional.avg_pool2d(even, 2), height, width)
    return x + _mix(averaged - chroma, FROM_CHROMA)


def _counts(image: Shape) -> tuple[int, int]:
    """Numbers of coefficients of luminance and of both chrominances."""
    channels, height, width = image
    halves = (-(-height // 2), -(-width // 2))
    light, colour = (
        SIDE * SIDE * math.ceil(h / SIDE) * math.ceil(w / SIDE) for h, w in ((height, width), halves)
    )
    return light, 2 * colour if channels == 3 else 0


def _mix(planes: Tensor, weights: tuple[tuple[float, ...], ...]) -> Tensor:
    """Planes [n,p,H,W] mixed to [n,len(weights),H,W]."""
    return torch.einsum("nphw,cp->nchw", planes, planes.new_tensor(weights))


def _upsample(planes: Tensor, height: int, width: int) -> Tensor:
    """Every pixel of planes [n,p,h,w] repeated to 2 x 2, cut to `height` and `width`."""
    return nn.functional.interpolate(planes, scale_factor=2.0, mode="nearest")[..., :height, :width]


def _decode(variables: Tensor, table: tuple[int, ...], height: int, width: int) -> Tensor:
    """Planes [n,p,height,width] in units of [0,1] pixels of v / 2 in steps of `table`. variables: [n,p,D], block after
    block, each in row-major order."""
    rows, columns = math.ceil(height / SIDE), math.ceil(width / SIDE)
    blocks = variables.reshape(-1, SIDE * SIDE) @ _synthesis(table, variables.dtype, variables.device)
    planes = blocks.reshape(*variables.shape[:2], rows, columns, SIDE, SIDE).transpose(3, 4)
    return planes.reshape(*variables.shape[:2], rows * SIDE, columns * SIDE)[..., :height, :width]


@cache
def _synthesis(table: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix [64,64] from variables of a block to its pixels: half a step of `table`, the inverse DCT, 1/255."""
    frequency = torch.arange(SIDE, dtype=torch.float64)
    waves = torch.cos((2 * frequency + 1) * frequency[:, None] * (math.pi / (2 * SIDE))) / 2.0
    waves[0] /= math.sqrt(2.0)
    steps = torch.tensor(table, dtype=torch.float64)[:, None]
    return (steps / (2.0 * 255.0) * torch.kron(waves, waves)).to(device, dtype)


@ATTACKS.register("jpeg")
class Jpeg(RenderedAttack):
    """JPEG coefficients in a ball: sign steps, normalised steps, or Frank-Wolfe for l1."""

    renders = JpegCoefficients

    def renderer(self, epsilon: float) -> JpegCoefficients:
        return JpegCoefficients(self.spec.norm, epsilon)
