"""Attacks on a classifier and its detector, against detectors whose answers are known."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scaled_models import Scaled
from torch import nn

from robbench.attacks import Victim, build_attack
from robbench.attacks.adaptive.objective import rank
from robbench.attacks.guard import call_guard, excess, score_gradients
from robbench.core.errors import UserError
from robbench.specs import from_surrogate, resolve_attack, threat_models

MODELS = threat_models()
ATTACKS = ("adaptive-pgd", "adaptive-apgd")


class Guard:
    """A detector whose score is a function of the images."""

    name = "made by the tests"

    def __init__(self, scores, threshold=0.0):
        self.scores, self.threshold = scores, threshold

    def scores_of(self, images):
        with torch.no_grad():
            return self.scores(images)

    def flags(self, scores):
        return scores > self.threshold


def constant(value):
    return Guard(lambda images: 0.0 * images.double().flatten(1).sum(1) + value)


def build(name, guard, epsilon=None, **parameters):
    spec = resolve_attack(name, "digits", MODELS, epsilon)
    attack = build_attack(spec.model_copy(update={"parameters": {**spec.parameters, **parameters}}))
    if attack.target == "detector":
        attack.guard = guard
    return attack


def evaluate(name, guard, model, x, y, epsilon=None, **parameters):
    attack = build(name, guard, epsilon, **parameters)
    return attack.evaluate(Victim(model), torch.arange(len(x)), x, y, 0, 256)


def broken(guard, outcome):
    """Misclassified and accepted, by the definition of both."""
    return (outcome.margins <= 0) & ~guard.flags(guard.scores_of(outcome.adversarial))


@pytest.fixture(scope="module")
def hundred(digits, classifier):
    rows = torch.arange(200)
    x, y = digits.test.x(rows), digits.test.labels[rows]
    right = (classifier(x).argmax(1) == y).nonzero().squeeze(1)[:100]
    return x[right], y[right]


@pytest.fixture(scope="module")
def density(digits, classifier):
    """Negative log density in the last hidden layer, under Gaussian kernels around training images of the predicted
    class; flags a twentieth of clean images."""
    x, labels = digits.train.x(torch.arange(400)), digits.train.labels[:400]
    hidden = classifier[:-1]
    points = hidden(x).double()
    scale = points.std()

    def scores(images):
        features = hidden(images.float())
        squares = torch.cdist(features.double(), points, compute_mode="donot_use_mm_for_euclid_dist").square()
        other = labels != classifier[-1](features).argmax(1)[:, None]
        return -(-squares / (2 * scale**2)).masked_fill(other, -torch.inf).logsumexp(1)

    clean = scores(digits.validation.x(torch.arange(100)))
    return Guard(scores, float(clean.quantile(0.95)))


@pytest.mark.parametrize("suffix", ["", "-l2"])
@pytest.mark.parametrize("name", ATTACKS)
def test_beside_a_detector_that_flags_nothing_no_attack_is_weaker_than_pgd(name, suffix, classifier, hundred):
    epsilon = 0.08 if not suffix else 0.4
    plain = evaluate(f"pgd20{suffix}", None, classifier, *hundred, epsilon)
    few = {"steps": 20, "strategies": ("selective",), "targets": 2}
    outcome = evaluate(name + suffix, constant(-1.0), classifier, *hundred, epsilon, **few)
    assert 5 < int(plain.robust.sum()) < 95
    assert int((outcome.robust & ~plain.robust).sum()) <= 1


@pytest.mark.parametrize("name", ATTACKS)
def test_beside_a_detector_that_flags_everything_nothing_is_broken(name, classifier, hundred):
    guard = constant(1.0)
    outcome = evaluate(name, guard, classifier, *hundred, steps=8)
    assert not broken(guard, outcome).any()
    assert (outcome.margins <= 0).float().mean() > 0.9, (
        "images that fool the classifier are returned nevertheless"
    )
    assert (outcome.linf <= 0.2 + 1e-6).all()
    cost = build(name, guard, steps=8).cost
    assert (outcome.forwards == cost.forwards).all()
    assert (outcome.backwards == cost.backwards).all()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_density_that_stops_pgd_does_not_stop_an_attack_that_knows_it(name, classifier, hundred, density):
    oblivious = evaluate("pgd20", None, classifier, *hundred)
    adaptive = evaluate(name, density, classifier, *hundred, steps=20)
    assert int(broken(density, oblivious).sum()) < 50
    assert int(broken(density, adaptive).sum()) > int(broken(density, oblivious).sum()) + 10


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("strategy", ["combined", "selective", "orthogonal"])
def test_images_that_stay_flagged_have_lower_scores_than_oblivious_ones(
    name, strategy, classifier, hundred, density
):
    x, y = (part[:30] for part in hundred)
    strict = Guard(density.scores, -1e9)
    first = evaluate(name, strict, classifier, x, y, steps=10, strategies=())
    outcome = evaluate(name, strict, classifier, x, y, steps=10, strategies=(strategy,), targets=1)
    wrong = (first.margins <= 0) & (outcome.margins <= 0)
    assert wrong.sum() >= (first.margins <= 0).sum(), "no misclassified image is given up"
    before, after = (strict.scores_of(one.adversarial)[wrong] for one in (first, outcome))
    assert (after <= before).all()
    assert after.mean() < before.mean() - 1


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize(("logits", "scores"), [(1e-3, 1e3), (1e3, 1e-3), (2.0**-20, 1.0), (1.0, 2.0**20)])
def test_verdicts_do_not_depend_on_the_scale_of_logits_or_scores(
    name, logits, scores, classifier, hundred, density
):
    """To one sample, where a step may round to the other side."""
    x, y = (part[:40] for part in hundred)
    scaled = Guard(lambda images: density.scores(images) * scores, density.threshold * scores)
    few = {"epsilon": 0.1, "steps": 8, "targets": 1, "starts": ("oblivious",)}
    plain = evaluate(name, density, classifier, x, y, **few)
    other = evaluate(name, scaled, Scaled(classifier, logits), x, y, **few)
    assert 5 < int(broken(density, plain).sum()) < 35
    allowed = 0 if math.frexp(logits)[0] == 0.5 else 1
    assert int((broken(density, plain) != broken(scaled, other)).sum()) <= allowed


@given(st.lists(st.tuples(*[st.floats(allow_nan=False, width=32)] * 2), min_size=2, max_size=2))
def test_rank_is_the_order_of_images(pairs):
    margin, above = torch.tensor(pairs, dtype=torch.float64).T
    first, second = rank(margin, above).tolist()
    keys = [(m <= 0, -a if m <= 0 else -m) for m, a in pairs]
    assert (first >= second) or keys[0] <= keys[1]
    assert (second >= first) or keys[1] <= keys[0]


class Linear(nn.Module):
    """Two classes of images of two pixels: w x + b > 0 is class 1."""

    def __init__(self, w, b):
        super().__init__()
        self.register_buffer("w", torch.tensor(w))
        self.b = b

    def forward(self, x):
        z = x.flatten(1) @ self.w + self.b
        return torch.stack([-z, z], 1) / 2


def closest(x, epsilon, norm, violation, size=101):
    """The smallest violation [n] in the ball around each image of two pixels and the box, on a grid."""
    low, high = (x - epsilon).clamp(min=0), (x + epsilon).clamp(max=1)
    ticks = torch.linspace(0, 1, size, dtype=torch.float64)
    points = low[:, None] + (high - low)[:, None] * torch.cartesian_prod(ticks, ticks)
    outside = (points - x[:, None]).norm(dim=2) > epsilon if norm == "l2" else torch.zeros(())
    values = violation(points.reshape(-1, 1, 1, 2)).reshape(points.shape[:2])
    return values.masked_fill(outside.bool(), torch.inf).amin(1)


@settings(max_examples=3, deadline=None)
@given(st.floats(0, 6.25), st.floats(0, 6.25), st.floats(-0.2, 0.2), st.booleans())
@example(1.5, 1.25, 0.0, False)  # a wedge
@pytest.mark.parametrize("name", [f"{name}{suffix}" for name in ATTACKS for suffix in ("", "-l2")])
def test_an_accepted_misclassified_image_is_found_where_there_is_one(name, turn, other, height, curved):
    """Two pixels. Classifier: a line; detector: another line, or an ellipse; 60 images on all sides of both."""
    draw = torch.Generator().manual_seed(0)
    x = 0.05 + 0.9 * torch.rand((60, 1, 1, 2), generator=draw)
    w, v = ([math.cos(one), math.sin(one)] for one in (turn, other))
    model, v = Linear(w, -sum(w) / 2), torch.tensor(v, dtype=torch.float64)
    y = model(x).argmax(1)
    centre, widths = 0.5 + 0.3 * v, torch.tensor([1.0, 3.0], dtype=torch.float64)

    def scores(images):
        flat = images.double().flatten(1)
        return ((flat - centre) * widths).square().sum(1) if curved else (flat - 0.5) @ v

    guard = Guard(scores, 0.25 + height if curved else height)
    norm, epsilon = ("l2" if name.endswith("l2") else "linf"), 0.2
    outcome = evaluate(name, guard, model, x, y, epsilon, steps=40, targets=0)

    def violation(images):
        sign = (2.0 * y.repeat_interleave(len(images) // len(y)) - 1.0).double()
        line = images.double().flatten(1) @ torch.tensor(w, dtype=torch.float64) + model.b
        return torch.maximum(sign * line, scores(images) - guard.threshold)

    least, found = closest(x.double().flatten(1), epsilon, norm, violation), broken(guard, outcome)
    assert not (found & (least > 0.02)).any(), "there is none"
    assert not (~found & (least < -0.01)).any(), "there is one"


def test_a_score_that_is_no_number_accepts_the_image(classifier, hundred):
    guard = Guard(lambda images: images.double().flatten(1).sum(1) * math.nan)
    outcome = evaluate("adaptive-pgd", guard, classifier, *hundred, steps=10)
    assert broken(guard, outcome).float().mean() > 0.9
    values = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1.0], dtype=torch.float64)
    assert (excess(constant(0), values) > 0).tolist() == constant(0).flags(values).tolist()
    never = Guard(None, math.inf)
    assert (excess(never, values) > 0).tolist() == never.flags(values).tolist()


def test_where_the_score_has_no_gradient_the_search_goes_on(classifier, hundred):
    """Flat, but for a jump: images far from the boundary are accepted."""

    def scores(images):
        lead = classifier(images).topk(2).values
        return 0.0 * images.double().flatten(1).sum(1) + (lead[:, 0] - lead[:, 1] < 3.0).double() - 0.5

    guard = Guard(scores)
    outcome = evaluate("adaptive-pgd", guard, classifier, *hundred, steps=20)
    assert broken(guard, outcome).float().mean() > 0.8


def no_graph(images):
    return images.detach().double().flatten(1).sum(1)


def leave(images):
    raise SystemExit(0)


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (no_graph, "has no gradient"),
        (leave, "failed on images .* SystemExit: 0"),
        (lambda images: images.sum(), r"returned \[\] torch.float32 for"),
        (lambda images: images.flatten(1).argmax(1), "torch.int64 for"),
        (lambda images: None, "returned NoneType"),
        (lambda images: torch.set_grad_enabled(False) and images, "leaves torch in another mode|returned"),
    ],
)
def test_a_detector_that_breaks_its_promise_is_refused(scores, message, classifier, hundred):
    with pytest.raises(UserError, match=message):
        evaluate("adaptive-pgd", Guard(scores, -1e9), classifier, *hundred, steps=3)
    torch.set_grad_enabled(True)


def test_a_detector_cannot_change_the_images_that_are_scored():
    x = torch.rand(3, 1, 2, 2)
    before = x.clone()
    call_guard(Guard(lambda images: images.mul_(0).flatten(1).sum(1)), x)
    assert torch.equal(x, before)


def test_gradients_of_scores_are_those_of_finite_differences(density, hundred):
    x = hundred[0][:3]
    found, step = score_gradients(density, x), 1e-3
    for pixel in ((0, 3, 3), (0, 5, 4)):
        moved = torch.zeros_like(x)
        moved[(slice(None), *pixel)] = step
        slope = (density.scores(x.double() + moved) - density.scores(x.double() - moved)) / (2 * step)
        torch.testing.assert_close(found[(slice(None), *pixel)].double(), slope, rtol=0.02, atol=1e-3)


def test_without_a_detector_at_hand(classifier, hundred):
    with pytest.raises(UserError, match="none is at hand"):
        evaluate("adaptive-pgd", None, classifier, *hundred)
    spec = resolve_attack("adaptive-pgd", "digits", MODELS)
    with pytest.raises(UserError, match="on a detector and has no transfer version"):
        from_surrogate(spec, "other", "0" * 64)


def test_an_attack_is_in_the_worst_case_of_the_oblivious_ones():
    one, other = (resolve_attack(name, "digits", MODELS) for name in ("pgd20", "adaptive-pgd"))
    assert (one.target, other.target) == ("classifier", "detector")
    assert one.threat == other.threat


@pytest.mark.parametrize(
    "parameters",
    [{"weights": (1.0,)}, {"weights": (0.0,)}, {"starts": ()}, {"targets": -1}, {"strategies": ("x",)}],
)
def test_parameters_that_mean_nothing_are_refused(parameters):
    with pytest.raises(UserError, match=next(iter(parameters))):
        build("adaptive-apgd", SimpleNamespace(), **parameters)


def test_detectors_are_not_trained_against_adaptive_attacks(in_tmp):
    from click.testing import CliRunner

    from robbench.cli.app import main

    command = ["train", "--detector", "kde", "--model", "digits-standard", "--attacks", "adaptive-pgd"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 2
    assert "needs a detector that is trained already" in done.output
