"""robbench: an adversarial-robustness benchmark suite.

`evaluate(model, x, y, attacks="pgd20,aa")` measures any model from Python, `attack("pgd20")(model, x, y)` makes
adversarial images (docs/python.md); the command line does the rest.
"""

from typing import TYPE_CHECKING, Any

from robbench.core.errors import UserError
from robbench.core.moved import follow_moves

if TYPE_CHECKING:
    from robbench.evaluation import RobbenchWarning, attack, evaluate, load_images, load_model

__version__ = "0.1.0"
follow_moves()
__all__ = [
    "RobbenchWarning",
    "UserError",
    "__version__",
    "attack",
    "evaluate",
    "load_images",
    "load_model",
]


def __getattr__(name: str) -> Any:
    """What `__all__` names beside the version, on first use: `import robbench` itself stays free of torch."""
    if name in ("attack", "evaluate", "load_images", "load_model", "RobbenchWarning"):
        from robbench import evaluation

        return getattr(evaluation, name)
    raise AttributeError(f"module 'robbench' has no attribute {name!r}")
