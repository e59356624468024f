"""Minimal-norm attacks against closed forms of linear models, against foolbox, and on models made to mislead."""

import foolbox
import numpy as np
import pytest
import torch
from grids import slow_but
from torch import nn

from robbench.attacks import Victim, build_attack
from robbench.attacks.search.geometry import norm_of
from robbench.core.errors import UserError
from robbench.models.loading import load_model
from robbench.models.zoo import find_model, zoo_entries
from robbench.specs import ResolvedAttack, resolve_attack, threat_models

MODELS = threat_models()
SURE = {"cw-l2-k9": 9.0, "cw-l2-k20": 20.0}  # which look beyond the boundary
NAMES = sorted(n for m in MODELS.values() if m.space == "minimal" for n in m.attacks if n not in SURE)
CLASSES, D = 3, 16
DECISION_BASED = ("boundary", "hopskipjump-l2", "hopskipjump-linf")
FEW_QUERIES = {name: {"queries": 500} for name in DECISION_BASED}


def attack(name, epsilon=None, **parameters):
    spec = resolve_attack(name, "digits", MODELS)
    small = {"cw-l2": {"steps": 60, "binary_search_steps": 5, "step_size": 0.05}, **FEW_QUERIES}.get(name, {})
    changes = {"epsilon": epsilon, "parameters": {**spec.parameters, **small, **parameters}}
    return build_attack(ResolvedAttack.model_validate({**spec.model_dump(), **changes}))


def evaluate(name, model, x, y, epsilon=None, batch_size=64, **parameters):
    one = attack(name, epsilon, **parameters)
    return one.evaluate(Victim(model), torch.arange(len(x)), x, y, 0, batch_size)


def linear(seed=0, offset=0.0):
    """Logits of a random linear model on 1x4x4 images; `offset` on all of them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layer = nn.Linear(D, CLASSES)
    with torch.no_grad():
        layer.bias += offset
    return nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False)


def images(model, low, high, n=24):
    draw = torch.Generator().manual_seed(1)
    x = low + (high - low) * torch.rand((n, 1, 4, 4), generator=draw)
    return x, model(x).argmax(1)


def exact(model, x, y, norm):
    """Distance to the nearest boundary of a linear model in float64, inside the box in l2 and linf, [n]."""
    weight, bias = (p.double().numpy() for p in model[1].parameters())
    return np.array(
        [
            min(_to(weight[k] - weight[c], bias[k] - bias[c], one, norm) for k in range(CLASSES) if k != c)
            for one, c in zip(x.flatten(1).double().numpy(), y.tolist(), strict=True)
        ]
    )


def _to(w, b, x, norm):
    gap = -(w @ x + b)
    room = np.where(w > 0, 1 - x, x)
    if norm in ("l1", "l0"):
        order = np.argsort(-np.abs(w)) if norm == "l1" else np.argsort(-np.abs(w) * room)
        closed = np.cumsum((np.abs(w) * room)[order])
        last = int(np.searchsorted(closed, gap))
        if last >= D:
            return np.inf
        if norm == "l0":
            return last + 1
        before = closed[last - 1] if last else 0.0
        return room[order][:last].sum() + (gap - before) / abs(w[order][last])
    pace = np.abs(w) if norm == "l2" else np.ones(D)
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.abs(w) @ np.minimum(middle * pace, room) < gap else (low, middle)
    moved = np.minimum(high * pace, room)
    if np.abs(w) @ moved < gap * (1 - 1e-9):
        return np.inf
    return np.sqrt((moved**2).sum()) if norm == "l2" else moved.max()


# Decision-based attacks need thousands of queries; by default test_decisions.py measures their distances.
@pytest.mark.parametrize("name", slow_but([n for n in NAMES if n not in DECISION_BASED], NAMES))
@pytest.mark.parametrize("offset", [0.0, -100.0])
def test_the_distance_to_the_boundary_of_a_linear_model(name, offset):
    model = linear(offset=offset)
    x, y = images(model, 0.3, 0.7)
    fine = {"cw-l2": {"steps": 150, "binary_search_steps": 6, "step_size": 0.01}}
    fine |= {name: {"queries": 5000} for name in DECISION_BASED}
    outcome, norm = evaluate(name, model, x, y, **fine.get(name, {})), MODELS_NORM[name]
    true = exact(model, x, y, norm)
    size = norm_of(outcome.adversarial.double() - x.double(), norm).numpy()
    assert not outcome.robust.any()
    assert (outcome.margins <= 0).all()
    assert (size >= true * (1 - 1e-4)).all(), "nearer than possible"
    limit = {"deepfool-l2": 1.03, "deepfool-linf": 1.03, "fmn-l0": 1.5}.get(name, 1.02)
    assert np.median(size / true) <= limit


@pytest.mark.parametrize("scale", [1.0, 1e-30])
@pytest.mark.parametrize("name", ["fmn-l2", "fmn-linf", "fmn-l1"])
def test_fmn_crosses_a_linear_boundary(name, scale):
    """Rounding leaves a tenth of the points of Newton's step just short of it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(144, 2)).eval().requires_grad_(False)
        x = torch.rand(60, 1, 12, 12)
    y = model(x).argmax(1)
    for parameter in model.parameters():
        parameter *= scale
    assert not evaluate(name, model, x, y).robust.any()


