"""Shortest steps onto a hyperplane inside the pixel box [0,1]^D, one row per sample (for FAB).

By symmetry each problem is a continuous knapsack: coordinate i may move by 0 <= e_i <= room_i against the sign of
normal_i * gap, which closes |normal_i| e_i of the gap. Where no point of the hyperplane lies in the box, the step leads
to the corner nearest to it: every coordinate with a normal moves as far as it can (Croce & Hein 2020, eq. 5).
"""

import torch
from torch import Tensor

from robbench.attacks.search.geometry import is_on_cpu, known_empty
from robbench.specs import Norm

NEWTON_STEPS = 16  # each makes (gap left) * (slope left) at least 4 times smaller; 2 to 6 are usually exact

FARTHEST = 1e30  # largest level; finite, because infinity times a pace of 0 is NaN


def steps_to_hyperplane(points: Tensor, normal: Tensor, gap: Tensor, norm: Norm) -> Tensor:
    """Steps d [m,n,D] of least `norm` with normal . d = -gap and 0 <= points + d <= 1 (to rounding).

    points: [m,n,D] in [0,1], m points per sample. normal: [n,D]. gap: [m,n], normal . point minus the hyperplane's
    offset. norm: linf, l2 or l1; where several steps are shortest, one of them. A coordinate whose normal is 0 or not
    finite does not move; a point whose gap is not finite does not move. `ValueError` for another norm.
    """
    normal = normal.nan_to_num(0.0, 0.0, 0.0)
    largest = normal.abs().amax(1, keepdim=True).clamp(min=torch.finfo(normal.dtype).tiny)
    normal = normal / largest  # so that neither gap nor squares leave the range of float32
    # At most D can be closed; a finite bound keeps infinities out of the arithmetic.
    closing = (gap.nan_to_num(0.0, 0.0, 0.0) / largest.squeeze(1)).clamp_(
        -2.0 * normal.shape[1], 2.0 * normal.shape[1]
    )
    direction = normal.sign() * closing.unsqueeze(-1).sign().neg_()
    weight = normal.abs()
    # Exact for weights 0 and 1, and many times faster than torch.where on the CPU, which branches.
    room = torch.lerp(points, 1.0 - points, direction.clamp(min=0.0)).mul_(direction.abs())
    closing.abs_()
    if norm == "l1":
        moved = _steepest_first(weight, room, closing)
    elif norm in ("linf", "l2"):
        moved = _move_to_level(weight, None if norm == "linf" else weight, room, closing)
    else:
        raise ValueError(f"no shortest steps in norm {norm!r}; give linf, l2 or l1")
    return moved.mul_(direction)


def _move_to_level(weight: Tensor, pace: Tensor | None, room: Tensor, closing: Tensor) -> Tensor:
    """e = min(level * pace, room) with weight . e = closing; `room` where that closes too little.

    The sum is concave and piecewise linear in the level: Newton's method from level 0 rises to the root and is exact
    once it has met the right segment. weight, pace: [n,D] >= 0, pace None for 1; room: [m,n,D] >= 0; closing: [m,n].
    """
    slopes = weight if pace is None else weight * pace
    closing = closing.unsqueeze(-1)
    level, slope = torch.zeros_like(closing), torch.zeros_like(closing)
    moved, scratch = torch.zeros_like(room), torch.empty_like(room)
    for _ in range(NEWTON_STEPS):
        before = slope
        slope = torch.gt(room, moved, out=scratch).mul_(slopes).sum(-1, keepdim=True)
        left = closing - torch.mul(moved, weight, out=scratch).sum(-1, keepdim=True)
        level = (level + (left / slope).masked_fill_(slope == 0, 0.0)).clamp_(0.0, FARTHEST)
        reached = level.expand_as(room) if pace is None else torch.mul(level, pace, out=scratch)
        torch.minimum(reached, room, out=moved)
        # Converged: further steps change nothing.
        if is_on_cpu(slope) and torch.equal(before, slope):
            break
    return _move_to_corner(moved, room, closing >= torch.mul(room, weight, out=scratch).sum(-1, keepdim=True))


def _move_to_corner(moved: Tensor, room: Tensor, out_of_reach: Tensor) -> Tensor:
    """`moved`, with `room` (the corner of the box) where out_of_reach [m,n,1]."""
    if known_empty(out_of_reach):
        return moved
    return torch.where(out_of_reach, room, moved)


def _steepest_first(weight: Tensor, room: Tensor, closing: Tensor) -> Tensor:
    """Least sum of e with weight . e = closing, 0 <= e <= room: the largest weights move, each as far as it can.

    One sort of the weights serves the m points of a sample. Shapes as for `_move_to_level`.
    """
    weight, order = weight.sort(dim=-1, descending=True)
    order = order.expand_as(room)
    room = room.gather(-1, order)
    closed = (weight * room).double().cumsum(-1).to(room.dtype)
    left = closing.unsqueeze(-1) - torch.nn.functional.pad(closed[..., :-1], (1, 0))
    moved = (left / weight).nan_to_num_(0.0).clamp_(min=0.0).minimum(room)  # 0/0: nothing left to close
    out_of_reach = closing.unsqueeze(-1) >= closed[..., -1:]
    return torch.empty_like(room).scatter_(-1, order, _move_to_corner(moved, room, out_of_reach))
