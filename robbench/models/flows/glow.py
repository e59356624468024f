"""Glow (Kingma & Dhariwal 2018): multi-scale flow with LU 1x1 convolutions and affine or additive coupling.

Differences from the reference implementation, for stability or simplicity: a floor under the coupling scale,
bounded prior widths, no actnorm inside the coupling nets, no border-marking channel, and a top prior with one
mean and width a coordinate.
"""

from typing import Literal, get_args

from robbench.core.errors import UserError
from robbench.models.flows.base import Flow
from robbench.models.flows.layers import ConditionalPrior, Coupling, GlowStep, StandardPrior, TopPrior
from robbench.models.flows.multiscale import MultiScale, Prior, step_shapes
from robbench.models.flows.preprocessing import DecodeMode, PreprocessingKind

PriorKind = Literal["standard", "learned"]


class Glow(Flow):
    """Glow of `levels` x `steps` with coupling nets of `width` channels.

    input_shape: (C,H,W); H and W divisible by 2^levels. grey_levels: of the data set (256 for 8 bits).
    coupling: "affine", or "additive" (volume-preserving). prior: "standard" N(0,I) over all latents (Yuksel
    et al.), or "learned" Gaussians: split priors conditioned on the coarser levels and a learned top.
    scale_floor: f in [0,1) of the coupling scale S = f + (1-f) sigmoid(raw + 2); 0 is Glow's own, which is
    not finite far off the data. preprocessing, decode_mode: see preprocessing.py and base.py. `UserError` for
    anything else. Call `initialize` before training.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        grey_levels: int,
        *,
        levels: int,
        steps: int,
        width: int,
        coupling: Coupling = "affine",
        prior: PriorKind = "learned",
        scale_floor: float = 0.1,
        preprocessing: PreprocessingKind = "shift",
        decode_mode: DecodeMode = "exact",
    ) -> None:
        _check_arguments(steps, width, coupling, prior, scale_floor)
        channels, height, columns = input_shape
        shape = (channels, height, columns)
        stacks = [
            [GlowStep(inner[0], width, coupling, scale_floor) for _ in range(steps)]
            for inner in step_shapes(shape, levels)
        ]
        transform = MultiScale(shape, stacks, _priors(shape, levels, prior))
        super().__init__(shape, grey_levels, transform, preprocessing, decode_mode)


def _priors(shape: tuple[int, int, int], levels: int, kind: PriorKind) -> list[Prior]:
    if kind == "standard":
        return [StandardPrior() for _ in range(levels)]
    *fine, top = step_shapes(shape, levels)
    return [*(ConditionalPrior(inner[0] // 2, inner[0] // 2) for inner in fine), TopPrior(top)]


def _check_arguments(steps: int, width: int, coupling: str, prior: str, scale_floor: float) -> None:
    for name, value in (("steps", steps), ("width", width)):
        if value < 1:
            raise UserError(f"glow argument {name}={value}; give at least 1")
    for name, kind, known in (
        ("coupling", coupling, get_args(Coupling)),
        ("prior", prior, get_args(PriorKind)),
    ):
        if kind not in known:
            raise UserError(f"glow argument {name}={kind!r}; choose one of: {', '.join(known)}")
    if not 0.0 <= scale_floor < 1.0:
        raise UserError(f"glow argument scale_floor={scale_floor}; give a number in [0, 1)")
