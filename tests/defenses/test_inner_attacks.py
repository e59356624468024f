"""What the defenses do to a batch before they compute a loss."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from robbench.attacks import build_attack
from robbench.attacks.codec import FlowCodec
from robbench.core.errors import UserError
from robbench.defenses import DEFENSES, FLOW_DEFENSES, Setting, build_defense
from robbench.defenses.augmentation import cutout_mask
from robbench.defenses.base import mix
from robbench.models.classifiers import conv3
from robbench.specs import resolve_attack, threat_models

CLASSIFIER_DEFENSES = list(DEFENSES)
ATTACKING = ["at", "trades", "mart", "iat", "a-la", "jsa-at", "ijsat", "trades-jsa", "mart-jsa"]


@pytest.fixture(scope="module")
def models_of_threat():
    return threat_models()


@pytest.fixture(scope="module")
def codec(flow):
    return FlowCodec(flow)


@pytest.fixture
def setting(models_of_threat, codec):
    return Setting("digits", models_of_threat, codec)


@pytest.fixture
def batch(digits):
    rows = torch.arange(12)
    return digits.train.x(rows), digits.train.labels[rows]


@pytest.fixture
def bn_model():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return conv3((1, 8, 8), 10).train()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_names_of_the_issue_are_registered():
    augmenting = ["standard", "mixup", "cutout", "r-la"]
    wanted = [*augmenting, *ATTACKING]
    assert set(wanted) <= set(CLASSIFIER_DEFENSES)
    assert list(FLOW_DEFENSES) == ["at", "clean", "hybrid"]


@pytest.mark.parametrize(
    "name", ["trades", "mart", "at", "jsa-at", "ijsat", "trades-jsa", "mart-jsa", "a-la"]
)
def test_the_inner_attack_leaves_the_model_as_it_was(name, setting, batch, bn_model):
    """Eval mode inside: running statistics stand still; no gradient reaches a parameter; train mode is
    restored."""
    x, y = batch
    defense = build_defense(name, {"steps": 2}, setting)
    before = copy.deepcopy(bn_model.state_dict())
    flags = [p.requires_grad for p in bn_model.parameters()]
    if name == "ijsat":
        worst = defense.robust_mixup(bn_model, mix(x, y, 1.0, seeded()), seeded())
    elif name in ("at", "trades", "mart", "a-la"):
        worst = defense.adversarial(bn_model, x, y, seeded())
    else:
        worst = defense.search(bn_model, x, y, seeded())
    assert all(torch.equal(before[key], value) for key, value in bn_model.state_dict().items())
    assert all(p.grad is None for p in bn_model.parameters())
    assert [p.requires_grad for p in bn_model.parameters()] == flags
    assert all(module.training for module in bn_model.modules())
    assert not worst.requires_grad
    assert float(worst.min()) >= 0.0
    assert float(worst.max()) <= 1.0
    assert not torch.equal(worst, x)


def test_train_mode_attacks_move_the_running_statistics_when_asked_to(setting, batch, bn_model):
    """attack_bn "train" is the reference code's habit: k+1 forwards a step update the statistics."""
    x, y = batch
    counter = next(m for m in bn_model.modules() if isinstance(m, nn.BatchNorm2d)).num_batches_tracked
    build_defense("a-la", {"steps": 3, "attack_bn": "train"}, setting).loss(bn_model, x, y, seeded())
    assert int(counter) == 4
    build_defense("a-la", {"steps": 3}, setting).loss(bn_model, x, y, seeded())
    assert int(counter) == 5


@pytest.mark.parametrize("name", CLASSIFIER_DEFENSES)
def test_every_loss_reaches_the_parameters_and_is_a_function_of_the_generator(name, setting, batch, bn_model):
    x, y = batch
    defense = build_defense(name, {"steps": 2} if name in ATTACKING else {}, setting)
    start = copy.deepcopy(bn_model.state_dict())
    values = []
    for seed in (3, 3):
        bn_model.load_state_dict(start)
        bn_model.zero_grad()
        loss = defense.loss(bn_model, x, y, seeded(seed))
        loss.backward()
        values.append(loss.item())
    assert values[0] == values[1]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in bn_model.parameters() if p.ndim > 1)


