"""The plain ascent loop on a fixed batch, for adversarial training; evaluation uses `engine`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robbench.attacks.search.geometry import finite_part
from robbench.attacks.search.progress import tell
from robbench.attacks.search.spaces import SearchSpace, State

SURE, FLAT = 16.0, 0.5  # of logits, see `temper_logits`


@contextmanager
def attack_mode(*modules: nn.Module) -> Iterator[None]:
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
    normalises gradients per sample takes the same steps on both. In float32, however, the cross-entropy loses the
    label's part of its gradient at margins above 17 and all of it above 104, where 1 - p_y and the other probabilities
    round to 0; this loss keeps its gradient.
    """
    others = logits.scatter(1, labels[:, None], float("-inf")).logsumexp(1)
    return others - logits.gather(1, labels[:, None]).squeeze(1)


def temper_logits(logits: Tensor, labels: Tensor) -> Tensor:
    """Logits [n,K] rescaled where their softmax is saturated or flat; unchanged for ordinary models.

    Where the label leads by more than `SURE` (1 - p_y is about 1e-7, the resolution of float32 at 1) they are divided
    so that it leads by `SURE`: the gradient of more confident logits depends on one rival only. Logits that all lie
    within `FLAT` of each other, whose softmax is nearly uniform, are spread over `SURE`. So the steps of a search do
    not depend on a factor by which a model's very large or small logits are multiplied.
    """
    with torch.no_grad():
        own = logits.gather(1, labels[:, None])
        lead = own - logits.scatter(1, labels[:, None], float("-inf")).amax(1, keepdim=True)
        spread = logits.amax(1, keepdim=True) - logits.amin(1, keepdim=True)
        size = torch.where(spread < FLAT, spread, lead.clamp(min=SURE)) / SURE
        size = size.masked_fill((size == 0) | ~size.isfinite(), 1.0)
    return logits / size


def ascent_weights(logits: Tensor, labels: Tensor) -> Tensor:
    """The gradient [n,K] of `error_log_odds` of the tempered logits in the logits [n,K], up to a positive factor per
    sample: what a search that normalises gradients per sample hands to the backward pass, without a graph of its own.
    """
    with torch.no_grad():
        others = temper_logits(logits, labels).scatter_(1, labels[:, None], float("-inf"))
        return others.softmax(1).scatter_(1, labels[:, None], -1.0)


def gradients(space: SearchSpace, state: State, loss: Callable[[Tensor], Tensor]) -> tuple[State, State]:
    """(gradient of the summed loss with respect to each perturbation, the detached state at which it was taken).

    loss maps images [n,C,H,W] to one value per sample [n]. Entries of its gradient with respect to the image that are
    not finite count as 0, since through a decoder one NaN pixel would make every latent NaN.
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
    """`steps` ascent steps on `loss` from `state`; call it inside `attack_mode(model)`."""
    for _ in range(steps):
        tell(calls=len(next(iter(state.values()))))
        found, state = gradients(space, state, loss)
        state = space.advance(state, found)
    return state
