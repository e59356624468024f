"""Corruptions that robbench makes itself, for images of any data set, as an attack without a budget.

Nothing is searched. An image follows from its clean image, the seed and its sample id, so that a verifier can make it
again.
"""

# ruff: noqa: RUF001 - the letters of formulas are meant
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from robbench.attacks.base import Attack, Candidates, Task
from robbench.attacks.named import ATTACKS, Cost, Objective
from robbench.attacks.search.task import Samples
from robbench.attacks.victim import Victim
from robbench.core.errors import UserError
from robbench.core.mathml import math
from robbench.core.schema import Strict
from robbench.data.corruption_generators import SMALLEST, generated_images
from robbench.data.corruption_names import SEVERITIES, Headline
from robbench.specs import ResolvedAttack, Semantics

ALGORITHM = "generated-corruption"
LEVEL = 1 / 255  # of 8-bit images
ROUNDED = 1e-3  # share of an image's values that another machine may round to the next level


class GeneratedCorruptionParameters(Strict):
    """generator: version of the code that makes the images, part of a cell's address."""

    corruption: Headline
    severity: int = Field(ge=1, le=SEVERITIES)
    generator: Literal[1] = 1


@ATTACKS.register(ALGORITHM)
class GeneratedCorruption(Attack):
    """One corruption at one severity."""

    Parameters = GeneratedCorruptionParameters

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        return (math("x′ = c(x, ω)"),), "ω: random numbers of the seed and the sample's id. Not searched."

    @property
    def cost(self) -> Cost:
        return Cost(forwards=2, backwards=0)

    @classmethod
    def declared_semantics(cls, parameters: Any) -> Semantics:
        return "perturbation"

    def require_images(self, shape: tuple[int, int, int]) -> None:
        channels, height, width = shape
        if channels not in (1, 3) or min(height, width) < SMALLEST:
            raise UserError(
                f"attack {self.spec.label!r} corrupts grey and RGB images with sides of at least {SMALLEST} pixels; "
                f"these are {channels} x {height} x {width}; leave it out"
            )

    def search(self, victim: Victim, task: Task) -> Candidates:
        found = Candidates.unsearched(task.x, self.spec.name)
        found.adversarial = self._images(Samples(task.ids, task.x, task.y), task.seed)
        found.step.zero_()
        return found

    def differences(self, samples: Samples, images: Tensor, seed: int) -> Iterator[str]:
        """What is wrong with `images` [N,C,H,W] that are said to be the corrupted `samples`: a value that another
        machine cannot have rounded to it, or too many that it may have."""
        gaps = ((images - self._images(samples, seed)).abs().flatten(1) / LEVEL).double()
        moved = (gaps > 1e-3).sum(1)
        wrong = (gaps > 1 + 1e-3).any(1) | (moved > max(1, int(ROUNDED * gaps.shape[1])))
        if wrong.any():
            first = int(samples.ids[int(wrong.int().argmax())])
            yield f"{int(wrong.sum())} images are not those that seed {seed} generates (first sample {first})"

    def _images(self, samples: Samples, seed: int) -> Tensor:
        p = self.parameters
        return generated_images(p.corruption, p.severity, samples.x, samples.ids, seed)
