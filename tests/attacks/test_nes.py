"""NES: its estimator against the definition in float64, its queries, and what it finds without gradients."""

import numpy as np
import pytest
import torch
from torch import nn

from robbench.attacks import Victim, build_attack
from robbench.attacks.nes import NESParameters, NESSearch
from robbench.attacks.search.geometry import drawn_noise
from robbench.attacks.search.task import Task
from robbench.core.errors import UserError
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()


def build(epsilon=0.2, **parameters):
    spec = resolve_attack("nes", "digits", MODELS, epsilon=epsilon)
    return build_attack(spec.model_copy(update={"parameters": {**spec.parameters, **parameters}}))


class Undifferentiable(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.no_grad():
            return self.model(x)


@pytest.mark.parametrize("loss", ["cross-entropy", "margin"])
def test_the_estimator_is_its_definition(loss, classifier, images):
    ids, x, y = (part[:3] for part in images)
    parameters = NESParameters(queries=100, pairs=4, sigma=0.05, loss=loss)
    search, victim = NESSearch("nes", 0.2, parameters), Victim(classifier)
    state = search.begin(victim, Task(ids, x, y, y, 0))
    with torch.no_grad():
        found = search.estimate(victim, state)
        expected, points = np.zeros(x.shape), x.double().numpy()
        for pair in range(4):
            u = drawn_noise(state["keys"], torch.full_like(state["keys"], pair), x)[1].double().numpy()
            values = []
            for sign in (1, -1):
                logits = (
                    classifier(torch.tensor(np.clip(points + sign * 0.05 * u, 0, 1)).float()).double().numpy()
                )
                own, rest = logits[np.arange(3), y], logits.copy()
                rest[np.arange(3), y] = -np.inf
                top = rest.max(1)
                odds = top + np.log(np.exp(rest - top[:, None]).sum(1)) - own
                values.append(odds if loss == "cross-entropy" else top - own)
            expected += (values[0] - values[1])[:, None, None, None] * u / (2 * 0.05 * 4)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-3, atol=1e-3 * np.abs(expected).max())


def test_it_follows_the_gradient_of_a_linear_model():
    """With many pairs the mean of u u^T is the identity."""
    weight = torch.linspace(-1.0, 1.0, 16)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2, bias=False))
    model[1].weight = nn.Parameter(torch.stack([-weight, weight]), requires_grad=False)
    search, victim = NESSearch("nes", 0.1, NESParameters(queries=4001, pairs=2000)), Victim(model)
    x, y = torch.full((1, 1, 4, 4), 0.5), torch.zeros(1).long()
    found = search.estimate(victim, search.begin(victim, Task(torch.arange(1), x, y, y, 0))).flatten()
    assert torch.cosine_similarity(found, weight, dim=0) > 0.99
    torch.testing.assert_close(found.norm(), 2 * weight.norm(), rtol=0.1, atol=0)


def test_queries_are_counted_and_no_gradient_is_needed(classifier, images):
    ids, x, y = (part[:12] for part in images)
    attack = build(0.1, queries=150, pairs=12, relative_step_size=0.3)
    outcome = attack.evaluate(Victim(Undifferentiable(classifier)), ids, x, y, 0, 12)
    assert attack.cost.forwards == 6 * 25 + 2
    assert (outcome.forwards[outcome.robust] == 6 * 25 + 2).all()
    broken = ~outcome.robust & (outcome.clean_predictions == y)
    assert broken.any()
    assert torch.equal(outcome.broken_at[broken] % 25, torch.zeros_like(outcome.broken_at[broken]))
    assert (outcome.forwards[broken] == outcome.broken_at[broken] + 2).all()
    assert not outcome.backwards.any()


def test_fewer_queries_than_a_step_are_refused():
    with pytest.raises(UserError, match="queries of 50 are no step, which takes 51"):
        build(queries=50)
