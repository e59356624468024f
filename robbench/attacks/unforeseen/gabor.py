"""Gabor noise: sparse points convolved with a random Gabor kernel (Co et al. 2019; Kang et al. 2019, section 3)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from robbench.attacks.named import ATTACKS
from robbench.attacks.search.constraints import Constraint, Range
from robbench.attacks.search.geometry import TINY, Noise
from robbench.attacks.search.rendered import Renderer, Shape
from robbench.attacks.unforeseen.base import FixedStepParameters, RenderedAttack
from robbench.attacks.unforeseen.draws import fractions, integers
from robbench.core.errors import UserError

KERNEL, SPARSITY, SIDES, EVENNESS = 23, 14, 10, 0.001


@dataclass(frozen=True)
class Gabor(Renderer):
    """x' = clip(x + e N(v)), e = epsilon / 255: N the noise in [0,1], the same in all channels.

    The variables v in [-1,1] are the values of one pixel in 14; the pixels are drawn per sample. N is that sparse image
    convolved with the sample's kernel of 23 x 23, then evened out: with d the difference from its mean, N is
    d / (0.001 + |d| / max |d|), moved and scaled to [0,1]. (The spectral variance of the public code is a Fourier
    transform and its inverse, which leaves |d|.) Variables of 0 give no noise, hence the clean image. As in the public
    code the gradient takes the statistics of N as constants: N is nearly the sign of d, whose own gradient vanishes but
    for pixels next to a change of sign.

    A kernel is the sum of 1 to 10 Gabor functions, turned by equal angles of pi: envelope sigma 0.1 to 0.4 of the side,
    3 to 5.75 waves over the side, first angle 0 to pi, all drawn per sample. Pixels and kernel are the scene.

    The public code moves the other 13 pixels of 14 and sets the sparse ones to 0 in its first step; here, as in the
    paper, the sparse ones move. Computed in float64: evening out magnifies rounding a thousand times.

    Attributes:
        epsilon: size of the noise on pixels 0..255.
    """

    epsilon: float
    unit = "pixels 0..255 of noise"
    usual = (0.5, 16384.0)

    def shape(self, image: Shape) -> tuple[int, ...]:
        _, height, width = image
        if min(height, width) < KERNEL:
            raise UserError(
                f"images of {height} x {width} pixels are too small for the gabor attack's kernel of {KERNEL}; leave "
                f"the attack out, or give a data set with sides of at least {KERNEL}"
            )
        return (round(height * width / SPARSITY),)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        return (Range("gabor variables", -1.0, 1.0),)

    def start(self, image: Shape, noise: Noise) -> Tensor:
        return noise.uniform(self.shape(image))

    def scene(self, x: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        _, channels, height, width = x.shape
        (points,) = self.shape((channels, height, width))
        order = noise.uniform((height * width,)).argsort(dim=1, stable=True)
        return {"places": order[:, :points], "kernels": gabor_kernels(noise)}

    def render(self, x: Tensor, scene: Mapping[str, Tensor], variables: Tensor) -> Tensor:
        height, width = x.shape[2:]
        sparse = torch.zeros((len(x), height * width), dtype=torch.float64, device=x.device)
        sparse = sparse.scatter(1, scene["places"], variables.double()).reshape(-1, 1, height, width)
        noise = even_out(convolve(sparse, scene["kernels"].double()))
        return (x + (self.epsilon / 255 * noise).to(x)).clamp(0.0, 1.0)


def gabor_kernels(noise: Noise) -> Tensor:
    """A kernel [n,1,23,23] a sample."""
    count = 1 + integers(noise, (), SIDES)[:, None]
    sigma, waves, angle = (fractions(noise, ())[:, None] for _ in range(3))
    turn = torch.arange(SIDES, device=count.device)
    turned = (math.pi * (angle + turn / count))[..., None, None]
    line = torch.linspace(-0.5, 0.5, KERNEL, device=count.device)
    distance = line.square() + line.square()[:, None]
    envelope = torch.exp(-0.5 * distance / (0.3 * sigma + 0.1 + 0.001)[..., None] ** 2)
    phase = (KERNEL / 4 - 3) * waves + 3
    wave = torch.cos(
        2 * math.pi * phase[..., None, None] * (line * turned.cos() + line[:, None] * turned.sin())
    )
    present = (turn < count)[..., None, None]
    return (wave * present).sum(1, keepdim=True) * envelope[:, None]


def convolve(images: Tensor, kernels: Tensor) -> Tensor:
    """Images [n,1,H,W] convolved with a kernel [n,1,K,K] each, zeros around, of the same size; by Fourier transform."""
    height, width = images.shape[2:]
    margin = kernels.shape[-1] - 1
    size, half = (height + margin, width + margin), margin // 2
    product = torch.fft.rfft2(images, size) * torch.fft.rfft2(kernels, size)
    whole: Tensor = torch.fft.irfft2(product, size)
    return whole[..., half : half + height, half : half + width]


def even_out(waves: Tensor) -> Tensor:
    """Waves [n,1,H,W] with equal contrast everywhere, in [0,1] per sample; 0 for a constant. The gradient takes mean,
    contrast and extremes as constants."""
    every = (1, 2, 3)
    with torch.no_grad():
        mean = waves.mean(every, keepdim=True)
        apart = (waves - mean).abs()
        largest = apart.amax(every, keepdim=True).clamp(min=TINY)
        gain = (1 + EVENNESS) / (EVENNESS + apart / largest)
        even = (waves - mean) * gain
        lowest, highest = even.amin(every, keepdim=True), even.amax(every, keepdim=True)
    return ((waves - mean) * gain - lowest) / (highest - lowest).clamp(min=TINY)


@ATTACKS.register("gabor")
class GaborAttack(RenderedAttack):
    """Gabor noise, sign steps of a fixed size on its sparse points."""

    Parameters = FixedStepParameters
    renders = Gabor

    def renderer(self, epsilon: float) -> Gabor:
        return Gabor(epsilon)