def test_at_examples_fill_the_ball_and_raise_the_loss(setting, batch, classifier):
    x, y = batch
    defense = build_defense("at", {}, setting)
    worst = defense.adversarial(classifier, x, y, seeded())
    assert (worst - x).abs().max().item() == pytest.approx(0.2, abs=1e-6)
    assert cross_entropy(classifier(worst), y) > 3 * cross_entropy(classifier(x), y)


def test_trades_and_mart_start_beside_the_image(setting, batch, classifier):
    """One step of size a from x + 0.001 N(0, I): every pixel within a + 0.006 of x."""
    x, y = batch
    for name in ("trades", "mart"):
        defense = build_defense(name, {"steps": 1, "step_size": 0.01}, setting)
        worst = defense.adversarial(classifier, x, y, seeded())
        assert (worst - x).abs().max().item() <= 0.016


def test_budgets_come_from_the_threat_models_and_can_be_overridden(setting):
    p = build_defense("at", {}, setting).parameters
    assert (p.epsilon, p.step_size, p.steps, p.norm) == (0.2, 0.05, 10, "linf")
    p = build_defense("at", {"epsilon": 0.1, "steps": 3}, setting).parameters
    assert (p.epsilon, p.step_size, p.steps) == (0.1, 0.025, 3)
    p = build_defense("at", {"attack": "pgd10-l2"}, setting).parameters
    assert (p.norm, p.epsilon) == ("l2", 0.8)
    p = build_defense("jsa-at", {"eta_step": 0.01}, setting).parameters
    assert (p.epsilon, p.epsilon_step, p.eta_step, p.in_loop) == (0.2, 0.05, 0.01, "project")
    assert build_defense("trades", {}, setting).parameters.beta == 6.0


@pytest.mark.parametrize(
    ("name", "parameters", "words"),
    [
        ("at", {"epsilom": 0.1}, ["epsilom", "at"]),
        ("at", {"epsilon": -0.1}, ["epsilon", "-0.1"]),
        ("at", {"epsilon": float("nan")}, ["epsilon"]),
        ("at", {"attack": "pgd11"}, ["pgd11", "pgd10"]),
        ("at", {"attack": "jsa10"}, ["joint", "image"]),
        ("trades", {"start": "zero"}, ["start", "gradient"]),
        ("trades", {"beta": -1}, ["beta"]),
        ("ijsat", {"tau": 0}, ["tau"]),
        ("nothing", {}, ["nothing", "robbench list defenses"]),
    ],
)
def test_bad_parameters_are_named(name, parameters, words, setting):
    with pytest.raises(UserError) as caught:
        build_defense(name, parameters, setting)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["r-la", "a-la", "jsa-at", "ijsat", "trades-jsa", "mart-jsa"])
def test_without_a_flow_the_message_says_how_to_get_one(name, models_of_threat):
    with pytest.raises(UserError, match="robbench train --defense clean --dataset digits"):
        build_defense(name, {}, Setting("digits", models_of_threat))


# ---------------------------------------------------------------------------------------------- latent, joint
def test_r_la_in_l2_has_length_exactly_eta(setting, batch, codec):
    """eta N(0, I) is far longer than eta in 64 dimensions, so the projection lands on the sphere."""
    x, y = batch
    defense = build_defense("r-la", {"attack": "r-la-l2", "eta": 0.5}, setting)
    clean_latents = codec.encode_flat(x, y)
    # Images away from the box, so that the final clip does not touch them.
    inner = codec.decode_flat(clean_latents).mul(0.5).add(0.25)
    moved = defense.perturb_images(inner, y, seeded())
    assert float(moved.min()) > 0.0
    assert float(moved.max()) < 1.0
    length = (codec.encode_flat(moved) - codec.encode_flat(inner)).norm(dim=1)
    torch.testing.assert_close(length, torch.full_like(length, 0.5), rtol=0, atol=2e-4)


