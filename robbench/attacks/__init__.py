"""Attacks: the contract (`base`), one search loop (`engine`) and one module a family."""

from robbench.attacks import autoattack, autoattack_reference, latent, likelihood, pgd  # noqa: F401  (they register themselves)
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
