"""The forward that a search calls: the model's own, or a faster network with the same function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from robbench.attacks.search.batches import batch_in_cache, largest_output
from robbench.attacks.search.lean import searchable


@dataclass(frozen=True)
class SearchForward:
    """The network that a search calls.

    network: maps images [n,C,H,W] to logits [n,K]. exact: whether the logits equal the model's own to the last bit;
    otherwise the model must confirm a candidate. layer_bytes: bytes per image of the largest layer output, which limits
    the batch on the CPU (`batch_in_cache`); 0 for no limit.
    """

    network: Callable[[Tensor], Any]
    exact: bool = True
    layer_bytes: int = 0

    def accelerate(self, module: nn.Module, call: Callable[[Tensor], Any], images: Tensor) -> "SearchForward":
        """The forward for the CPU: a lean network in the place of `module`, whose weights must not change meanwhile,
        in batches that fit the cache. call: a forward of `module`; images: [n,C,H,W], some of those to attack."""
        network = searchable(module, images) if self.network is module else self.network
        layer_bytes = largest_output(module, call, images[:2])
        return SearchForward(network, self.exact and network is self.network, layer_bytes)

    def batch(self, requested: int) -> int:
        """The batch to search in, at most `requested`."""
        return batch_in_cache(self.layer_bytes, requested)
