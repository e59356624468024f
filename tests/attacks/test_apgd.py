"""APGD against the reference's iterates, the papers' formulas, and the contract of searches."""

import math
import warnings
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from grids import slow_but
from hypothesis import given, settings
from hypothesis import strategies as st
from scaled_models import Scaled
from scipy import stats
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from robbench.attacks.autoattack.apgd import APGD, dlr, dlr_targeted
from robbench.attacks.base import Candidates, Task
from robbench.attacks.checks import inside_ball, inside_box
from robbench.attacks.search.active import run_search, still_robust
from robbench.attacks.search.decision import margins
from robbench.attacks.search.geometry import norm_of
from robbench.attacks.search.inner import SURE
from robbench.attacks.trust import model_call
from robbench.attacks.victim import Victim
from robbench.core.errors import UserError
from robbench.models.loading import load_model
from robbench.models.zoo import zoo_entries
from robbench.specs import ResolvedAttack

EPSILON = {"linf": 0.12, "l2": 0.6, "l1": 3.0}
REFERENCE_NORM = {"linf": "Linf", "l2": "L2", "l1": "L1"}
LOSSES = {"ce": None, "dlr": None, "ce-targeted": 1, "dlr-targeted": 2}


def search(norm="linf", loss="ce", budget=20, **options) -> APGD:
    options = {"epsilon": EPSILON.get(norm, 0.1), "target": LOSSES.get(loss), **options}
    return APGD(norm, name="apgd", stream="test/apgd", loss=loss, budget=budget, **options)


def attack(apgd, model, ids, x, y, batch_size=64, seed=0) -> Candidates:
    n = len(x)
    zeros = torch.zeros(n, dtype=torch.int64)
    found = Candidates(x.clone(), zeros - 1, zeros.clone(), zeros.clone(), ["apgd"] * n)
    task = Task(ids, x, y, model(x).argmax(1), seed, batch_size)
    run_search(Victim(model), apgd, task, found, torch.arange(n))
    return found


