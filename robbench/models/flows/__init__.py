"""Normalizing flows with exact inverses: trainable ones, and frozen copies for attacks."""

from robbench.models.flows.base import Flow, FrozenFlow, Latents
from robbench.models.flows.conditional import ConditionalFlow
from robbench.models.flows.frozen import frozen_module
from robbench.models.flows.gated_coupling import GatedCouplingFlow
from robbench.models.flows.glow import Glow
from robbench.models.flows.realnvp import RealNVP

__all__ = [
    "ConditionalFlow",
    "Flow",
    "FrozenFlow",
    "GatedCouplingFlow",
    "Glow",
    "Latents",
    "RealNVP",
    "frozen_module",
]
