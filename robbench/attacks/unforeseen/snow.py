"""Snow: streaks of flakes over a whitened image (Kang et al. 2019, section 3)."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robbench.attacks.named import ATTACKS
from robbench.attacks.search.constraints import BALL_TOLERANCE, Constraint, Range
from robbench.attacks.search.geometry import Noise, project
from robbench.attacks.search.rendered import Renderer, Shape
from robbench.attacks.unforeseen.base import FixedStepParameters, RenderedAttack
from robbench.attacks.unforeseen.draws import fractions, integers

KERNELS, STRIDE, REACH, BLOCK = 7, 4, 6, 8
DENSITY = 0.2  # largest mean of a block of intensities, and scale of the exponential start
FAINTEST = 1e-9  # a flake's gradient vanishes at intensity 0
DISCOLOURING = 0.25
LUMINANCE = (0.2126, 0.7152, 0.0722)


@dataclass(frozen=True)
class BlockMean:
    """Intensities [n,K,h,w] of at least `low`, whose mean over every block of `side` x `side` is at most `limit`; the
    last blocks are smaller where the sides are no multiples."""

    what: str
    limit: float
    side: int
    low: float
    allowance: float = BALL_TOLERANCE

    def sizes(self, values: Tensor) -> Tensor:
        return torch.cat([block.mean((2, 3)) for block in self._blocks(values)], 1)

    def project(self, values: Tensor) -> Tensor:
        """Of a block with a mean above the limit, all intensities lowered by the same amount, but not below `low`."""
        projected = values.clamp(min=self.low)
        for block in self._blocks(projected):
            radius = block.shape[2:].numel() * (self.limit - self.low)
            above = project((block - self.low).flatten(0, 1), "l1", radius)
            block.copy_(above.reshape(block.shape) + self.low)
        return projected

    def _blocks(self, values: Tensor) -> list[Tensor]:
        """Views of the blocks."""
        return [part for row in torch.split(values, self.side, 2) for part in torch.split(row, self.side, 3)]


@dataclass(frozen=True)
class Snow(Renderer):
    """x' = clip(0.75 x + 0.25 max(x, 1.5 g + 0.5) + epsilon S(v)): g the luminance, S the snow, both of one channel.

    S is the sum of seven grids of flakes, each convolved with a line of its own. Grid k has a flake on every fourth row
    and column, of intensity v_k^4: k = 0..3 begin in row 0 and column k, k = 4..6 in row k - 3 and column 0. The
    variables v [7, ceil(H/4), ceil(W/4)] lie in [1e-9, 1], and their mean over every block of 8 x 8 (smaller at the
    border, one block up to 32 pixels) is at most 0.2. They start at exp(-u / 0.2), u uniform on [0,1].

    The lines are the scene: centred segments of random direction and width (1, 3 or 5 with probability 0.6, 0.3, 0.1),
    blurred by a Gaussian of 3 x 3 with sigma 0.41 to 0.6, all seven mirrored with probability 1/2. They reach 6 pixels
    from the centre (13 x 13); on images below 24 pixels a quarter of the shorter side (5 x 5 at 8).

    Clipping is differentiated: at large budgets most pixels are at 1, and an unclipped image is far from the one that
    is judged. Also without flakes the image is whitened, so that no variables render the clean image. The public code
    scales a block above its limit and leaves the last step as it is; here every step is projected on the nearest point,
    which leaves strong flakes strong and breaks more.

    Attributes:
        epsilon: factor of the snow, on [0,1] pixels.
    """

    epsilon: float
    unit = "multiples of the snow on [0,1] pixels"
    usual = (0.005, 64.0)
    contains_clean = False

    def shape(self, image: Shape) -> tuple[int, ...]:
        return (KERNELS, *(-(-side // STRIDE) for side in image[1:]))

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        block = BlockMean(f"mean of a block of {BLOCK} x {BLOCK} intensities", DENSITY, BLOCK, FAINTEST)
        return (Range("intensities", FAINTEST, 1.0), block)

    def start(self, image: Shape, noise: Noise) -> Tensor:
        return torch.exp(fractions(noise, self.shape(image)) / -DENSITY)

    def scene(self, x: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        reach = max(1, min(REACH, min(x.shape[2:]) // 4))
        return {"kernels": line_kernels(noise, reach)}

    def render(self, x: Tensor, scene: Mapping[str, Tensor], variables: Tensor) -> Tensor:
        height, width = x.shape[2:]
        snow = fall(variables, scene["kernels"].to(variables))[..., :height, :width]
        whitened = (1 - DISCOLOURING) * x + DISCOLOURING * torch.maximum(x, 1.5 * _luminance(x) + 0.5)
        return (whitened + self.epsilon * snow).clamp(0.0, 1.0)


def _luminance(x: Tensor) -> Tensor:
    """Grey [n,1,H,W] of images [n,C,H,W]: of three channels the luminance, else the mean."""
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor(LUMINANCE)[:, None, None]).sum(1, keepdim=True)


def fall(intensities: Tensor, kernels: Tensor) -> Tensor:
    """Snow [n,1,4h,4w] of intensities [n,7,h,w] and kernels [n,7,K,K]: every flake draws the kernel of its grid."""
    _, _, height, width = intensities.shape
    corners = [(0, column) for column in range(STRIDE)] + [(row, 0) for row in range(1, STRIDE)]
    stamps = torch.stack([_moved(kernels[:, k], *corner) for k, corner in enumerate(corners)], 1).flatten(2)
    drawn = stamps.transpose(1, 2) @ intensities.pow(4).flatten(2)
    side, reach = kernels.shape[-1] + STRIDE - 1, kernels.shape[-1] // 2
    return nn.functional.fold(drawn, (STRIDE * height, STRIDE * width), side, padding=reach, stride=STRIDE)


def _moved(kernel: Tensor, row: int, column: int) -> Tensor:
    return nn.functional.pad(kernel, (column, STRIDE - 1 - column, row, STRIDE - 1 - row))


def line_kernels(noise: Noise, reach: int) -> Tensor:
    """Seven blurred lines [n,7,K,K] a sample, K = 2 reach + 1, symmetric about the centre."""
    shortest = max(1, reach // 3)
    rows, columns = (integers(noise, (KERNELS,), reach - shortest + 1) + shortest for _ in range(2))
    drawn, blur = fractions(noise, (KERNELS,)), 0.41 + 0.19 * fractions(noise, (KERNELS,))
    widths = 1 + 2 * ((drawn >= 0.6).float() + (drawn >= 0.9).float())
    quarter = _quarter(rows, columns, widths, reach)
    lines = nn.functional.pad(quarter, (reach, 0, reach, 0))
    lines = torch.maximum(lines, lines.flip(2, 3))
    mirrored = (fractions(noise, ()) < 0.5)[:, None, None, None]
    return _blurred(torch.where(mirrored, lines.flip(3), lines), blur)


def _quarter(rows: Tensor, columns: Tensor, widths: Tensor, reach: int) -> Tensor:
    """The lower right quarter [n,7,reach+1,reach+1] of lines from the centre to (rows, columns), with soft edges."""
    steep = rows > columns
    longer, shorter = torch.maximum(rows, columns), torch.minimum(rows, columns)
    slope = (shorter / longer)[..., None, None]
    along = torch.arange(reach + 1, device=rows.device)
    across = along[:, None]
    thickness = widths[..., None, None] * (1 + slope).sqrt() / 2
    value = (1 + thickness / 2 - (across - slope * along).abs()).clamp(0.0, 1.0)
    value = value * (along <= longer[..., None, None])
    return torch.where(steep[..., None, None], value.transpose(2, 3), value)


def _blurred(lines: Tensor, sigma: Tensor) -> Tensor:
    """Lines [n,7,K,K] convolved with a Gaussian of 3 x 3 of sum 1 and `sigma` [n,7], zeros around."""
    side = torch.exp(-0.5 / sigma**2)
    line = torch.stack([side, torch.ones_like(side), side], -1)
    line = line / line.sum(-1, keepdim=True)
    shifted = nn.functional.unfold(lines.flatten(0, 1)[:, None], 3, padding=1)
    weights = (line[..., :, None] * line[..., None, :]).reshape(-1, 1, 9)
    return (weights @ shifted).reshape(lines.shape)


@ATTACKS.register("snow")
class SnowAttack(RenderedAttack):
    """Snow, sign steps of a fixed size on the intensities of its flakes."""

    Parameters = FixedStepParameters
    renders = Snow

    def renderer(self, epsilon: float) -> Snow:
        return Snow(epsilon)
