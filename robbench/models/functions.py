"""Callables that are no modules, as modules: wrappers that return one of several outputs, functions, bound methods."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from robbench.core.errors import UserError


class FunctionModel(nn.Module):
    """A callable of images [n,C,H,W], with the modules it holds registered.

    Modules are found in the callable's attributes, its closure, the global names it uses, and the object it is bound
    to, so that they are attacked in eval mode and held to their weights like any other.
    """

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.held = nn.ModuleList({id(module): module for module in _modules(function)}.values())

    def forward(self, x: Tensor) -> Any:
        """What the callable returns."""
        return self.function(x)


def as_module(model: object) -> nn.Module:
    """`model` itself, or a `FunctionModel` of a callable; `UserError` for anything else."""
    if isinstance(model, nn.Module):
        return model
    if isinstance(model, type) or not callable(model):
        raise UserError(
            f"model={model!r} is no model; give a torch.nn.Module (an instance, not the class) or a function that maps "
            f"images [N,C,H,W] in [0,1] to logits [N,classes]"
        )
    return FunctionModel(model)


def _modules(function: Any) -> Iterator[nn.Module]:
    if isinstance(function, partial):
        found = [function.func, *function.args, *function.keywords.values()]
        yield from (value for value in found if isinstance(value, nn.Module))
        yield from _modules(function.func)
        return
    owner = getattr(function, "__self__", None)
    if isinstance(owner, nn.Module):
        yield owner
    code = getattr(function, "__code__", None)
    cells = [read_cell(cell) for cell in getattr(function, "__closure__", None) or ()]
    names = getattr(function, "__globals__", {})
    used = [names.get(name) for name in code.co_names] if code is not None else []
    for value in (*cells, *used, *getattr(function, "__dict__", {}).values()):
        if isinstance(value, nn.Module):
            yield value


def read_cell(cell: Any) -> Any:
    """The value in a cell of a closure; None where its name was never assigned."""
    try:
        return cell.cell_contents
    except ValueError:
        return None
