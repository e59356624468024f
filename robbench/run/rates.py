"""What model calls cost on this device: seconds an image of a forward and of a forward with its backward, each measured
for a moment at the batch where it is cheapest. What `--dry-run` turns counts into hours with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from robbench.attacks.search.spaces import Codec
from robbench.attacks.threads import multiply_adds, threads_for
from robbench.attacks.trust.model_call import out_of_memory
from robbench.attacks.victim import Victim
from robbench.core.device import now
from robbench.models.flows.base import FlowModel
from robbench.run.cells import SHARD_SIZE, Cell, ClassifierCell, FlowCell
from robbench.run.plan import Plan

LIMIT = 0.4  # seconds after which a measurement tries no larger batch
BATCHES = (1, 4, 16, 32, 64, 128, 256, 512, 1024)
Call = Callable[[int], object]  # one model call on a batch of that many images


@dataclass(frozen=True)
class Rate:
    """Seconds an image. forward: without a graph. both: a forward and its backward."""

    forward: float
    both: float

    def seconds(self, forwards: float, backwards: float) -> float:
        """Of so many forwards, `backwards` of which are followed by a backward."""
        return max(forwards - backwards, 0.0) * self.forward + backwards * self.both


def seconds_an_image(call: Call, largest: int, device: torch.device, limit: float = LIMIT) -> float:
    """Lowest seconds an image of `call` over growing batches of at most `largest`; stops where batches no longer help,
    memory is full, or `limit` seconds have passed."""
    call(1)  # whatever only the first call costs
    with threads_for(lambda: multiply_adds(lambda: call(1))):
        return _lowest(call, largest, device, limit)


def _lowest(call: Call, largest: int, device: torch.device, limit: float) -> float:
    best, worse, began = float("inf"), 0, now(device)
    for size in [*(batch for batch in BATCHES if batch < largest), largest]:
        try:
            spent = _quickest(lambda size=size: call(size), device) / size  # type: ignore[misc]
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not out_of_memory(error):
                raise
            return best
        worse = worse + 1 if spent > best else 0
        best = min(best, spent)
        if worse == 2 or (size > 1 and now(device) - began > limit):
            return best
    return best


def _quickest(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of up to five calls; of one that takes long, a single one."""
    times: list[float] = []
    while len(times) < 5 and sum(times) < 0.02:
        started = now(device)
        call()
        times.append(now(device) - started)
    return min(times)


def measured(forward: Call, both: Call, largest: int, device: torch.device) -> Rate:
    """The rate of a pair of calls."""
    return Rate(*(seconds_an_image(call, largest, device) for call in (forward, both)))


# ---------------------------------------------------------------------------------------------------- searches
def classifier_rate(victim: Victim, shape: Sequence[int], largest: int) -> Rate:
    """Of logits and of the gradient to the image, in the search's precision. shape: (C,H,W)."""
    images = _images(shape, largest, victim.device)
    labels = torch.zeros(largest, dtype=torch.int64, device=victim.device)
    return measured(
        lambda n: victim.logits(images[:n]),
        lambda n: victim.loss_gradient(images[:n], labels[:n]),
        largest,
        victim.device,
    )


def latent_rate(victim: Victim, codec: Codec, shape: Sequence[int], largest: int) -> Rate:
    """Of decoding latents and classifying the image, and of the gradient to the latents."""
    z = 0.1 * torch.randn(largest, _size(shape), device=victim.device)
    labels = torch.zeros(largest, dtype=torch.int64, device=victim.device)

    def forward(n: int) -> Tensor:
        with torch.no_grad():
            return victim.differentiable(codec.decode_flat(z[:n], labels[:n]))

    def both(n: int) -> object:
        point = z[:n].detach().requires_grad_(True)
        loss = nn.functional.cross_entropy(
            victim.differentiable(codec.decode_flat(point, labels[:n])), labels[:n], reduction="sum"
        )
        return torch.autograd.grad(loss, point)

    return measured(forward, both, largest, victim.device)


