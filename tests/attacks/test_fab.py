"""Targeted FAB against the reference package: same iterates, same verdicts; and the contract of a search."""

import copy

import pytest
import torch
from grids import slow_but
from pyautoattack.fab_pt import FABAttack_PT
from torch import nn

from robbench.attacks.autoattack.fab import TargetedFab
from robbench.attacks.base import Candidates, Task
from robbench.attacks.search.active import run_search
from robbench.attacks.search.geometry import norm_of
from robbench.attacks.victim import Victim, margins
from robbench.core.errors import UserError
from robbench.models.loading import load_model
from robbench.models.zoo import find_model, zoo_entries

NORMS = ("linf", "l2", "l1")
SHAPE = (3, 5, 9)
# Some of the small network's samples are robust in these radii, some are not.
RADII = {"linf": 0.03, "l2": 0.2, "l1": 0.8}


def small_network(shape=SHAPE, classes=6, seed=0, steepness=3.0):
    """A random smooth network, steep enough for many decision regions."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = [
            nn.Conv2d(shape[0], 8, 3, padding=1),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(8 * shape[1] * shape[2], classes),
        ]
        model = nn.Sequential(*layers)
        with torch.no_grad():
            model[0].weight *= steepness
    return model.eval().requires_grad_(False)


class Counting(nn.Module):
    """Counts the images that go through the model, and those that a gradient comes back for."""

    def __init__(self, module):
        super().__init__()
        self.module, self.forwards, self.backwards = module, 0, 0

    def forward(self, x):
        self.forwards += len(x)
        if torch.is_grad_enabled() and x.requires_grad:
            x.register_hook(self._count)
        return self.module(x)

    def _count(self, gradient):
        self.backwards += len(gradient)


def images_for(model, n=40, shape=SHAPE, seed=1):
    """Random images, labelled by the model: (ids, x, y). A third of the pixels stand at the border of the box."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.rand((n, *shape), generator=draw)
    x = torch.where(torch.rand(x.shape, generator=draw) < 0.3, x.round(), x)
    return torch.arange(n) + 100, x, model(x).argmax(1)


def attack(model, ids, x, y, norm, epsilon, batch_size=64, seed=0, **numbers):
    """`found` of one target class for correctly classified images."""
    n = len(x)
    zeros = torch.zeros(n, dtype=torch.int64)
    found = Candidates(x.clone(), zeros - 1, zeros.clone(), zeros.clone(), ["fab-t"] * n)
    search = TargetedFab(norm, epsilon, name="fab-t", stream="test/fab-t", **{"target": 1, **numbers})
    task = Task(ids, x, y, y, seed, batch_size)
    run_search(Victim(model), search, task, found, torch.arange(n))
    return found


def is_robust(model, found, y):
    return margins(model(found.adversarial), y) > 0


def reference(model, norm, epsilon, iterations, targets=1, seed=0):
    name = {"linf": "Linf", "l2": "L2", "l1": "L1"}[norm]
    return FABAttack_PT(
        model,
        norm=name,
        n_iter=iterations,
        eps=epsilon,
        seed=seed,
        targeted=True,
        device="cpu",
        n_target_classes=targets,
    )


