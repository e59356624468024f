"""robbench: an adversarial-robustness benchmark suite.

`evaluate(model, x, y, attacks=[...])` attacks any model from Python; the command line does the rest.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from robbench.evaluation import evaluate

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate"]


def __getattr__(name: str) -> Any:
    """`robbench.evaluate` on first use: `import robbench` itself stays free of torch."""
    if name == "evaluate":
        from robbench.evaluation import evaluate

        return evaluate
    raise AttributeError(f"module 'robbench' has no attribute {name!r}")
