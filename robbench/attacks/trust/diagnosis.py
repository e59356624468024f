"""Counts for `suspicions`, from the logits and gradients of an attack."""

from collections.abc import Sequence

import torch
from torch import Tensor

from robbench.attacks.search.decision import margins
from robbench.attacks.trust.suspicions import Diagnostics
from robbench.specs import ResolvedAttack

SUM_TOLERANCE = 1e-4  # how far from 1 the sum of a row of probabilities may be
PROBED = 64  # samples per call whose gradient at the clean image is inspected


def diagnose(
    spec: ResolvedAttack,
    raises_cross_entropy: bool,
    clean: Tensor,
    attacked: Tensor,
    labels: Tensor,
    robust: Tensor,
    broken_by: Sequence[str | None],
    searched: Tensor,
) -> Diagnostics:
    """Counts of an attack's outcome, without those of gradients and batches.

    raises_cross_entropy: see `Attack`. clean, attacked: logits [N,K] of clean and attacked images; labels: [N];
    robust, searched: [N] bool, verdicts, and whether the sample was searched; broken_by: see `Outcome`.
    """
    before, after = margins(clean, labels), margins(attacked, labels)
    climbed = robust & searched if raises_cross_entropy else torch.zeros_like(robust)
    by_square = sum(name == "square" for name in broken_by) if square_follows_gradients(spec) else 0
    by_ce, by_t = (sum(name == part for name in broken_by) for part in ("apgd-ce", "apgd-t"))
    compared = targeted_follows_cross_entropy(spec)
    alone = spec.space == "minimal" and spec.parameters.get("target") is None
    return shape_of_outputs(clean) + Diagnostics(
        samples=len(labels),
        weak_given=int(searched.sum()) - by_ce if compared else 0,
        weak_broke=by_t if compared else 0,
        square_given=by_square + int((robust & searched).sum()) if square_follows_gradients(spec) else 0,
        square_broke=by_square,
        held=int(climbed.sum()),
        loss_before=float(cross_entropy(clean[climbed], labels[climbed]).sum()),
        loss_after=float(cross_entropy(attacked[climbed], labels[climbed]).sum()),
        clean_right=int((before > 0).sum()),
        classes=clean.shape[1],
        clean_ties=int((before == 0).sum()),
        attacked_ties=int((after == 0).sum()),
        unbounded=int(searched.sum()) if alone else 0,
        not_found=int((searched & (after > 0)).sum()) if alone else 0,
        not_finite=int((~attacked.isfinite().all(1)).sum()),
    )


def square_follows_gradients(spec: ResolvedAttack) -> bool:
    """Whether Square is the last of several components, so that no gradient component broke the samples it breaks."""
    components = list(spec.parameters.get("components") or ())
    return len(components) > 1 and components[-1] == "square"


def targeted_follows_cross_entropy(spec: ResolvedAttack) -> bool:
    """Whether APGD-T comes right after APGD-CE, so that the cross-entropy did not break the samples it breaks."""
    components = list(spec.parameters.get("components") or ())
    return components[:2] == ["apgd-ce", "apgd-t"]


def shape_of_outputs(outputs: Tensor) -> Diagnostics:
    """Counts of the range of finite outputs [N,K], K at least 2, without `samples`."""
    outputs = outputs.double()
    low, high = outputs.amin(1), outputs.amax(1)
    size = torch.maximum(high, -low)
    unit, signed = (low >= 0) & (high <= 1), size <= 1
    return Diagnostics(
        probability_rows=int(probability_rows(outputs).sum()),
        shaped=len(outputs),
        unit_rows=int(unit.sum()),
        unit_reached=int((unit & (size >= 0.5)).sum()),
        signed_rows=int(signed.sum()),
        signed_reached=int((signed & (size >= 0.75)).sum()),
        floor_sum=float(low.sum()),
        floor_squares=float(low.square().sum()),
        range_sum=float((high - low).sum()),
    )


def probability_rows(outputs: Tensor) -> Tensor:
    """Rows of outputs [N,K] that are non-negative and sum to 1 within `SUM_TOLERANCE`, [N] bool.

    Log-probabilities are valid logits and do not count.
    """
    return (outputs >= 0).all(1) & ((outputs.double().sum(1) - 1).abs() <= SUM_TOLERANCE)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy [N] in float64 of logits [N,K], exact also where the label's probability rounds to 1: losses of
    1e-20 and 1e-30 differ, where log_softmax gives 0 for both."""
    logits = logits.double()
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf")).logsumexp(1)
    lead = others - own
    return torch.logaddexp(torch.zeros_like(lead), lead)


def zero_gradients(gradients: Tensor) -> Tensor:
    """Samples whose gradient [N,...] is exactly 0 or has an entry that is not finite, [N] bool."""
    rows = gradients.flatten(1)
    return (rows == 0).all(1) | ~rows.isfinite().all(1)
