"""One call of the model under test, isolated from the caller's tensors.

The model gets a private, contiguous copy of the images in the default memory format, so that a forward that writes into
its input (`mul_`, `clamp_`) or calls `view` works as it would on its own. Its logits are copied, so that an output
buffer it reuses cannot change earlier results.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robbench.core.errors import UserError
from robbench.core.foreign import cause, message_of
from robbench.core.stops import reraise_stop

Module = Callable[[Tensor], Any]


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory of the device or the machine was too small."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in message_of(
        error, 1000
    )  # the CPU's allocator


def call_model(module: Module, images: Tensor) -> Tensor:
    """float32 logits [n,K] of float images [n,C,H,W], on their device, with a graph to `images` if gradients are on.

    Raises `UserError` when the forward fails, or returns anything but [n, K >= 2] real numbers; lack of memory is
    raised as it comes.
    """
    private = images.clone(memory_format=torch.contiguous_format)
    try:
        out = module(private)
    except UserError:
        raise
    except (
        BaseException
    ) as error:  # SystemExit or KeyboardInterrupt raised by the model must not end this program
        reraise_stop(error)
        if out_of_memory(error):
            raise
        raise UserError(
            f"the model's forward ({type(module).__name__}) failed on images {tuple(images.shape)} with "
            f"{cause(error)}; {_next_step(module, error)}"
        ) from error
    return _logits(out, len(images))


def _logits(out: Any, n: int) -> Tensor:
    if not isinstance(out, Tensor) or out.ndim != 2 or out.shape[0] != n or out.shape[1] < 2:
        got = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(
            f"the model returned {got} for {n} images; a classifier returns logits of shape ({n}, classes) with at "
            f"least 2 classes: wrap the model so that it does"
        )
    if out.is_complex() or out.dtype == torch.bool:
        raise UserError(
            f"the model returned {out.dtype} for {n} images; a classifier returns logits, which are real numbers: "
            f"return the scores from which the prediction is made"
        )
    return out.to(torch.float32, copy=True)


def _next_step(module: Module, error: BaseException) -> str:
    parameters = module.parameters() if isinstance(module, torch.nn.Module) else ()
    others = {p.dtype for p in parameters if p.is_floating_point()} - {torch.float32}
    if others and "type" in cause(error):
        names = ", ".join(sorted(map(str, others)))
        return (
            f"the model has parameters of {names} and cannot take the torch.float32 images it is given: convert it "
            f"with model.float(), or let its forward convert the images"
        )
    return "call the model on a float32 batch of that shape, contiguous and in [0,1], and correct its forward"
