"""Loss around images on two directions: the gradient's sign and a random vector of -1 and 1 (Engstrom et al. 2018).

The mean cross-entropy of x + a sign(grad) + b r, clipped to [0,1], at every (a, b), from clean fp32 forwards.
"""

import math

import torch
from torch import Tensor, nn

from robbench.attacks import Victim
from robbench.attacks.victim import chunks
from robbench.core.errors import UserError
from robbench.core.random import SampleRandom
from robbench.run.subjects import FigureRequest, Numbers, Subject

STREAM = "loss surface"
COLUMNS = ("gradient_sign", "random", "loss")
FALLBACK = 0.1  # extent where the run has no attack in Linf


def measure_surface(subject: Subject, request: FigureRequest) -> Numbers:
    """Mean loss on a grid of `request.points` times `request.points` around the stored clean images."""
    extent = _extent(subject) if request.extent is None else request.extent
    sign = _gradient_sign(subject.victim, subject.images, subject.labels)
    random = SampleRandom(subject.run.seed, STREAM).uniform(subject.ids, subject.run.shape)
    random = torch.where(random < 0, -1.0, 1.0)
    half = request.points // 2
    steps = [extent * k / half for k in range(-half, half + 1)]  # 0 exactly in the middle
    rows = tuple(
        (a, b, _loss(subject, (subject.images + a * sign + b * random).clamp(0, 1)))
        for b in steps
        for a in steps
    )
    flat = int((sign == 0).flatten(1).all(1).sum())
    facts = [
        f"Mean cross-entropy of {len(subject.ids)} images at x + a sign(gradient) + b r, clipped to [0,1]; r of -1 and "
        f"1 by seed {subject.run.seed}, one an image; clean fp32 forwards."
    ]
    facts += [f"{flat} of {len(subject.ids)} images have no gradient."] if flat else []
    options = ("--extent", f"{extent:g}", "--points", f"{request.points}")
    return Numbers(COLUMNS, rows, tuple(facts), len(subject.ids), options)


def _extent(subject: Subject) -> float:
    """The largest Linf budget of the model's attacks."""
    budgets = [r.cell.attack.epsilon for r in subject.cells if r.cell.attack.norm == "linf"]
    return max((budget for budget in budgets if budget), default=FALLBACK)


def _gradient_sign(victim: Victim, images: Tensor, labels: Tensor) -> Tensor:
    """Sign of the gradient of the cross-entropy, [N,C,H,W] of -1, 0 and 1 on the CPU."""
    signs = []
    for part in chunks(torch.arange(len(images)), victim.batch_size):
        x, y = images[part].to(victim.device), labels[part].to(victim.device)
        try:
            signs.append(victim.loss_gradient(x, y).sign().cpu())
        except RuntimeError as error:
            raise UserError(
                f"a loss surface follows the gradient and the model gives none ({error})"
            ) from error
    return torch.cat(signs)


def _loss(subject: Subject, images: Tensor) -> float:
    logits = subject.victim.score(images).double()
    loss = float(nn.functional.cross_entropy(logits, subject.labels))
    if not math.isfinite(loss):
        raise UserError(
            f"the loss of {subject.name!r} is {loss} near clean images; a surface needs finite logits"
        )
    return loss
