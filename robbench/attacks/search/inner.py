"""The plain ascent loop on a fixed batch: what adversarial training calls. Evaluation uses `engine` instead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robbench.attacks.search.geometry import finite_part
from robbench.attacks.search.progress import tell
from robbench.attacks.search.spaces import SearchSpace, State

SURE, FLAT = 16.0, 0.5  # of logits, see `tempered`


@contextmanager
def attacked(*modules: nn.Module) -> Iterator[None]:
    """Eval mode and no parameter gradients inside; every submodule's mode and every flag restored after."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    for module in modules:
        module.eval()
    for parameter, _ in flags:  # not Module.requires_grad_, which scripted modules refuse
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def error_log_odds(logits: Tensor, labels: Tensor) -> Tensor:
    """log((1 - p_y) / p_y) [n] of logits [n,K]: log-sum-exp of the other logits minus the label's.

    It rises with the cross-entropy L = -log p_y, and its gradient is that of L divided by 1 - p_y: a search that
    normalises gradients per sample takes the same steps on both. But in float32 the cross-entropy loses the label's
    part of its gradient at margins above 17 and all of it above 104, where 1 - p_y and p rounds to 0; this one never
    does.
    """
    others = logits.scatter(1, labels[:, None], float("-inf")).logsumexp(1)
    return others - logits.gather(1, labels[:, None]).squeeze(1)


def tempered(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [n,K] on a scale at which their softmax says something: `logits` themselves for ordinary models.

    Where the label leads by more than `SURE` (1 - p_y is about 1e-7, what float32 resolves next to 1), they are divided
    so that it leads by `SURE`: the cross-entropy of more confident logits looks at one rival only. Logits that all lie
    within `FLAT` of each other, whose softmax is uniform, are spread over `SURE`. So a search on these takes the same
    steps whatever factor the logits of such a model are multiplied by.
    """
    with torch.no_grad():
        own = logits.gather(1, labels[:, None])
        lead = own - logits.scatter(1, labels[:, None], float("-inf")).amax(1, keepdim=True)
        spread = logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)
        size = torch.where(spread < FLAT, spread, lead.clamp(min=SURE)) / SURE
        size = size.masked_fill((size == 0) | ~size.isfinite(), 1.0)
    return logits / size


def gradients(space: SearchSpace, state: State, loss: Callable[[Tensor], Tensor]) -> tuple[State, State]:
    """(gradients of the summed loss by perturbation, the detached state they belong to).

    loss maps an image [n,C,H,W] to one value per sample [n]. What is not finite in its gradient to the image counts as
    0: behind a decoder one NaN pixel would be NaN in every latent.
    """
    leaves = {name: state[name].detach().requires_grad_(True) for name in space.perturbations}
    with torch.enable_grad():
        image, live = space.render({**state, **leaves})
        image.register_hook(finite_part)  # type: ignore[no-untyped-call]
        values = loss(image).sum()
        found = torch.autograd.grad(values, list(leaves.values()))
    detached = {**live, **{name: live[name].detach() for name in leaves}}
    return dict(zip(leaves, found, strict=True)), detached


def ascend(space: SearchSpace, loss: Callable[[Tensor], Tensor], state: State, steps: int) -> State:
    """`steps` ascent steps on `loss` from `state`; call it inside `attacked(model)`."""
    for _ in range(steps):
        tell(calls=len(next(iter(state.values()))))
        found, state = gradients(space, state, loss)
        state = space.advance(state, found)
    return state
