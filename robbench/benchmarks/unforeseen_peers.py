"""Elastic and JPEG as the public code of Kang et al. computes them, in plain PyTorch: every step convolves with a
kernel in two dimensions and samples, or transforms, quantises, disturbs and transforms back the whole image. Written
from the definitions; the published package itself runs on CUDA alone."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from robbench.attacks.unforeseen.jpeg import CHROMINANCE, FROM_CHROMA, LUMINANCE, TO_CHROMA

Render = Callable[[Tensor, Tensor], Tensor]  # images [n,C,H,W], variables -> images


def elastic(x: Tensor, flow: Tensor) -> Tensor:
    """Images [n,C,S,S] displaced along a flow [n,2,S,S] in pixels, smoothed with sigma 3 S / 224."""
    side, sigma = x.shape[-1], 3.0 * x.shape[-1] / 224.0
    reach = math.ceil(4 * sigma)
    places = torch.arange(-reach, reach + 1, dtype=x.dtype, device=x.device)
    rows, columns = torch.meshgrid(places, places, indexing="ij")
    kernel = torch.exp(-(rows**2 + columns**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(2, 1, -1, -1)
    padded = nn.functional.pad(flow * (2.0 / side), (reach,) * 4, mode="reflect")
    smooth = nn.functional.conv2d(padded, kernel, groups=2).permute(0, 2, 3, 1)
    line = torch.linspace(-1.0, 1.0, side, device=x.device)
    base = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1)
    return nn.functional.grid_sample(x, base + smooth, align_corners=True)


def jpeg(x: Tensor, variables: Tensor) -> Tensor:
    """Images [n,3,H,W], sides multiples of 16, encoded, disturbed by variables [n,1.5 H W] / 2, and decoded."""
    image = 255.0 * x.permute(0, 2, 3, 1)
    luma = image @ image.new_tensor([0.299, 0.587, 0.114])
    chroma = image @ image.new_tensor(TO_CHROMA).T + 128.0
    halves = nn.functional.avg_pool2d(chroma.permute(0, 3, 1, 2), 2)
    planes, decoded, begun = (luma, halves[:, 0], halves[:, 1]), [], 0
    for plane, table in zip(planes, (LUMINANCE, CHROMINANCE, CHROMINANCE), strict=True):
        count = plane[0].numel()
        decoded.append(_through_codec(plane, variables[:, begun : begun + count], table))
        begun += count
    blue, red = (one.repeat_interleave(2, 1).repeat_interleave(2, 2) - 128.0 for one in decoded[1:])
    coloured = torch.stack([blue, red], -1) @ image.new_tensor(FROM_CHROMA).T
    return ((decoded[0][..., None] + coloured) / 255.0).permute(0, 3, 1, 2)


def _through_codec(plane: Tensor, variables: Tensor, table: tuple[int, ...]) -> Tensor:
    """A plane [n,H,W] on 0..255, its coefficients in steps of `table` moved by variables [n,H W] / 2."""
    n, height, width = plane.shape
    blocks = plane.reshape(n, height // 8, 8, width // 8, 8).transpose(2, 3).reshape(n, -1, 8, 8) - 128.0
    place = torch.arange(8, dtype=plane.dtype, device=plane.device)
    waves = torch.cos((2 * place + 1) * place[:, None] * math.pi / 16)
    cosines = torch.einsum("ux,vy->xyuv", waves, waves)
    scale = torch.ones(8, device=plane.device)
    scale[0] = math.sqrt(0.5)
    scales, steps = torch.outer(scale, scale), plane.new_tensor(table).reshape(8, 8)
    coefficients = 0.25 * scales * torch.tensordot(blocks, cosines, dims=2) / steps
    coefficients = (coefficients + 0.5 * variables.reshape(blocks.shape)) * steps
    back: Tensor = 0.25 * torch.tensordot(coefficients * scales, cosines.permute(2, 3, 0, 1), dims=2) + 128.0
    return back.reshape(n, height // 8, width // 8, 8, 8).transpose(2, 3).reshape(n, height, width)


PEERS: dict[str, Render] = {"elastic": elastic, "jpeg-linf": jpeg}
