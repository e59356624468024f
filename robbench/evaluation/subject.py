"""The caller's model, made ready for attacks and left as it was found; and what identifies it in a run folder."""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from robbench.attacks import Victim
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.trust.context import full_precision, refuse_inference_tensors
from robbench.core.device import resolve_device
from robbench.core.errors import UserError
from robbench.core.stops import reraise_stop
from robbench.models.functions import FunctionModel, as_module, read_cell
from robbench.models.state import ModelState

Model = nn.Module | Callable[[Tensor], Any]
_INTERNAL = frozenset(vars(nn.Module()))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class LogitsOf(nn.Module):
    """A model that returns more than logits, with the logits taken out. where: as code, ".logits"."""

    def __init__(self, model: nn.Module, pick: Callable[[Any], Any], where: str) -> None:
        super().__init__()
        self.model, self.pick, self.where = model, pick, where

    def forward(self, x: Tensor) -> Any:
        """The logits [n,K] in what the model returns."""
        return self.pick(self.model(x))


@dataclass(frozen=True)
class Subject:
    """A model ready to be attacked.

    Attributes:
        victim: as attacks see it.
        name: of its class or function.
        classes: number of logits per image.
        sha256: identifies what it computes (`fingerprint`); computed when asked for.
        notes: what was taken of its output and what could not be checked, one line each.
    """

    victim: Victim
    name: str
    classes: int
    notes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        return fingerprint(self.victim.module)


@contextmanager
def prepare(
    model: Model, images: Tensor, device: str | torch.device, batch_size: int, data: torch.device
) -> Iterator[Subject]:
    """Inside, `model` is on its device and ready; afterwards it is as it was before, random states included.

    images: float32 [N,C,H,W] in [0,1], of which it is tried on two. device: "auto" is CUDA where there is some; of a
    function, where its modules are, or `data`, the device of the caller's images.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"batch_size={batch_size!r}; give a whole number of images of at least 1")
    module = as_module(model)
    refuse_inference_tensors(module)
    target = choose_device(model, device, data)
    with _random_states(target), preserve(module):
        ready, notes = _with_logits(module.to(target), images[:2].to(target))
        victim = Victim(ready, target, batch_size)
        with attack_mode(ready), full_precision():
            classes = int(victim.score(images[:2]).shape[1])
        name = getattr(model, "__name__", None) or type(model).__name__
        yield Subject(victim, str(name), classes, (*notes, *_list_unchecked(module)))


def choose_device(model: Model, requested: str | torch.device, data: torch.device) -> torch.device:
    """Where `model` is attacked: see `prepare`."""
    module = as_module(model)
    if not isinstance(requested, str | torch.device):
        raise UserError(f"device={requested!r} is not a device; give auto, cpu, cuda or cuda:N")
    if str(requested) != "auto" or not isinstance(module, FunctionModel):
        return resolve_device(str(requested))
    held = (*module.parameters(), *module.buffers())
    return held[0].device if held else data


def _list_unchecked(module: nn.Module) -> Iterator[str]:
    if not isinstance(module, FunctionModel):
        return
    if held := ", ".join(type(part).__name__ for part in module.held):
        yield f"model is a function: of what it uses, only {held} could be put into eval mode and checked for changes"
    else:
        yield "model is a function without a torch.nn.Module: no eval mode and no weights could be checked"


def _with_logits(module: nn.Module, images: Tensor) -> tuple[nn.Module, tuple[str, ...]]:
    """The module, or one that takes the logits out of what it returns for `images`, with a note that says so."""
    try:
        with torch.no_grad(), attack_mode(module):
            out = module(images.clone())
    except BaseException as error:  # the checks of every attack call it again, and say what is wrong
        reraise_stop(error)
        return module, ()
    found = _logits_in(out)
    if found is None:
        return module, ()
    pick, where = found
    return LogitsOf(module, pick, where), (
        f"model returns a {type(out).__name__}: its {where} was taken for logits",
    )


def _logits_in(out: Any) -> tuple[Callable[[Any], Any], str] | None:
    if isinstance(out, Tensor):
        return None
    if isinstance(getattr(out, "logits", None), Tensor):
        return _attribute, ".logits"
    if isinstance(out, Mapping) and isinstance(out.get("logits"), Tensor):
        return _key, '["logits"]'
    if isinstance(out, list | tuple) and out and isinstance(out[0], Tensor):
        return _first, "first element"
    return None


def _attribute(out: Any) -> Any:
    return out.logits


def _key(out: Any) -> Any:
    return out["logits"]


def _first(out: Any) -> Any:
    return out[0]


@contextmanager
def preserve(module: nn.Module) -> Iterator[None]:
    """Afterwards modes, flags, devices, gradients, hooks, parameters and buffers of `module` are what they were, also
    where its forward changed them. Tensors stay the same objects."""
    state = ModelState.of(module)
    parameters = [(p, p.data, p.requires_grad, p.grad) for p in module.parameters()]
    parts = [(part, part.training, dict(part._buffers), _hooks(part)) for part in module.modules()]
    try:
        yield
    finally:
        for parameter, data, flag, gradient in parameters:
            if parameter.data_ptr() != data.data_ptr() or parameter.device != data.device:
                parameter.data = data
            parameter.requires_grad_(flag)
            parameter.grad = gradient
        for part, training, buffers, hooks in parts:
            part.training = training
            for name, buffer in buffers.items():
                if part._buffers[name] is not buffer:
                    part._buffers[name] = buffer
            for name, registered in hooks.items():
                held = getattr(part, name)
                for key in [key for key in held if key not in registered]:
                    del held[key]
        _restore_values(module, state)


def _hooks(part: nn.Module) -> dict[str, set[Any]]:
    return {name: set(getattr(part, name)) for name in _HOOKS if hasattr(part, name)}


def _restore_values(module: nn.Module, state: ModelState) -> None:
    now = dict([*module.named_parameters(), *module.named_buffers()])
    for name in list(state.changed_tensors(module)):
        if name not in state.tensors or name not in now:
            continue
        tensor, content, _ = state.tensors[name]
        if content is not None:
            tensor.data.copy_(content.view(tensor.dtype).reshape(tensor.shape))


@contextmanager
def _random_states(device: torch.device) -> Iterator[None]:
    """The random states of torch, NumPy and Python are those of before afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def fingerprint(module: nn.Module) -> str:
    """sha256 over what a module computes, as far as Python shows it: classes, code of their forwards, plain attributes,
    tensors; of a function its code and what it refers to. Not proof: whoever relies on it compares outputs too."""
    digest = hashlib.sha256()
    _feed(digest.update, module, {})
    return digest.hexdigest()


