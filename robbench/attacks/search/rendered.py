"""Perturbations that are no pixel ball: variables in a set of their own, and a renderer from clean image and variables
to an image. One renderer is one module of `robbench.attacks.unforeseen`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from robbench.attacks.search.constraints import Constraint
from robbench.attacks.search.geometry import Noise, direction
from robbench.attacks.search.spaces import Rendering, SearchSpace, State
from robbench.specs import Norm

Optimizer = Literal["steps", "frank-wolfe"]
VARIABLES, SCENE = "variables", "scene/"
Shape = tuple[int, int, int]


class Renderer(ABC):
    """Map of a clean image x [n,C,H,W] in [0,1] and variables [n,*shape] to an image [n,C,H,W].

    Attributes:
        unit: of the budget, in words ("pixels of displacement").
        contains_clean: whether some variables of the set render the clean image. Where not (fog, snow, JPEG), a budget
            of 0 is an attack too, and accuracy under attack counts the rendered image alone.
        tolerance: how far rounding may move a pixel between two renderings of the same variables.
    """

    unit: ClassVar[str]
    contains_clean: ClassVar[bool] = True
    tolerance: ClassVar[float] = 1e-4

    @property
    @abstractmethod
    def usual(self) -> tuple[float, float]:
        """Smallest and largest budget above 0 that makes sense, in `unit`; others are errors of scale."""

    @abstractmethod
    def shape(self, image: Shape) -> tuple[int, ...]:
        """Shape of the variables of one image; `UserError` for image sides that the renderer cannot take."""

    @property
    @abstractmethod
    def constraints(self) -> tuple[Constraint, ...]:
        """Conditions on the variables, projected on in this order after every step."""

    @abstractmethod
    def start(self, image: Shape, noise: Noise) -> Tensor:
        """Variables [n,*shape] before the first step; they are projected on the constraints afterwards."""

    def scene(self, x: Tensor, noise: Noise) -> Mapping[str, Tensor]:
        """What is random per sample and not searched (kernels of snow), by name, sample first. noise: `Noise.scene`."""
        return {}

    @abstractmethod
    def render(self, x: Tensor, scene: Mapping[str, Tensor], variables: Tensor) -> Tensor:
        """Image [n,C,H,W], differentiable in the variables; clipped to the box afterwards, or here, where steps on the
        clipped image break more. Per sample: no statistics of the batch."""

    def confine(self, x: Tensor, variables: Tensor) -> Tensor:
        """Variables, inside their constraints, brought to where their image lies in the box; after every step."""
        return variables

    def vertex(self, x: Tensor, variables: Tensor, gradient: Tensor) -> Tensor:
        """The point of the set that is furthest along the gradient: where a Frank-Wolfe step moves to."""
        raise NotImplementedError(f"{type(self).__name__} has no Frank-Wolfe step")


@dataclass(frozen=True)
class RenderedSpace(SearchSpace):
    """Variables of a renderer, moved by steps of steepest ascent or by Frank-Wolfe.

    Attributes:
        renderer: from clean image and variables to an image.
        step_size: in the units of the variables; unused by Frank-Wolfe.
        step_norm: linf for sign steps, l2 for normalised ones.
        optimizer: "frank-wolfe" moves the variables by 1/(t+1) towards the vertex at step t = 0, 1, ... (no step size).
        perturbations: the name of the variables in the state.
    """

    renderer: Renderer
    step_size: float
    step_norm: Norm = "linf"
    optimizer: Optimizer = "steps"
    perturbations: tuple[str, ...] = (VARIABLES,)

    @property
    def tolerance(self) -> float:
        return self.renderer.tolerance

    @property
    def constraints(self) -> tuple[tuple[str, Constraint], ...]:
        return tuple((VARIABLES, constraint) for constraint in self.renderer.constraints)

    def start(self, x: Tensor, y: Tensor, noise: Noise) -> State:
        image = (int(x.shape[1]), int(x.shape[2]), int(x.shape[3]))
        variables = self._project(self.renderer.start(image, noise))
        return {"x": x, "y": y, VARIABLES: variables, **self._scene(x, noise)}

    def render(self, state: State) -> tuple[Tensor, State]:
        scene = {name[len(SCENE) :]: value for name, value in state.items() if name.startswith(SCENE)}
        return self.renderer.render(state["x"], scene, state[VARIABLES]), state

    def advance(self, state: State, gradients: State) -> State:
        variables, gradient = state[VARIABLES], gradients[VARIABLES]
        if self.optimizer == "frank-wolfe":
            share = 1.0 / (state["iteration"] + 1.0)
            vertex = self.renderer.vertex(state["x"], variables, gradient)
            moved = variables + share.reshape(-1, *[1] * (variables.ndim - 1)).to(variables) * (
                vertex - variables
            )
        else:
            moved = variables + self.step_size * direction(gradient, self.step_norm)
        return {**state, VARIABLES: self.renderer.confine(state["x"], self._project(moved))}

    def image_of(self, x: Tensor, y: Tensor, witness: Mapping[str, Tensor], noise: Noise) -> Rendering:
        with torch.no_grad():
            state = {"x": x, "y": y, VARIABLES: witness[VARIABLES], **self._scene(x, noise)}
            image = self.render(state)[0].clamp(0.0, 1.0)
        return Rendering(image, torch.zeros(len(x), dtype=torch.bool, device=x.device))

    def _scene(self, x: Tensor, noise: Noise) -> State:
        return {f"{SCENE}{name}": value for name, value in self.renderer.scene(x, noise.scene()).items()}

    def _project(self, variables: Tensor) -> Tensor:
        for constraint in self.renderer.constraints:
            variables = constraint.project(variables)
        return variables