MODELS_NORM = {name: (m.attacks[name].norm or m.norm) for m in MODELS.values() for name in m.attacks}


@pytest.mark.parametrize("name", NAMES)
def test_pixels_at_the_ends_of_the_box(name):
    """Every pixel is exactly 0 or 1, so that half of all directions are closed."""
    model = linear(2)
    x, _ = images(model, 0.0, 1.0)
    x = x.round()
    y = model(x).argmax(1)
    true = exact(model, x, y, MODELS_NORM[name])
    outcome = evaluate(name, model, x, y)
    size = norm_of(outcome.adversarial.double() - x.double(), MODELS_NORM[name]).numpy()
    broken = ~outcome.robust.numpy()
    assert broken.mean() >= 0.5 if "deepfool" in name else broken.mean() > 0.9
    assert (size[broken] >= true[broken] * (1 - 1e-4)).all()
    assert torch.equal(outcome.adversarial[outcome.robust], x[outcome.robust]), (
        "a failure keeps its clean image"
    )


def test_a_success_of_cw_leads_by_its_confidence():
    model = linear()
    x, y = images(model, 0.3, 0.7)
    plain, sure = (evaluate("cw-l2", model, x, y, confidence=k) for k in (0.0, 0.3))
    assert (sure.margins[~sure.robust] <= -0.3).all()
    assert float((sure.l2 / plain.l2)[~sure.robust].min()) > 1.0
    never = evaluate("cw-l2", model, x, y, confidence=1e4)
    assert never.robust.all(), "misclassified images that lead by less are no success"
    assert torch.equal(never.adversarial, x)


@pytest.mark.parametrize("target", [None, 2])
@pytest.mark.parametrize("name", SURE)
def test_high_confidence_cw_reaches_its_confidence(name, target):
    model = linear()
    model[1].weight.mul_(300.0)
    x, y = images(model, 0.3, 0.7)
    y[0] = 2  # has nowhere to go where the target is 2
    aim = {} if target is None else {"target": target}
    outcome = evaluate(name, model, x, y, epsilon=4.0, steps=100, step_size=0.05, **aim)
    own = torch.full_like(y, 2)[:, None]
    logits = model(outcome.adversarial)
    reached = logits.gather(1, own).squeeze(1) - logits.scatter(1, own, -torch.inf).amax(1)
    lead = (-outcome.margins if target is None else reached)[1:]
    assert (lead >= SURE[name] * (1 - 1e-5)).all()
    assert lead.median() < 1.1 * SURE[name], "hardly further than asked for"
    if target is not None:
        assert torch.equal(outcome.adversarial[0], x[0])
        assert outcome.reached.tolist() == [False] + 23 * [True]


