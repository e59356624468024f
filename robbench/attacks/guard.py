"""What adaptive attacks see of a detector: scores of images and the threshold above which they are flagged."""

from typing import Protocol

import torch
from torch import Tensor

from robbench.attacks.trust.context import refuse_other_modes, torch_modes
from robbench.attacks.trust.model_call import out_of_memory
from robbench.core.errors import UserError
from robbench.core.foreign import cause
from robbench.core.stops import reraise_stop


class Guard(Protocol):
    """What an adaptive attack sees of a detector."""

    name: str
    threshold: float

    def scores(self, images: Tensor) -> Tensor:
        """Scores of images [N,C,H,W], float64 [N], larger for more suspicious, differentiable in the images."""

    def scores_of(self, images: Tensor) -> Tensor:
        """`scores` without a graph, in batches, on the CPU."""

    def flags(self, scores: Tensor) -> Tensor:
        """Whether images of these scores are flagged, [N] bool."""


def call_guard(guard: Guard, images: Tensor) -> Tensor:
    """Scores [N] of a private copy of the images [N,C,H,W], on their device, with a graph to them if gradients are on.

    `UserError` where the detector fails, or returns anything but [N] floating-point numbers.
    """
    before = torch_modes()
    try:
        scores = guard.scores(images.clone(memory_format=torch.contiguous_format))
    except UserError:
        raise
    except BaseException as error:  # a detector of another package may raise anything, also SystemExit
        reraise_stop(error)
        if out_of_memory(error):
            raise
        raise UserError(
            f"detector {guard.name!r} failed on images {tuple(images.shape)} with {cause(error)}; correct its `scores`"
        ) from error
    refuse_other_modes(before, f"detector {guard.name!r}")
    if not isinstance(scores, Tensor) or scores.shape != (len(images),) or not scores.is_floating_point():
        found = (
            f"{list(scores.shape)} {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
        )
        raise UserError(
            f"detector {guard.name!r} returned {found} for {len(images)} images; return one floating-point score each"
        )
    return scores.double()


def excess(guard: Guard, scores: Tensor) -> Tensor:
    """Scores [N] minus the threshold, float64: above 0 where an image is flagged; -inf for NaN, which is accepted."""
    return (scores - guard.threshold).nan_to_num(float("-inf"), float("inf"), float("-inf"))


def score_gradients(guard: Guard, images: Tensor) -> Tensor:
    """Gradient [N,C,H,W] of the scores at images, entries that are not finite included; `UserError` for a detector
    whose scores have no graph to the images."""
    return excess_and_gradient(guard, images)[1]


def excess_and_gradient(guard: Guard, images: Tensor) -> tuple[Tensor, Tensor]:
    """(`excess` [N], gradient [N,C,H,W] of the score) at images [N,C,H,W]; see `score_gradients`."""
    point = images.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        scores = call_guard(guard, point)
        if not scores.requires_grad:
            raise UserError(
                f"detector {guard.name!r} has no gradient (its scores have no graph to the images), which adaptive "
                f"attacks follow; remove torch.no_grad and detach from its `scores`, or leave these attacks out"
            )
        (gradient,) = torch.autograd.grad(scores.sum(), point)
    return excess(guard, scores.detach()), gradient
