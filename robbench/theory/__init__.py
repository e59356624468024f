"""The linear theory of likelihood attacks (paper 002), in closed form: flows that fit a Gaussian."""

from robbench.theory.bound import Guarantee, chi_quantile, lemma_margin, lemma_tail
from robbench.theory.perturbation import Gaussian, Perturbation, universal_perturbation, worst_perturbation
from robbench.theory.training import (
    RECURSIONS,
    Recursion,
    TradeOff,
    alpha,
    mean_chi,
    natural_drop,
    random_gaussian,
    sensitivity,
    simulate_trade_off,
    spherical_trade_off,
    trained_variances,
)

__all__ = [
    "RECURSIONS",
    "Gaussian",
    "Guarantee",
    "Perturbation",
    "Recursion",
    "TradeOff",
    "alpha",
    "chi_quantile",
    "lemma_margin",
    "lemma_tail",
    "mean_chi",
    "natural_drop",
    "random_gaussian",
    "sensitivity",
    "simulate_trade_off",
    "spherical_trade_off",
    "trained_variances",
    "universal_perturbation",
    "worst_perturbation",
]