def begin(apgd, model, ids, x, y, seed=0):
    return apgd.begin(Victim(model), Task(ids, x, y, model(x).argmax(1), seed))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Steps as a GPU makes them: nobody looks at values, and who has finished stays for a while."""
    monkeypatch.setattr("robbench.attacks.search.geometry.is_on_cpu", lambda tensor: False)


def right(model, images):
    """The samples the model classifies correctly."""
    ids, x, y = images
    kept = model(x).argmax(1) == y
    return ids[kept], x[kept], y[kept]


class Counting(nn.Module):
    """Counts rows forwarded with and without a graph."""

    def __init__(self, module):
        super().__init__()
        self.module, self.forwards, self.graphs = module, 0, 0

    def forward(self, x):
        self.forwards += len(x)
        self.graphs += len(x) if x.requires_grad else 0
        return self.module(x)


def random_model(shape, classes, seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(shape[0], 6, 3, padding=1), nn.ReLU(), nn.Flatten(),
            nn.Linear(6 * shape[1] * shape[2], classes),
        )  # fmt: skip
    return model.eval().requires_grad_(False)


# --- losses and schedules -------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10**6), classes=st.integers(4, 12))
@settings(max_examples=50)
def test_losses_are_the_papers(seed, classes):
    generator = np.random.default_rng(seed)
    z = generator.normal(size=(6, classes))
    y, t = generator.integers(0, classes, 6), generator.integers(0, classes, 6)
    labels, targets = torch.tensor(y), torch.tensor(t)
    plain, targeted = dlr(torch.tensor(z), labels), dlr_targeted(torch.tensor(z), labels, targets)
    for i, row in enumerate(z):
        down = np.sort(row)[::-1]
        rival = max(np.delete(row, y[i]))
        assert float(plain[i]) == pytest.approx(-(row[y[i]] - rival) / (down[0] - down[2]))
        expected = -(row[y[i]] - row[t[i]]) / (down[0] - (down[2] + down[3]) / 2)
        assert float(targeted[i]) == pytest.approx(expected)
    assert ((plain > 0) == (torch.tensor(z).argmax(1) != labels)).all()
    torch.testing.assert_close(dlr(7 * torch.tensor(z) - 3, labels), plain)


def test_checkpoints_are_the_papers():
    """Section 3.1: p_0 = 0, p_1 = 0.22, p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06); in hundredths."""
    p = [0, 22]
    while p[-1] + max(p[-1] - p[-2] - 3, 6) <= 100:
        p.append(p[-1] + max(p[-1] - p[-2] - 3, 6))
    window = search(budget=100).timetable.window
    assert window.nonzero().squeeze(1).tolist() == p[1:]
    assert window[p[1:]].tolist() == [b - a for a, b in pairwise(p)]


def test_large_radii_are_the_references_schedule():
    """30 + 30 + 40 steps at 3, 2 and 1 times epsilon; every phase scores its start too, the last iterate aside."""
    apgd = search("l1", budget=100, large_radii=True, epsilon=2.0)
    radius, counts = apgd.timetable.radius, apgd.timetable.counts
    assert radius.tolist() == [6.0] * 31 + [4.0] * 31 + [2.0] * 41
    assert torch.equal(counts, radius == 2.0)
    assert apgd.timetable.ends.nonzero().squeeze(1).tolist() == [30, 61]
    assert apgd.iterations == 102


def test_targets_are_the_most_likely_wrong_classes(classifier, images):
    ids, x, y = images
    rank = classifier(x).scatter(1, y[:, None], -torch.inf).sort(dim=1, descending=True).indices
    for target in (1, 2, 9):
        state = begin(search(loss="dlr-targeted", target=target), classifier, ids, x, y)
        assert torch.equal(state["target"], rank[:, target - 1])


# --- start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_starts_lie_on_the_sphere_and_depend_on_sample_seed_restart_target(norm, classifier):
    x, ids = torch.full((40, 1, 8, 8), 0.5), torch.arange(40)
    y = torch.zeros(40, dtype=torch.int64)

    def start(seed=0, **options):
        return begin(search(norm, **options), classifier, ids, x, y, seed)["point"] - x

    base = start()
    assert torch.allclose(norm_of(base, norm), torch.tensor(EPSILON[norm]), rtol=1e-4)
    assert torch.equal(base, start())
    others = [start(seed=1), start(restart=1), start(loss="dlr-targeted"), base.roll(1, 0)]
    others.append(start(loss="dlr-targeted", target=3) - others[2] + base)
    for other in others:
        assert (other - base).abs().flatten(1).amax(1).min() > 1e-3


def test_noise_is_uniform_and_normal(classifier):
    class Both(APGD):
        def _noise(self, batch):
            self.rule.noise = lambda uniform, normal: drawn.extend([uniform, normal]) or normal
            return super()._noise(batch)

    drawn: list[torch.Tensor] = []
    apgd = Both("l2", 0.5, name="apgd", stream="test")
    x = torch.zeros(100, 1, 8, 8)
    begin(apgd, classifier, torch.arange(100), x, torch.zeros(100, dtype=torch.int64))
    uniform, normal = (values.flatten().double().numpy() for values in drawn)
    assert stats.kstest(uniform, "uniform", args=(-1, 2)).pvalue > 1e-3
    assert stats.kstest(normal, "norm").pvalue > 1e-3


# --- the reference's iterates ---------------------------------------------------------------------------------


def reference(norm, loss, model, epsilon, budget, large=False, seed=0):
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    options = {"n_iter": budget, "norm": REFERENCE_NORM[norm], "eps": epsilon, "seed": seed}
    options["use_largereps"] = large
    if loss == "dlr-targeted":
        return APGDAttack_targeted(model, **options)
    return APGDAttack(model, loss=loss, **options)


CASES = [(norm, loss, False) for norm in ("linf", "l2", "l1") for loss in ("ce", "dlr", "dlr-targeted")]


LARGE = [("l1", "ce", True), ("l1", "dlr-targeted", True)]
QUICK = [("linf", "dlr", False), ("l2", "dlr-targeted", False), ("l1", "ce", False), ("l1", "ce", True)]


@pytest.mark.parametrize(("norm", "loss", "large"), slow_but(QUICK, [*CASES, *LARGE]))
def test_finds_the_references_best_losses_from_the_same_start(
    norm, loss, large, classifier, images, monkeypatch
):
    """Ours never leaves here; best loss of all scored iterates, and who was broken on the way.

    The model's margins are below those from which on the gradient is that of tempered logits and not the reference's.
    """
    classifier = Scaled(classifier, 0.3)
    ids, x, y = right(classifier, images)
    assert float(margins(classifier(x), y).max()) < SURE
    budget, epsilon = 40, EPSILON[norm]
    apgd = search(norm, loss, budget, large_radii=large)
    state = begin(apgd, classifier, ids, x, y)
    start, victim = state["point"].clone(), Victim(classifier)
    broken = torch.zeros(len(x), dtype=torch.bool)
    for _ in range(apgd.iterations):
        state = apgd.step(victim, state)
        broken |= state["broken"]
        state["broken"] = torch.zeros_like(broken)
    broken |= classifier(state["point"]).argmax(1) != y

    package = reference(norm, loss, classifier, epsilon, budget, large)
    package.init_hyperparam(x)
    package.y_target = state.get("target")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Warning)  # its report of zero gradients
        if large:
            monkeypatch.setattr(torch, "randn_like", lambda like: start - x)
            result = package.decr_eps_pgd(x, y, [3 * epsilon, 2 * epsilon, epsilon], [12, 12, 16])
        elif norm == "l1":
            monkeypatch.setattr(torch, "randn", lambda shape: start - x)
            result = package.attack_single_run(x, y)
        else:
            result = package.attack_single_run(x, y, x_init=start)
    _, accurate, best, _ = result
    last = apgd._losses(classifier(state["point"]), state)  # a search does not score it itself
    ours = torch.maximum(state["best_loss"], last)
    if loss == "ce":
        ours = nn.functional.softplus(ours + math.log(9))  # the cross-entropy of log((1 - p) / p)
    # Signs of gradients that are 0 but for rounding part the ways of some samples.
    close = (ours - best).abs() <= 0.01 * (1 + best.abs())
    assert close.float().mean() >= 0.85
    assert float(ours.median()) == pytest.approx(float(best.median()), rel=0.02, abs=0.01)
    assert abs(int(broken.sum()) - int((~accurate).sum())) <= 1


def robust_accuracy_of_reference(norm, component, model, x, y, seed, large):
    package = reference(
        norm, "ce" if component == "ce" else "dlr-targeted", model, EPSILON[norm], 12, large, seed
    )
    package.n_target_classes = 2
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Warning)
        images = package.perturb(x.clone(), y.clone())
    return int((model(images).argmax(1) == y).sum())


AS_THE_REFERENCE = (("classifier", "linf", "t"), ("digits-at", "l2", "ce"), ("digits-at", "l1", "ce"))


@pytest.mark.parametrize(
    ("name", "norm", "component"),
    slow_but(AS_THE_REFERENCE, product(("classifier", "digits-at"), ("linf", "l2", "l1"), ("ce", "t"))),
)
def test_breaks_as_many_as_the_reference(name, norm, component, classifier, digits):
    model = classifier if name == "classifier" else load_model(zoo_entries()[name]).module
    rows = torch.randperm(len(digits.test), generator=torch.Generator().manual_seed(0))[:100]
    large = norm == "l1"
    ids, x, y = right(model, (digits.test.ids[rows], digits.test.x(rows), digits.test.labels[rows]))
    theirs = [robust_accuracy_of_reference(norm, component, model, x, y, seed, large) for seed in range(3)]
    rows = torch.arange(len(x))
    for target in [None] if component == "ce" else [1, 2]:
        loss = "ce" if target is None else "dlr-targeted"
        found = attack(
            search(norm, loss, 12, target=target, large_radii=large), model, ids[rows], x[rows], y[rows]
        )
        rows = rows[model(found.adversarial).argmax(1) == y[rows]]
    assert len(rows) <= max(theirs) + 2
    if not (name == "classifier" and len(rows) == 0):
        assert len(rows) >= min(theirs) - 8, "stronger beyond chance: does it search the same ball?"


# --- the contract ---------------------------------------------------------------------------------------------


def spec(norm: str, epsilon: float) -> ResolvedAttack:
    return ResolvedAttack(
        name="test", label="test", threat_model=norm, space="image", norm=norm, epsilon=epsilon, eta=None,
        algorithm="pgd", parameters={},
    )  # fmt: skip


@given(
    norm=st.sampled_from(["linf", "l2", "l1"]),
    loss=st.sampled_from(sorted(LOSSES)),
    shape=st.sampled_from([(3, 5, 9), (1, 8, 8), (2, 7, 1)]),
    size=st.sampled_from([1e-3, 0.3, 1.0, 5.0]),
    binary=st.booleans(),
    seed=st.integers(0, 100),
)
@settings(max_examples=25)
def test_images_are_exactly_admissible_and_broken_means_broken(norm, loss, shape, size, binary, seed):
    model = random_model(shape, 5, seed)
    epsilon = size * EPSILON[norm]
    x = torch.rand(9, *shape, generator=torch.Generator().manual_seed(seed))
    x = x.round() if binary else x
    y, ids = model(x).argmax(1), torch.arange(9)
    apgd = search(norm, loss, 8, epsilon=epsilon, large_radii=norm == "l1" and seed % 2 == 0)
    found = attack(apgd, model, ids, x, y, 4, seed)
    assert found.adversarial.dtype == torch.float32
    assert torch.equal(inside_box(spec(norm, epsilon), ids, found.adversarial), found.adversarial)
    assert torch.equal(inside_ball(spec(norm, epsilon), ids, x, found.adversarial), found.adversarial)
    if norm != "linf":
        assert (norm_of(found.adversarial - x, norm) <= epsilon).all()
    left_early = found.step < apgd.iterations
    assert (model(found.adversarial).argmax(1) != y)[left_early].all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_sample_is_alone_in_any_batch(norm, classifier, images):
    ids, x, y = (part[:40] for part in right(classifier, images))
    apgd = search(norm, "dlr-targeted", 15, large_radii=norm == "l1")
    whole = attack(apgd, classifier, ids, x, y, 64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    permuted = attack(apgd, classifier, ids[order], x[order], y[order], 64)
    refilled = attack(apgd, classifier, ids, x, y, 7)
    alone = [attack(apgd, classifier, ids[i : i + 1], x[i : i + 1], y[i : i + 1]) for i in range(0, 40, 8)]
    assert 0 < (whole.step < apgd.iterations).sum() < len(x)
    for other, rows in [
        (permuted, order),
        (refilled, torch.arange(40)),
        *((one, torch.tensor([8 * i])) for i, one in enumerate(alone)),
    ]:
        for column in ("step", "forwards", "backwards"):
            same = getattr(other, column) == getattr(whole, column)[rows]
            assert same.float().mean() > 0.95, column  # rounding may tip a sample
        gap = (other.adversarial - whole.adversarial[rows]).flatten(1).abs().amax(1)
        assert (gap < 1e-3).float().mean() >= 0.9


@pytest.mark.parametrize("eot", [1, 3])
@pytest.mark.parametrize(("norm", "loss"), [("linf", "ce"), ("l2", "dlr"), ("l1", "dlr-targeted")])
def test_counts_are_exact(norm, loss, eot, classifier, images):
    ids, x, y = right(classifier, images)
    apgd = search(norm, loss, 10, eot_iterations=eot)
    first = 1 if apgd.target else 0
    for rows in [torch.arange(len(x)), *torch.arange(6).split(1)]:
        model = Counting(classifier)
        victim, n = Victim(model), len(rows)
        zeros = torch.zeros(n, dtype=torch.int64)
        found = Candidates(x[rows].clone(), zeros - 1, zeros.clone(), zeros.clone(), ["apgd"] * n)
        task = Task(ids[rows], x[rows], y[rows], y[rows], 0, 16)
        run_search(victim, apgd, task, found, torch.arange(n))
        assert int(found.forwards.sum()) == model.forwards
        assert int(found.backwards.sum()) == model.graphs
        left = found.step < apgd.iterations
        scored = found.step + left  # x_0 .. x_step of the broken; x_0 .. x_9 of the others
        robust = ~left & (classifier(found.adversarial).argmax(1) == y[rows])
        assert torch.equal(found.backwards[left], eot * scored[left])
        assert torch.equal(found.forwards, found.backwards + eot * first)
        still_robust(victim, task, found, torch.arange(n))
        assert (found.forwards[robust] == eot * (first + 10) + 1).all()
        assert (found.backwards[robust] == eot * 10).all()


def test_nobody_is_spared_by_leaving_early(classifier, images):
    """A search that keeps its samples to the end breaks the same ones, at the same iterate."""
    ids, x, y = right(classifier, images)
    apgd, victim = search("linf", "ce", 30, epsilon=0.1), Victim(classifier)
    state, at = begin(apgd, classifier, ids, x, y), torch.full((len(x),), apgd.iterations)
    for t in range(apgd.iterations):
        state = apgd.step(victim, state)
        at = torch.where(state["broken"] & (at == apgd.iterations), t, at)
        state["broken"] = torch.zeros_like(state["broken"])
    found = attack(apgd, classifier, ids, x, y, 11)
    assert torch.equal(found.step, at)
    assert 0 < (at == apgd.iterations).sum() < len(x)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_steps_past_the_end_change_nothing(norm, classifier, images, on_a_gpu):
    """A device that is looked at every few steps only makes some too many."""
    ids, x, y = right(classifier, images)
    apgd, victim = search(norm, "ce", 10, epsilon=0.5 * EPSILON[norm]), Victim(classifier)
    state = begin(apgd, classifier, ids, x, y)
    for _ in range(apgd.iterations):
        state = apgd.step(victim, state)
    before = {name: value.clone() for name, value in apgd.leave(dict(state)).items()}
    for _ in range(3):
        state = apgd.step(victim, state)
    after = apgd.leave(dict(state))
    assert torch.equal(before["adversarial"], after["adversarial"])
    for name in ("iteration", "forwards", "backwards"):
        assert torch.equal(before[name], after[name])
    # One that the last iterate breaks may be written down late, with the same image and iterate.
    late = after["broken"] & ~before["broken"]
    assert (after["broken_at"][late] == apgd.iterations).all()
    assert torch.equal(after["broken"] & ~late, before["broken"])


@pytest.mark.parametrize(("norm", "loss"), [("linf", "ce"), ("l2", "dlr"), ("l1", "dlr-targeted")])
def test_a_step_never_asks_the_device_for_a_value(norm, loss, on_a_gpu, classifier, images, monkeypatch):
    """Tensors without values refuse .item(), bool(), nonzero() and masks as indices: what would make a GPU wait."""
    monkeypatch.setattr(model_call, "_plain", lambda out: out)  # takes no tensors without values, rightly
    ids, x, y = images
    apgd = search(norm, loss, 10, large_radii=norm == "l1")
    state = begin(apgd, classifier, ids, x, y)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        hollow = {name: mode.from_tensor(value) for name, value in state.items()}
        with pytest.raises(DataDependentOutputException):
            bool(hollow["broken"].any())
        after = apgd.step(Victim(classifier), hollow)
    assert {name: value.shape for name, value in after.items()} == {
        name: value.shape for name, value in state.items()
    }


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_break_that_is_not_confirmed_costs_the_search_nothing(norm, on_a_gpu, classifier, images):
    """Low precision only claims breaks; until one is taken back, the sample waits for some steps."""
    ids, x, y = right(classifier, images)
    apgd, victim = search(norm, "ce", 14), Victim(classifier)
    victim.forward = replace(victim.forward, exact=False)
    kept, waited = (begin(apgd, classifier, ids, x, y) for _ in range(2))
    wait = torch.arange(len(x)) % 2 == 0
    for t in range(apgd.iterations):
        kept, waited = apgd.step(victim, kept), apgd.step(victim, waited)
        kept["broken"] = torch.zeros_like(wait)
        waited["broken"] = wait.clone()
        for _ in range(2 if t < apgd.iterations - 1 else 0):
            idle = apgd.step(victim, {name: value[wait] for name, value in waited.items()})
            assert torch.equal(idle["point"], waited["point"][wait])
            for name, value in idle.items():
                waited[name] = waited[name].index_put((wait,), value)
        waited["broken"] = torch.zeros_like(wait)
    for name in ("point", "best", "best_loss", "step_size", "iteration", "forwards", "backwards"):
        torch.testing.assert_close(waited[name], kept[name])


class Faulty(nn.Module):
    """Logits and gradients are NaN or infinite wherever pixel (0,0) of an image exceeds 0.9."""

    def __init__(self, module, value):
        super().__init__()
        self.module, self.value = module, value

    def forward(self, x):
        return self.module(x) * torch.where(x[:, 0, 0, 0] > 0.9, self.value, 1.0)[:, None]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("loss", ["ce", "dlr-targeted"])
def test_non_finite_logits_stay_with_their_sample(value, norm, loss, classifier, images):
    ids, x, y = right(classifier, images)
    x = x.clone()
    x[::3, 0, 0, 0] = 1.0
    apgd = search(norm, loss, 8, epsilon=0.5 * EPSILON[norm])
    model = Faulty(classifier, value)
    found = attack(apgd, model, ids, x, y)
    assert torch.isfinite(found.adversarial).all()
    assert torch.equal(inside_box(spec(norm, apgd.rule.epsilon), ids, found.adversarial), found.adversarial)
    assert torch.equal(
        inside_ball(spec(norm, apgd.rule.epsilon), ids, x, found.adversarial), found.adversarial
    )
    sound = torch.ones(len(x), dtype=torch.bool)
    sound[::3] = False
    expected = attack(apgd, classifier, ids[sound], x[sound], y[sound])
    gap = (found.adversarial[sound] - expected.adversarial).flatten(1).abs().amax(1)
    assert (gap < 1e-5).float().mean() > 0.95


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[:, :, 2] = float("nan")
        return gradient


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_nan_gradient_is_no_step_in_its_coordinate(norm, classifier, images):
    ids, x, y = right(classifier, images)

    class Model(nn.Module):
        def forward(self, images):
            return classifier(NanGradient.apply(images))

    apgd, victim = search(norm, budget=8), Victim(Model())
    state = begin(apgd, classifier, ids, x, y)
    start = state["point"].clone()
    state = apgd.step(victim, state)
    moved = (state["point"] - start).abs()
    rest = torch.tensor([0, 1, 3, 4, 5, 6, 7])
    assert torch.isfinite(moved).all()
    assert moved[:, :, rest].amax() > 0
    if norm == "linf":
        assert not moved[:, :, 2].any()
    else:  # only the projection moves it
        assert ((state["point"] - x)[:, :, 2].abs() <= (start - x)[:, :, 2].abs() * (1 + 1e-5) + 1e-6).all()


def test_l2_steps_survive_gradients_whose_squares_underflow(classifier, images):
    """The reference stands still on them: a norm of 0 in float32."""
    ids, x, y = right(classifier, images)
    weights = classifier(x).new_tensor(1e-25)

    class Tiny(nn.Module):
        def forward(self, images):
            return classifier(images) * weights

    state = begin(search("l2"), classifier, ids, x, y)
    start = state["point"].clone()
    tiny = search("l2").step(Victim(Tiny()), {k: v.clone() for k, v in state.items()})["point"]
    usual = search("l2", "dlr").step(Victim(classifier), state)["point"]
    assert (tiny - start).flatten(1).norm(dim=1).min() > 0.1
    assert (usual - start).flatten(1).norm(dim=1).min() > 0.1


def test_eot_averages_losses_gradients_and_logits(classifier, images):
    """A model with two faces in turn is attacked as the mean of the two."""
    ids, x, y = right(classifier, images)
    other = random_model((1, 8, 8), 10, 3)

    class Turns(nn.Module):
        calls = 0

        def forward(self, images):
            self.calls += 1
            return classifier(images) if self.calls % 2 else other(images)

    apgd = search("l2", "ce", 10, eot_iterations=2)
    state = begin(apgd, classifier, ids, x, y)
    point = state["point"].clone().requires_grad_(True)
    losses = [nn.functional.cross_entropy(model(point), y, reduction="none") for model in (classifier, other)]
    (gradient,) = torch.autograd.grad(sum(loss.sum() for loss in losses) / 2, point)
    state = apgd.step(Victim(Turns()), state)
    torch.testing.assert_close(state["best_loss"], (sum(losses) / 2).detach())
    torch.testing.assert_close(state["best_gradient"], gradient)
    mean = (classifier(point) + other(point)).argmax(1)
    assert torch.equal(state["broken"], mean != y)
    assert (state["forwards"] == 2).all()
    assert (state["backwards"] == 2).all()


def test_users_errors_name_the_way_out():
    three, two = random_model((1, 8, 8), 3, 0), random_model((1, 8, 8), 2, 0)
    x, ids = torch.rand(2, 1, 8, 8), torch.arange(2)
    y = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UserError, match="at least 4 classes, the model has 3"):
        begin(search(loss="dlr-targeted", target=1), three, ids, x, y)
    with pytest.raises(UserError, match="at least 4 classes, the model has 3"):
        begin(search(loss="ce-targeted", target=3), three, ids, x, y)
    with pytest.raises(UserError, match="at least 3 classes, the model has 2"):
        attack(search(loss="dlr"), two, ids, x, y)
    assert torch.isfinite(attack(search(loss="ce"), two, ids, x, y).adversarial).all()
    for options in (
        {"loss": "ce", "target": 1},
        {"loss": "dlr-targeted", "target": None},
        {"loss": "dlr-targeted", "target": 0},
        {"loss": "margin"},
        {"norm": "l0"},
        {"norm": "l2", "large_radii": True},
        {"norm": "l1", "large_radii": True, "budget": 2},
        {"budget": 0},
        {"epsilon": 0.0},
        {"eot_iterations": 0},
    ):
        with pytest.raises(UserError, match="apgd: "):
            search(**options)
