"""Geometry of the intersection of L1 ball and pixel box, one row per sample (for L1-APGD).

Projecting on the ball and then on the box ends inside the ball: where many pixels are near 0 or 1, at most half of the
radius is used (Croce & Hein 2021, section 3). Projection and steps here respect both constraints.
"""

import math

import torch
from torch import Tensor

from robbench.attacks.search.geometry import finite_part


def project_l1_box(delta: Tensor, x: Tensor, radius: Tensor) -> Tensor:
    """Nearest point (Euclidean) to `delta` of {z: ||z||_1 <= radius, 0 <= x + z <= 1}; to rounding.

    delta, x: [n, ...], x in [0,1], delta finite; radius: [n], at least 0. A coordinate that the projection removes is
    exactly 0. Exact by sorting, O(D log D) (Croce & Hein 2021, proposition 3.1): |z_i| is |delta_i| minus a threshold
    per sample, clamped between 0 and the room left in the box.
    """
    size = delta.flatten(1).abs()
    room = torch.where(delta > 0, 1.0 - x, x).flatten(1)
    fits = torch.minimum(size, room).sum(1, dtype=torch.float64) <= radius
    threshold = _threshold(size, room, radius).masked_fill_(fits, 0.0)
    kept = (size - threshold[:, None]).clamp_(min=0.0).minimum(room)
    return kept.reshape(delta.shape).mul_(delta.sign())


def _threshold(size: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """t [n] with sum_i clamp(size_i - t, 0, room_i) = radius. size, room: [n,D].

    The sum falls piecewise linearly in t; its slope changes at size_i (coordinate i becomes positive, going down) and
    at size_i - room_i (it reaches the box).
    """
    dimensions = size.shape[1]
    knots, order = torch.cat([size, (size - room).clamp_(min=0.0)], 1).sort(dim=1, descending=True)
    free = torch.where(order < dimensions, 1, -1).cumsum(1)[:, :-1]
    mass = (free * (knots[:, :-1] - knots[:, 1:])).double().cumsum(1)  # the sum at t = knots[:, 1:]
    # The first segment at whose lower end the sum has reached the radius.
    segment = (mass < radius[:, None]).sum(1, keepdim=True).clamp_(max=mass.shape[1] - 1)
    before = torch.nn.functional.pad(mass, (1, 0)).gather(1, segment)
    rise = (radius[:, None] - before) / free.gather(1, segment).clamp(min=1)
    threshold = (knots.gather(1, segment) - rise).clamp_(min=0.0).to(size.dtype)
    return _correct_threshold(threshold, size, room, radius)


def _correct_threshold(threshold: Tensor, size: Tensor, room: Tensor, radius: Tensor) -> Tensor:
    """One Newton step, which removes the rounding of the knots and of the threshold."""
    above = size - threshold
    free = ((above > 0) & (above < room)).sum(1)
    excess = above.clamp_(min=0.0).minimum(room).sum(1, dtype=torch.float64) - radius
    return (threshold[:, 0] + excess / free.clamp(min=1)).clamp_(min=0.0).to(size.dtype)


def furthest_point(gradient: Tensor, room: Tensor, radius: float) -> Tensor:
    """The point z of {||z||_1 <= radius, |z_i| <= room_i} with the largest <gradient, z>: the radius is spent on the
    largest |gradient| first, up to the room. gradient, room: [n, ...], room at least 0; coordinates whose gradient is
    0, NaN or infinite get 0."""
    flat = finite_part(gradient).flatten(1)
    order = flat.abs().sort(dim=1, descending=True, stable=True).indices
    own = room.flatten(1).gather(1, order)
    before = own.cumsum(1, dtype=torch.float64) - own
    spent = (radius - before).clamp_(min=0.0).minimum(own).to(flat.dtype)
    return torch.zeros_like(flat).scatter_(1, order, spent).mul_(flat.sign()).reshape(gradient.shape)


def sparse_direction(gradient: Tensor, count: Tensor) -> Tensor:
    """Signs of the `count` [n] (1..D) largest |gradient| coordinates (ties included), divided by their number, so that
    the L1 norm is 1; coordinates whose gradient is 0, NaN or infinite get 0. gradient: [n, ...]."""
    flat = finite_part(gradient).flatten(1)
    size = flat.abs()
    least = size.sort(dim=1, descending=True).values.gather(1, count[:, None] - 1)
    signs = flat.sign_().masked_fill_(size < least, 0.0)
    return (signs / signs.abs().sum(1, keepdim=True).clamp_(min=1.0)).reshape(gradient.shape)


def support_size(delta: Tensor) -> Tensor:
    """Number of coordinates that are not 0, [n] float32."""
    return (delta != 0).flatten(1).sum(1).to(torch.float32)


def rounding_allowance(epsilon: float, dimensions: int) -> float:
    """By how much to stay below an L1 or L2 radius, so that the norm of (x + delta) - x in `dimensions` float32
    coordinates does not exceed it: covers rounding of delta, and of each pixel (at most 2**-25) with random sign. At
    most 1 % of epsilon.

    Where all pixels round to the same side (an image of one grey level, moved evenly) the norm may still exceed the
    radius; the base class then shortens the perturbation (`checks.inside_ball`)."""
    return min(1e-6 * epsilon + 1e-7 * math.sqrt(dimensions), 0.01 * epsilon)