def likelihood_rate(flow: FlowModel, shape: Sequence[int], largest: int, device: torch.device) -> Rate:
    """Of a flow's log-density and of its gradient to the image."""
    images = _images(shape, largest, device)
    labels = torch.zeros(largest, dtype=torch.int64, device=device)

    def forward(n: int) -> Tensor:
        with torch.no_grad():
            return flow.log_prob(images[:n], labels[:n])

    def both(n: int) -> object:
        point = images[:n].detach().requires_grad_(True)
        return torch.autograd.grad(flow.log_prob(point, labels[:n]).sum(), point)

    return measured(forward, both, largest, device)


def training_rate(
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    largest: int,
    device: torch.device,
) -> float:
    """Seconds an image of a forward and the gradients of all parameters. loss: images [n,C,H,W] -> scalar. `module`
    must be in train mode; at least two images a batch, for batch norm."""
    images = _images(shape, max(largest, 2), device)

    def both(n: int) -> object:
        return torch.autograd.grad(loss(images[: max(n, 2)]), list(module.parameters()), allow_unused=True)

    return seconds_an_image(both, max(largest, 2), device)


def _images(shape: Sequence[int], n: int, device: torch.device) -> Tensor:
    return torch.rand(n, *shape, device=device)


def _size(shape: Sequence[int]) -> int:
    return int(torch.tensor(shape).prod())


# ------------------------------------------------------------------------------------------------ cells of a plan
@dataclass
class PlanRates:
    """Hours of a plan's cells. A model is measured once for each kind of call that its attacks make."""

    plan: Plan
    _rates: dict[tuple[int, int], Rate] = field(default_factory=dict)

    def hours(self, cell: Cell, samples: int) -> float:
        """Of `samples` samples that stay robust to the end, bits/dim of their images included."""
        if not samples:
            return 0.0
        seconds = self._rate(cell).seconds(cell.cost.forwards, cell.cost.backwards)
        return samples * (seconds + self._scoring(cell)) / 3600

    def _rate(self, cell: Cell) -> Rate:
        plan = self.plan
        shape, largest = plan.dataset.shape, min(plan.batch_size, SHARD_SIZE, len(plan.samples))
        if isinstance(cell, FlowCell):
            flow = cell.model.flow
            return self._once(flow, None, lambda: likelihood_rate(flow, shape, largest, plan.device))
        assert isinstance(cell, ClassifierCell)
        codec = cell.attack.flow
        victim = Victim(cell.model.module, plan.device, largest)  # compiled searches are measured uncompiled
        if codec is None:
            return self._once(cell.model.module, None, lambda: classifier_rate(victim, shape, largest))
        return self._once(
            cell.model.module, plan.nll_flow, lambda: latent_rate(victim, codec, shape, largest)
        )

    def _scoring(self, cell: Cell) -> float:
        """Bits/dim of a sample's adversarial image and its clean one, which the cells of a run share."""
        flow, plan = self.plan.nll_flow, self.plan
        if flow is None or not isinstance(cell, ClassifierCell):
            return 0.0
        largest = min(plan.batch_size, SHARD_SIZE, len(plan.samples))
        shape = plan.dataset.shape
        return self._once(flow, None, lambda: likelihood_rate(flow, shape, largest, plan.device)).forward

    def _once(self, module: nn.Module, flow: nn.Module | None, measure: Callable[[], Rate]) -> Rate:
        key = (id(module), id(flow))
        if key not in self._rates:
            self._rates[key] = measure()
        return self._rates[key]


def hours_text(hours: float) -> str:
    """ "<0.01", "0.25", "3.1", "1,204" hours."""
    if hours < 0.01:
        return "0" if hours == 0 else "<0.01"
    return f"{hours:.2f}" if hours < 1 else f"{hours:.1f}" if hours < 100 else f"{hours:,.0f}"
