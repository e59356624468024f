"""PGD of other libraries in an Linf ball, called as documented: the same start (the image itself), step size, number of
steps and batch as robbench's, on the same frozen model in eval mode.

robbench itself needs none of the libraries; `INSTALL` has the commands.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from robbench.attacks.victim import chunks
from robbench.benchmarks.peers import available

Search = Callable[[Tensor, Tensor], Tensor]  # images [n,C,H,W] in [0,1], labels [n] -> adversarial images

INSTALL = {
    "foolbox": "pip install foolbox",
    "torchattacks": "pip install --no-deps torchattacks",  # its pins are old; it needs torch alone
    "ART": "pip install adversarial-robustness-toolbox packaging",
}
DISTRIBUTIONS = {
    "foolbox": "foolbox",
    "torchattacks": "torchattacks",
    "ART": "adversarial-robustness-toolbox",
}


@dataclass(frozen=True)
class Pgd:
    """Settings of all implementations.

    Attributes:
        epsilon: radius of the Linf ball, of pixels in [0, 1].
        step_size: of a sign step, in the same unit.
        steps: number of steps.
        batch_size: images per batch.
        classes: of the model, which ART needs.
    """

    epsilon: float
    step_size: float
    steps: int
    batch_size: int
    classes: int


Build = Callable[[nn.Module, Pgd, torch.device], Search]


def _in_batches(search: Search, size: int) -> Search:
    """A search in batches of `size`, for libraries without batches."""

    def run(x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([search(x[rows], y[rows]) for rows in chunks(torch.arange(len(x)), size)])

    return run


def plain(module: nn.Module, pgd: Pgd, device: torch.device) -> Search:
    """PGD as a plain loop."""

    def search(x: Tensor, y: Tensor) -> Tensor:
        adversarial = x.clone()
        for _ in range(pgd.steps):
            adversarial.requires_grad_(True)
            loss = nn.functional.cross_entropy(module(adversarial), y, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, adversarial)
            moved = adversarial.detach() + pgd.step_size * gradient.sign()
            adversarial = (x + (moved - x).clamp(-pgd.epsilon, pgd.epsilon)).clamp(0.0, 1.0)
        return adversarial

    return _in_batches(search, pgd.batch_size)


def foolbox(module: nn.Module, pgd: Pgd, device: torch.device) -> Search:
    """`run` of foolbox's LinfPGD, without the forward that its call adds for the verdict."""
    from foolbox.attacks.projected_gradient_descent import LinfProjectedGradientDescentAttack
    from foolbox.criteria import Misclassification
    from foolbox.models.pytorch import PyTorchModel

    model = PyTorchModel(module, bounds=(0, 1), device=device)
    attack = LinfProjectedGradientDescentAttack(
        abs_stepsize=pgd.step_size, steps=pgd.steps, random_start=False
    )

    def search(x: Tensor, y: Tensor) -> Tensor:
        return attack.run(model, x, Misclassification(y), epsilon=pgd.epsilon)

    return _in_batches(search, pgd.batch_size)


def torchattacks(module: nn.Module, pgd: Pgd, device: torch.device) -> Search:
    """torchattacks.PGD."""
    import torchattacks

    attack = torchattacks.PGD(
        module, eps=pgd.epsilon, alpha=pgd.step_size, steps=pgd.steps, random_start=False
    )
    return _in_batches(lambda x, y: cast(Tensor, attack(x, y)), pgd.batch_size)


def art(module: nn.Module, pgd: Pgd, device: torch.device) -> Search:
    """ART's ProjectedGradientDescentPyTorch at our batch size (its default of 32 is slower). Its `generate` always
    makes forwards of clean and final images to log the success rate."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    def search(x: Tensor, y: Tensor) -> Tensor:
        classifier: Any = PyTorchClassifier(
            module,
            loss=nn.CrossEntropyLoss(),
            input_shape=tuple(x.shape[1:]),
            nb_classes=pgd.classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if device.type == "cuda" else "cpu",
        )
        attack = ProjectedGradientDescentPyTorch(
            classifier,
            eps=pgd.epsilon,
            eps_step=pgd.step_size,
            max_iter=pgd.steps,
            batch_size=pgd.batch_size,
            verbose=False,
        )
        return torch.from_numpy(attack.generate(x.cpu().numpy(), y.cpu().numpy())).to(device)

    return search


PEERS: dict[str, Build] = {"plain loop": plain, "foolbox": foolbox, "torchattacks": torchattacks, "ART": art}


def build_peers(
    module: nn.Module, pgd: Pgd, device: torch.device, peers: dict[str, Build] | None = None
) -> tuple[dict[str, Search], dict[str, str]]:
    """(searches of the peers that are installed, reasons of those that are not)."""
    builds = {
        name: partial(build, module, pgd, device)
        for name, build in (PEERS if peers is None else peers).items()
    }
    return available(builds, INSTALL)
