"""Torch's global settings during an attack; the caller's are restored afterwards."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from robbench.core.errors import UserError


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


def refuse_inference_tensors(module: nn.Module) -> None:
    """`UserError` for a module that was built inside `torch.inference_mode`: it has no gradients."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    name = next((name for name, tensor in tensors if tensor.is_inference()), None)
    if name is not None:
        raise UserError(
            f"the model's tensor {name!r} was made inside torch.inference_mode() and cannot be differentiated through; "
            f"build or load the model outside of torch.inference_mode()"
        )
