"""Base of decision-based attacks: all that they learn of the model is whether it misclassifies an image.

One query per iteration. A search begins with keyed random images until one is misclassified, goes back along the way to
the clean image by bisection, and leaves the rest to its subclass. The last query asks for the nearest image found,
moved `RETREAT` of its distance away from the clean one: what lies on the boundary to the last bit would be judged by
the rounding of another batch.
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from robbench.attacks.minimal.base import MinimalAttack, MinimalSearch
from robbench.attacks.named import Cost
from robbench.attacks.search.geometry import known_empty, norm_of, per_sample, put
from robbench.attacks.search.progress import tell
from robbench.attacks.search.spaces import State
from robbench.attacks.search.task import Task
from robbench.attacks.victim import Victim
from robbench.core.random import KeyedNumbers
from robbench.core.schema import Strict
from robbench.specs import Norm

RETREAT = 2.0**-12
START, BISECT, WALK = 0, 1, 2  # phases of a sample; a subclass may have more
UNBLENDED = 2  # first random images, which hold nothing of the clean one


class DecisionParameters(Strict):
    """Parameters of decision-based attacks.

    Attributes:
        queries: decisions that the model is asked for per sample, those for the start included.
    """

    queries: int = Field(default=5000, gt=0)


class DecisionSearch(MinimalSearch):
    """See the module. State: keys [n], of random numbers; phase [n]; point [n,C,H,W], the misclassified image where the
    search is; of a bisection: far [n,C,H,W], its misclassified end, and low, high, top [n], bracket and its first end.

    Attributes:
        budget: distance at which a sample counts as broken; only its query is noted, the search goes on.
        resolution: of a bisection, relative to its first bracket.
    """

    resolution: float

    def __init__(self, name: str, norm: Norm, queries: int, budget: float) -> None:
        self.name, self.norm, self.iterations, self.budget = name, norm, queries, budget

    @abstractmethod
    def propose(self, state: State) -> Tensor:
        """The images [n,C,H,W] to ask for; those of samples that start or bisect are not used."""

    @abstractmethod
    def learn(self, state: State, images: Tensor, wrong: Tensor) -> None:
        """Update the state in place by the answers `wrong` [n] bool; samples that start or bisect must not change."""

    @abstractmethod
    def arrive(self, state: State, where: Tensor) -> None:
        """Begin in place what follows a bisection, for the samples `where` [n] bool."""

    def begin(self, victim: Victim, task: Task) -> State:
        state = super().begin(victim, task)
        keys = KeyedNumbers(task.seed, self.name, task.ids, 0, task.x.device).keys
        zeros = torch.zeros_like(state["distance"])
        bracket = {name: zeros.clone() for name in ("low", "high", "top")}
        images = {"point": task.x.clone(), "far": task.x.clone()}
        return {**state, **images, **bracket, "keys": keys, "phase": torch.zeros_like(keys)}

    def step(self, victim: Victim, state: State) -> State:
        state, live = {**state}, self.live(state)
        phase, last = state["phase"], state["found"] & (state["iteration"] + 1 == self.iterations)
        images = self._images(state, last)
        tell(calls=len(images))
        wrong = victim.margins(images, state["y"]) <= 0
        self._keep(state, images, live & wrong, last)
        self.learn(state, images, wrong)
        self._bisect(state, images, wrong & (phase == BISECT), ~wrong & (phase == BISECT))
        self.bisect_from(state, images, wrong & (phase == START))
        state["iteration"] = state["iteration"] + live
        state["forwards"] = state["forwards"] + live * victim.draws
        return state

    def _images(self, state: State, last: Tensor) -> Tensor:
        """What every sample asks for, [n,C,H,W] in the box."""
        x, phase = state["x"], state["phase"]
        images = self.propose(state)
        put(images, self._along(state, 0.5 * (state["low"] + state["high"])), phase == BISECT)
        if not known_empty(phase == START):
            put(images, self._start(state), phase == START)
        if not known_empty(last):
            put(images, torch.lerp(x, state["adversarial"], 1.0 + RETREAT), last)
        return images.clamp_(0.0, 1.0)

    def _start(self, state: State) -> Tensor:
        """Uniform noise, in every other try rounded to black and white; after `UNBLENDED` tries blended with the clean
        image by a random share."""
        x, draw = state["x"], state["iteration"]
        noise = KeyedNumbers.uniform(state["keys"], 2 * draw, x.shape[1:].numel()).reshape(x.shape)
        share = KeyedNumbers.uniform(state["keys"], 2 * draw + 1, 1).squeeze(1)
        share = torch.where(draw < UNBLENDED, 1.0, share)
        noise = torch.where(per_sample(draw % 2 == 1, x), noise.round(), noise)
        return torch.lerp(x, noise, per_sample(share, x))

    def _keep(self, state: State, images: Tensor, wrong: Tensor, last: Tensor) -> None:
        """Record in place the `images` that are misclassified (`wrong` [n] bool) and nearer than what is kept."""
        distance, before = norm_of(images - state["x"], self.norm), state["distance"]
        inside, was_inside = distance.double() <= self.budget, before.double() <= self.budget
        taken = wrong & torch.where(last, inside | ~was_inside, distance < before)
        put(state["adversarial"], images, taken)
        state["distance"] = torch.where(taken, distance, before)
        first = wrong & inside & ~(was_inside & state["found"])
        state["broken_at"] = torch.where(first, state["iteration"] + 1, state["broken_at"])
        state["found"] = state["found"] | taken

    def _bisect(self, state: State, images: Tensor, nearer: Tensor, farther: Tensor) -> None:
        if known_empty(nearer | farther):
            return
        middle = 0.5 * (state["low"] + state["high"])
        put(state["point"], images, nearer)
        state["high"] = torch.where(nearer, middle, state["high"])
        state["low"] = torch.where(farther, middle, state["low"])
        close = state["high"] - state["low"] <= self.resolution * state["top"]
        self.arrive(state, (nearer | farther) & close)

    def bisect_from(self, state: State, images: Tensor, where: Tensor) -> None:
        """Begin in place the bisection between the clean images and the misclassified `images`, for `where` [n]."""
        if known_empty(where):
            return
        for name in ("point", "far"):
            put(state[name], images, where)
        top = norm_of(images - state["x"], "linf") if self.norm == "linf" else torch.ones_like(state["top"])
        state["low"] = state["low"].masked_fill(where, 0.0)
        state |= {name: torch.where(where, top, state[name]) for name in ("high", "top")}
        state["phase"] = state["phase"].masked_fill(where, BISECT)

    def _along(self, state: State, size: Tensor) -> Tensor:
        """Images on the way from the clean images to `far`: blended by a share `size` [n], or, in Linf, changed by at
        most `size`."""
        x, far = state["x"], state["far"]
        if self.norm == "linf":
            reach = per_sample(size, x)
            return x + (far - x).clamp(-reach, reach)
        return torch.lerp(x, far, per_sample(size, x))


class DecisionAttack(MinimalAttack):
    """Base of decision-based attacks."""

    Parameters: ClassVar[type[DecisionParameters]] = DecisionParameters

    @property
    def budget(self) -> float:
        """Distance at which a sample counts as broken; infinite without a budget."""
        return float("inf") if self.spec.epsilon is None else self.spec.radius

    @property
    def cost(self) -> Cost:
        """The queries and the two scoring forwards; no sample leaves before."""
        return Cost(forwards=self.parameters.queries + 2, backwards=0)
