"""Attacks: the contract (`base`), how they search (`search`), and one module per family."""

from robbench.attacks import (  # noqa: F401  (they register themselves)
    corruption,
    generated_corruption,
    latent,
    likelihood,
    nes,
    pgd,
    transfer,
)
from robbench.attacks.adaptive import attacks as adaptive  # noqa: F401  (they register themselves)
from robbench.attacks.autoattack import ensemble, reference  # noqa: F401  (they register themselves)
from robbench.attacks.base import Attack, Outcome, build_attack
from robbench.attacks.likelihood import LikelihoodAttack, LikelihoodOutcome, build_likelihood_attack
from robbench.attacks.minimal import (  # noqa: F401  (they register themselves)
    boundary,
    cw,
    ddn,
    deepfool,
    fmn,
    hopskipjump,
)
from robbench.attacks.named import ATTACKS, Cost, NamedAttack
from robbench.attacks.transfer import TransferAttack
from robbench.attacks.unforeseen import elastic, fog, gabor, jpeg, pixels, snow  # noqa: F401  (they register themselves)
from robbench.attacks.victim import Victim

__all__ = [
    "ATTACKS",
    "Attack",
    "Cost",
    "LikelihoodAttack",
    "LikelihoodOutcome",
    "NamedAttack",
    "Outcome",
    "TransferAttack",
    "Victim",
    "build_attack",
    "build_likelihood_attack",
]
