"""Is a module's input gradient that of its loss? Central finite differences against autograd at a few values.

For modules that robbench did not write and that were not trained in PyTorch: a wrong gradient makes every attack that
follows it look harmless.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from robbench.core.random import SampleRandom

CHECKED = 3  # coordinates with the largest gradient that are checked, and as many others
STEPS = {torch.float64: (1e-4, 1e-6), torch.float32: (2.0**-6, 2.0**-9)}
GRADIENT_TOLERANCE = {torch.float64: 1e-3, torch.float32: 5e-2}  # of the largest gradient


@dataclass(frozen=True)
class GradientCheck:
    """Derivatives of the cross-entropy at some coordinates of one image.

    Attributes:
        coordinates: (channel, row, column) of each.
        autograd: derivatives by autograd, [n].
        differences: the central differences that come closest to them among several steps, [n].
        allowed: largest |autograd - differences| of a correct gradient.
        dtype: what they were computed in.
    """

    coordinates: list[tuple[int, ...]]
    autograd: Tensor
    differences: Tensor
    allowed: float
    dtype: torch.dtype

    @property
    def wrong(self) -> list[int]:
        """Positions that differ by more than `allowed`."""
        apart = (self.autograd - self.differences).abs()
        return [int(i) for i in torch.nonzero(~(apart <= self.allowed)).flatten()]


def check_gradient(network: nn.Module, image: Tensor, dtype: torch.dtype) -> GradientCheck:
    """Compare the gradient of `network`, whose weights are of `dtype`, with finite differences at image [1,C,H,W].

    The loss is the cross-entropy for the second largest logit, which is steep also where the model is sure. `CHECKED`
    coordinates with the largest gradient are taken and as many random ones, where a wrong gradient may be 0.
    """
    x = image.to(dtype).requires_grad_()
    logits = network(x)
    target = logits.detach().topk(2, 1).indices[:, 1]
    loss = cross_entropy(logits, target)
    gradient = torch.autograd.grad(loss, x)[0].detach().flatten()
    order = gradient.abs().nan_to_num(torch.inf).argsort(descending=True)
    others = SampleRandom(0, "gradient check").generator(0).permutation(len(order) - CHECKED)[:CHECKED]
    chosen = torch.cat([order[:CHECKED], order[CHECKED:][torch.from_numpy(others)]])
    numeric = torch.stack([_differences(network, x.detach(), target, chosen, step) for step in STEPS[dtype]])
    best = (numeric - gradient[chosen]).abs().nan_to_num(torch.inf).argmin(0, keepdim=True)
    rounding = 32 * torch.finfo(dtype).eps * max(1.0, float(loss.detach().abs())) / max(STEPS[dtype])
    allowed = GRADIENT_TOLERANCE[dtype] * float(gradient.abs().max()) + rounding
    places = [tuple(int(i) for i in torch.unravel_index(c, image.shape[1:])) for c in chosen]
    return GradientCheck(places, gradient[chosen], numeric.gather(0, best).squeeze(0), allowed, dtype)


def _differences(network: nn.Module, x: Tensor, target: Tensor, chosen: Tensor, step: float) -> Tensor:
    """Central differences of the loss at coordinates `chosen` of x [1,C,H,W]."""
    moves = torch.zeros(len(chosen), x.numel(), dtype=x.dtype)
    moves[torch.arange(len(chosen)), chosen] = step
    with torch.no_grad():
        up, down = (
            cross_entropy(
                network(x + sign * moves.view(-1, *x.shape[1:])), target.expand(len(chosen)), reduction="none"
            )
            for sign in (1, -1)
        )
    return (up - down) / (2 * step)
