"""robbench: an adversarial-robustness benchmark suite.

`evaluate(model, x, y, attacks=[...])` attacks any model from Python; the command line does the rest.
"""

from typing import TYPE_CHECKING, Any

from robbench.core.moved import follow_moves

if TYPE_CHECKING:
    from robbench.evaluation import RobbenchWarning, evaluate

__version__ = "0.1.0"
follow_moves()
__all__ = ["RobbenchWarning", "__version__", "evaluate"]


def __getattr__(name: str) -> Any:
    """`robbench.evaluate` and its warning on first use: `import robbench` itself stays free of torch."""
    if name in ("evaluate", "RobbenchWarning"):
        from robbench import evaluation

        return getattr(evaluation, name)
    raise AttributeError(f"module 'robbench' has no attribute {name!r}")
