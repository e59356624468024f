"""Attacks on a flow's likelihood, against closed forms of a diagonal Gaussian flow and against hand computation."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robbench.attacks import build_attack, build_likelihood_attack
from robbench.attacks.likelihood import noise_images
from robbench.core.errors import AttackViolation, UserError
from robbench.core.random import SampleRandom
from robbench.models.flows.base import Encoded, FrozenFlow, Transform, unit_interval
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()
SHAPE, LEVELS = (1, 4, 4), 17


class Diagonal(Transform):
    """z = (v - mean) / sigma a pixel: NLL is separable and convex, its optima in a box are known."""

    level_shapes = (SHAPE,)

    def __init__(self, mean, sigma):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("sigma", sigma)

    def encode(self, v, y):
        z = (v - self.mean) / self.sigma
        zero = torch.zeros_like(z)
        log_det = -self.sigma.log().sum().expand(len(v))
        return Encoded((z,), ((zero, zero),), log_det)

    def decode(self, levels, y):
        return levels[0] * self.sigma + self.mean

    def recolour(self, levels, y, rule, whitened):
        return tuple(rule(z, torch.zeros_like(z), torch.zeros_like(z)) for z in levels)

    def freeze(self, dtype, memory):
        return self


def diagonal_flow(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mean = torch.rand(SHAPE, generator=generator) - 0.5
    sigma = 0.05 + torch.rand(SHAPE, generator=generator)
    return FrozenFlow(SHAPE, LEVELS, Diagonal(mean.to(dtype), sigma.to(dtype)))


def closed_form_bits(flow, x, u):
    """Bits/dim of the diagonal flow in float64, by the formula of the module docstring."""
    mean, sigma = flow.transform.mean.double(), flow.transform.sigma.double()
    d = (x.double() * (LEVELS - 1) + u.double()) / LEVELS
    z = (d - 0.5 - mean) / sigma
    nats = (-0.5 * z**2 - 0.5 * math.log(2 * math.pi) - sigma.log() - math.log(LEVELS)).flatten(1).sum(1)
    return -nats / (math.prod(SHAPE) * math.log(2))


def attack(name, epsilon=None, steps=None, **parameters):
    spec = resolve_attack(name, "digits", MODELS, epsilon, steps=steps)
    return build_likelihood_attack(spec.model_copy(update={"parameters": {**spec.parameters, **parameters}}))


def evaluated(one, flow, n=24, batch_size=24, judge=None, seed=3):
    ids = torch.arange(100, 100 + n)
    x = SampleRandom(0, "test images").draw(ids, SHAPE, lambda g, s: g.integers(0, LEVELS, s) / (LEVELS - 1))
    y = torch.zeros(n, dtype=torch.int64)
    return x, one.evaluate(flow, judge or flow, ids, x, y, seed, batch_size)


@pytest.mark.parametrize("name", ["nll-in", "nll-out", "noise"])
@pytest.mark.parametrize("epsilon", [4, 32, 200])
def test_images_are_admissible_and_scores_follow_from_them(name, epsilon):
    flow = diagonal_flow()
    x, outcome = evaluated(attack(name, epsilon, steps=4 if name != "noise" else None), flow)
    original, found = outcome.originals.double().numpy(), outcome.adversarial.double().numpy()
    assert found.min() >= 0
    assert found.max() <= 1
    distance = np.abs(found - original).reshape(len(x), -1)
    assert distance.max() <= epsilon / 255 * (1 + 1e-5)
    assert distance.max() > 0.5 * min(epsilon / 255, 0.9), "the attack never used its budget"
    np.testing.assert_allclose(outcome.linf.numpy(), distance.max(1), atol=1e-6)
    np.testing.assert_allclose(outcome.l1.numpy(), distance.sum(1), rtol=1e-5)
    np.testing.assert_allclose(outcome.l2.numpy(), np.sqrt((distance**2).sum(1)), rtol=1e-5)
    u = SampleRandom(3, "dequantization").draw(outcome.sample_ids, SHAPE, unit_interval, 0)
    for images, scores in ((outcome.originals, outcome.nll_before), (outcome.adversarial, outcome.nll_after)):
        np.testing.assert_allclose(scores.numpy(), closed_form_bits(flow, images, u).numpy(), rtol=2e-5)
    if name != "nll-out":
        assert torch.equal(outcome.originals, x)


@given(seed=st.integers(0, 50), epsilon=st.sampled_from([1, 8, 32, 100]))
@settings(max_examples=15)
def test_the_search_reaches_the_closed_form_optimum(seed, epsilon):
    """Raising: the corner away from the mean. Lowering: the point of the ball nearest to the mean. The noise u moves
    the mean by at most one level of d, so pixels nearer to it than that are left out of the comparison."""
    flow, radius = diagonal_flow(seed), epsilon / 255
    middle = (flow.transform.mean + 0.5) * LEVELS / (LEVELS - 1)  # the mean as a pixel for u = 0
    for name in ("nll-in", "nll-out"):
        _, outcome = evaluated(attack(name, epsilon, steps=40), flow, n=6)
        x, found = outcome.originals, outcome.adversarial
        away = x - middle + 0.5 / (LEVELS - 1)
        clear = away.abs() > 1.0 / (LEVELS - 1)
        if name == "nll-in":
            wanted = (x + radius * away.sign()).clamp(0, 1)
        else:
            clear &= away.abs() > radius + 1.5 / (LEVELS - 1)
            wanted = (x - radius * away.sign()).clamp(0, 1)
        assert clear.any() or name == "nll-out"
        assert torch.allclose(found[clear], wanted[clear], atol=1e-5)
        gain = (outcome.nll_after - outcome.nll_before) * (1 if name == "nll-in" else -1)
        assert (gain > -1e-6).all()


def test_out_of_distribution_images_are_uniform_grey_levels():
    images = noise_images(0, torch.arange(400), SHAPE, LEVELS)
    levels = images * (LEVELS - 1)
    assert torch.allclose(levels, levels.round(), atol=1e-5)
    counts = np.bincount(levels.round().long().flatten().numpy(), minlength=LEVELS)
    expected = images.numel() / LEVELS
    assert ((counts - expected) ** 2 / expected).sum() < 40  # chi-square, 16 degrees of freedom: p < 1e-3
    assert torch.equal(images[7:9], noise_images(0, torch.tensor([7, 8]), SHAPE, LEVELS))
    _, outcome = evaluated(attack("nll-out", 8, steps=2), diagonal_flow())
    assert torch.equal(outcome.originals, noise_images(3, outcome.sample_ids, SHAPE, LEVELS))


@pytest.mark.parametrize("name", ["nll-in", "nll-out", "noise"])
def test_a_sample_does_not_depend_on_its_batch(name, flow):
    frozen, ids = flow.freeze(), torch.arange(20)
    x, y = torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.zeros(20).long()
    one = attack(name, 32, steps=None if name == "noise" else 5)
    whole = one.evaluate(frozen, frozen, ids, x, y, 0, 20)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(2))
    parts = one.evaluate(frozen, frozen, ids[order], x[order], y[order], 0, 7)
    assert torch.allclose(whole.adversarial[order], parts.adversarial, atol=1e-5)
    assert torch.allclose(whole.nll_after[order], parts.nll_after, rtol=1e-4)


def test_noise_is_fresh_in_every_step_and_fixed_for_the_scores(monkeypatch):
    flow, seen = diagonal_flow(), []
    original = FrozenFlow.log_prob

    def spy(self, x, y=None, u=0.5):
        if isinstance(u, torch.Tensor):  # at u = 1/2 the flow itself is tried, before and after the attack
            seen.append((x.requires_grad, u.clone()))
        return original(self, x, y, u)

    monkeypatch.setattr(FrozenFlow, "log_prob", spy)
    evaluated(attack("nll-in", 8, steps=5), flow, n=3, batch_size=3)
    searched = [u for gradient, u in seen if gradient]
    scored = [u for gradient, u in seen if not gradient]
    assert len(searched) == 5
    assert len(scored) == 2
    assert torch.equal(scored[0], scored[1])
    for i, one in enumerate([*searched, scored[0]]):
        assert all(not torch.equal(one, other) for other in [*searched, scored[0]][:i])


def test_no_budget_no_change():
    flow = diagonal_flow()
    for name in ("nll-in", "nll-out", "noise"):
        _, outcome = evaluated(attack(name, 0), flow)
        assert torch.equal(outcome.adversarial, outcome.originals)
        assert torch.equal(outcome.nll_before, outcome.nll_after)
        assert outcome.forwards.eq(2).all()
        assert outcome.backwards.eq(0).all()


def test_costs_are_what_was_called(monkeypatch):
    flow, calls = diagonal_flow(), []
    original = FrozenFlow.log_prob

    def spy(self, x, y=None, u=0.5):
        if isinstance(u, torch.Tensor):  # at u = 1/2 the flow itself is tried, which is no cost of the attack
            calls.append(1)
        return original(self, x, y, u)

    monkeypatch.setattr(FrozenFlow, "log_prob", spy)
    for changes in ({}, {"restarts": 3}, {"noise_draws": 4}, {"restarts": 2, "noise_draws": 2}):
        calls.clear()
        one = attack("nll-in", 8, steps=3, **changes)
        _, outcome = evaluated(one, flow, n=2, batch_size=2)
        assert len(calls) == one.cost.forwards == int(outcome.forwards[0]), changes
        assert one.cost.backwards == 3 * changes.get("restarts", 1)


@given(epsilon=st.integers(0, 255), levels=st.sampled_from([2, 17, 256]))
@settings(max_examples=40)
def test_quantized_images_lie_on_the_grid_and_in_the_ball(epsilon, levels):
    flow = FrozenFlow(SHAPE, levels, diagonal_flow().transform)
    ids = torch.arange(4)
    x = noise_images(9, ids, SHAPE, levels)
    one = attack("nll-in", epsilon, steps=3, quantize=True)
    found = one.evaluate(flow, flow, ids, x, torch.zeros(4).long(), 0, 4).adversarial.double()
    grid = found * (levels - 1)
    assert (grid - grid.round()).abs().max() < 1e-4
    assert (found - x.double()).abs().max() <= epsilon / 255 + 1e-6
    # No level inside the ball on the way was given away: the unrounded image is less than a level further.
    free = attack("nll-in", epsilon, steps=3).evaluate(flow, flow, ids, x, torch.zeros(4).long(), 0, 4)
    assert ((free.adversarial.double() - found).abs() < 1 / (levels - 1) + 1e-6).all()


def test_more_restarts_are_never_weaker_under_the_scored_noise(flow):
    frozen, ids = flow.freeze(), torch.arange(12)
    x, y = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(4)), torch.zeros(12).long()
    for name, sign in (("nll-in", 1), ("nll-out", -1)):
        reached = [
            sign * attack(name, 32, steps=3, restarts=r).evaluate(frozen, frozen, ids, x, y, 0, 12).nll_after
            for r in (1, 2, 4)
        ]
        assert (reached[1] >= reached[0] - 1e-6).all()
        assert (reached[2] >= reached[1] - 1e-6).all()
        assert (reached[2] > reached[0]).any()


def test_a_float64_judge_scores_in_float64(flow):
    x, y, ids = torch.rand(5, 1, 8, 8), torch.zeros(5).long(), torch.arange(5)
    one = attack("nll-in", 16, steps=2)
    wide = flow.double().freeze(torch.float64)
    flow.float()
    outcome = one.evaluate(flow.freeze(), wide, ids, x, y, 0, 5)
    exact = wide.bits_per_dim(outcome.adversarial, y, seed=0, sample_ids=ids)
    assert exact.dtype == torch.float64
    assert torch.equal(outcome.nll_after, exact)
    assert not torch.equal(outcome.nll_after, outcome.nll_after.float().double())


class Cliff(Diagonal):
    """NaN likelihood and gradient left of pixel value 1/4, infinite right of 3/4."""

    def encode(self, v, y):
        found = super().encode(v, y)
        first = v[:, 0, 0, 0]
        spoil = torch.where(first < -0.25, float("nan"), torch.where(first > 0.25, float("inf"), 0.0))
        return Encoded(found.levels, found.moments, found.log_det - spoil)


def test_infinite_and_nan_likelihoods_are_recorded_and_harm_nobody_else():
    plain = diagonal_flow()
    bad = FrozenFlow(SHAPE, LEVELS, Cliff(plain.transform.mean, plain.transform.sigma))
    one = attack("nll-in", 8, steps=3)
    _, spoiled = evaluated(one, bad, n=40)
    _, fine = evaluated(one, plain, n=40)
    assert torch.isnan(spoiled.nll_before).any()
    assert torch.isposinf(spoiled.nll_before).any()
    untouched = torch.isfinite(spoiled.nll_before) & torch.isfinite(spoiled.nll_after)
    assert untouched.sum() > 5
    assert torch.allclose(spoiled.nll_after[untouched], fine.nll_after[untouched])
    assert torch.isfinite(spoiled.adversarial).all()


def test_an_attack_that_leaves_its_set_is_an_error(monkeypatch):
    one = attack("noise", 8)
    for change, word in ((0.5, "linf ball"), (float("nan"), "NaN")):
        monkeypatch.setattr(
            type(one), "search", lambda self, flow, task, c=change: (task.x + c).clamp(0.0, 1.0)
        )
        with pytest.raises(AttackViolation, match=word):
            evaluated(one, diagonal_flow())


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: build_attack(resolve_attack("nll-in", "digits", MODELS)),
            ["nll-in", "likelihood", "classifier"],
        ),
        (lambda: build_likelihood_attack(resolve_attack("pgd20", "digits", MODELS)), ["pgd20", "nll-in"]),
        (lambda: resolve_attack("nll-in", "digits", MODELS, 0.03), ["0.03", "0..255", "7.65"]),
        (lambda: resolve_attack("noise", "digits", MODELS, 300), ["300", "255"]),
        (lambda: resolve_attack("pgd20", "digits", MODELS, 8), ["--epsilon 8", "0..1", "8/255"]),
        (lambda: attack("nll-in", 8, steps=0), ["steps"]),
        (lambda: attack("nll-in", 8, momentum=1.0), ["momentum", "nll-in"]),
    ],
)
def test_errors_name_the_argument_and_the_next_step(call, words):
    with pytest.raises(UserError) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)