@pytest.fixture
def in_double(monkeypatch):
    """Lets the reference and our search, which both cast to float32, compute in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def pulled_back(model, ids, x, y, norm, target, iterations):
    """Share of the first points of our search that are pulled back, after comparing them all with the reference's.

    Where the model is linear between two points, the mean of both projections can lie on the decision boundary itself:
    rounding then decides whether it is pulled back. Such samples (5 % at most) are left out from there on.
    """
    model, x = copy.deepcopy(model).double(), x.double()
    theirs = reference(model, norm, RADII[norm], iterations)
    scored = []
    theirs._get_predicted_label = lambda image: scored.append(image.clone()) or model(image).argmax(1)
    theirs.target_class = target + 1
    theirs.attack_single_run(x, y, is_targeted=True)
    # A radius nothing is found in: our samples must not leave before.
    search = TargetedFab(norm, 1e-6, name="fab-t", stream="test", target=target)
    victim = Victim(model)
    state = search.begin(victim, Task(ids, x, y, y, 0))
    wrong, tied = [], torch.zeros(len(x), dtype=torch.bool)
    for candidate in scored[1:]:
        state = search.step(victim, state)
        logits = model(candidate)
        wrong.append(logits.argmax(1) != y)
        tied |= margins(logits, y).abs() < 1e-9
        expected = torch.where(wrong[-1][:, None, None, None], x + 0.9 * (candidate - x), candidate)
        torch.testing.assert_close(state["point"][~tied], expected[~tied], rtol=0, atol=1e-6)
    assert not state["broken"].any()
    assert tied.float().mean() <= 0.05
    return torch.stack(wrong).double().mean()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("target", [1, 5])
def test_iterates_are_those_of_the_reference(norm, target, classifier, images, request):
    ids, x, y = images
    right = classifier(x).argmax(1) == y
    random = small_network()
    noise = images_for(random)
    request.getfixturevalue("in_double")
    pulled_back(random, *noise, norm, target, 6)
    share = pulled_back(classifier, ids[right], x[right], y[right], norm, target, 6)
    assert 0.1 < share < 0.98, f"{share:.2f} of the points are pulled back; both cases must occur"


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", slow_but(["digits-at"], ["classifier", "digits-at"]))
def test_as_strong_as_the_reference(name, norm, request, digits):
    """Three target classes on 60 test images: our robust accuracy against the reference's (it draws no numbers
    without restarts, so that all its seeds agree)."""
    model = (
        request.getfixturevalue("classifier")
        if name == "classifier"
        else load_model(find_model(name, zoo_entries())).module
    )
    model = model.eval().requires_grad_(False)
    epsilon = {"linf": 0.15, "l2": 0.6, "l1": 2.0}[norm] * (0.4 if name == "classifier" else 1.0)
    rows = torch.randperm(len(digits.test), generator=torch.Generator().manual_seed(0))[:60]
    x, y = digits.test.x(rows), digits.test.labels[rows]
    right = model(x).argmax(1) == y
    ids, x, y = digits.test.ids[rows][right], x[right], y[right]
    candidate = reference(model, norm, epsilon, 20, targets=3).perturb(x, y).detach()
    theirs = (norm_of(candidate - x, norm) > epsilon) | (model(candidate).argmax(1) == y)
    ours = torch.ones_like(theirs)
    for target in (1, 2, 3):
        rest = ours.nonzero().squeeze(1)
        found = attack(model, ids[rest], x[rest], y[rest], norm, epsilon, target=target, budget=20)
        ours[rest] = is_robust(model, found, y[rest])
    assert 5 < theirs.sum() < len(y) - 3, "both outcomes must occur"
    assert ours.sum() <= theirs.sum() + 2
    assert (ours != theirs).sum() <= 4


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(1, 8, 8), SHAPE])
def test_broken_means_admissible_and_misclassified(norm, shape):
    model = small_network(shape)
    ids, x, y = images_for(model, shape=shape)
    found = attack(model, ids, x, y, norm, RADII[norm], budget=30)
    robust = is_robust(model, found, y)
    assert 0 < robust.sum() < len(x), "both outcomes must occur"
    assert norm_of(found.adversarial - x, norm).max() <= RADII[norm]
    assert found.adversarial.min() >= 0
    assert found.adversarial.max() <= 1
    assert torch.equal(found.adversarial[robust], x[robust])
    assert (found.step[robust] == 30).all()
    assert (found.step[~robust] <= 30).all()


@pytest.mark.parametrize("norm", NORMS)
def test_leaving_early_weakens_nothing(norm):
    """A sample is broken exactly when the reference, which never leaves, comes within epsilon in its iterations."""
    model = small_network()
    ids, x, y = images_for(model)
    candidate = reference(model, norm, RADII[norm], 30).perturb(x, y)
    theirs = (norm_of(candidate - x, norm) > RADII[norm]) | (model(candidate).argmax(1) == y)
    found = attack(model, ids, x, y, norm, RADII[norm], budget=30)
    assert torch.equal(is_robust(model, found, y), theirs)
    assert found.step.float().mean() < 25, "samples do leave early"


@pytest.mark.parametrize("norm", NORMS)
def test_results_do_not_depend_on_the_batch(norm):
    model = small_network()
    ids, x, y = images_for(model)
    whole = attack(model, ids, x, y, norm, RADII[norm], budget=12, restart=1, batch_size=40)
    mixed = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    refilled = attack(model, ids, x, y, norm, RADII[norm], budget=12, restart=1, batch_size=7)
    permuted = attack(model, ids[mixed], x[mixed], y[mixed], norm, RADII[norm], budget=12, restart=1)
    alone = attack(model, ids[5:6], x[5:6], y[5:6], norm, RADII[norm], budget=12, restart=1)
    for other, rows in ((refilled, torch.arange(40)), (permuted, mixed), (alone, torch.tensor([5]))):
        torch.testing.assert_close(other.adversarial, whole.adversarial[rows], rtol=0, atol=1e-4)
        for count in ("step", "forwards", "backwards"):
            assert torch.equal(getattr(other, count), getattr(whole, count)[rows])


@pytest.mark.parametrize("restart", [0, 1])
def test_counts_are_the_model_s_calls(restart):
    model = Counting(small_network())
    ids, x, y = images_for(model.module)
    found = attack(model, ids, x, y, "l2", RADII["l2"], budget=15, restart=restart, batch_size=16)
    assert (model.forwards, model.backwards) == (int(found.forwards.sum()), int(found.backwards.sum()))
    robust = is_robust(model.module, found, y)
    assert (found.forwards[robust] == 2 * 15 + restart).all()
    assert (found.backwards[robust] == 15).all()


def test_a_finished_sample_is_left_alone():
    model = small_network()
    ids, x, y = images_for(model)
    search = TargetedFab("l2", RADII["l2"], name="fab-t", stream="test", target=1, budget=5)
    victim = Victim(model)
    state = search.begin(victim, Task(ids, x, y, y, 0))
    for _ in range(5):
        state = search.step(victim, state)
    assert 0 < state["broken"].sum() < len(x)
    later = state
    for _ in range(20):
        later = search.step(victim, later)
    for name in ("adversarial", "broken", "broken_at", "iteration", "forwards", "backwards"):
        assert torch.equal(later[name], state[name]), name


@pytest.mark.parametrize("norm", NORMS)
def test_random_restarts_begin_half_a_radius_away(norm):
    model = small_network()
    ids, x, y = images_for(model)
    x = x * 0.2 + 0.4  # far from the border of the box
    y = model(x).argmax(1)

    def start(**numbers):
        search = TargetedFab(norm, 0.1, name="fab-t", stream="test", **{"target": 1, "restart": 1, **numbers})
        return search.begin(Victim(model), Task(ids, x, y, y, 0))

    torch.testing.assert_close(
        norm_of(start()["point"] - x, norm), torch.full((len(x),), 0.05), rtol=1e-3, atol=0
    )
    assert torch.equal(start(restart=0)["point"], x)
    points = [start()["point"], start(restart=2)["point"], start(target=2)["point"]]
    assert all(not torch.equal(a, b) for i, a in enumerate(points) for b in points[:i])
    logits = model(x)
    for target in (1, 4):
        order = logits.argsort(1, descending=True)
        assert torch.equal(start(target=target)["target"], order[:, target])


class NotFinite(nn.Module):
    """NaN or infinite logits, or a NaN gradient, for images whose first pixel is above 0.9; the others as usual."""

    def __init__(self, module, kind):
        super().__init__()
        self.module, self.kind = module, kind

    def forward(self, x):
        odd = (x[:, 0, 0, 0] > 0.9)[:, None]
        if self.kind == "gradient":
            flat = torch.where(odd, x[:, 0, 0, 1:2] * 0.0, 1.0).sqrt()  # slope at 0: infinity times 0
            return self.module(x) + 0.0 * flat
        return torch.where(odd, torch.full((), self.kind), self.module(x))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", [float("nan"), float("inf"), "gradient"])
def test_what_is_not_finite_stays_with_its_sample(norm, kind):
    model = small_network()
    ids, x, y = images_for(model, n=12)
    x[:4, 0, 0, 0], x[4:, 0, 0, 0] = 1.0, 0.3
    y = model(x).argmax(1)
    usual = attack(model, ids[4:], x[4:], y[4:], norm, RADII[norm], budget=10)
    found = attack(NotFinite(model, kind), ids, x, y, norm, RADII[norm], budget=10)
    assert torch.isfinite(found.adversarial).all()
    assert norm_of(found.adversarial - x, norm).max() <= RADII[norm]
    torch.testing.assert_close(found.adversarial[4:], usual.adversarial, rtol=0, atol=1e-4)


def test_two_classes_suffice_for_one_target():
    model = small_network(classes=2)
    ids, x, y = images_for(model)
    found = attack(model, ids, x, y, "linf", 0.2, budget=10)
    assert not is_robust(model, found, y).all()
    with pytest.raises(UserError, match="target 2 needs at least 3 classes, the model has 2"):
        attack(model, ids, x, y, "linf", 0.2, target=2)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"norm": "none"}, "norm 'none'"),
        ({"epsilon": 0.0}, "epsilon 0"),
        ({"target": 0}, "target 0"),
        ({"budget": 0}, "budget 0"),
    ],
)
def test_wrong_numbers_are_named(numbers, message):
    with pytest.raises(UserError, match=message):
        TargetedFab(
            **{"norm": "l2", "epsilon": 0.5, "name": "fab-t", "stream": "test", "target": 1, **numbers}
        )
