"""Cost of model calls on this device, with which `--dry-run` converts counts into hours: seconds per image of a forward
and of a forward with its backward, each measured on one batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn

from robbench.attacks.search.spaces import Codec
from robbench.attacks.trust.model_call import out_of_memory
from robbench.attacks.victim import Victim
from robbench.core.device import now
from robbench.core.threads import multiply_adds, threads_for
from robbench.models.flows.base import FrozenFlow
from robbench.run.cells import SHARD_SIZE, Cell, ClassifierCell, FlowCell
from robbench.run.plan import Plan

LIMIT = 0.4  # seconds that the measured batch may take, estimated from a single image
Call = Callable[[int], object]  # one model call on a batch of so many images


@dataclass(frozen=True)
class Rate:
    """Seconds per image. forward: without a graph. both: a forward and its backward."""

    forward: float
    both: float

    def seconds(self, forwards: float, backwards: float) -> float:
        """Seconds of `forwards` forwards, `backwards` of which are followed by a backward."""
        return max(forwards - backwards, 0.0) * self.forward + backwards * self.both


def measure_seconds(call: Call, largest: int, device: torch.device) -> float:
    """Seconds per image of `call` on a batch of at most `largest` images that takes at most about `LIMIT` seconds; the
    batch is halved where memory is too small."""
    call(1)  # warm-up
    with threads_for(lambda: multiply_adds(lambda: call(1))):
        size = min(largest, max(1, int(LIMIT / max(_quickest(call, 1, device), 1e-6))))
        while True:
            try:
                return _quickest(call, size, device) / size
            except (RuntimeError, MemoryError) as error:
                if size == 1 or not out_of_memory(error):
                    raise
            size //= 2


def _quickest(call: Call, size: int, device: torch.device) -> float:
    """Seconds of the fastest of up to five calls on `size` images, of a single one where it takes long."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < 0.02:
        started = now(device)
        call(size)
        times.append(now(device) - started)
    return min(times)


def _measure(value: Callable[[Tensor], Tensor], points: Tensor) -> Rate:
    """The rate of `value`, points [n,...] -> [n] or their sum, and of its gradient to the points."""

    def forward(n: int) -> Tensor:
        with torch.no_grad():
            return value(points[:n])

    def both(n: int) -> object:
        point = points[:n].detach().requires_grad_(True)
        return torch.autograd.grad(value(point).sum(), point)

    return Rate(*(measure_seconds(call, len(points), points.device) for call in (forward, both)))


def measure_calls(
    model: nn.Module, codec: Codec | None, shape: Sequence[int], largest: int, device: torch.device
) -> Rate:
    """The rate of a model's calls in a search, in batches of at most `largest` images of `shape` (C,H,W): log-densities
    of a flow, logits of a classifier, with `codec` including the decoding of latents."""
    images = torch.rand(largest, *shape, device=device)
    if isinstance(model, FrozenFlow):
        return _measure(lambda x: model.log_prob(x, make_labels(x)), images)
    victim = Victim(model, device, largest)
    if codec is None:
        return _measure(lambda x: _loss(victim, x), images)
    latents = 0.1 * torch.randn(largest, prod(shape), device=device)
    return _measure(lambda z: _loss(victim, codec.decode_flat(z, make_labels(z))), latents)


def measure_training(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    largest: int,
    device: torch.device,
) -> float:
    """Seconds per image of a forward and the gradients of all parameters. loss: images [n,C,H,W] -> scalar. `module`
    must be in train mode; batches have at least two images, for batch norm."""
    images = torch.rand(max(largest, 2), *shape, device=device)

    def both(n: int) -> object:
        return torch.autograd.grad(loss(images[: max(n, 2)]), list(module.parameters()), allow_unused=True)

    return measure_seconds(both, len(images), device)


def measure_steps(
    step: Callable[[Tensor, Tensor, torch.Generator, float, int], object],
    shape: Sequence[int],
    largest: int,
    device: torch.device,
) -> float:
    """Seconds per image of a training step (`defenses.base.Optimization.step`) with learning rate 0 on `largest`
    images, but at least two, for batch norm. Where these may take longer than about `LIMIT` seconds, fewer are
    measured and the time is extrapolated: an optimiser takes as long for any batch."""
    images, generator = torch.rand(max(largest, 2), *shape, device=device), torch.Generator().manual_seed(0)

    def call(n: int) -> object:
        x = images[:n]
        return step(x, make_labels(x), generator, 0.0, 0)

    call(2)  # warm-up
    few = _quickest(call, 2, device)
    size = min(len(images), max(8, int(2 * LIMIT / max(few, 1e-6))))
    many = _quickest(call, size, device) if size > 2 else few
    slope = max(many - few, 0.0) / max(size - 2, 1)
    return (many + slope * (len(images) - size)) / len(images)


def make_labels(x: Tensor) -> Tensor:
    """Label 0 for every row of x, [n]; timings do not depend on the class."""
    return torch.zeros(len(x), dtype=torch.int64, device=x.device)


def _loss(victim: Victim, x: Tensor) -> Tensor:
    return nn.functional.cross_entropy(victim.differentiable(x), make_labels(x), reduction="sum")


@dataclass
class PlanRates:
    """Hours of a plan's cells; a model is measured once per kind of call that its attacks make."""

    plan: Plan
    _rates: dict[tuple[int, bool], Rate] = field(default_factory=dict)

    def hours(self, cell: Cell, samples: int) -> float:
        """Hours for `samples` robust samples, bits/dim of their images included."""
        if not samples:
            return 0.0
        rate, flow = self._rate(cell), self.plan.nll_flow
        seconds = rate.seconds(cell.cost.forwards, cell.cost.backwards)
        if flow is not None and isinstance(cell, ClassifierCell):
            seconds += self._measure(flow).forward  # of the adversarial image; cells share the clean one
        return samples * seconds / 3600

    def _rate(self, cell: Cell) -> Rate:
        if isinstance(cell, FlowCell):
            return self._measure(cell.model.flow)
        assert isinstance(cell, ClassifierCell)
        return self._measure(cell.model.module, cell.attack.flow)  # compiled searches are measured uncompiled

    def _measure(self, model: nn.Module, codec: Codec | None = None) -> Rate:
        key, plan = (id(model), codec is not None), self.plan  # all latent attacks of a run search one flow
        if key not in self._rates:
            largest = min(plan.batch_size, SHARD_SIZE, len(plan.samples))
            self._rates[key] = measure_calls(model, codec, plan.dataset.shape, largest, plan.device)
        return self._rates[key]


def format_hours(hours: float) -> str:
    """ "<0.01", "0.25", "3.1", "1,204" hours."""
    if hours < 0.01:
        return "0" if hours == 0 else "<0.01"
    return f"{hours:.2f}" if hours < 1 else f"{hours:.1f}" if hours < 100 else f"{hours:,.0f}"
