"""The model under attack: its forwards in a search, and its scores."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from robbench.attacks.search.decision import margins
from robbench.attacks.search.forward import SearchForward
from robbench.attacks.search.goals import goal_margins
from robbench.attacks.search.progress import tell
from robbench.attacks.trust.model_call import call_model
from robbench.core.errors import UserError

RANDOMISED_VERDICTS = 3  # times that an attacked image is scored where the model is randomised


def chunks(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """`rows` in consecutive parts of at most `size`; () for no rows, where Tensor.split gives one empty part."""
    return tuple(rows[start : start + size] for start in range(0, len(rows), size))


class Listener(Protocol):
    """Receives the forwards of a search."""

    def note(self, images: Tensor, logits: Tensor) -> None:
        """Called after a forward of images [n,C,H,W] with logits [n,K]."""


class Victim:
    """A frozen model under attack. It counts no calls: engines count them per sample.

    `margins`, `score` and `clean_logits`, on which verdicts rest, are always fp32 forwards of the unmodified module.

    Attributes:
        module: maps [n,C,H,W] float32 in [0,1] to logits [n,K]; normalisation inside.
        device, batch_size: of scoring.
        forward: the network that searches call through `logits` and `differentiable`.
        draws: forwards averaged per verdict of a randomised module; 1 for others.
        fits: batch size known to fit into memory, once a larger one did not.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        compiled: bool = False,
    ) -> None:
        self.module, self.device, self.batch_size = module.to(device), torch.device(device), batch_size
        network = torch.compile(self.module, dynamic=True) if compiled else self.module
        self.forward = SearchForward(network, exact=not compiled)
        self.draws = 1
        self.fits: int | None = None
        self._listener: Listener | None = None
        self._classes: int | None = None

    @property
    def must_confirm(self) -> bool:
        """Whether `margins` must confirm that a candidate is misclassified: the search uses another forward than the
        module's own, or the module is randomised."""
        return not self.forward.exact or self.draws > 1

    @property
    def verdicts(self) -> int:
        """How often an attacked image is scored, each time by a mean of `draws` forwards."""
        return 1 if self.draws == 1 else RANDOMISED_VERDICTS

    def attacked_logits(self, x: Tensor, labels: Tensor) -> Tensor:
        """fp32 logits [N,K] of attacked images, on the CPU; rows that are not finite count as broken (`margins`). For a
        randomised module, those with the smallest margin of `verdicts` scorings: a robust sample is right each time.
        labels: [N] on the CPU."""
        worst = self.score(x)
        for _ in range(self.verdicts - 1):
            again = self.score(x)
            closer = margins(again, labels) < margins(worst, labels)
            worst = torch.where(closer[:, None], again, worst)
        return worst

    @contextmanager
    def lean_search(self, images: Tensor) -> Iterator[None]:
        """Inside, a search on the CPU calls an accelerated forward (`SearchForward`); the module's weights must not
        change meanwhile. images [n,C,H,W]: some of those to attack."""
        before = self.forward
        if self.device.type == "cpu":
            self.forward = before.accelerate(self.module, self.score, images)
        try:
            yield
        finally:
            self.forward = before

    @contextmanager
    def audit_forwards(self, listener: Listener) -> Iterator[None]:
        """Inside, `listener` is told of every forward of a search."""
        self._listener = listener
        try:
            yield
        finally:
            self._listener = None

    def call(self, x: Tensor) -> Tensor:
        """One fp32 forward of the unmodified module: logits [n,K] on x's device, with a graph if gradients are on."""
        return self._as_many(call_model(self.module, x))

    def _as_many(self, logits: Tensor) -> Tensor:
        """`logits` [n,K]; `UserError` where K was another before."""
        self._classes = self._classes or logits.shape[1]
        if logits.shape[1] != self._classes:
            raise UserError(
                f"the model returned {self._classes} logits for some images and {logits.shape[1]} for others; return "
                f"one logit per class for every image"
            )
        return logits

    def logits(self, x: Tensor) -> Tensor:
        """Logits [n,K] of the search's forward, without a graph, on x's device."""
        with torch.no_grad():
            return self.differentiable(x)

    def differentiable(self, x: Tensor) -> Tensor:
        """float32 logits [n,K] of the search's forward, with a graph to x."""
        tell(calls=len(x))
        out = self._as_many(call_model(self.forward.network, x))
        if self._listener is not None:
            self._listener.note(x, out)
        return out

    def margins(self, x: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
        """Margins [n] of a clean fp32 forward of images on the device; with targets [n], how far these are from being
        reached (`goal_margins`)."""
        with torch.no_grad():
            logits = self._average_forwards(x)
        return margins(logits, labels) if targets is None else goal_margins(logits, targets)

    def loss_gradient(self, x: Tensor, labels: Tensor) -> Tensor:
        """Gradient [n,C,H,W] of the cross-entropy at images on the device, through the search's forward. `RuntimeError`
        of autograd for a model that is not differentiable."""
        point = x.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(self.differentiable(point), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, point)
        return gradient

    def use_batches_of(self, size: int) -> None:
        """Limit all later batches to `size` images."""
        self.fits, self.batch_size = size, min(self.batch_size, size)

    def _average_forwards(self, x: Tensor) -> Tensor:
        out = self.call(x)
        for _ in range(self.draws - 1):
            out = out + self.call(x)
        return out if self.draws == 1 else out / self.draws

    def score(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """fp32 logits [N,K] on the CPU for images on any device, means of `draws` forwards, finite or not.

        In batches of `batch_size`, or of the victim's own. `UserError` where `call_model` refuses the output.
        """
        with torch.no_grad():
            parts = [
                self._average_forwards(part.to(self.device)).cpu()
                for part in chunks(x, batch_size or self.batch_size)
            ]
        return torch.cat(parts) if parts else torch.zeros((0, 2))

    def score_draws(self, x: Tensor, batch_size: int) -> Tensor:
        """fp32 logits [draws,N,K] on the CPU, each draw by itself, in batches of `batch_size`."""
        with torch.no_grad():
            parts = [
                torch.stack([self.call(part.to(self.device)) for _ in range(self.draws)]).cpu()
                for part in chunks(x, batch_size)
            ]
        return torch.cat(parts, 1)

    def clean_logits(self, x: Tensor, batch_size: int | None = None) -> Tensor:
        """`score` for clean images; `UserError` when a logit is NaN or infinite."""
        out = self.score(x, batch_size)
        bad = int((~torch.isfinite(out)).any(1).sum())
        if bad:
            raise UserError(
                f"the model returned NaN or infinite logits for {bad} of {len(x)} clean images in [0,1]; "
                f"repair the model or its normalisation before measuring it"
            )
        return out
