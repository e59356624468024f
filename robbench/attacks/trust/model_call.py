"""One call of the model under test, isolated from the caller's tensors.

A model gets a private, contiguous copy of the images (float32 in every attack) in the default memory format, whatever a
flow or a faster network used inside, so that a forward that writes into its input (`mul_`, `clamp_`) or calls `view`
computes what it would compute on its own. Logits and gradients are copied, so that a buffer it uses again cannot
change earlier results, and are plain tensors: a subclass of the model's could compare as it likes. Torch's modes are
afterwards what they were before.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from robbench.attacks.trust.context import refuse_other_modes, torch_modes
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
    private, before = images.clone(memory_format=torch.contiguous_format), torch_modes()
    if private.requires_grad:
        private.register_hook(_own_memory)  # type: ignore[no-untyped-call]
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
    refuse_other_modes(before, "the model's forward")
    return _logits(out, len(images))


def _own_memory(gradient: Tensor) -> Tensor:
    return gradient.clone(memory_format=torch.contiguous_format)


def _plain(out: Any) -> Any:
    """A tensor without the methods of its class and with data in memory; None for what is none."""
    if type(out) is not Tensor:
        kind: Any = type(out)
        if not issubclass(kind, Tensor) or kind.__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return None
        with torch._C.DisableTorchFunctionSubclass():
            out = out.as_subclass(Tensor)
    return None if out.layout != torch.strided or out.is_meta or out.is_nested else out


def _logits(returned: Any, n: int) -> Tensor:
    out = _plain(returned)
    if out is None or out.ndim != 2 or out.shape[0] != n or out.shape[1] < 2:
        kind = "a tensor without dense data" if isinstance(returned, Tensor) else type(returned).__name__
        got = kind if out is None else tuple(out.shape)
        if out is not None and tuple(out.shape) in ((n,), (n, 1)):
            raise UserError(
                f"the model returned {got} for {n} images, which looks like the single logit of a binary classifier; "
                f"robbench needs one a class: z = model(x).reshape(-1, 1); return torch.cat([-z, z], 1) / 2"
            )
        raise UserError(
            f"the model returned {got} for {n} images; a classifier returns logits of shape ({n}, classes) with at "
            f"least 2 classes: wrap the model so that it does"
        )
    if out.is_complex() or out.dtype == torch.bool:
        raise UserError(
            f"the model returned {out.dtype} for {n} images; a classifier returns logits, which are real numbers: "
            f"return the scores from which the prediction is made"
        )
    logits: Tensor = out.to(torch.float32, copy=True)
    return logits


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
