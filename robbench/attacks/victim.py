"""The model as attacks see it, and the small things everybody needs to score it."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from robbench.attacks.batches import batch_in_cache, largest_output
from robbench.attacks.lean import searchable
from robbench.errors import UserError
from robbench.precision import SearchPrecision, checked_precision

RANDOMISED_VERDICTS = 3  # means of forwards an attacked image is scored by where the model is randomised


def full_precision() -> AbstractContextManager[None]:
    """fp32 means fp32: no TF32 in convolutions and matrix products on recent GPUs; restored after."""
    return _tensor_float_32(False)


@contextmanager
def _tensor_float_32(allowed: bool) -> Iterator[None]:
    before = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, the device's or the machine's, was too small."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)  # the CPU's allocator


def chunks(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """`rows` in consecutive parts of at most `size`; none for no rows (Tensor.split gives one empty part)."""
    return tuple(rows[start : start + size] for start in range(0, len(rows), size))


class Victim:
    """A frozen model as an attack sees it. Counts nothing by itself: engines count per sample.

    module: maps [n,C,H,W] float32 in [0,1] to logits [n,K]; normalisation inside. precision, compiled: how `logits` and
    `differentiable` compute, which a search may be told in order to be faster; `margins` and `clean_logits`, on which
    verdicts stand, are fp32 forwards of the unmodified module always, means of `draws` of them where the module is
    randomised. fits: a batch size that memory holds, once a larger one was found not to fit. exact: whether a search
    sees the module itself, to the last bit; what it finds elsewhere is to be confirmed.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device | str = "cpu",
        batch_size: int = 256,
        precision: SearchPrecision = "fp32",
        compiled: bool = False,
    ) -> None:
        self.module, self.device, self.batch_size = module.to(device), torch.device(device), batch_size
        self.precision: SearchPrecision = checked_precision(precision)
        self.exact = precision == "fp32" and not compiled
        self.draws = 1
        self.fits: int | None = None
        self._largest = 0  # bytes of a layer's output, an image; 0 for any batch
        self._searched: Callable[[Tensor], Tensor] = (
            torch.compile(self.module, dynamic=True) if compiled else self.module
        )

    @property
    def only_claims(self) -> bool:
        """Whether a search that sees a misclassified image can be mistaken: its forward was another one than that of
        the module, or the module is randomised."""
        return not self.exact or self.draws > 1

    @property
    def verdicts(self) -> int:
        """How many means of `draws` forwards an attacked image is scored by."""
        return 1 if self.draws == 1 else RANDOMISED_VERDICTS

    def attacked_logits(self, x: Tensor, labels: Tensor) -> Tensor:
        """`clean_logits` of attacked images; where the module is randomised, those of the least margin in `verdicts`
        of them: who is not right each time is not robust. labels: [N] on the CPU, valid ones."""
        worst = self.clean_logits(x)
        for _ in range(self.verdicts - 1):
            again = self.clean_logits(x)
            closer = margins(again, labels) < margins(worst, labels)
            worst = torch.where(closer[:, None], again, worst)
        return worst

    @contextmanager
    def searched_leanly(self, images: Tensor) -> Iterator[None]:
        """Inside, and on the CPU, a search sees a lean network that computes what the module does, whose weights must
        not change meanwhile. images [n,C,H,W]: some of those to attack."""
        before = (self._searched, self.exact, self._largest)
        if self.device.type == "cpu":
            self._largest = largest_output(self.module, self._checked, images[:2])
            if self._searched is self.module:
                self._searched = searchable(self.module, images)
                self.exact &= self._searched is self.module
        try:
            yield
        finally:
            self._searched, self.exact, self._largest = before

    def searched_batch(self, asked: int) -> int:
        """The batch for a search, at most `asked`: inside `searched_leanly`, on the CPU, what its cache holds."""
        return batch_in_cache(self._largest, asked)

    def logits(self, x: Tensor) -> Tensor:
        """Logits [n,K] without a graph, on x's device, in the search's precision."""
        with torch.no_grad():
            return self.differentiable(x)

    def differentiable(self, x: Tensor) -> Tensor:
        """float32 logits [n,K] with a graph to x, in the search's precision."""
        if self.precision == "fp32":
            return self._searched(x).float()
        with _tensor_float_32(True):
            return self._searched(x).float()

    def margins(self, x: Tensor, labels: Tensor) -> Tensor:
        """Margins [n] of a clean fp32 forward of images on the device."""
        with torch.no_grad():
            return margins(self._averaged(x).float(), labels)

    def loss_gradient(self, x: Tensor, labels: Tensor) -> Tensor:
        """Gradient [n,C,H,W] of the cross-entropy at images on the device, as a search sees it. `RuntimeError` of
        autograd for a model that is not differentiable."""
        point = x.detach().requires_grad_(True)
        with torch.enable_grad():
            loss = nn.functional.cross_entropy(self.differentiable(point), labels, reduction="sum")
            (slope,) = torch.autograd.grad(loss, point)
        return slope

    def use_batches_of(self, size: int) -> None:
        """From now on no batch is larger than `size`."""
        self.fits, self.batch_size = size, min(self.batch_size, size)

    def _averaged(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        for _ in range(self.draws - 1):
            out = out + self.module(x)
        return out if self.draws == 1 else out / self.draws

    def clean_logits(self, x: Tensor) -> Tensor:
        """Checked fp32 logits [N,K] on the CPU for images on any device, in batches of `batch_size`.

        `UserError` when the model returns another shape, NaN or infinite values.
        """
        parts = [self._checked(part.to(self.device)) for part in chunks(x, self.batch_size)]
        return torch.cat(parts) if parts else torch.zeros((0, 2))

    def require_deterministic(self, x: Tensor) -> None:
        """`UserError` when the model gives other logits for the same images a second time.

        A search stops at the first misclassified iterate; against random logits that is luck, and the later verdict
        another draw: the accuracy would be too high.
        """
        x = x[: self.batch_size]
        first, second = self.clean_logits(x), self.clean_logits(x)
        gap = float((first - second).abs().max()) if len(x) else 0.0
        if gap > 1e-3 * max(1.0, float(first.abs().max())):
            raise UserError(
                f"the model is randomised: its logits for the same images differ by {gap:.3g}; "
                f"attack it with aa-rand, which averages over its randomness, or make its forward pass deterministic"
            )

    def _checked(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            try:
                out = self._averaged(x)
            except RuntimeError as error:
                self._explain(error)
                raise
        if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != len(x) or out.shape[1] < 2:
            got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise UserError(
                f"the model returned {got} for {len(x)} images; a classifier returns logits of shape "
                f"({len(x)}, classes) with at least 2 classes: wrap the model so that it does"
            )
        if not torch.isfinite(out).all():
            bad = int((~torch.isfinite(out)).any(1).sum())
            raise UserError(
                f"the model returned NaN or infinite logits for {bad} of {len(x)} images in [0,1]; "
                f"repair the model or its normalisation before measuring it"
            )
        return out.float().cpu()

    def _explain(self, error: RuntimeError) -> None:
        """`UserError` where a forward failed because the parameters are not float32 and the images are."""
        others = {p.dtype for p in self.module.parameters() if p.is_floating_point()} - {torch.float32}
        if others and "type" in str(error) and not out_of_memory(error):
            names = ", ".join(sorted(map(str, others)))
            raise UserError(
                f"the model has parameters of {names} and cannot take the torch.float32 images it is given; convert "
                f"it with model.float(), or let its forward convert the images"
            ) from error


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Logit of the label minus the largest other logit, [n]; at most 0 means broken."""
    own = logits.gather(1, labels[:, None]).squeeze(1)
    others = logits.scatter(1, labels[:, None], float("-inf"))
    return own - others.amax(1)
