"""What must not change while a model is used: its parameters, its buffers, its modules and their hooks."""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{kind}" for kind in _HOOKS)


@dataclass(frozen=True)
class ModelState:
    """A copy of a module's state, to compare with later.

    Attributes:
        tensors: parameters and buffers by name; the tensor itself, its bytes (None where its layout has none to
            compare, as of quantized tensors) and its version counter.
        parts: by name of a submodule, its class and the forward of that class, training mode, number of hooks and
            whether its own forward is patched.
        global_hooks: number of hooks that run for all modules.
    """

    tensors: dict[str, tuple[Tensor, Tensor | None, int]]
    parts: dict[str, tuple[type, object, bool, int, bool]]
    global_hooks: int

    @classmethod
    def of(cls, module: nn.Module) -> "ModelState":
        """The state of `module` now."""
        tensors = {
            name: (tensor, None if (content := _bytes(tensor)) is None else content.clone(), tensor._version)
            for name, tensor in _named_tensors(module)
        }
        return cls(tensors, _parts(module), _global_hooks())

    def change(self, module: nn.Module) -> str | None:
        """The first difference of `module` from this state in words, None where there is none."""
        moved = dict(_named_tensors(module)).keys() ^ self.tensors.keys()
        if moved:
            return f"parameters or buffers were added or removed ({', '.join(sorted(moved)[:3])})"
        for name in self.changed_tensors(module):
            return f"the values of {name!r} changed"
        if _parts(module) != self.parts or _global_hooks() != self.global_hooks:
            return "submodules, their forwards, their training modes or their hooks changed"
        return None

    def changed_tensors(self, module: nn.Module) -> Iterator[str]:
        """Names of the parameters and buffers of `module` that have other values now, were added or removed."""
        now = dict(_named_tensors(module))
        for name in self.tensors | now:
            if name not in now or name not in self.tensors or not self._same(name, now[name]):
                yield name

    def _same(self, name: str, now: Tensor) -> bool:
        before, content, version = self.tensors[name]
        found = _bytes(now)
        if content is None or found is None:
            return now is before and before._version == version
        return found.shape == content.shape and torch.equal(found, content.to(found.device))


class FirstStates:
    """States of modules when each was first used in this process."""

    def __init__(self) -> None:
        self._states: dict[int, tuple[weakref.ref[nn.Module], ModelState]] = {}

    def change(self, module: nn.Module) -> str | None:
        """How `module` differs from its first use, see `ModelState.change`; None for the first use."""
        known = self._states.get(id(module))
        if known is None or known[0]() is not module:
            self._states[id(module)] = weakref.ref(module), ModelState.of(module)
            return None
        return known[1].change(module)

    def __reduce__(self) -> tuple[type["FirstStates"], tuple[()]]:
        return FirstStates, ()  # another process has modules of its own


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _bytes(tensor: Tensor) -> Tensor | None:
    """The tensor's content as bytes, so that NaN equals itself; None for layouts without plain storage."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        return None
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _parts(module: nn.Module) -> dict[str, tuple[type, object, bool, int, bool]]:
    return {
        name: (
            type(part),
            next((vars(kind)["forward"] for kind in type(part).__mro__ if "forward" in vars(kind)), None),
            part.training,
            sum(len(getattr(part, hooks, ())) for hooks in _HOOKS),
            "forward" in part.__dict__,
        )
        for name, part in module.named_modules()
    }


def _global_hooks() -> int:
    return sum(len(getattr(torch_module, name)) for name in _GLOBAL_HOOKS)
