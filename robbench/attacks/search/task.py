"""Input and output of a search."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from robbench.attacks.trust.suspicions import Diagnostics


@dataclass(frozen=True)
class SearchSettings:
    """seed: of all random numbers. batch_size: largest batch of the search."""

    seed: int
    batch_size: int


@dataclass(frozen=True)
class Samples:
    """Samples to attack, on the CPU. ids: [N] int64, all different; x: images [N,C,H,W] in [0,1]; y: labels [N]."""

    ids: Tensor
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Task:
    """Samples for a search, on the victim's device.

    Attributes:
        ids: [n] int64, on the CPU.
        x, y: images [n,C,H,W] in [0,1] and labels [n].
        clean_predictions: classes of the clean images as scored by the base class, [n].
        seed, batch_size: see `SearchSettings`.
        targets: classes [n] that a targeted attack must reach; None for untargeted ones.
    """

    ids: Tensor
    x: Tensor
    y: Tensor
    clean_predictions: Tensor
    seed: int
    batch_size: int = 256
    targets: Tensor | None = None

    def part(self, rows: Tensor) -> "Task":
        """The task of `rows` [m] alone, which are on the CPU."""
        where = rows.to(self.x.device)
        return replace(
            self,
            ids=self.ids[rows],
            x=self.x[where],
            y=self.y[where],
            clean_predictions=self.clean_predictions[where],
            targets=None if self.targets is None else self.targets[where],
        )


@dataclass
class Candidates:
    """Results of a search, on any device, N rows in the order of its task.

    Attributes:
        adversarial: images [N,C,H,W].
        step: gradient steps or queries used when the search believed it succeeded, else -1, [N] int64.
        forwards, backwards: calls of the model, [N] int64.
        component: per sample, the part of an ensemble that found the image.
        witness: tensors from which a latent or joint example is decoded again ("lambda" [N,D], "delta" [N,C,H,W]).
        counts_exact: whether `forwards` and `backwards` are counted per sample, not means over a batch.
        diagnostics: counts of the search.
        claimed: [N] bool, a forward of the search misclassified `adversarial`; None where it is not recorded.
    """

    adversarial: Tensor
    step: Tensor
    forwards: Tensor
    backwards: Tensor
    component: list[str]
    witness: dict[str, Tensor] = field(default_factory=dict)
    counts_exact: bool = True
    diagnostics: Diagnostics = field(default_factory=Diagnostics)
    claimed: Tensor | None = None

    def take(self, part: "Candidates", rows: Tensor) -> None:
        """Copy the results `part` of the samples `rows` [n] into their rows; calls are added."""
        self.adversarial[rows] = part.adversarial.detach().cpu()
        self.step[rows] = part.step.cpu()
        self.forwards[rows] += part.forwards.cpu()
        self.backwards[rows] += part.backwards.cpu()
        self.counts_exact, self.diagnostics = part.counts_exact, part.diagnostics
        if part.claimed is not None and self.claimed is not None:
            self.claimed[rows] = part.claimed.cpu()
        for row, name in zip(rows.tolist(), part.component, strict=True):
            self.component[row] = name
        for name, value in part.witness.items():
            self.witness[name] = torch.zeros((len(self.step), *value.shape[1:]))
            self.witness[name][rows] = value.detach().float().cpu()

    @classmethod
    def unsearched(cls, x: Tensor, component: str) -> "Candidates":
        """The clean images x [N,C,H,W] as results, with no calls counted."""
        zeros = torch.zeros(len(x), dtype=torch.int64)
        return cls(x.clone(), zeros - 1, zeros.clone(), zeros.clone(), [component] * len(x))
