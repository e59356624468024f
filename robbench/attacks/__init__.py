"""Attacks: the contract (`base`), one search loop (`engine`) and one module a family."""

from robbench.attacks import autoattack, latent, pgd  # noqa: F401  (they register themselves)
from robbench.attacks.base import ATTACKS, Attack, Cost, Outcome, build_attack
from robbench.attacks.victim import Victim

__all__ = ["ATTACKS", "Attack", "Cost", "Outcome", "Victim", "build_attack"]