def test_a_la_replaces_every_image_and_moves_away_from_the_chosen_label(setting, batch, classifier):
    x, y = batch
    wrong = (y + 1) % 10
    true = build_defense("a-la", {"eta": 0.4}, setting)
    predicted = build_defense("a-la", {"eta": 0.4, "label_source": "predicted"}, setting)
    by_true, by_prediction = (d.adversarial(classifier, x, wrong, seeded()) for d in (true, predicted))
    assert ((by_true - x).flatten(1).abs().amax(1) > 1e-3).all()
    # The labels handed in are wrong on purpose; only the "true" attack believes them.
    assert cross_entropy(classifier(by_true), wrong) > cross_entropy(classifier(x), wrong)
    assert cross_entropy(classifier(by_prediction), y) > cross_entropy(classifier(x), y)


class Recorder:
    """A codec that remembers which images it was asked to encode."""

    def __init__(self, codec):
        self.codec, self.encoded = codec, []

    def encode_flat(self, x, y=None):
        self.encoded.append(x.clone())
        return self.codec.encode_flat(x, y)

    def latents(self, x, y=None):
        return self.codec.latents(x, y)

    def decode_flat(self, z, y=None):
        return self.codec.decode_flat(z, y)


def test_robust_mixup_encodes_the_mixed_image_and_differs_from_attack_then_mix(
    models_of_threat, codec, batch, classifier
):
    x, y = batch
    recorder = Recorder(codec)
    setting = Setting("digits", models_of_threat, recorder)
    defense = build_defense("ijsat", {"tau": 1.0, "steps": 5}, setting)
    mixture = mix(x, y, 1.0, seeded(5))
    assert 0.05 < mixture.weight < 0.95
    robust = defense.robust_mixup(classifier, mixture, seeded(7))
    assert len(recorder.encoded) == 1
    assert torch.equal(recorder.encoded[0], mixture.x)

    attacked = build_defense("jsa-at", {"steps": 5}, setting).search(classifier, x, y, seeded(7))
    partner = [int(i) for i in _permutation(seeded(5), len(x))]
    attack_then_mix = mixture.weight * attacked + (1 - mixture.weight) * attacked[partner]
    assert (robust - attack_then_mix).abs().max() > 0.05

    def mixed_loss(images):
        logits = classifier(images)
        own, other = (cross_entropy(logits, labels) for labels in (mixture.labels, mixture.partners))
        return float(mixture.weight * own + (1 - mixture.weight) * other)

    assert mixed_loss(robust) > mixed_loss(mixture.x)
    assert mixed_loss(robust) > mixed_loss(attack_then_mix)


def _permutation(generator, n):
    from robbench.defenses.base import beta_draw

    beta_draw(1.0, generator)
    return torch.randperm(n, generator=generator)


def test_ijsat_trains_on_the_adversarial_term_alone(setting, batch, classifier, monkeypatch):
    x, y = batch
    defense = build_defense("ijsat", {"steps": 1}, setting)
    monkeypatch.setattr(type(defense), "robust_mixup", lambda self, model, mixture, generator: x * 0.0)
    drawn = mix(x, y, 0.1, seeded(9))
    logits = classifier(torch.zeros_like(x))
    wanted = drawn.weight * cross_entropy(logits, drawn.labels) + (1 - drawn.weight) * cross_entropy(
        logits, drawn.partners
    )
    assert defense.loss(classifier, x, y, seeded(9)).item() == pytest.approx(wanted.item(), rel=1e-5)


