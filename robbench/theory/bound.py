"""Guaranteed robustness of the likelihood after adversarial training: paper 002, Theorem 3.2 and Lemma 8.2.

Under a model N(mu, v I), the worst perturbation of x ~ N(mu, sigma^2 I) lowers the log-likelihood by
(2 epsilon ||x - mu|| + epsilon^2) / (2 v), and ||x - mu||/sigma is chi distributed. The printed theorem is the case of
geometric v_m; it needs only a large enough v, so the bound here is on v and applies to every recursion.
"""

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaincc, gammainccinv

from robbench.core.errors import UserError
from robbench.statistics.accuracy import Estimate, wilson
from robbench.theory.perturbation import Gaussian, check_dimension, check_epsilon, worst_perturbation
from robbench.theory.training import Recursion, check_sigma, variances

MAX_STEPS = 1_000_000


@dataclass(frozen=True)
class Guarantee:
    """P[L(x) - L(x + delta) < drop for all ||delta||_2 <= epsilon] >= 1 - gamma, x ~ N(mu, sigma^2 I) in n dimensions.

    `UserError` for other values.

    Attributes:
        n: dimensions.
        epsilon: L2 radius, at least 0.
        sigma: standard deviation, positive.
        drop: of the log-likelihood in nats, positive.
        gamma: probability that the guarantee fails, 0 < gamma < 1.
    """

    n: int
    epsilon: float
    sigma: float
    drop: float
    gamma: float

    def __post_init__(self) -> None:
        check_dimension(self.n)
        check_epsilon(self.epsilon)
        check_sigma(self.sigma)
        if not (math.isfinite(self.drop) and self.drop > 0):
            raise UserError(f"drop={self.drop:g} nats of likelihood; give a finite number above 0")
        if not 0 < self.gamma < 1:
            raise UserError(f"gamma={self.gamma:g} is not a probability of failure; give one between 0 and 1")

    def required_variance(self, sharp: bool = False) -> float:
        """The guarantee holds for every model variance above this one (Theorem 3.2, corrected).

        (2 epsilon sigma q + epsilon^2) / (2 drop) with q = sqrt(max(20 ln(1/gamma), 2n)) by Lemma 8.2; sharp: with
        the (1 - gamma) quantile of the chi distribution for q, which no smaller variance can beat.
        """
        q = chi_quantile(self.n, self.gamma) if sharp else self._lemma_quantile()
        return (2 * self.epsilon * self.sigma * q + self.epsilon**2) / (2 * self.drop)

    def _lemma_quantile(self) -> float:
        return math.sqrt(max(20 * math.log(1 / self.gamma), 2.0 * self.n))

    def required_steps(self, recursion: Recursion, sharp: bool = False) -> int | None:
        """Smallest m with v_m above `required_variance`; None where training does not reach it in 1e6 steps.

        With paper_geometric it is the theorem's m, computed exactly and with the sigma that the printed alpha lacks.
        """
        needed, before = self.required_variance(sharp), -1.0
        for step, variance in enumerate(variances(self.n, self.epsilon, self.sigma, recursion)):
            if variance > needed:
                return step
            if variance == before or step == MAX_STEPS:
                return None
            before = variance
        raise AssertionError("the variances do not end")

    def simulate(self, variance: float, samples: int, seed: int) -> Estimate:
        """Percentage of `samples` draws whose worst drop under N(0, variance I) stays below `drop`, with a 95 % Wilson
        interval. Attacked by `worst_perturbation`, independently of the bound's formula."""
        if samples < 1:
            raise UserError(f"samples={samples}; give an integer of at least 1")
        generator = np.random.default_rng(seed)
        x = Gaussian.spherical(self.n, self.sigma**2).sample(samples, generator)
        rise = worst_perturbation(Gaussian.spherical(self.n, variance), x, self.epsilon).rise
        return wilson(int((rise < self.drop).sum()), samples)


def chi_quantile(n: int, gamma: float) -> float:
    """q with P[||z|| > q] = gamma for z ~ N(0, I) in n dimensions."""
    check_dimension(n)
    return math.sqrt(2 * float(gammainccinv(n / 2, gamma)))


def lemma_tail(n: int, t: float) -> tuple[float, float]:
    """(P[chi2_n >= 2 t n], exp(-t n / 10)): by Lemma 8.2 the first is at most the second for t > 1.

    The lemma holds: Laurent and Massart's bound needs 1 + 2 sqrt(t/10) + t/5 <= 2t, see `lemma_margin`. The printed
    proof uses 1 + 2t/10 + 2t/10 instead, which needs t > 10.
    """
    check_dimension(n)
    return float(gammaincc(n / 2, t * n)), math.exp(-t * n / 10)


def lemma_margin(t: float) -> float:
    """2t - (1 + 2 sqrt(t/10) + t/5): positive where Lemma 8.2 is proved; 0.1675 at t = 1 and rising."""
    return 2 * t - (1 + 2 * math.sqrt(t / 10) + t / 5)
