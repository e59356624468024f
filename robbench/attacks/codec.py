"""A flow as the attacks see it: one flat latent vector a sample."""

from collections.abc import Mapping

import torch
from torch import Tensor

from robbench.attacks.spaces import Codec
from robbench.models.flows.base import Flow, FrozenFlow, Latents


class FlowCodec:
    """Adapts a frozen flow to `spaces.Codec`. Dequantisation is fixed at u = 1/2, so that decode inverts encode."""

    def __init__(self, flow: Flow | FrozenFlow) -> None:
        self.flow = flow.freeze() if isinstance(flow, Flow) else flow

    def encode_flat(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """z [n,D] of images [n,C,H,W] in [0,1]."""
        latents, _ = self.flow.encode(x, y)
        return latents.flat()

    def decode_flat(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images [n,C,H,W], not clipped, differentiable in z."""
        return self.flow.decode(Latents.unflat(z, self.flow.level_shapes), y)

    def level_mask(self, levels: tuple[int, ...]) -> Tensor:
        """1 on the coordinates of the named levels (1-based, 1 = finest), [D]."""
        parts = [
            torch.full((int(torch.tensor(shape).prod()),), float(number in levels))
            for number, shape in enumerate(self.flow.level_shapes, start=1)
        ]
        return torch.cat(parts)


def decoded_image(codec: Codec, x: Tensor, y: Tensor, witness: Mapping[str, Tensor]) -> Tensor:
    """clip(G(F(x) + lambda) + delta): the images [n,C,H,W] of a witness, without a graph.

    x: [n,C,H,W] in [0,1]; y: [n], the condition; witness: "lambda" [n,D] and, of joint attacks, "delta" [n,C,H,W].
    """
    with torch.no_grad():
        image = codec.decode_flat(codec.encode_flat(x, y) + witness["lambda"], y)
        return (image + witness["delta"] if "delta" in witness else image).clamp(0, 1)
