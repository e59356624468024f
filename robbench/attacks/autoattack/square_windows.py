"""Positions, sizes and patterns of the Square attack's windows (Andriushchenko et al. 2020, sections 3 and 5)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from robbench.attacks.search.geometry import TINY, norm_of
from robbench.specs import Norm

# Queries of 10,000 after which the share p of the image's pixels in a window halves (paper, section 5).
HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
POSITION_BITS = 48  # bits of a random word that give the position of a window


def window_sizes(
    norm: Norm, shape: tuple[int, ...], iterations: int, p_init: float = 0.8, rescale: bool = False
) -> Tensor:
    """Side of the window of queries 1..iterations, [iterations + 1] int64 (entry 0 is that of query 1).

    shape: (C,H,W). rescale: stretch the schedule, made for 10,000 queries, to `iterations`; AutoAttack does not. Sides
    are at most min(H,W); for l2 and l1 at least 3 and odd, where the image is large enough.
    """
    queries = [max(i - 1, 0) for i in range(iterations + 1)]
    steps = [int(q / iterations * 10_000) if rescale else q for q in queries]
    shares = [p_init / 2 ** sum(step > bound for bound in HALVINGS) for step in steps]
    sides = [round(math.sqrt(share * shape[1] * shape[2])) for share in shares]
    if norm != "linf":
        sides = [max(side, 3) | 1 for side in sides]
    return torch.tensor(sides).clamp(1, min(shape[1:]))


def pattern(side: int, norm: Norm) -> Tensor:
    """The pattern that an l2 or l1 window adds, [side, side] with norm 1: a hill above a valley."""
    out = torch.cat([_hill(side // 2, side, norm), -_hill(side - side // 2, side, norm)])
    return out / norm_of(out[None], norm)


def _hill(height: int, width: int, norm: Norm) -> Tensor:
    """Nested squares around the middle, the k-th of weight k**-2 (l2) or k**-4 (l1), norm 1 (paper, eq. 2)."""
    power = 2 if norm == "l2" else 4
    rows = (torch.arange(height) - height // 2).abs()[:, None]
    columns = (torch.arange(width) - width // 2).abs()[None, :]
    rings = torch.maximum(rows, columns).expand(height, width)
    reach = max(height // 2, width // 2) + 1
    weights = torch.arange(1, reach + 1, dtype=torch.float32) ** -power
    out = weights.flip(0).cumsum(0).flip(0)[rings]
    return out / norm_of(out[None], norm).clamp(min=TINY) if height else out


def random_coins(words: Tensor, count: int, skip: int = 0) -> Tensor:
    """Random 0 or 1, [..., count], from words [..., W] of 64 random bits, the first `skip` bits left out."""
    place = torch.arange(skip, skip + count, device=words.device)
    return words[..., place // 64] >> place % 64 & 1


def window_spans(place: Tensor, side: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Rows [..., H] and columns [..., W], float32, of windows with upper left corner `place` [..., 2] and `side` [...]:
    1 inside and 0 outside."""
    length = max(shape[1:])
    half = (0.5 * side)[..., None, None]
    distance = torch.arange(0.5, length, device=place.device) - (place[..., None] + half)
    inside = (half + 0.5 - distance.abs_()).clamp_(0.0, 1.0)
    return inside[..., 0, : shape[1]], inside[..., 1, : shape[2]]


@dataclass(frozen=True)
class Schedule:
    """Windows of queries 0..iterations. at: [iterations + 1, 3], side of the window, and the number of rows and of
    columns it may begin at. kind: index of the side in `sides`, the different sides."""

    at: Tensor
    kind: Tensor
    sides: list[int]

    @staticmethod
    def of(side: Tensor, shape: tuple[int, ...], device: torch.device) -> "Schedule":
        sides, kind = torch.unique(side, return_inverse=True)
        at = torch.stack([side, shape[1] - side + 1, shape[2] - side + 1], 1)
        return Schedule(at.to(device), kind.to(device), sides.tolist())

    @property
    def queries(self) -> int:
        """Number of the last query."""
        return len(self.at) - 1

    def windows(self, words: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
        """Windows uniform over the positions where they fit: upper left corners [..., 2] and sides [...].

        words: [...], of whose 64 random bits the lower 48 are used; query: [...], those past the last have its side.
        """
        at = self.at[query.clamp(max=self.queries)]
        shifts = torch.arange(0, POSITION_BITS, 24, device=words.device)
        return (words[..., None] >> shifts & 0xFFFFFF) * at[..., 1:] >> 24, at[..., 0]
