"""Checks of a model before it is attacked or scored.

A robust accuracy presumes that logits are a function of one image: the same for any other images in the batch, any
position in it, with and without gradients, and at every call; and that a forward does not change the model. The checks
take about ten forwards of at most 32 images. A function that changes later, or on attacked images only, is found after
the attack, see `robbench.attacks.trust.audit`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from robbench.attacks.trust.agreement import ROUNDING, largest_explained_gap, relative_gaps, spread_gaps
from robbench.attacks.trust.model_call import out_of_memory
from robbench.attacks.victim import Victim
from robbench.core.errors import UserError
from robbench.models.state import ModelState

PROBED = 32  # images, at most
FEWEST = 8  # fewer images are complemented by transformed copies of themselves
ALONE = 3  # images scored in a batch of their own
STANDARD_ERRORS = 8.0  # between two means of a randomised model's logits


class RandomisedModelError(UserError):
    """The model's logits for the same images differ between two calls."""


@dataclass(frozen=True)
class Passed:
    """Result of the checks of a model that passed them.

    Attributes:
        images: the images used, [n,C,H,W].
        gap: largest relative gap of logits between two batches; 0 for rounding.
        draws: logits [draws,n,K] of a randomised model for `images`; None for other models.
    """

    images: Tensor
    gap: float = 0.0
    draws: Tensor | None = None


def check_model(victim: Victim, images: Tensor) -> Passed:
    """Check `victim` on the first of `images` [N,C,H,W] in [0,1].

    With `victim.draws` above 1 the model is declared as randomised, and means of that many forwards are compared within
    their spread. A gap that arithmetic can explain (as of layers quantised by the range of the batch) is returned for
    the caller to report. `UserError` when the logits depend on the batch, on the gradient mode or on chance, or are not
    finite, and when a forward changes the model.
    """
    probe = _probe(images, max(victim.batch_size, 2))
    if not len(probe):
        return Passed(probe)
    state = ModelState.of(victim.module)
    reference = victim.clean_logits(probe, len(probe))
    if victim.draws > 1:
        passed = Passed(probe, draws=_compare_means(victim, probe))
    else:
        passed = Passed(probe, _compare(victim, probe, reference))
    changed = state.change(victim.module)
    if changed is not None:
        raise UserError(
            f"a forward of the model changes the model: {changed}; make its forward leave parameters, buffers and "
            f"hooks as they are (batch norm in eval mode, no statistics updated, no hooks added)"
        )
    return passed


def _probe(images: Tensor, most: int) -> Tensor:
    """The first images, complemented by mirrored, rotated and inverted copies where there are few."""
    few = images[: min(PROBED, most)]
    if 0 < len(few) < FEWEST:
        copies = (few, few.flip(3), few.flip(2), 1.0 - few, few.flip(2, 3), 1.0 - few.flip(3))
        few = torch.cat(copies)[: max(most, 2)][:FEWEST]
    return few


def _compare(victim: Victim, probe: Tensor, reference: Tensor) -> float:
    n, limit = len(probe), largest_explained_gap(victim.module)
    _refuse_randomised(relative_gaps(reference, victim.score(probe, n)))
    gaps = torch.cat([relative_gaps(reference, other) for other in _in_other_batches(victim, probe)])
    worst = float(gaps.max())
    if worst > limit:
        raise _batch_dependent(f"differ by {100 * worst:.3g} % of their size")
    graph = float(relative_gaps(reference, _with_graph(victim, probe, reference)).max())
    if graph > limit:
        raise UserError(
            f"the model's logits differ by {100 * graph:.3g} % of their size between a forward with "
            f"and one without gradients; an attack would search another function than the one that is scored: make "
            f"the forward independent of torch.is_grad_enabled() and of requires_grad"
        )
    worst = max(worst, graph)
    return worst if worst > ROUNDING else 0.0


def _refuse_randomised(gaps: Tensor) -> None:
    worst = float(gaps.max())
    if worst > ROUNDING:
        raise RandomisedModelError(
            f"the model is randomised: its logits for the same images differ by {100 * worst:.3g} % of their size the "
            f"second time; attack it with aa-rand, which averages over its randomness, or make each image's logits a "
            f"function of the image alone (a seed fixed inside the forward does not: its noise goes by the place in "
            f"the batch)"
        )


def _batch_dependent(seen: str) -> UserError:
    return UserError(
        f"the model's logits for an image depend on the other images of its batch: alone, in another order or in other "
        f"company they {seen}; no accuracy of such a model is a property of its images: use batch norm with running "
        f"statistics in eval mode, and noise or statistics that do not go by the batch"
    )


def _with_graph(victim: Victim, probe: Tensor, reference: Tensor) -> Tensor:
    """Logits of a forward with gradients; `reference` where the model is not differentiable, which attacks report."""
    point = probe.to(victim.device).detach().requires_grad_(True)
    try:
        with torch.enable_grad():
            return victim.call(point).detach().cpu()
    except (RuntimeError, UserError, MemoryError) as error:
        if out_of_memory(error):
            raise
        return reference


def _in_other_batches(victim: Victim, probe: Tensor) -> list[Tensor]:
    """Logits of the probe in reverse order, with some images alone, with one among copies of itself, and shifted."""
    n = len(probe)
    backwards = victim.score(probe.flip(0), n).flip(0)
    rows = torch.linspace(0, n - 1, min(ALONE, n)).long()
    alone = backwards.clone()
    alone[rows] = victim.score(probe[rows], 1)
    repeated = backwards.clone()
    copies = max(2, n // 4)
    repeated[rows[-1]] = victim.score(probe[rows[-1:]].expand(copies, -1, -1, -1), copies)[-1]
    shifted = victim.score(probe.roll(n // 2, 0), max(1, n // 2 + 1)).roll(-(n // 2), 0)
    return [backwards, alone, repeated, shifted]


def _compare_means(victim: Victim, probe: Tensor) -> Tensor:
    """The draws [draws,n,K] of a randomised model for `probe`; `UserError` where its means in reverse order, or of
    images alone, differ from theirs by more than their spread."""
    n = len(probe)
    reference = victim.score_draws(probe, n)
    backwards = victim.score_draws(probe.flip(0), n).flip(1)
    rows = torch.linspace(0, n - 1, min(ALONE, n)).long()
    alone = victim.score_draws(probe[rows], 1)
    worst = max(
        float(spread_gaps(reference, backwards).max()), float(spread_gaps(reference[:, rows], alone).max())
    )
    if worst > STANDARD_ERRORS:
        raise _batch_dependent(f"have means that differ by {worst:.3g} standard errors")
    return reference
