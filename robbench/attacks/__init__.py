"""Attacks: the contract (`base`), one search loop (`engine`) and one module a family."""

from robbench.attacks import (  # noqa: F401  (they register themselves)
    autoattack,
    autoattack_reference,
    corruption,
    latent,
    likelihood,
    pgd,
)
from robbench.attacks.base import Attack, Outcome, build_attack
from robbench.attacks.likelihood import LikelihoodAttack, LikelihoodOutcome, build_likelihood_attack
from robbench.attacks.named import ATTACKS, Cost, NamedAttack
from robbench.attacks.victim import Victim

__all__ = [
    "ATTACKS",
    "Attack",
    "Cost",
    "LikelihoodAttack",
    "LikelihoodOutcome",
    "NamedAttack",
    "Outcome",
    "Victim",
    "build_attack",
    "build_likelihood_attack",
]
