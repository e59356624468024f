"""Steps of a search do not depend on the scale of gradients and logits, or on single entries that are not finite."""

import functools
import math
from itertools import product

import pytest
import torch
from grids import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from scaled_models import Scaled
from torch import nn

from robbench.attacks import Victim, build_attack
from robbench.attacks.autoattack.apgd import dlr, dlr_targeted
from robbench.attacks.base import Task
from robbench.attacks.codec import FlowCodec
from robbench.attacks.search.engine import GradientSearch, SearchPlan
from robbench.attacks.search.geometry import direction, norm_of, normalise, project, stands_still
from robbench.attacks.search.geometry_l1 import project_l1_box, sparse_direction
from robbench.attacks.search.inner import error_log_odds, temper_logits
from robbench.attacks.search.spaces import ImageSpace, JointSpace, LatentSpace
from robbench.defenses import Setting, build_defense
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()
NORMS = ("linf", "l2", "l1")


def gradient(seed=0, shape=(4, 3, 5, 5)):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ pure functions
@pytest.mark.parametrize("norm", [*NORMS, "none"])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-12, 1e-6, 1.0, 1e6, 1e37])
def test_a_direction_has_size_1_and_is_that_of_float64(norm, scale):
    small = gradient() * scale if scale > 1e-39 else (gradient().double() * scale).float()
    found = direction(small, norm)
    size = "l2" if norm == "none" else norm
    torch.testing.assert_close(norm_of(found, size), torch.ones(4), rtol=1e-6, atol=0)
    exact = small.double()
    if size == "l2":
        torch.testing.assert_close(found.double(), exact / exact.flatten(1).norm(dim=1)[:, None, None, None])
    elif size == "linf":
        assert torch.equal(found.double(), exact.sign())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_entry_that_is_not_finite_stays_and_the_others_move(norm, bad):
    slope = gradient()
    slope[:, 0, 0, 0] = bad
    without = slope.clone()
    without[:, 0, 0, 0] = 0.0
    assert torch.equal(direction(slope, norm), direction(without, norm))
    assert torch.equal(normalise(slope, "l1"), normalise(without, "l1"))
    count = torch.full((4,), 7)
    assert torch.equal(sparse_direction(slope, count), sparse_direction(without, count))
    assert not stands_still(slope).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_gradient_of_nothing_is_no_step(norm, value):
    slope = torch.full((2, 1, 3, 3), value)
    assert torch.equal(direction(slope, norm), torch.zeros_like(slope))
    assert stands_still(slope).all()


@given(st.integers(0, 10**6), st.sampled_from(NORMS), st.floats(1e-30, 1e30), st.integers(1, 60))
@settings(max_examples=100)
def test_directions_ignore_a_factor(seed, norm, factor, dimensions):
    slope = gradient(seed, (3, dimensions))
    torch.testing.assert_close(direction(slope * factor, norm), direction(slope, norm), rtol=1e-5, atol=1e-7)


def test_one_coordinate_with_a_gradient_gets_the_whole_l1_step():
    slope = torch.zeros(1, 100)
    slope[0, 17] = -3.0
    assert direction(slope, "l1")[0, 17] == -1.0


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_norms_and_projections_of_many_entries_are_those_of_float64(norm):
    points = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(0)) + 0.5
    exact = points.double().flatten(1).norm(dim=1, p=int(norm[1]))
    torch.testing.assert_close(norm_of(points, norm).double(), exact, rtol=1e-7, atol=0)
    radius = 5.0 if norm == "l2" else 300.0
    size = project(points, norm, radius).double().flatten(1).norm(dim=1, p=int(norm[1]))
    torch.testing.assert_close(size, torch.full_like(size, radius), rtol=1e-6, atol=0)


def test_l1_steps_in_the_box_use_the_whole_radius_of_many_entries():
    x = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(1))
    delta = torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) - 0.5
    size = project_l1_box(delta, x, torch.full((2,), 500.0)).double().abs().sum((1, 2, 3))
    torch.testing.assert_close(size, torch.full_like(size, 500.0), rtol=1e-6, atol=0)