@pytest.mark.parametrize("name", NAMES)
def test_the_verdict_is_that_of_the_budget(name):
    model = linear()
    x, y = images(model, 0.3, 0.7)
    y[0] = (y[0] + 1) % CLASSES
    every = evaluate(name, model, x, y)
    size = getattr(every, MODELS_NORM[name])
    epsilon = float(size.median())
    outcome = evaluate(name, model, x, y, epsilon=epsilon)
    assert torch.equal(outcome.adversarial, every.adversarial), "the budget changes no search"
    right = every.clean_margins > 0
    assert torch.equal(outcome.robust, right & (size > epsilon))
    assert outcome.broken_by[0] == "clean"
    assert float(size[0]) == 0
    assert [by is None for by in outcome.broken_by] == outcome.robust.tolist()


class NotFiniteWhereBright(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        bright = (x.flatten(1) > 0.75).any(1, keepdim=True)
        return self.model(x).masked_fill(bright, float("nan"))


class Rounded(nn.Module):
    """No gradient: autograd gives exact zeros."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model((x * 4).round() / 4)


class NotDifferentiable(Rounded):
    def forward(self, x):
        with torch.no_grad():
            return self.model(x)


@pytest.mark.parametrize("name", NAMES)
def test_logits_that_are_not_finite_are_broken(name):
    model = linear()
    x, y = images(model, 0.3, 0.7)
    outcome = evaluate(name, NotFiniteWhereBright(model), x, y)
    assert outcome.adversarial.isfinite().all()
    lost = outcome.predictions == -1
    assert not outcome.robust[lost].any()
    assert (~outcome.robust).float().mean() > 0.9


@pytest.mark.parametrize("name", [n for n in NAMES if n not in DECISION_BASED])
def test_a_model_without_gradient_is_no_robust_model(name):
    model = Rounded(linear())
    x, _ = images(linear(), 0.3, 0.7)
    y = model(x).argmax(1)
    outcome = evaluate(name, model, x, y)
    assert outcome.suspicions
    assert torch.equal(outcome.adversarial[outcome.robust], x[outcome.robust])


@pytest.mark.parametrize("name", ["cw-l2", "deepfool-linf", "fmn-l1", "ddn-l2"])
def test_a_model_that_is_not_differentiable_is_refused(name):
    x, y = images(linear(), 0.3, 0.7)
    with pytest.raises(UserError, match="follows the gradient of the model, which has none") as refused:
        evaluate(name, NotDifferentiable(linear()), x, y)
    assert "\n" not in str(refused.value)


def test_a_norm_that_an_algorithm_does_not_search_is_refused():
    spec = resolve_attack("cw-l2", "digits", MODELS).model_copy(update={"norm": "linf"})
    with pytest.raises(UserError, match="searches space minimal in norm l2, not minimal in linf"):
        build_attack(spec)
    image = resolve_attack("fmn-l2", "digits", MODELS).model_copy(update={"space": "image"})
    with pytest.raises(UserError, match="not image in l2"):
        build_attack(image)


STEPS = 40
PEERS = {
    "cw-l2": lambda: foolbox.attacks.L2CarliniWagnerAttack(steps=60, binary_search_steps=4, stepsize=0.05),
    "deepfool-l2": lambda: foolbox.attacks.L2DeepFoolAttack(steps=STEPS),
    "deepfool-linf": lambda: foolbox.attacks.LinfDeepFoolAttack(steps=STEPS),
    "fmn-l2": lambda: foolbox.attacks.L2FMNAttack(steps=STEPS),
    "fmn-linf": lambda: foolbox.attacks.LInfFMNAttack(steps=STEPS),
    "fmn-l1": lambda: foolbox.attacks.L1FMNAttack(steps=STEPS),
    "fmn-l0": lambda: foolbox.attacks.L0FMNAttack(steps=STEPS),
    "ddn-l2": lambda: foolbox.attacks.DDNAttack(steps=STEPS),
}  # fmt: skip
OURS = {"cw-l2": {"steps": 60, "binary_search_steps": 4, "step_size": 0.05}}


def median_distance(module, x, y, attacked, norm):
    """Failures infinite; foolbox's C&W returns a black image for them, which may be misclassified."""
    with torch.no_grad():
        lost = module(attacked).argmax(1) != y
    lost &= (attacked != 0).flatten(1).any(1)
    size = norm_of(attacked.double() - x.double(), norm)
    return float(size.masked_fill(~lost, float("inf")).median())


@pytest.mark.parametrize("model", ["digits-standard", "digits-at"])
@pytest.mark.parametrize("name", sorted(PEERS))
def test_no_further_than_foolbox(name, model, digits):
    module = load_model(find_model(model, zoo_entries()), torch.device("cpu")).module.eval()
    x, y = digits.test.x(torch.arange(40)), digits.test.labels[:40]
    right = module(x).argmax(1) == y
    x, y = x[right], y[right]
    outcome = evaluate(name, module, x, y, **{"steps": STEPS, **OURS.get(name, {})})
    theirs = PEERS[name]().run(
        foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu"), x, foolbox.criteria.Misclassification(y)
    )
    with torch.no_grad():
        again = module(outcome.adversarial).argmax(1) != y
    assert torch.equal(again, outcome.margins <= 0), "a success is one under a clean forward"
    mine, other = (
        median_distance(module, x, y, one, MODELS_NORM[name]) for one in (outcome.adversarial, theirs)
    )
    assert mine <= 1.01 * other


def test_targeted_cw_is_no_further_than_foolbox(digits):
    module = load_model(find_model("digits-at", zoo_entries()), torch.device("cpu")).module.eval()
    x, y = digits.test.x(torch.arange(40)), digits.test.labels[:40]
    right = module(x).argmax(1) == y
    x, y = x[right], y[right]
    own = {"target": "random", **OURS["cw-l2"]}
    one = attack("cw-l2", **own)
    outcome = one.evaluate(Victim(module), torch.arange(len(x)), x, y, 0, 64)
    assert outcome.reached.float().mean() > 0.8
    assert torch.equal(
        module(outcome.adversarial[outcome.reached]).argmax(1), outcome.targets[outcome.reached]
    )
    targets = outcome.targets
    theirs = PEERS["cw-l2"]().run(
        foolbox.PyTorchModel(module, bounds=(0, 1), device="cpu"),
        x,
        foolbox.criteria.TargetedMisclassification(targets),
    )
    mine, other = (
        distances_to_targets(module, x, targets, images) for images in (outcome.adversarial, theirs)
    )
    assert mine.isfinite().sum() >= other.isfinite().sum()
    assert float(mine.median()) <= 1.01 * float(other.median())


def distances_to_targets(module, x, targets, images):
    """L2 distances [n], infinite where the target is not reached."""
    with torch.no_grad():
        missed = module(images).argmax(1) != targets
    return norm_of(images.double() - x.double(), "l2").masked_fill(missed, float("inf"))


class Tiny(nn.Module):
    """Logits too small for the constants that C&W tries."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 1e-30 * self.model(x)


def test_a_search_of_the_whole_box_that_finds_nothing_is_said():
    model = linear()
    x, y = images(model, 0.3, 0.7)
    outcome = evaluate("cw-l2", Tiny(model), x, y)
    assert outcome.robust.all()
    (found,) = [one for one in outcome.suspicions if one.kind == "not-found"]
    assert "for 24 of 24 samples" in found.text
    assert "not-found" not in {one.kind for one in evaluate("cw-l2", model, x, y).suspicions}
