"""Number of CPU threads per PyTorch operation ("intra-op threads"), chosen by the size of the networks.

At the end of every operation its threads wait for the slowest one, in a small network after a fraction of a
millisecond. Two threads then gain little on idle cores, and on busy ones mostly wait. So commands compute small
networks in one thread (`thread_rule`), and large ones in PyTorch's own number. The user's choice takes precedence:
--threads, OMP_NUM_THREADS, MKL_NUM_THREADS, and torch.set_num_threads in code that a command loads. Outside
`thread_rule` nothing changes: callers from Python keep their setting.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
# Multiply-adds per image from which a network is computed in all threads. Time of two threads over time of one, forward
# and input gradient, on two cores beside six busy processes: digits-cnn (0.26 M) 9.7, a Glow on digits (0.25 M) 15,
# conv3 (0.8 M) 3.3, TRADES' MNIST network (10 M) 1.8, a Glow on CIFAR-10 (35 M in many operations) 10, ResNet-18
# (555 M) 1.8. On idle cores the first gains 1.17; one of the size of the last keeps many cores busy.
LARGE = 100e6


class Coder(Protocol):
    """An encoder and decoder between images and latents."""

    def encode_flat(self, x: "Tensor", y: "Tensor") -> "Tensor":
        """Latents [n,D] of images x [n,C,H,W] with labels y [n]."""

    def decode_flat(self, z: "Tensor", y: "Tensor") -> "Tensor":
        """Images [n,C,H,W] of latents z [n,D]."""


@dataclass(frozen=True)
class _Rule:
    """Threads for small and for large networks."""

    small: int
    large: int


_RULE: ContextVar[_Rule | None] = ContextVar("thread_rule", default=None)


@contextmanager
def thread_rule(requested: int | None = None) -> Iterator[None]:
    """Inside, one thread except for large networks (`threads_for`); the previous number is restored after.

    requested: number of threads for every network instead. Without it, a number in the environment is kept for all.
    """
    import torch

    before = torch.get_num_threads()
    if requested is not None:
        rule = _Rule(requested, requested)
    elif any(os.environ.get(name) for name in VARIABLES):
        rule = _Rule(before, before)
    else:
        rule = _Rule(1, before)
    token = _RULE.set(rule)
    torch.set_num_threads(rule.small)
    try:
        yield
    finally:
        _RULE.reset(token)
        torch.set_num_threads(before)


@contextmanager
def threads_for(multiply_adds: Callable[[], float]) -> Iterator[None]:
    """Inside, the number of threads of the present rule for a network of `multiply_adds` per image. Nothing changes
    without a rule, and where other code has called torch.set_num_threads since it began."""
    import torch

    rule = _RULE.get()
    if rule is None or rule.small == rule.large or torch.get_num_threads() != rule.small:
        yield
        return
    torch.set_num_threads(rule.large if multiply_adds() >= LARGE else rule.small)
    try:
        yield
    finally:
        torch.set_num_threads(rule.small)


def multiply_adds(call: Callable[[], object]) -> float:
    """Multiply-adds of the convolutions and matrix products in one `call`, without those of a backward in it. The
    random state is restored after. Scripted modules are not counted; 0 where the call raises an exception, since the
    number affects speed only."""
    import torch
    from torch.overrides import TorchFunctionMode

    convolutions = (torch.conv1d, torch.conv2d, torch.conv3d)
    products = (torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm)
    found = [0.0]

    class Counter(TorchFunctionMode):  # torch.utils.flop_counter counts more, but takes seconds to import
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in convolutions:
                found[0] += out.numel() * args[1][0].numel()
            elif func in products or func is torch.nn.functional.linear:
                found[0] += out.numel() * args[0].shape[-1]
            elif func in (torch.addmm, torch.baddbmm):
                found[0] += out.numel() * args[1].shape[-1]
            return out

    try:
        with torch.random.fork_rng(devices=[]), Counter():
            call()
    except Exception:  # a foreign forward can raise anything, which later calls report
        return 0.0
    return found[0]


def search_multiply_adds(
    model: Callable[["Tensor"], object], codec: Coder | None, x: "Tensor", y: "Tensor"
) -> float:
    """Multiply-adds of one call of `model` with the image x [1,C,H,W], and with `codec` of the decoder. y: label
    [1]."""
    through = (
        multiply_adds(lambda: codec.decode_flat(codec.encode_flat(x, y), y)) / 2 if codec is not None else 0.0
    )
    return through + multiply_adds(lambda: model(x))