# --------------------------------------------------------------------------------------------------------- losses
@given(st.lists(st.floats(-8, 8), min_size=3, max_size=10), st.integers(0, 2))
@settings()
def test_the_loss_that_is_climbed_has_the_gradient_of_the_cross_entropy(row, label):
    logits = torch.tensor([row], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([label])
    odds = error_log_odds(logits, labels)
    (climbed,) = torch.autograd.grad(odds.sum(), logits)
    loss = nn.functional.cross_entropy(logits, labels)
    (wanted,) = torch.autograd.grad(loss, logits)
    error = 1 - float(logits.detach().softmax(1)[0, label])
    torch.testing.assert_close(climbed * error, wanted, rtol=1e-7, atol=1e-10)
    assert float(odds.detach().exp().log1p()) == pytest.approx(float(loss.detach()), rel=1e-7, abs=1e-12)


def test_tempering_leaves_ordinary_logits_alone_and_ignores_large_and_small_factors():
    logits = torch.tensor([[4.0, 1.0, -2.0], [0.3, 0.1, 0.9]])
    labels = torch.tensor([0, 2])
    assert torch.equal(temper_logits(logits, labels), logits)
    for factors in ((1e2, 1e6), (1e-2, 1e-6)):
        first, second = (temper_logits(logits * factor, labels) for factor in factors)
        torch.testing.assert_close(first, second)
    assert torch.equal(temper_logits(torch.zeros(1, 3), labels[:1]), torch.zeros(1, 3))


@pytest.mark.parametrize("power", [-60, -20, 20, 60])
def test_dlr_is_invariant_to_powers_of_two(power):
    logits = gradient(3, (6, 5)).requires_grad_(True)
    labels, targets = torch.arange(6) % 5, (torch.arange(6) + 1) % 5
    for loss in (dlr, lambda z, y: dlr_targeted(z, y, targets)):
        plain = loss(logits, labels)
        assert torch.equal(loss(logits * 2.0**power, labels), plain)
    (slope,) = torch.autograd.grad(dlr(logits * 2.0**power, labels).sum(), logits)
    (wanted,) = torch.autograd.grad(dlr(logits, labels).sum(), logits)
    torch.testing.assert_close(slope, wanted)


# ------------------------------------------------------------------------------------------------- whole attacks
class OneNaN(nn.Module):
    """The same function; the gradient of the top left pixel is NaN (0 times infinity)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        corner = x[:, :, :1, :1] + (0.0 * x[:, :, :1, :1]).sqrt()
        top = torch.cat([corner, x[:, :, :1, 1:]], 3)
        return self.model(torch.cat([top, x[:, :, 1:]], 2))


def outcome(name, model, images, flow=None, n=48, **parameters):
    ids, x, y = (part[:n] for part in images)
    spec = resolve_attack(name, "digits", MODELS)
    spec = spec.model_copy(update={"parameters": {**spec.parameters, **parameters}})
    return build_attack(spec, flow).evaluate(Victim(model), ids, x, y, 0, 48)


@functools.cache
def _plain(name, model, images, flow, parameters=()):
    return outcome(name, model, images, flow, **dict(parameters))


LINEAR = ("fgsm", "fgsm-l2", "pgd20", "pgd20-l2", "pgd20-l1", "mim", "apgd-ce", "fab-t")
LATENT = ("jsa10", "om-pgd", "a-la-l2")


@pytest.mark.parametrize(
    ("name", "factor"),
    slow_but(
        [*product(("pgd20", "pgd20-l1", "apgd-ce", "jsa10"), (1e-6, 1e6)), ("mim", 1e-6), ("fab-t", 1e6)],
        product(LINEAR + LATENT, (1e-6, 1e6)),
    ),
)
def test_verdicts_do_not_change_with_the_scale_of_the_logits(classifier, flow, images, name, factor):
    if name not in {n for m in MODELS.values() for n in m.attacks}:
        pytest.skip(f"no attack is called {name}")
    short = {"iterations": 8, "fab_target_classes": 3} if name in ("fab-t", "apgd-ce") else {}
    plain = _plain(name, classifier, images, flow, tuple(short.items()))
    scaled = outcome(name, Scaled(classifier, factor), images, flow, **short)
    # Another weighting of the rivals decides a few samples near the boundary.
    assert abs(int(scaled.robust.sum()) - int(plain.robust.sum())) <= 3


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@pytest.mark.parametrize("name", slow_but(["pgd20-l2", "mim"], ["pgd20", "pgd20-l2", "mim", "om-pgd"]))
def test_two_classes_give_the_same_verdicts_at_any_scale(images, flow, name, factor):
    """With one rival the direction of the cross-entropy is that of the margin, whatever the scale."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 2)).eval()
    ids, x, _ = images
    own = (ids, x, model(x).argmax(1))
    plain, scaled = (outcome(name, Scaled(model, k), own, flow) for k in (1.0, factor))
    assert int((plain.robust != scaled.robust).sum()) <= 1


@pytest.mark.parametrize(
    "name", ["fgsm", "pgd20", "mim", "fgsm-l2", "pgd20-l2", "pgd20-l1", "apgd-ce", "jsa10"]
)
def test_one_nan_in_the_gradient_stops_no_attack(classifier, flow, images, name):
    plain, with_nan = (
        _plain(name, classifier, images, flow),
        outcome(name, OneNaN(classifier), images, flow),
    )
    _, x, _ = images
    leaf = x.clone().requires_grad_(True)
    slope = torch.autograd.grad(OneNaN(classifier)(leaf).sum(), leaf)[0]
    assert slope.isnan().sum((1, 2, 3)).eq(1).all()
    assert int(with_nan.robust.sum()) <= int(plain.robust.sum()) + 1


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, 1e-40, 1e37])
def test_momentum_survives_a_gradient_of_any_kind(spoilt):
    """After one spoilt step the accumulated gradient is finite and follows the next, ordinary one."""
    search = GradientSearch(SearchPlan(ImageSpace("linf", 0.3, 0.1, "zero"), 3, momentum=1.0), "mim", 0, ())
    x, y = torch.full((1, 1, 2, 2), 0.5), torch.tensor([0])
    state = search.begin(Victim(nn.Identity()), Task(torch.tensor([0]), x, y, y, 0))
    slope = torch.tensor([[[[1.0, -1.0], [1.0, 1.0]]]])
    bad = slope * spoilt if spoilt < 1e38 else slope.clone()
    bad[0, 0, 0, 0] = spoilt
    state, first = search._with_momentum(state, {"delta": bad})
    assert first["delta"].isfinite().all()
    _, second = search._with_momentum(state, {"delta": slope})
    assert torch.equal(second["delta"].sign(), slope.sign())