def _feed(put: Callable[[bytes], None], value: Any, seen: dict[int, Any]) -> None:
    """`put` every part of `value` that can be read, each object once. seen: by id, kept so that none is reused."""
    if isinstance(value, Tensor | np.ndarray):
        _feed_array(put, value if isinstance(value, Tensor) else torch.from_numpy(np.array(value)))
        return
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        put(f"{type(value).__name__}:{value!r};".encode(errors="replace"))
        return
    put(f"{type(value).__module__}.{type(value).__qualname__}(".encode())
    if id(value) not in seen:
        seen[id(value)] = value
        for part in _parts(value):
            _feed(put, part, seen)
    put(b")")


def _feed_array(put: Callable[[bytes], None], values: Tensor) -> None:
    put(f"{values.dtype}{tuple(values.shape)};".encode())
    if values.layout == torch.strided and not values.is_quantized and not values.is_meta:
        put(values.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        put(repr(values).encode())


def _parts(value: Any) -> list[Any]:
    if isinstance(value, nn.Module):
        own = {name: part for name, part in vars(value).items() if name not in _INTERNAL}
        code = getattr(getattr(type(value), "forward", None), "__code__", None)
        return [code, own, dict(value._parameters), dict(value._buffers), dict(value._modules)]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_names, list(value.co_consts)]
    if isinstance(value, Mapping):
        return [part for pair in value.items() for part in pair]
    if isinstance(value, list | tuple):
        return list(value)
    if callable(code := getattr(value, "__func__", None)):  # a bound method
        return [code, value.__self__]
    if isinstance(code := getattr(value, "__code__", None), CodeType):
        names, cells = getattr(value, "__globals__", {}), getattr(value, "__closure__", None) or ()
        used = [names[name] for name in code.co_names if name in names and not _is_library(names[name])]
        return [code, value.__defaults__, value.__kwdefaults__, used, [read_cell(cell) for cell in cells]]
    if _is_library(value):
        return []
    return [
        getattr(vars(type(value)).get("__call__"), "__code__", None),
        dict(getattr(value, "__dict__", {})),
    ]


def _is_library(value: Any) -> bool:
    """Modules and classes: their names say enough."""
    return isinstance(value, type) or type(value).__name__ in ("module", "builtin_function_or_method")
