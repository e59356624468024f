"""A flow as attacks use it: one flat latent vector per sample, and the checks that the flow stays its own inverse."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from robbench.attacks.search.spaces import Codec
from robbench.core.errors import UserError, spell_argument
from robbench.models.flows.base import Flow, FrozenFlow, Latents
from robbench.models.flows.checks import (
    CONTRACT,
    IMAGE_TOLERANCE,
    LATENT_TOLERANCE,
    PROBED,
    frozen_like,
    largest_gap,
    require_same_state,
    require_steady,
)
from robbench.models.state import ModelState

STEP = 1e-2  # length of the latent step of the gradient check
GRADIENT_TOLERANCE = 0.25  # relative error of the rise along the gradient; the zoo's flows reach 0.05


class FlowCodec:
    """Adapts a frozen flow to `spaces.Codec`. Dequantisation is fixed at u = 1/2, so that decode inverts encode.

    Images and latents keep the dtype of the input, whatever the flow computes in. check_every: `encode_flat` verifies
    the inverse on the first batch and on every `check_every`-th one after it.
    """

    def __init__(self, flow: Flow | FrozenFlow, check_every: int = 1) -> None:
        self.flow = frozen_like(flow) if isinstance(flow, Flow) else flow
        self.check_every, self._batches = check_every, 0

    def encode_flat(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Latents z [n,D] of images [n,C,H,W] in [0,1]; `UserError` where decoding them does not return the images."""
        z = self.latents(x, y)
        if self._batches % self.check_every == 0:
            self._require_inverse(x, z, y)
        self._batches += 1
        return z

    def latents(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """`encode_flat` without its check."""
        latents, _ = self.flow.encode(x.clone(), y)  # a copy: what is encoded stays as it is
        return latents.flat().to(x.dtype)

    def decode_flat(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images [n,C,H,W], not clipped, contiguous, differentiable in z."""
        inner = z.to(self.flow.dtype)
        return self.flow.decode(Latents.unflat(inner, self.flow.level_shapes), y).to(z.dtype).contiguous()

    def level_mask(self, levels: tuple[int, ...]) -> Tensor:
        """1 on the coordinates of the named levels (1-based, 1 = finest), [D]."""
        parts = [
            torch.full((int(torch.tensor(shape).prod()),), float(number in levels))
            for number, shape in enumerate(self.flow.level_shapes, start=1)
        ]
        return torch.cat(parts)

    def _require_inverse(self, x: Tensor, z: Tensor, y: Tensor | None) -> None:
        """A decoder that does not invert the encoder would perturb images before any attack does. Training may use a
        flow with another decode contract (`Flow.reconstruction`); attacks do not."""
        with torch.no_grad():
            expected = self.flow.reconstruction(x)
            gap = (self.decode_flat(z, y) - expected).abs().flatten(1).amax(1)
        if not bool((gap <= IMAGE_TOLERANCE).all()):
            raise not_inverse(gap)


def not_inverse(gap: Tensor) -> UserError:
    """The error for a flow whose decode(encode(x)) differs from x by `gap` [n]."""
    wrong = ~(gap <= IMAGE_TOLERANCE)
    return UserError(
        f"the flow does not invert itself: decode(encode(x)) is off by up to {float(gap[wrong].max()):.3g} on "
        f"{int(wrong.sum())} of {len(gap)} images, allowed {IMAGE_TOLERANCE:g}; choose another "
        f"{spell_argument('flow')} or train it again"
    )


@dataclass(frozen=True)
class FlowProbe:
    """Outputs of a flow for a few images before an attack, to compare with later ones.

    Attributes:
        codec: the flow.
        x, y: images [n,C,H,W] in [0,1] and labels [n].
        z: their latents [n,D].
        image: the images decoded from `z`.
        state: of the flow's module.
    """

    codec: Codec
    x: Tensor
    y: Tensor
    z: Tensor
    image: Tensor
    state: ModelState

    def repeat(self) -> None:
        """Encode and decode again in reverse order; `UserError` where the values or the flow's state changed."""
        with torch.no_grad():
            z = self.codec.latents(self.x.flip(0), self.y.flip(0)).flip(0)
            image = self.codec.decode_flat(self.z.flip(0), self.y.flip(0)).flip(0)
        gaps = largest_gap(self.z, z, LATENT_TOLERANCE), largest_gap(self.image, image, IMAGE_TOLERANCE)
        if max(gaps) > 1.0:
            name = "encode" if gaps[0] > 1.0 else "decode"
            raise UserError(
                f"the flow changed during the attack: its {name} gives the same samples other values than before; let "
                f"it keep no state between calls ({CONTRACT})"
            )
        require_same_state("the flow", self.state, _module(self.codec))


def probe_flow(
    codec: Codec | None, x: Tensor, y: Tensor, device: torch.device, gradient: bool
) -> FlowProbe | None:
    """Check a flow on the first `PROBED` images x [n,C,H,W] with labels y [n]; None without a flow.

    `UserError` for a flow that does not invert itself, whose values depend on batch, order or call, that changes its
    inputs or its state, and, with `gradient`, one whose `decode` has no gradient or a wrong one.
    """
    if codec is None or not len(x):
        return None
    x, y, state = x[:PROBED].to(device), y[:PROBED].to(device), ModelState.of(_module(codec))
    z = require_steady("the flow's encode", codec.latents, x, y, LATENT_TOLERANCE)
    image = require_steady("the flow's decode", codec.decode_flat, z, y, IMAGE_TOLERANCE)
    gap = (image - x).abs().flatten(1).amax(1)
    if not bool((gap <= IMAGE_TOLERANCE).all()):
        raise not_inverse(gap)
    if gradient:
        _require_gradient(codec, z, y)
    require_same_state("the flow", state, _module(codec))
    return FlowProbe(codec, x, y, z, image, state)


def _require_gradient(codec: Codec, z: Tensor, y: Tensor) -> None:
    """`UserError` unless a linear function of the decoded image rises along its gradient at the rate it predicts."""

    def heights(point: Tensor) -> Tensor:
        image = codec.decode_flat(point, y.repeat(len(point) // len(y))).flatten(1)
        return image @ torch.linspace(-1.0, 2.0, image.shape[1]).to(image)

    point = z.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        value = heights(point).sum()
        gradient = torch.autograd.grad(value, point, allow_unused=True)[0] if value.requires_grad else None
    size = torch.zeros(len(z), device=z.device) if gradient is None else gradient.norm(dim=1)
    if gradient is None or not bool(torch.isfinite(size).all()) or not float(size.min()) > 0:
        raise UserError(
            f"the flow's decode has no gradient with respect to its latents, or none that is finite, and the attack "
            f"follows it; compute decode without torch.no_grad or detach ({CONTRACT})"
        )
    along = gradient / size[:, None]
    with torch.no_grad():
        ahead, behind = heights(torch.cat([z + STEP * along, z - STEP * along])).chunk(2)
        rise = (ahead - behind) / (2.0 * STEP)
    ratio = float((rise / size).mean())
    if not abs(ratio - 1.0) <= GRADIENT_TOLERANCE:
        raise UserError(
            f"the gradient of the flow's decode is wrong: along it images change {ratio:.3g} times as fast as it says; "
            f"correct its backward pass, or leave no part of decode out of it ({CONTRACT})"
        )


def _module(codec: Codec) -> nn.Module:
    """The flow of a codec, or a module without state for other codecs."""
    return codec.flow if isinstance(codec, FlowCodec) else nn.Identity()


def regroup(rows: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """`rows` in batches of at most `batch_size`, composed differently from those of a search, so that a decoder that
    depends on its batch is noticed."""
    size = max(1, 2 * min(batch_size, len(rows)) // 3)
    return torch.split(rows.flip(0), size) if len(rows) else ()
