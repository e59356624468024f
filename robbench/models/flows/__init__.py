"""Normalizing flows with exact inverses: trainable ones, and frozen copies for attacks."""

from robbench.models.flows.base import Flow, FrozenFlow, Latents
from robbench.models.flows.glow import Glow

__all__ = ["Flow", "FrozenFlow", "Glow", "Latents"]
