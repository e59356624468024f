"""From dequantised pixels d in [0,1) to the variables v that a flow transforms, and back.

    shift:  v = d - 1/2; volume-preserving, no boundary. Default of our own flows.
    logit:  p = .05 + .9 d, v = logit(p); Dinh et al. 2017, section 4.1, with the constants of the PyTorch Glow that
            Yuksel et al. 2022 use. ln|dv/dd| = ln .9 + softplus(v) + softplus(-v). Finite for d in (-.0555, 1.0555),
            which holds every image in [0,1]; NaN or infinity outside.
Which one a flow was trained with is part of its architecture, and so of its card and of every result's identity.
"""

import math
from typing import Literal, Protocol, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from robbench.errors import UserError

PreprocessingKind = Literal["shift", "logit"]
DecodeMode = Literal["exact", "flp_legacy"]

OFFSET, SLOPE = 0.05, 0.9  # of the squeeze p = OFFSET + SLOPE * d


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
    """v = logit(.05 + .9 d)."""

    kind: PreprocessingKind = "logit"

    def forward(self, d: Tensor) -> Tensor:
        return torch.logit(OFFSET + SLOPE * d)

    def log_det(self, v: Tensor) -> Tensor:
        return (math.log(SLOPE) + F.softplus(v) + F.softplus(-v)).flatten(1).sum(1)

    def inverse(self, v: Tensor) -> Tensor:
        return (torch.sigmoid(v) - OFFSET) / SLOPE


def build_preprocessing(kind: str) -> Preprocessing:
    """The pre-processing called `kind`; `UserError` when there is none."""
    known: dict[str, type[Shift] | type[Logit]] = {"shift": Shift, "logit": Logit}
    if kind not in known:
        raise UserError(f"flow argument preprocessing={kind!r}; choose one of: {', '.join(known)}")
    return known[kind]()


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