@pytest.mark.parametrize("defense", ["at", "trades", "mart", "jsa-at", "a-la"])
def test_inner_attacks_of_training_move_with_a_nan_in_the_gradient(classifier, flow, images, defense):
    _, x, y = images
    model = OneNaN(classifier)
    built = build_defense(defense, {"steps": 2}, Setting("digits", MODELS, FlowCodec(flow)))
    make = built.search if defense == "jsa-at" else built.adversarial
    worst = make(model, x[:8], y[:8], torch.Generator().manual_seed(0))
    assert worst.isfinite().all()
    assert ((worst - x[:8]).abs().flatten(1).amax(1) > 1e-3).all()


def test_spaces_take_no_step_on_coordinates_that_are_not_finite(flow, images):
    codec = FlowCodec(flow)
    x, y = images[1][:2], images[2][:2]
    for space in (LatentSpace(codec, "l2", 1.0, 0.5, "zero"), JointSpace(codec, 0.2, 0.1, 0.5, 0.25, "zero")):
        state = _started(space, x, y)
        slopes = {name: torch.ones_like(state[name]) for name in space.perturbations}
        for slope in slopes.values():
            slope.flatten(1)[:, 0] = math.nan
        moved = space.advance(state, slopes)
        for name in space.perturbations:
            assert moved[name].isfinite().all()
            assert (moved[name].flatten(1)[:, 0] == 0).all()
            assert (moved[name].flatten(1)[:, 1:] > 0).all()


def _started(space, x, y):
    from robbench.attacks.search.geometry import GeneratorNoise

    return space.start(x, y, GeneratorNoise(len(x), torch.Generator().manual_seed(0)))
