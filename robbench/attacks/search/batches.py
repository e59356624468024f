"""The batch a search on the CPU works in: no larger than what keeps a layer's output near the processor.

Measured on one core (forward and input gradient per image, fp32): the small nets of the zoo gain up to
batches of 256 to 512; where the largest output of a layer exceeds some 16 MiB (`trades-mnist` from 256, `resnet20` from
512) larger batches cost the same or up to 10 % more, and a quarter to a half more where malloc gives memory back.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CACHE_BYTES = 16 * 2**20  # of a layer's output for a whole batch
LEAST_BATCH = 32  # a smaller one is not worth what it costs beside the model's call


def batch_in_cache(bytes_per_image: int, asked: int) -> int:
    """The largest power of 2 not above `asked` for which a layer's output stays within `CACHE_BYTES`, at least
    `LEAST_BATCH`; `asked` itself where it does so, or is smaller than that."""
    if asked <= LEAST_BATCH or asked * bytes_per_image <= CACHE_BYTES:
        return asked
    size = LEAST_BATCH
    while 2 * size <= asked and 2 * size * bytes_per_image <= CACHE_BYTES:
        size *= 2
    return size


def largest_output(module: nn.Module, call: Callable[[Tensor], Any], images: Tensor) -> int:
    """Bytes per image of the largest output of a part of `module` in one `call` of it with `images` [n,C,H,W]; 0 for no
    images. Parts that are scripted, and operations that are no modules, are not seen."""
    sizes = [0]

    def seen(part: nn.Module, given: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            sizes.append(out.numel() * out.element_size())

    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    hooks = [part.register_forward_hook(seen) for part in parts]
    try:
        if len(images):
            call(images)
    finally:
        for hook in hooks:
            hook.remove()
    return max(sizes) // max(len(images), 1)
