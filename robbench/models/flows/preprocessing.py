"""From dequantised pixels d in [0,1) to the variables v that a flow transforms, and back.

    shift:  v = d - 1/2; volume-preserving, no boundary. Default of our own flows.
    logit:  p = .05 + .9 d, v = logit(p); Dinh et al. 2017, section 4.1, with the constants of the PyTorch Glow that
            Yuksel et al. 2022 use. ln|dv/dd| = ln .9 + softplus(v) + softplus(-v). Finite for d in (-.0555, 1.0555),
            which holds every image in [0,1]; NaN or infinity outside.
    logit-1e-5: the same with p = 5e-6 + (1 - 1e-5) d, as in imported weights of gated_coupling.py. Images in [0,1] stay
            finite; dv/dd reaches 2e5 at black and white, and d outside [-5e-6, 1 + 5e-6] is NaN or infinity.
Which one a flow was trained with is part of its architecture, and so of its card and of every result's identity.
"""

import math
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from robbench.core.errors import UserError

PreprocessingKind = Literal["shift", "logit", "logit-1e-5"]
DecodeMode = Literal["exact", "flp_legacy"]

SQUEEZES: dict[PreprocessingKind, float] = {
    "logit": 0.1,
    "logit-1e-5": 1e-5,
}  # alpha: p = alpha/2 + (1 - alpha) d


class Preprocessing(Protocol):
    """A bijection of every pixel on its own. d, v: [N,C,H,W]."""

    kind: PreprocessingKind

    def forward(self, d: Tensor) -> Tensor:
        """v of dequantised pixels."""

    def log_det(self, v: Tensor) -> Tensor:
        """ln|det dv/dd| at the point whose image is v, [N] in nats."""

    def inverse(self, v: Tensor) -> Tensor:
        """d, for any real v."""


class Shift:
    """v = d - 1/2."""

    kind: PreprocessingKind = "shift"

    def forward(self, d: Tensor) -> Tensor:
        return d - 0.5

    def log_det(self, v: Tensor) -> Tensor:
        return v.new_zeros(len(v))

    def inverse(self, v: Tensor) -> Tensor:
        return v + 0.5


class Logit:
    """v = logit(alpha / 2 + (1 - alpha) d); kind chooses alpha."""

    def __init__(self, kind: PreprocessingKind = "logit") -> None:
        self.kind = kind
        self.offset, self.slope = SQUEEZES[kind] / 2.0, 1.0 - SQUEEZES[kind]

    def forward(self, d: Tensor) -> Tensor:
        return torch.logit(self.offset + self.slope * d)

    def log_det(self, v: Tensor) -> Tensor:
        return (math.log(self.slope) + F.softplus(v) + F.softplus(-v)).flatten(1).sum(1)

    def inverse(self, v: Tensor) -> Tensor:
        return (torch.sigmoid(v) - self.offset) / self.slope


def build_preprocessing(kind: str) -> Preprocessing:
    """The pre-processing called `kind`; `UserError` when there is none."""
    if kind == "shift":
        return Shift()
    for known in SQUEEZES:
        if kind == known:
            return Logit(known)
    raise UserError(
        f"flow argument preprocessing={kind!r}; choose one of: {', '.join(get_args(PreprocessingKind))}"
    )


def check_decode_mode(mode: str, preprocessing: Preprocessing) -> None:
    """`UserError` for an unknown mode, and for flp_legacy without the squeeze that it leaves in."""
    if mode not in get_args(DecodeMode):
        raise UserError(
            f"flow argument decode_mode={mode!r}; choose one of: {', '.join(get_args(DecodeMode))}"
        )
    if mode == "flp_legacy" and preprocessing.kind != "logit":
        raise UserError(
            "flow argument decode_mode='flp_legacy' needs preprocessing='logit': it is the published decoder that "
            "leaves the logit's squeeze .05 + .9 d in; use decode_mode='exact'"
        )
