"""Search spaces: the set of an attack, as perturbations with their constraints and a renderer from a clean image and
perturbations to an image.

A search returns its perturbations as a witness; the base class of attacks checks every constraint of `constraints` on
it, renders the image again (`image_of`) and requires the same one. So no attack leaves its set unnoticed, whatever its
perturbations are: pixels, latents of a flow, a flow field, fog.

A space has no state of its own; the state of a batch is a dictionary of tensors with the sample as first dimension, so
that the engine can drop finished samples and refill the batch. Per step: `render` -> loss -> gradients with respect to
`perturbations` -> `advance` (accumulate, then project, also where a paper's printed update omits it). `finish` gives
the admissible image. No method changes the state that is passed to it.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from robbench.attacks.search.constraints import Ball, Constraint, Support
from robbench.attacks.search.geometry import Noise, Start, direction, norm_of, project, random_start
from robbench.models.flows.checks import LATENT_TOLERANCE
from robbench.specs import Norm

State = dict[str, Tensor]
# Share of a latent perturbation by which encoding a decoded image may miss its latents: below 1e-3 for the flows of the
# zoo at their budgets, above 1 at four times those of cifar10-glow, whose decoder explodes there.
SAME_LATENTS = 0.1
WITNESS_TOLERANCE = 1e-4  # of a pixel in [0,1] that is rendered again, unless the renderer says otherwise
InLoop = Literal["project", "paper_literal"]
Box = Literal["each-step", "end"]


class Rendering(NamedTuple):
    """Images rendered from witnesses. image: [n,C,H,W] in [0,1]. misplaced: [n] bool, the image is none of the latents
    that it was decoded from; False for renderers that are no flow."""

    image: Tensor
    misplaced: Tensor


class Codec(Protocol):
    """A flow as attacks use it: images to latents, one flat vector z [n,D] per sample, and back."""

    def encode_flat(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Latents z [n,D] of images x [n,C,H,W] in [0,1], dequantised at the fixed point u = 1/2; `UserError` where
        decoding them does not return the images."""

    def latents(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """`encode_flat` without its check."""

    def decode_flat(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """Images [n,C,H,W] of latents, not clipped; differentiable in z."""

    def level_mask(self, levels: tuple[int, ...]) -> Tensor:
        """Float mask [D]: 1 on the coordinates of the 1-based `levels` (1 = first factored out, finest)."""


class SearchSpace(ABC):
    """Base of all search spaces.

    perturbations: names of the state entries that are searched. tolerance: how far rounding may move a pixel, in [0,1],
    between the image that a search found and the one rendered from its witness.
    """

    perturbations: tuple[str, ...]

    @property
    def tolerance(self) -> float:
        return WITNESS_TOLERANCE

    @property
    @abstractmethod
    def constraints(self) -> tuple[tuple[str, Constraint], ...]:
        """(name of a perturbation, condition that it meets) pairs: together the set of the attack."""

    @abstractmethod
    def image_of(self, x: Tensor, y: Tensor, witness: Mapping[str, Tensor], noise: Noise) -> Rendering:
        """Images rendered from clean images x [n,C,H,W], labels y [n] and perturbations, without a graph.

        noise: of the search's first restart, whose `scene` draws what is random and not searched.
        """

    @property
    def admissible(self) -> bool:
        """Whether every rendered image lies in the box, so that its logits are those of `finish`."""
        return False

    @abstractmethod
    def start(self, x: Tensor, y: Tensor, noise: Noise) -> State:
        """State of a batch before the first step. x: [n,C,H,W] in [0,1]; y: [n]."""

    @abstractmethod
    def render(self, state: State) -> tuple[Tensor, State]:
        """Image [n,C,H,W], differentiable in the perturbations, and its state: `state` itself, or a copy with a
        perturbation moved into the box. In latent spaces the image may leave [0,1]."""

    @abstractmethod
    def advance(self, state: State, gradients: State) -> State:
        """One ascent step: accumulate, then project. `gradients` has an entry per perturbation."""

    def finish(self, state: State) -> tuple[Tensor, State]:
        """`render` without a graph, the image clipped to [0,1]: the admissible adversarial example."""
        with torch.no_grad():
            image, state = self.render(state)
            return image.clamp(0.0, 1.0), state


@dataclass(frozen=True)
class ImageSpace(SearchSpace):
    """delta in a norm ball around x and inside the box, projected on the ball, then on the box; the box contains x, so
    that clipping never leaves the ball.

    Attributes:
        norm: of the ball.
        epsilon, step_size: in [0,1] pixels.
        start_kind: see `geometry.random_start`.
        box: "end" clips only the final image, as the PGD of Yuksel et al. does; gradients are then taken outside the
            box too.
        perturbations: names of the state entries that are searched.
    """

    norm: Norm
    epsilon: float
    step_size: float
    start_kind: Start = "uniform"
    box: Box = "each-step"
    perturbations: tuple[str, ...] = ("delta",)

    @property
    def admissible(self) -> bool:
        """Whether every iterate is clipped to the box."""
        return self.box == "each-step"

    @property
    def constraints(self) -> tuple[tuple[str, Constraint], ...]:
        return (("delta", Ball("delta", self.norm, self.epsilon)),)

    def image_of(self, x: Tensor, y: Tensor, witness: Mapping[str, Tensor], noise: Noise) -> Rendering:
        return Rendering((x + witness["delta"]).clamp(0.0, 1.0), torch.zeros_like(y, dtype=torch.bool))

    def start(self, x: Tensor, y: Tensor, noise: Noise) -> State:
        delta = random_start(self.start_kind, self.norm, self.epsilon, tuple(x.shape[1:]), noise)
        delta = project(delta, self.norm, self.epsilon)
        return {"x": x, "y": y, "delta": self._in_box(x, delta)}

    def render(self, state: State) -> tuple[Tensor, State]:
        return state["x"] + state["delta"], state

    def advance(self, state: State, gradients: State) -> State:
        gradient = gradients["delta"]
        if self.norm == "l1":
            gradient = self._towards_the_box(state, gradient)
        delta = state["delta"] + self.pace(state) * direction(gradient, self.norm)
        delta = project(delta, self.norm, self.epsilon)
        return {**state, "delta": self._in_box(state["x"], delta)}

    def pace(self, state: State) -> float | Tensor:
        """Size of the step from `state`, one for all samples or [n,1,1,1]."""
        return self.step_size

    def _in_box(self, x: Tensor, delta: Tensor) -> Tensor:
        """`delta` [n,C,H,W], clipped so that x + delta is in [0,1] where every iterate is clipped."""
        return (x + delta).clamp_(0.0, 1.0).sub_(x) if self.admissible else delta

    @staticmethod
    def _towards_the_box(state: State, gradient: Tensor) -> Tensor:
        """The gradient with 0 for pixels at 0 or 1 where it points outwards: clipping would undo a sparse L1 step on
        them, and the search would not move any more."""
        pixels = state["x"] + state["delta"]
        stuck = ((pixels >= 1.0) & (gradient > 0)) | ((pixels <= 0.0) & (gradient < 0))
        return gradient.masked_fill(stuck, 0.0)


def decode_witness(codec: Codec, x: Tensor, y: Tensor, witness: Mapping[str, Tensor]) -> Rendering:
    """The images clip(G(F(x) + lambda) + delta) of a witness, without a graph, and which of them are misplaced: F(G(z))
    is further from z = F(x) + lambda than `SAME_LATENTS` times lambda.

    G is checked to invert F at clean latents elsewhere; at others it may give any image, which would be no image of the
    ball of lambda. x: [n,C,H,W] in [0,1]; y: the condition [n]; witness: "lambda" [n,D] and, for joint attacks, "delta"
    [n,C,H,W].
    """
    with torch.no_grad():
        z = codec.latents(x, y) + witness["lambda"]
        decoded = codec.decode_flat(z, y)
        allowed = SAME_LATENTS * norm_of(witness["lambda"], "l2")
        allowed = allowed + LATENT_TOLERANCE * norm_of(z, "l2")  # of rounding, where lambda is small
        same = norm_of(codec.latents(decoded, y) - z, "l2") <= allowed
        image = decoded + witness["delta"] if "delta" in witness else decoded
        return Rendering(image.clamp(0, 1), ~same)


def _latent_constraints(
    flow: Codec, norm: Norm, eta: float, levels: tuple[int, ...] | None
) -> tuple[tuple[str, Constraint], ...]:
    ball: tuple[str, Constraint] = ("lambda", Ball("lambda", norm, eta))
    if levels is None:
        return (ball,)
    return ball, ("lambda", Support(f"levels {list(levels)} of the flow", flow.level_mask(levels)))


def _on_levels(flow: Codec, levels: tuple[int, ...] | None, shift: Tensor) -> Tensor:
    """`shift` [n,D] with zeros outside the named levels of the flow; None for all levels."""
    return shift if levels is None else shift * flow.level_mask(levels).to(shift)


@dataclass(frozen=True)
class LatentSpace(SearchSpace):
    """lambda in a norm ball around the latents z = F(x); x' = clip(G(z + lambda)).

    No clipping inside the loop (Yuksel et al.); only the final image is clipped.

    Attributes:
        flow: encoder F and decoder G.
        norm: of the ball.
        eta, step_size: in raw z units.
        start_kind: see `geometry.random_start`.
        levels: 1-based levels of the flow that may move; None for all.
        perturbations: names of the state entries that are searched.
    """

    flow: Codec
    norm: Norm
    eta: float
    step_size: float
    start_kind: Start = "uniform"
    levels: tuple[int, ...] | None = None
    perturbations: tuple[str, ...] = ("lambda",)

    @property
    def constraints(self) -> tuple[tuple[str, Constraint], ...]:
        return _latent_constraints(self.flow, self.norm, self.eta, self.levels)

    def image_of(self, x: Tensor, y: Tensor, witness: Mapping[str, Tensor], noise: Noise) -> Rendering:
        return decode_witness(self.flow, x, y, witness)

    def start(self, x: Tensor, y: Tensor, noise: Noise) -> State:
        with torch.no_grad():
            z = self.flow.encode_flat(x, y)
        shift = random_start(self.start_kind, self.norm, self.eta, tuple(z.shape[1:]), noise)
        return {
            "x": x,
            "y": y,
            "z": z,
            "lambda": project(_on_levels(self.flow, self.levels, shift), self.norm, self.eta),
        }

    def render(self, state: State) -> tuple[Tensor, State]:
        return self.flow.decode_flat(state["z"] + state["lambda"], state["y"]), state

    def advance(self, state: State, gradients: State) -> State:
        step = self.step_size * direction(_on_levels(self.flow, self.levels, gradients["lambda"]), self.norm)
        return {**state, "lambda": project(state["lambda"] + step, self.norm, self.eta)}


@dataclass(frozen=True)
class JointSpace(SearchSpace):
    """Joint space attack (IJSAT eq. 8, corrected): x' = clip(G(z + lambda) + delta), both Linf.

    The printed update neither accumulates nor projects, so that its budgets would never be reached; here both
    perturbations accumulate and are projected, from gradients of the same loss at the same point. The image is never
    clipped inside the differentiated path, which would remove gradients: where G leaves the box, the gradient is taken
    outside it by as much, and the scored image is clipped. delta is relative to G(z + lambda), not to x.

    Attributes:
        flow: encoder F and decoder G.
        epsilon, epsilon_step: in [0,1] pixels.
        eta, eta_step: in raw z units.
        start_kind: see `geometry.random_start`.
        in_loop: "project" keeps clip(G(z + lambda)) + delta in the box at every step; "paper_literal" clips only the
            final image, which is weaker.
        levels: 1-based levels of the flow that may move; None for all.
        perturbations: names of the state entries that are searched.
    """

    flow: Codec
    epsilon: float
    epsilon_step: float
    eta: float
    eta_step: float
    start_kind: Start = "uniform"
    in_loop: InLoop = "project"
    levels: tuple[int, ...] | None = None
    perturbations: tuple[str, ...] = ("lambda", "delta")

    @property
    def constraints(self) -> tuple[tuple[str, Constraint], ...]:
        latent = _latent_constraints(self.flow, "linf", self.eta, self.levels)
        return (*latent, ("delta", Ball("delta", "linf", self.epsilon)))

    def image_of(self, x: Tensor, y: Tensor, witness: Mapping[str, Tensor], noise: Noise) -> Rendering:
        return decode_witness(self.flow, x, y, witness)

    def start(self, x: Tensor, y: Tensor, noise: Noise) -> State:
        latent = LatentSpace(self.flow, "linf", self.eta, self.eta_step, self.start_kind, self.levels)
        state = latent.start(x, y, noise)
        delta = random_start(self.start_kind, "linf", self.epsilon, tuple(x.shape[1:]), noise)
        return {**state, "delta": project(delta, "linf", self.epsilon)}

    def render(self, state: State) -> tuple[Tensor, State]:
        """See `SearchSpace`. In mode "project" delta is brought into the box here, so that one decode, the most
        expensive part of a step, serves both the constraint and the image."""
        decoded = self.flow.decode_flat(state["z"] + state["lambda"], state["y"])
        delta = state["delta"]
        if self.in_loop == "project":
            centre = decoded.detach().clamp(0.0, 1.0)
            inside = (centre + delta.detach()).clamp(0.0, 1.0) - centre
            delta = inside + (
                delta - delta.detach()
            )  # the value of `inside`, to the bit, with the gradient of delta
        return decoded + delta, {**state, "delta": delta}

    def advance(self, state: State, gradients: State) -> State:
        gradient = _on_levels(self.flow, self.levels, gradients["lambda"])
        shift = state["lambda"] + self.eta_step * direction(gradient, "linf")
        delta = state["delta"] + self.epsilon_step * direction(gradients["delta"], "linf")
        return {
            **state,
            "lambda": project(shift, "linf", self.eta),
            "delta": project(delta, "linf", self.epsilon),
        }
