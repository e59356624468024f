"""The battery every model passes before it is attacked, in one place for all who attack or score models.

A robust accuracy presumes a function of one image: the same logits whichever images share the batch, whichever place
the image has in it, whether a gradient is asked for or not, and each time again; and a forward that changes nothing of
the model. The battery makes about ten forwards of at most 32 images. What no probe can see beforehand (a function that
changes later, or on attacked images only) is found at the end, see `robbench.attacks.trust.audit`.
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
FEWEST = 8  # fewer images get transformed copies of themselves for company
ALONE = 3  # images scored in a batch of their own
STANDARD_ERRORS = 8.0  # between two means of a randomised model's logits


class RandomisedModelError(UserError):
    """The model gives the same images other logits a second time."""


@dataclass(frozen=True)
class Passed:
    """What the battery saw of a model that passed it.

    Attributes:
        images: those tried, [n,C,H,W].
        gap: largest relative gap of logits between two batches; 0 for rounding.
        draws: of a randomised model, its logits [draws,n,K] for `images`; None of others.
    """

    images: Tensor
    gap: float = 0.0
    draws: Tensor | None = None


def check_model(victim: Victim, images: Tensor) -> Passed:
    """Try `victim` on `images` [N,C,H,W] in [0,1].

    Under `victim.draws` above 1 the model is randomised by declaration, and means of that many forwards are compared,
    within their spread. A gap that arithmetic may explain (layers quantised by the range of the batch make one) is
    returned for the caller to report. Raises `UserError` in one line when the logits depend on the batch, on the
    gradient mode or on chance, are not finite, or when a forward changes the model.
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
    """The first images, with mirrored, turned and inverted copies for company where there are few."""
    few = images[: min(PROBED, most)]
    if 0 < len(few) < FEWEST:
        copies = (few, few.flip(3), few.flip(2), 1.0 - few, few.flip(2, 3), 1.0 - few.flip(3))
        few = torch.cat(copies)[: max(most, 2)][:FEWEST]
    return few


def _compare(victim: Victim, probe: Tensor, reference: Tensor) -> float:
    n, limit = len(probe), largest_explained_gap(victim.module)
    _refuse_randomised(relative_gaps(reference, victim.scored(probe, n)))
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
    """Logits of a forward that keeps a graph; `reference` where the model has none, which attacks explain."""
    point = probe.to(victim.device).detach().requires_grad_(True)
    try:
        with torch.enable_grad():
            return victim.call(point).detach().cpu()
    except (RuntimeError, UserError, MemoryError) as error:
        if out_of_memory(error):
            raise
        return reference


def _in_other_batches(victim: Victim, probe: Tensor) -> list[Tensor]:
    """Logits of the probe in reverse order, of some images alone, and of images each among copies of itself."""
    n = len(probe)
    backwards = victim.scored(probe.flip(0), n).flip(0)
    rows = torch.linspace(0, n - 1, min(ALONE, n)).long()
    alone = backwards.clone()
    alone[rows] = victim.scored(probe[rows], 1)
    repeated = backwards.clone()
    copies = max(2, n // 4)
    repeated[rows[-1]] = victim.scored(probe[rows[-1:]].expand(copies, -1, -1, -1), copies)[-1]
    shifted = victim.scored(probe.roll(n // 2, 0), max(1, n // 2 + 1)).roll(-(n // 2), 0)
    return [backwards, alone, repeated, shifted]


def _compare_means(victim: Victim, probe: Tensor) -> Tensor:
    """For randomised models: means in order, in reverse order and alone, within their spread; the draws in order."""
    n = len(probe)
    reference = victim.scored_draws(probe, n)
    backwards = victim.scored_draws(probe.flip(0), n).flip(1)
    rows = torch.linspace(0, n - 1, min(ALONE, n)).long()
    alone = victim.scored_draws(probe[rows], 1)
    worst = max(
        float(spread_gaps(reference, backwards).max()), float(spread_gaps(reference[:, rows], alone).max())
    )
    if worst > STANDARD_ERRORS:
        raise _batch_dependent(f"have means that differ by {worst:.3g} standard errors")
    return reference
