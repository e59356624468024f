"""Detectors that do what a test wants, their zoo folders, and an attack that is given its detector."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from robbench.attacks.base import Candidates, Task
from robbench.attacks.named import ATTACKS
from robbench.attacks.pgd import ProjectedGradientDescent
from robbench.attacks.victim import Victim
from robbench.cards import ClassifierReference, DetectorCard, DetectorSplit, TrainingAttack, Weights
from robbench.core.resources import sha256_file
from robbench.core.schema import dump_yaml
from robbench.detectors.base import DETECTORS, Detector, DetectorParameters, Reference
from robbench.models.zoo import read_entry

HONEST = ("zero", "mean", "nan", "infinite")
MANY = 2  # images of the call with which a detector is tried when it is loaded
KNOWING = """
name: knowing
target: detector
space: image
norm: linf
description: An attack that is given its detector.
budgets: {digits: {epsilon: 0.2}}
attacks:
  knowing-pgd: {algorithm: knowing-pgd, parameters: {steps: 10}}
"""
Scoring = Callable[["Scripted", Tensor], Any]


class ScriptedParameters(DetectorParameters):
    mode: str


class Scripted(Detector):
    """Scores as its mode says; a mode that is not honest shows once more images come than it is tried on."""

    Parameters = ScriptedParameters

    def learn(self, reference: Reference) -> None: ...

    def statistic(self, place: int, features: Tensor, predicted: Tensor) -> Tensor:
        raise NotImplementedError

    @property
    def pointwise(self) -> bool:
        return self.parameters.mode != "together"

    def scores(self, images: Tensor, clean: Tensor | None = None) -> Any:
        if len(images) <= MANY and self.parameters.mode not in HONEST:
            return images.double().flatten(1).sum(1) * 0
        return MODES[self.parameters.mode](self, images)


def _zero(_: Scripted, images: Tensor) -> Tensor:
    return images.double().flatten(1).sum(1) * 0


def _retuned(detector: Scripted, images: Tensor) -> Tensor:
    detector.threshold = 1e9
    return _zero(detector, images)


def _drifting(detector: Scripted, images: Tensor) -> Tensor:
    detector.held("value").add_(1)
    return _zero(detector, images)


def _writing(_: Scripted, images: Tensor) -> Tensor:
    images.zero_()
    return images.double().flatten(1).sum(1)


def _leaving(_: Scripted, images: Tensor) -> Tensor:
    raise SystemExit(0)


MODES: dict[str, Scoring] = {
    "zero": _zero,
    "together": _zero,
    "mean": lambda _, images: images.double().flatten(1).mean(1),
    "nan": lambda _, images: _zero(_, images) + math.nan,
    "infinite": lambda _, images: _zero(_, images) + math.inf,
    "order": lambda _, images: torch.arange(len(images), dtype=torch.float64),
    "batch": lambda _, images: images.double().flatten(1).sum(1) * 0 + len(images),
    "column": lambda _, images: _zero(_, images)[:, None],
    "float32": lambda _, images: _zero(_, images).float(),
    "list": lambda _, images: [0.0] * len(images),
    "threshold": _retuned,
    "drift": _drifting,
    "write": _writing,
    "exit": _leaving,
}


class Knowing(ProjectedGradientDescent):
    """PGD that must have been given its detector, and looks at it."""

    target = "detector"

    def search(self, victim: Victim, task: Task) -> Candidates:
        assert self.guard is not None
        assert len(self.guard.scores_of(task.x.cpu())) == len(task.x)
        return super().search(victim, task)


@contextmanager
def registered() -> Iterator[None]:
    """Inside, `scripted` is a detector and `knowing-pgd` an attack algorithm."""
    DETECTORS.register("scripted")(Scripted)
    ATTACKS.register("knowing-pgd")(Knowing)
    try:
        yield
    finally:
        del DETECTORS._entries["scripted"], ATTACKS._entries["knowing-pgd"]


@contextmanager
def guarded_zoo(tiny_zoo: Path, folder: Path) -> Iterator[Path]:
    """`folder` with a copy of tiny-a and the threat model `knowing` in specs/; inside, what is `registered`."""
    shutil.copytree(tiny_zoo / "tiny-a", folder / "tiny-a")
    (folder / "specs").mkdir()
    (folder / "specs" / "knowing.yaml").write_text(KNOWING)
    with registered():
        yield folder


def write_detector(zoo: Path, mode: str, threshold: float = 0.5, **changes: Any) -> str:
    """Write the folder of a scripted detector of tiny-a; returns its name."""
    name, model = f"tiny-{mode}", read_entry(zoo / "tiny-a").card
    folder = zoo / name
    folder.mkdir(exist_ok=True)
    save_file({"value": torch.zeros(1)}, folder / "weights.safetensors")
    fields: dict[str, Any] = {
        "name": name,
        "description": "made by the tests",
        "dataset": "digits",
        "detector": "scripted",
        "parameters": {"mode": mode},
        "classifier": ClassifierReference(name="tiny-a", function_hash=model.function_hash),
        "layers": ("8",),
        "input_shape": (1, 8, 8),
        "classes": 10,
        "attacks": (TrainingAttack(name="fgsm", examples=1, mean_l2=1.0, noise_std=0.1),),
        "split": DetectorSplit(reference=1, attacked=1, threshold=1, sha256="a" * 64),
        "seed": 0,
        "threshold": threshold,
        "false_positive_rate": 0.05,
        "measured_false_positive_rate": 0.0,
        "weights": Weights(file="weights.safetensors", sha256=sha256_file(folder / "weights.safetensors")),
        "command": "",
        "versions": {},
        "minutes": 0.0,
    }
    (folder / "card.yaml").write_text(dump_yaml(DetectorCard(**fields | changes)))
    return name
