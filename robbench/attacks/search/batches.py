"""Batch size of a search on the CPU: as large as the output of every layer stays in the cache.

Measured on one core (forward and input gradient per image, fp32): the small nets of the zoo gain up to batches of 256
to 512; where the largest output of a layer exceeds some 16 MiB (`trades-mnist` from 256, `resnet20` from 512) larger
batches cost the same or up to 10 % more, and a quarter to a half more where malloc returns memory to the system.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CACHE_BYTES = 16 * 2**20  # of a layer's output for a whole batch
LEAST_BATCH = 32  # in smaller batches the overhead per call dominates


def batch_in_cache(bytes_per_image: int, requested: int) -> int:
    """`requested` where a layer's output for so many images fits `CACHE_BYTES`; else the largest power of 2 for which
    it does, and at least `LEAST_BATCH` unless `requested` is smaller."""
    if requested <= LEAST_BATCH or requested * bytes_per_image <= CACHE_BYTES:
        return requested
    size = LEAST_BATCH
    while 2 * size <= requested and 2 * size * bytes_per_image <= CACHE_BYTES:
        size *= 2
    return size


def largest_output(module: nn.Module, call: Callable[[Tensor], Any], images: Tensor) -> int:
    """Bytes per image of the largest output of a submodule in one `call` of `module` with `images` [n,C,H,W]; 0 for no
    images. Scripted submodules and functional operations are not measured."""
    sizes = [0]

    def record_size(part: nn.Module, given: Any, out: Any) -> None:
        if isinstance(out, Tensor):
            sizes.append(out.numel() * out.element_size())

    parts = [part for part in module.modules() if not isinstance(part, torch.jit.ScriptModule)]
    hooks = [part.register_forward_hook(record_size) for part in parts]
    try:
        if len(images):
            call(images)
    finally:
        for hook in hooks:
            hook.remove()
    return max(sizes) // max(len(images), 1)
