"""Theory meets attack: PGD on the likelihood of a linear flow reaches the closed-form optimum."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from robbench.attacks.search.geometry import GeneratorNoise
from robbench.attacks.search.inner import ascend, attack_mode
from robbench.attacks.search.spaces import ImageSpace
from robbench.theory.perturbation import Gaussian, worst_perturbation

EPSILON, RESTARTS = 0.05, 8


class LinearFlow(nn.Module):
    """z = W (x - mean) with W^T W = K^-1: the flow whose density is N(mean, K). Images [N,C,H,W], float64."""

    def __init__(self, model: Gaussian) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.from_numpy(model.mean))
        inverse = np.linalg.inv(model.covariance)
        self.weight = nn.Parameter(torch.from_numpy(np.linalg.cholesky((inverse + inverse.T) / 2).T.copy()))

    def log_prob(self, x: Tensor) -> Tensor:
        """ln N(x; mean, K) in nats, [N]: log-det plus standard normal density of z."""
        z = (x.flatten(1) - self.mean) @ self.weight.T
        log_det = torch.linalg.slogdet(self.weight).logabsdet
        return log_det - 0.5 * (z.square().sum(1) + z.shape[1] * math.log(2 * math.pi))


def image_gaussian(n: int, seed: int, spread: float) -> Gaussian:
    """A Gaussian well inside the unit box, so that only the ball binds; eigenvalues spread by a factor."""
    generator = np.random.default_rng(seed)
    basis = np.linalg.qr(generator.standard_normal((n, n)))[0]
    return Gaussian.from_spectrum(np.full(n, 0.5), 0.03**2 * np.geomspace(1, spread, n), basis)


@pytest.mark.parametrize(("spread", "steps"), [(1.0, 100), (4.0, 400), (20.0, 400)])
@pytest.mark.parametrize("seed", [0, 1])
def test_pgd_reaches_the_closed_form(seed: int, spread: float, steps: int) -> None:
    model = image_gaussian(16, seed, spread)
    flow = LinearFlow(model)
    points = model.sample(12, np.random.default_rng(seed))
    best = worst_perturbation(model, points, EPSILON)
    x = torch.from_numpy(points).reshape(-1, 1, 4, 4).repeat_interleave(RESTARTS, 0)
    space = ImageSpace("l2", EPSILON, step_size=EPSILON)
    noise = GeneratorNoise(len(x), torch.Generator().manual_seed(seed))
    with attack_mode(flow):
        before = flow.log_prob(x)
        start = space.start(x, torch.zeros(len(x), dtype=torch.long), noise)
        state = ascend(space, lambda image: -flow.log_prob(image), start, steps)
        rise = (before - flow.log_prob(space.finish(state)[0])).reshape(-1, RESTARTS)
    assert np.asarray(before.reshape(-1, RESTARTS)[:, 0]) == pytest.approx(
        model.log_density(points), rel=1e-10
    )
    winner = rise.argmax(1)
    assert np.asarray(rise.amax(1)) == pytest.approx(best.rise, rel=1e-4)
    assert (np.asarray(rise) <= best.rise[:, None] * (1 + 1e-9)).all()
    found = state["delta"].reshape(-1, RESTARTS, 16)[torch.arange(len(points)), winner].numpy()
    assert np.linalg.norm(found - best.delta, axis=1).max() <= 1e-4 * EPSILON
