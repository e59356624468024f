"""Corrupted test images of a published benchmark (CIFAR-10-C) as an attack without a budget.

Nothing is searched: the images are read by sample id. The accuracy counts all of them, also those whose clean image is
misclassified (semantics "perturbation").
"""

# ruff: noqa: RUF001 - the letters of formulas are meant
from pathlib import Path
from typing import Any

from pydantic import Field

from robbench.attacks.base import Attack, Candidates, Task
from robbench.attacks.named import ATTACKS, Cost, Objective
from robbench.attacks.search.spaces import Codec
from robbench.attacks.victim import Victim
from robbench.core.errors import UserError
from robbench.core.mathml import math
from robbench.core.schema import Strict
from robbench.data.corruption_names import SEVERITIES, Corruption
from robbench.data.corruptions import corrupted_images
from robbench.specs import SHA256, ResolvedAttack, Semantics


class CorruptionParameters(Strict):
    """sha256: of the file of images, part of a cell's address. folder: where the file is, part of no address."""

    corruption: Corruption
    severity: int = Field(ge=1, le=SEVERITIES)
    sha256: SHA256 | None = None
    folder: Path | None = Field(default=None, exclude=True)


@ATTACKS.register("corruption")
class CorruptedImages(Attack):
    """One corruption at one severity; `robbench run` finds the files."""

    Parameters = CorruptionParameters

    def __init__(self, spec: ResolvedAttack, flow: Codec | None = None) -> None:
        super().__init__(spec, flow)
        if self.parameters.folder is None:
            raise UserError(
                f"attack {spec.name!r} reads the corrupted images of a data set by sample id; run it with "
                f"robbench run --dataset cifar10 --attacks {spec.name}"
            )

    @classmethod
    def objective(cls, spec: ResolvedAttack) -> Objective:
        return (math("x′ = c(x)"),), "Given, not searched."

    @property
    def cost(self) -> Cost:
        return Cost(forwards=2, backwards=0)

    @classmethod
    def declared_semantics(cls, parameters: Any) -> Semantics:
        return "perturbation"

    def search(self, victim: Victim, task: Task) -> Candidates:
        p, found = self.parameters, Candidates.unsearched(task.x, self.spec.name)
        found.adversarial = corrupted_images(p.folder, p.corruption, p.severity, task.ids)
        found.step.zero_()
        return found
