"""Defenses: the contract (`base`), one module per family, and the training loop (`training`)."""

from robbench.defenses import adversarial, augmentation, er, flow, joint, latent, standard  # noqa: F401  (register)
from robbench.defenses.base import (
    DEFENSES,
    FLOW_DEFENSES,
    Defense,
    Setting,
    build_defense,
    defense_kinds,
    find_defense,
)

__all__ = [
    "DEFENSES",
    "FLOW_DEFENSES",
    "Defense",
    "Setting",
    "build_defense",
    "defense_kinds",
    "find_defense",
]