# ----------------------------------------------------------------------------------------------------- cutout
@pytest.mark.parametrize("length", [1, 4, 5, 8])
def test_cutout_masks_are_squares_cut_off_at_the_border(length):
    masks = cutout_mask(2000, 8, 8, length, seeded())
    assert masks.shape == (2000, 1, 8, 8)
    sizes = masks.flatten(1).sum(1)
    assert int(sizes.max()) == length**2 if length < 8 else int(sizes.max()) == 64
    assert int(sizes.min()) >= 1
    for mask in masks[:50, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        block = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert bool(block.all())
        assert int(block.sum()) == int(mask.sum())
        assert max(len(rows), len(columns)) <= length
    # Centres are uniform over the pixels: every pixel is covered by some hole.
    assert bool(masks.any(0).all())


def test_cutout_changes_the_hole_and_nothing_else(setting, batch):
    x, y = batch
    seen = []

    class Spy(nn.Module):
        def forward(self, images):
            seen.append(images)
            return torch.zeros(len(images), 10)

    build_defense("cutout", {}, setting).loss(Spy(), x, y, seeded(3))
    hole = cutout_mask(len(x), 8, 8, 4, seeded(3)).expand_as(x)
    assert torch.equal(seen[0][~hole], x[~hole])
    torch.testing.assert_close(seen[0][hole], x.mean().expand(int(hole.sum())))
    build_defense("cutout", {"fill": "zero", "length": 3}, setting).loss(Spy(), x, y, seeded(3))
    assert float(seen[1][cutout_mask(len(x), 8, 8, 3, seeded(3)).expand_as(x)].abs().max()) == 0.0


def test_the_pgd_of_yuksel_et_al_is_a_setting_of_adversarial_training(setting, batch, bn_model):
    """Against a plain loop in its words: labels predicted and every forward in train mode, start uniform in the cube
    and for L2 pulled onto the sphere, projection on the ball at each step, on the box only at the end."""
    x, y = batch
    epsilon, step, steps = 1.5, 0.4, 4
    parameters = {"attack": "pgd10-l2", "epsilon": epsilon, "step_size": step, "steps": steps}
    paper = {"start": "cube", "label_source": "predicted", "attack_bn": "train", "box": "end"}
    twin = copy.deepcopy(bn_model)
    found = build_defense("at", parameters | paper, setting).adversarial(bn_model, x, y, seeded())

    def onto(delta):
        length = delta.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1)
        return delta * (epsilon / length).clamp(max=1.0)

    label = twin(x).argmax(1)
    delta = onto((torch.rand(x.shape, generator=seeded()) * 2 - 1) * epsilon)
    assert torch.allclose(delta.flatten(1).norm(dim=1), torch.full((len(x),), epsilon))
    for _ in range(steps):
        delta = delta.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(cross_entropy(twin(x + delta), label, reduction="sum"), delta)
        delta = onto(delta + step * slope / slope.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1))
    assert ((x + delta) < 0).any(), "an iterate left the box"
    assert torch.allclose(found, (x + delta).detach().clamp(0, 1), atol=1e-5)
    counters = [m.num_batches_tracked for m in bn_model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {int(count) for count in counters} == {steps + 1}
    ours = build_defense("at", parameters, setting).adversarial(twin, x, y, seeded())
    assert not torch.allclose(found, ours, atol=1e-3)


def test_the_attack_of_trades_has_no_label(setting):
    with pytest.raises(UserError, match="uses no label"):
        build_defense("trades", {"label_source": "predicted"}, setting)


@pytest.mark.parametrize("name", ["elastic", "uar-linf-3", "fog"])
def test_training_follows_the_attack_that_evaluates(setting, batch, classifier, name):
    """The inner attack of `at` renders variables in the attack's set, raises the loss, and scales with the warm-up."""
    at = build_defense("at", {"attack": name, "steps": 6}, setting)
    x, y = batch
    attacked = at.adversarial(classifier, x, y, seeded())
    assert float(attacked.min()) >= 0
    assert float(attacked.max()) <= 1
    plain = build_defense("at", {"attack": name, "steps": 1, "step_size": 1e-9}, setting)
    start = plain.adversarial(classifier, x, y, seeded())
    before, after = (float(cross_entropy(classifier(image), y)) for image in (start, attacked))
    assert after > before
    spec = resolve_attack(name, "digits", dict(setting.threat_models), steps=6)
    assert at.parameters.epsilon == spec.epsilon
    assert at.parameters.step_size == pytest.approx(build_attack(spec).parameters.step(spec.epsilon))
    if name == "uar-linf-3":
        assert float((attacked - x).abs().max()) <= spec.epsilon * (1 + 1e-6)
        at.strength = 0.25
        assert float((at.adversarial(classifier, x, y, seeded()) - x).abs().max()) <= spec.epsilon / 4 * (
            1 + 1e-6
        )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attack": "elastic", "norm": "l2"}, "has no norm; leave it out"),
        ({"attack": "uar-l1"}, "no gradient steps"),
    ],
)
def test_what_a_rendered_inner_attack_lacks_is_refused(setting, given, message):
    with pytest.raises(UserError, match=message):
        build_defense("at", given, setting)
