"""Torch's global settings during an attack; the caller's are restored afterwards."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from operator import attrgetter

import torch
from torch import nn

from robbench.core.errors import UserError

# Attributes of torch.backends with an `fp32_precision` of their own (torch 2.9 and later).
_OPERATIONS = ("cuda.matmul", "cudnn.conv", "cudnn.rnn", "mkldnn.matmul", "mkldnn.conv", "mkldnn.rnn")


@contextmanager
def own_context() -> Iterator[None]:
    """Inside, no inference mode, no autocast, float32 as default dtype and the CPU as default device, whatever the
    caller has set."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 and no bfloat16 inside of float32 convolutions and matrix products, on GPU and CPU; restored after.

    Torch has two ways to ask for them, and refuses to read the older one where the newer has made settings that it
    cannot express; then the newer one alone is used.
    """
    with ExitStack() as restored:
        operations = _precisions()
        for (
            name,
            precision,
        ) in operations.items():  # restored last, since the older settings change some of them
            restored.callback(setattr, attrgetter(name)(torch.backends), "fp32_precision", precision)
        with suppress(RuntimeError):
            restored.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
            torch.set_float32_matmul_precision("highest")
        with suppress(RuntimeError):
            restored.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
            torch.backends.cudnn.allow_tf32 = False
        for name in operations:
            attrgetter(name)(torch.backends).fp32_precision = "ieee"
        yield


def _precisions() -> dict[str, str]:
    """The `fp32_precision` of the operations of torch.backends; empty before torch 2.9."""
    if not hasattr(torch.backends, "fp32_precision"):
        return {}
    return {name: attrgetter(f"{name}.fp32_precision")(torch.backends) for name in _OPERATIONS}


def _precision() -> tuple[object, ...]:
    """Of float32 arithmetic, by torch's older settings, which are quick to read and notice most of the newer ones."""
    try:
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    except RuntimeError:  # the newer ones say what the older cannot express
        return ("mixed",)


def torch_modes() -> dict[str, object]:
    """Torch's modes of this thread, by the name of what sets them."""
    return {
        "torch.set_grad_enabled": torch.is_grad_enabled(),
        "torch.inference_mode": torch.is_inference_mode_enabled(),
        "torch.set_default_dtype": torch.get_default_dtype(),
        "torch.autocast": (torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")),
        "torch.set_default_device or a TorchFunctionMode": torch._C._len_torch_function_stack(),
        "a TorchDispatchMode": torch._C._len_torch_dispatch_stack(),
        "torch.set_float32_matmul_precision or torch.backends": _precision(),
    }


def refuse_other_modes(before: dict[str, object], what: str) -> None:
    """`UserError` where `what` (the model's forward, a search) has left torch in another mode than `before`."""
    after = torch_modes()
    if after == before:
        return
    changed = next(name for name in after if after[name] != before[name])
    torch.set_grad_enabled(bool(before["torch.set_grad_enabled"]))
    raise UserError(
        f"{what} leaves torch in another mode than before ({changed}), in which attacks and verdicts would be computed "
        f"otherwise; set modes outside of it, or in a with block inside of it"
    )


def refuse_inference_tensors(module: nn.Module) -> None:
    """`UserError` for a module that was built inside `torch.inference_mode`: it has no gradients."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    name = next((name for name, tensor in tensors if tensor.is_inference()), None)
    if name is not None:
        raise UserError(
            f"the model's tensor {name!r} was made inside torch.inference_mode() and cannot be differentiated through; "
            f"build or load the model outside of torch.inference_mode()"
        )
