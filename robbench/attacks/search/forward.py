"""The forward that a search calls in place of the model's own: where it is faster, a network with its function."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from robbench.attacks.search.batches import batch_in_cache, largest_output
from robbench.attacks.search.lean import searchable


@dataclass(frozen=True)
class SearchForward:
    """What a search calls, and how it may be used.

    network: maps images [n,C,H,W] to logits [n,K]. exact: whether these are the model's own to the last bit; a
    candidate found on other ones is to be confirmed by the model. layer_bytes: bytes per image of the largest output
    of a layer, which batches on the CPU must keep in the cache; 0 where any batch will do.
    """

    network: Callable[[Tensor], Any]
    exact: bool = True
    layer_bytes: int = 0

    def accelerated(
        self, module: nn.Module, call: Callable[[Tensor], Any], images: Tensor
    ) -> "SearchForward":
        """The forward for the CPU: a lean network in the place of `module`, whose weights must not change meanwhile,
        and smaller batches. call: a forward of `module`; images: [n,C,H,W], some of those to attack."""
        network = searchable(module, images) if self.network is module else self.network
        layer_bytes = largest_output(module, call, images[:2])
        return SearchForward(network, self.exact and network is self.network, layer_bytes)

    def batch(self, requested: int) -> int:
        """The batch to search in, at most `requested`."""
        return batch_in_cache(self.layer_bytes, requested)
