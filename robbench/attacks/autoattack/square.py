"""Square attack (Andriushchenko et al. 2020): random search on the margin, forwards only; Linf, L2 and L1.

Schedule, starts, windows and budget are those of AutoAttack's standard version. Windows, sizes and signs are drawn per
sample, keyed by its id and the number of the query. A query whose answer is known costs no forward, see `SignWindows`.
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from robbench.attacks.autoattack.square_windows import (
    POSITION_BITS,
    Schedule,
    pattern,
    random_coins,
    window_sizes,
    window_spans,
)
from robbench.attacks.search.active import Search, fresh_state
from robbench.attacks.search.decision import margins
from robbench.attacks.search.geometry import TINY, norm_of, per_sample, put
from robbench.attacks.search.geometry_l1 import project_l1_box, rounding_allowance
from robbench.attacks.search.spaces import State
from robbench.attacks.search.task import Task
from robbench.attacks.victim import Victim
from robbench.core.errors import UserError
from robbench.core.random import KeyedNumbers
from robbench.specs import Norm

MOST_REMEMBERED = 2**16  # possible windows up to which refusals are stored; with more, repeats are rare


class Moves(ABC):
    """Start and proposals of a norm. It adds its own state entries; "keys", "x" and "adversarial" are given."""

    def __init__(self, epsilon: float, shape: tuple[int, ...], schedule: Schedule) -> None:
        self.epsilon, self.shape, self.schedule = epsilon, shape, schedule

    @abstractmethod
    def start(self, keys: Tensor, x: Tensor) -> State:
        """Entries of samples x [n,C,H,W] before the first query, "adversarial" (the image to score) included."""

    @abstractmethod
    def propose(self, state: State) -> tuple[Tensor, Tensor, State]:
        """(query numbers [n], which may exceed the last one; their images [n,C,H,W]; input of `accept`)."""

    @abstractmethod
    def accept(self, state: State, better: Tensor, proposal: State) -> None:
        """Update own state entries in place where `better` [n]; "adversarial" is already updated."""

    def leave(self, state: State) -> None:
        """Free what is stored outside the state for samples that leave."""
        return


class SignWindows(Moves):
    """Linf: every pixel at x - eps or x + eps (clipped to the box); a window gets one sign per channel.

    The answer to many queries is known: a window that already has these signs gives the best image itself, and the same
    window may have been refused since the best image last changed. Both are refused without a forward, at most
    `ahead` - 1 queries per step; queries and results are the same as with one forward per query.

    All queries of a sample are computed before the first one. State: "signs" [n,C,H,W] of -1 and 1; "place" [n], index
    of the sample in `plans` [places, queries, 3 + C] int32, see `_plan`; "refused" [n, 2^C H W], `_stamp` of the last
    refusals; "changes" [n].
    """

    def __init__(self, epsilon: float, shape: tuple[int, ...], schedule: Schedule, ahead: int) -> None:
        super().__init__(epsilon, shape, schedule)
        device = schedule.at.device
        self.ahead = torch.arange(1, ahead + 1, device=device)
        queries = torch.arange(schedule.queries + ahead + 1, device=device).clamp_(max=schedule.queries)
        self.side, self.kind = schedule.at[queries, 0], schedule.kind[queries]
        self.area = (self.side * self.side).float()
        self.lines, self.bands = (_stripes(schedule.sides, length, device) for length in shape[1:])
        self.plans = torch.zeros((0, len(queries), 3 + shape[0]), dtype=torch.int32, device=device)
        self.free: list[int] = []
        self.windows = 2 ** shape[0] * shape[1] * shape[2]
        self.remembers = self.windows <= MOST_REMEMBERED

    def start(self, keys: Tensor, x: Tensor) -> State:
        channels, _, width = self.shape
        words = KeyedNumbers.bits(keys, torch.zeros_like(keys), -(-channels * width // 64))
        stripes = random_coins(words, channels * width).reshape(-1, channels, 1, width).to(x.dtype) * 2 - 1
        signs = stripes.expand(x.shape).clone()
        entries = {
            "signs": signs,
            "adversarial": self._images(x, signs),
            "place": self._store_plan(self._plan(keys)),
        }
        if self.remembers:
            entries["refused"] = torch.zeros((len(x), self.windows), dtype=torch.int32, device=x.device)
            entries["changes"] = torch.zeros_like(keys, dtype=torch.int32)
        return entries

    def _store_plan(self, plan: Tensor) -> Tensor:
        """Copy `plan` [n, ...] into `plans` and return its indices [n]: the state is copied whenever a sample
        leaves."""
        missing = max(len(plan) - len(self.free), 0)
        self.free += range(len(self.plans), len(self.plans) + missing)
        self.plans = torch.cat([self.plans, plan[:missing]])
        places, self.free = self.free[: len(plan)], self.free[len(plan) :]
        where = torch.tensor(places, dtype=torch.int64, device=plan.device)
        self.plans[where] = plan
        return where

    def leave(self, state: State) -> None:
        self.free += state["place"].tolist()

    def _plan(self, keys: Tensor) -> Tensor:
        """Per query: the window's row in `lines` and in `bands`, its index in state["refused"], its sign per
        channel."""
        channels, height, width = self.shape
        queries = torch.arange(len(self.kind), device=keys.device).expand(len(keys), -1)
        count = -(-(POSITION_BITS + channels) // 64)  # a position, and a coin per channel
        words = KeyedNumbers.bits(keys[:, None].expand_as(queries).flatten(), queries.flatten(), count)
        words = words.reshape(*queries.shape, count)
        place, _ = self.schedule.windows(words[..., 0], queries)
        coins = random_coins(words, channels, POSITION_BITS)
        code = (coins << torch.arange(channels, device=keys.device)).sum(-1)
        window = (code * height + place[..., 0]) * width + place[..., 1] if self.remembers else code
        spans = place + self.kind[:, None] * torch.tensor((height, width), device=keys.device)
        return torch.cat([spans, window[..., None], 2 * coins - 1], 2).to(torch.int32)

    def propose(self, state: State) -> tuple[Tensor, Tensor, State]:
        queries = state["iteration"][:, None] + self.ahead
        at = (state["place"][:, None] * len(self.kind) + queries).flatten()  # one index is faster than two
        plan = self.plans.flatten(0, 1).index_select(0, at).reshape(*queries.shape, -1)  # [n, ahead, 3 + C]
        rows, columns = self._spans(plan)
        signs = plan[..., 3:].to(state["x"].dtype)
        # A window changes nothing where its pixels sum to its area times its signs.
        sums = ((rows[:, None] @ state["signs"]) * columns[:, None]).sum(-1)  # [n, C, ahead]
        known = (sums.transpose(1, 2) == self.area[queries][..., None] * signs).all(-1)
        if self.remembers:
            window, stamp = plan[..., 2].long(), self._stamp(state["changes"][:, None], self.side[queries])
            known |= state["refused"].gather(1, window) == stamp
        known[:, -1] = False
        pick = known.to(torch.uint8).argmin(1, keepdim=True)  # the first query whose answer is not known
        if self.remembers:
            state["refused"].scatter_(1, window.gather(1, pick), stamp.gather(1, pick))
        flat = (pick.squeeze(1) + torch.arange(0, known.numel(), len(self.ahead), device=pick.device)).long()
        row, column, sign = (t.flatten(0, 1).index_select(0, flat) for t in (rows, columns, signs))
        filled = self._fill_window(state["signs"], row, column, sign)
        return queries.flatten().index_select(0, flat), self._images(state["x"], filled), {"signs": filled}

    def accept(self, state: State, better: Tensor, proposal: State) -> None:
        put(state["signs"], proposal["signs"], better)
        if self.remembers:
            state["changes"] += better

    def _images(self, x: Tensor, signs: Tensor) -> Tensor:
        return torch.add(x, signs, alpha=self.epsilon).clamp_(0.0, 1.0)

    def _spans(self, plan: Tensor) -> tuple[Tensor, Tensor]:
        """Rows [n, ahead, H] and columns [n, ahead, W] of the windows, 1 inside and 0 outside."""
        chosen = (
            table.index_select(0, plan[..., axis].flatten())
            for axis, table in ((0, self.lines), (1, self.bands))
        )
        rows, columns = (spans.reshape(*plan.shape[:2], -1) for spans in chosen)
        return rows, columns

    def _fill_window(self, have: Tensor, row: Tensor, column: Tensor, sign: Tensor) -> Tensor:
        """`have` with `sign` [n,C] in the window of row [n,H] and column [n,W]: adds twice the sign and clips to 1."""
        stripes = row[:, None] * (2.0 * sign)[..., None]
        return torch.addcmul(have, stripes[..., None], column[:, None, None]).clamp_(-1.0, 1.0)

    def _stamp(self, changes: Tensor, side: Tensor) -> Tensor:
        """A nonzero int32 code of (number of changes of the best image, side of the window)."""
        return (changes * (max(self.shape[1:]) + 1) + side).to(torch.int32)


def _stripes(sides: list[int], length: int, device: torch.device) -> Tensor:
    """Row `kind * length + first`: 1 inside a window of sides[kind] that begins at `first`, else 0."""
    first = torch.arange(length)[:, None]
    inside = [(torch.arange(length) >= first) & (torch.arange(length) < first + side) for side in sides]
    return torch.cat(inside).float().to(device)


class PatternWindows(Moves):
    """L2 and L1: one window takes the norm of two windows and the rest of the budget; its shape is `pattern` plus what
    it had."""

    def __init__(self, norm: Norm, epsilon: float, shape: tuple[int, ...], schedule: Schedule) -> None:
        super().__init__(epsilon, shape, schedule)
        self.norm: Norm = norm
        self.radius = epsilon - rounding_allowance(epsilon, math.prod(shape))
        self.extent = torch.tensor(shape[1:], device=schedule.at.device)
        self.patterns = self._patterns()

    def start(self, keys: Tensor, x: Tensor) -> State:
        """Patterns side by side over the whole image, each with a random direction, and a random sign per channel."""
        channels, height, width = self.shape
        side = max(min(height, width) // 5, 1)
        down, across = height // side, width // side
        tiles = down * across
        words = KeyedNumbers.bits(keys, torch.zeros_like(keys), -(-tiles * (channels + 1) // 64))
        coins = random_coins(words, tiles * (channels + 1)).reshape(-1, channels + 1, down, across, 1, 1)
        shape = pattern(side, self.norm).to(x.device)
        filled = torch.where(coins[:, :1] == 1, shape, shape.T) * (coins[:, 1:] * 2 - 1)
        filled = filled.transpose(3, 4).reshape(-1, channels, down * side, across * side)
        delta = torch.zeros_like(x)
        above, before = (height - down * side) // 2, (width - across * side) // 2
        delta[:, :, above : above + down * side, before : before + across * side] = filled
        return {"adversarial": self._images(x, delta, project=self.norm == "l1")}

    def propose(self, state: State) -> tuple[Tensor, Tensor, State]:
        channels = self.shape[0]
        query = state["iteration"] + 1
        words = KeyedNumbers.bits(state["keys"], query, 1 - (-(POSITION_BITS + channels + 1) // 64))
        place, side = self.schedule.windows(words[:, :2], query[:, None].expand(-1, 2))
        coins = random_coins(words[:, 1:], channels + 1, POSITION_BITS)
        kind = self.schedule.kind[query.clamp(max=self.schedule.queries)]
        corner = self.extent - place[:, 0]
        shape = self.patterns[kind, coins[:, 0], corner[:, 0], corner[:, 1]][:, None]
        signs = 2.0 * coins[:, 1:] - 1.0
        rows, columns = window_spans(place, side, self.shape)
        delta = self._move_windows(state["adversarial"] - state["x"], rows, columns, shape, signs)
        return query, self._images(state["x"], delta, project=self.norm == "l1" and channels > 1), {}

    def _move_windows(
        self, delta: Tensor, rows: Tensor, columns: Tensor, shape: Tensor, signs: Tensor
    ) -> Tensor:
        """delta with the second window emptied and the first filled. rows [n,2,H], columns [n,2,W]: 1 inside; shape
        [n,1,H,W]: the pattern at its place; signs [n,C]."""
        mass = self._mass(delta, rows, columns)  # [n,C] each, powers of the norm
        room = (self._power(self.radius) - mass[3].sum(1, keepdim=True)).clamp_(min=0.0)
        both = (mass[0] + mass[1] - mass[2]).clamp_(min=0.0)
        reach = (room / self.shape[0] + both).sqrt() if self.norm == "l2" else room + both * self.shape[0]
        size = mass[0].sqrt() if self.norm == "l2" else mass[0]
        lines, bands = rows[:, :, :, None], columns[:, :, None, :]
        inside = lines[:, :1] / (size + TINY)[..., None, None] * bands[:, :1]  # [n,C,H,W], 1 / size inside
        filled = torch.addcmul(shape * signs[..., None, None], delta, inside)
        order = 2 if self.norm == "l2" else 1
        scale = reach / (torch.linalg.vector_norm(filled, order, dim=(2, 3)) + TINY)
        keep = (1.0 - lines[:, :1] * bands[:, :1]).mul_(1.0 - lines[:, 1:] * bands[:, 1:])
        return torch.addcmul(filled.mul_(scale[..., None, None]), delta, keep)

    def _mass(self, delta: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        """Sums of |delta| (l1) or its square (l2), [n,C] each: first window, second, their intersection, the image."""
        power = delta * delta if self.norm == "l2" else delta.abs()
        bands = torch.cat([columns, columns.prod(1, keepdim=True), torch.ones_like(columns[:, :1])], 1)
        lines = torch.cat([rows, rows.prod(1, keepdim=True), torch.ones_like(rows[:, :1])], 1)
        sums = power @ bands.transpose(1, 2)[:, None]  # [n,C,H,4]
        return (sums * lines.transpose(1, 2)[:, None]).sum(2).unbind(-1)

    def accept(self, state: State, better: Tensor, proposal: State) -> None:
        """No entries but the image."""

    def _power(self, value: float) -> float:
        return value**2 if self.norm == "l2" else value

    def _images(self, x: Tensor, delta: Tensor, project: bool) -> Tensor:
        """Admissible images: projected on ball and box, or scaled into the ball (for l2 to its sphere) and clipped."""
        if project:
            radius = torch.full((len(x),), self.radius, device=x.device)
            return (x + project_l1_box(delta, x, radius)).clamp_(0.0, 1.0)
        scale = self.radius / (norm_of(delta, self.norm) + TINY)
        if self.norm == "l1":
            scale = scale.clamp(max=1.0)
        return torch.addcmul(x, delta, per_sample(scale, x)).clamp_(0.0, 1.0)

    def _patterns(self) -> Tensor:
        """View [kinds, 2, H+1, W+1, H, W]: at [kind, transposed, H - top, W - left] an image of zeros with the pattern
        in the window at (top, left)."""
        _, height, width = self.shape
        kinds = len(self.schedule.sides)
        canvas = torch.zeros(kinds, 2, 2 * height, 2 * width, device=self.schedule.at.device)
        for kind, side in enumerate(self.schedule.sides):
            shape = pattern(side, self.norm)
            canvas[kind, 0, height : height + side, width : width + side] = shape
            canvas[kind, 1, height : height + side, width : width + side] = shape.T
        return canvas.unfold(2, height, 1).unfold(3, width, 1)


class Square(Search):
    """Square attack with the margin as loss. A query is an iteration; `forwards` counts the queries that needed a
    forward, and the one that scores the start.

    epsilon: radius in [0,1] pixels. name: of the attack, with `restart` the key of its random numbers. iterations:
    queries per robust sample. p_init, rescale: see `window_sizes`. ahead: queries considered per step (linf), of which
    those with known answers are skipped; None chooses by the image's size; results do not depend on it. `UserError` for
    other norms.
    """

    def __init__(
        self,
        norm: Norm,
        epsilon: float,
        name: str = "square",
        iterations: int = 5000,
        p_init: float = 0.8,
        rescale: bool = False,
        restart: int = 0,
        ahead: int | None = None,
    ) -> None:
        if norm not in ("linf", "l2", "l1"):
            raise UserError(f"square attack: norm {norm!r} has no windows; give linf, l2 or l1")
        self.norm: Norm = norm
        self.epsilon, self.name, self.iterations, self.restart = epsilon, name, iterations, restart
        self.p_init, self.rescale, self.ahead = p_init, rescale, ahead
        self._moves: tuple[tuple[int, ...], torch.device, Moves] | None = None

    def begin(self, victim: Victim, task: Task) -> State:
        moves = self._moves_for(task.x)
        keys = KeyedNumbers(task.seed, self.name, task.ids, self.restart, task.x.device).keys
        state = fresh_state(task.x) | {"x": task.x, "y": task.y, "keys": keys}
        state |= moves.start(keys, task.x)
        state["margin"] = margins(victim.logits(state["adversarial"]), task.y)
        state["broken"] = state["margin"] <= 0
        state["forwards"] += 1
        return state

    def step(self, victim: Victim, state: State) -> State:
        moves = self._moves_for(state["x"])
        query, images, proposal = moves.propose(state)
        margin = margins(victim.logits(images), state["y"])
        going = ~state["broken"] & (query <= self.iterations)
        hit = (margin <= 0) & going
        better = (margin < state["margin"]) & going | hit
        put(state["adversarial"], images, better)
        moves.accept(state, better, proposal)
        state["margin"] = torch.where(better, margin, state["margin"])
        state["iteration"] = query.clamp(max=self.iterations)
        state["broken_at"] = torch.where(hit, query, state["broken_at"])
        state["broken"] = state["broken"] | hit
        state["forwards"] += 1
        return state

    def leave(self, state: State) -> State:
        self._moves_for(state["x"]).leave(state)
        return state

    def _moves_for(self, x: Tensor) -> Moves:
        """The moves for images of x's shape, made once."""
        shape = tuple(x.shape[1:])
        if self._moves is None or self._moves[:2] != (shape, x.device):
            self._moves = (shape, x.device, self._new_moves(shape, x.device))
        return self._moves[2]

    def _new_moves(self, shape: tuple[int, ...], device: torch.device) -> Moves:
        sides = window_sizes(self.norm, shape, self.iterations, self.p_init, self.rescale)
        schedule = Schedule.of(sides, shape, device)
        if self.norm != "linf":
            return PatternWindows(self.norm, self.epsilon, shape, schedule)
        ahead = self.ahead or (16 if math.prod(shape) <= 256 else 4)
        return SignWindows(self.epsilon, shape, schedule, ahead)
