"""Latent and joint attacks: budgets reached, gradients right, strength ordered, traps of the papers avoided."""

import copy

import pytest
import torch
from pydantic import create_model
from torch import nn

from robbench.attacks import Victim, build_attack
from robbench.attacks.codec import FlowCodec
from robbench.attacks.latent import random_latent
from robbench.attacks.search.geometry import GeneratorNoise, SampleNoise
from robbench.attacks.search.inner import ascend, attack_mode, error_log_odds, gradients, temper_logits
from robbench.attacks.search.spaces import JointSpace, LatentSpace
from robbench.core.errors import AttackViolation, UserError
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()


def noise_for(n: int, seed: int = 0) -> GeneratorNoise:
    return GeneratorNoise(n, torch.Generator().manual_seed(seed))


def cross_entropy(model, y):
    return lambda image: nn.functional.cross_entropy(model(image), y, reduction="none")


def test_gradients_of_the_flow_path_equal_finite_differences(classifier, flow, images):
    """d CE(f(G(z + lambda) + delta)) / d(lambda, delta), float64, central differences on random coordinates."""
    _, x, y = images
    x, y = x[:3].double(), y[:3]
    codec = FlowCodec(copy.deepcopy(flow).double().freeze(dtype=torch.float64))
    model = copy.deepcopy(classifier).double()
    space = JointSpace(codec, 0.2, 0.05, 0.3, 0.075, in_loop="paper_literal")
    state = space.start(x, y, noise_for(3))
    state = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    with attack_mode(model):
        slopes, _ = gradients(space, state, cross_entropy(model, y))

    def loss_at(name: str, position: tuple[int, ...], shift: float) -> float:
        moved = {k: v.clone() for k, v in state.items()}
        moved[name][position] += shift
        with torch.no_grad():
            return float(cross_entropy(model, y)(space.render(moved)[0]).sum())

    step = 1e-6
    for name, positions in (("lambda", [(0, 3), (1, 40), (2, 63)]), ("delta", [(0, 0, 4, 4), (2, 0, 1, 6)])):
        for position in positions:
            numeric = (loss_at(name, position, step) - loss_at(name, position, -step)) / (2 * step)
            assert float(slopes[name][position]) == pytest.approx(numeric, rel=1e-4, abs=1e-7)


def test_jsa_reaches_both_budgets(classifier, flow, images):
    """The printed update would stop at one step of each: accumulate-then-project touches both bounds."""
    ids, x, y = images
    spec = resolve_attack("jsa50", "digits", MODELS, epsilon=0.1, eta=0.05)
    spec = spec.model_copy(update={"parameters": {"steps": 12, "early_stop": False}})
    outcome = build_attack(spec, flow).evaluate(Victim(classifier), ids, x, y, 0, 48)
    assert outcome.witness["lambda"].abs().amax(1).min() > 0.05 * (1 - 1e-4)
    reached = outcome.witness["delta"].abs().flatten(1).amax(1)
    assert reached.max() <= 0.1 * (1 + 1e-5)
    assert (reached > 0.1 * (1 - 1e-4)).float().mean() > 0.9


def test_jsa_is_at_least_as_strong_as_its_parts_on_average(classifier, flow, images):
    ids, x, y = images
    accuracy = {}
    for name in ("pgd50", "om-pgd", "jsa50"):
        spec = resolve_attack(name, "digits", MODELS)
        small = {k: v / 3 for k, v in {"epsilon": spec.epsilon, "eta": spec.eta}.items() if v is not None}
        outcome = build_attack(spec.model_copy(update=small), flow).evaluate(
            Victim(classifier), ids, x, y, 0, 48
        )
        accuracy[name] = outcome.robust.float().mean().item()
    assert accuracy["jsa50"] <= min(accuracy["pgd50"], accuracy["om-pgd"]) + 1 / 48
    assert accuracy["jsa50"] < accuracy["om-pgd"]


def test_jsa_keeps_the_joint_point_in_the_box_at_every_step(classifier, flow, images):
    _, x, y = images
    codec = FlowCodec(flow)
    space = JointSpace(codec, 0.3, 0.075, 0.2, 0.05)
    state = space.start(x, y, noise_for(len(x)))
    with attack_mode(classifier):
        for _ in range(5):
            slopes, state = gradients(space, state, cross_entropy(classifier, y))
            centre = codec.decode_flat(state["z"] + state["lambda"]).detach().clamp(0, 1)
            joint = centre + state["delta"]
            assert joint.min() >= -1e-6
            assert joint.max() <= 1 + 1e-6
            state = space.advance(state, slopes)


def test_both_perturbations_move_on_the_same_gradient_evaluation(classifier, flow, images):
    """Simultaneous (Jacobi) update: one forward and one backward a step."""
    ids, x, y = images
    spec = resolve_attack("jsa10", "digits", MODELS)
    outcome = build_attack(spec, flow).evaluate(Victim(classifier), ids, x, y, 0, 48)
    held = outcome.robust
    assert (outcome.backwards[held] == 10).all()


def test_level_restricted_jsa_moves_only_its_level(classifier, flow, images):
    ids, x, y = images
    sizes = [int(torch.tensor(s).prod()) for s in flow.level_shapes]
    for name, moving in (("jsa50-level1", slice(0, sizes[0])), ("jsa50-level2", slice(sizes[0], None))):
        spec = resolve_attack(name, "digits", MODELS)
        spec = spec.model_copy(update={"parameters": {**spec.parameters, "steps": 4, "early_stop": False}})
        outcome = build_attack(spec, flow).evaluate(Victim(classifier), ids, x, y, 0, 48)
        lam = outcome.witness["lambda"].clone()
        assert lam[:, moving].abs().amax(1).min() > 0
        lam[:, moving] = 0
        assert (lam == 0).all()


def test_a_level_the_flow_lacks_is_an_error(classifier, flow, images):
    ids, x, y = images
    spec = resolve_attack("jsa50", "digits", MODELS).model_copy(
        update={"parameters": {"steps": 2, "levels": [3]}}
    )
    with pytest.raises(UserError, match=r"levels \[3\]"):
        build_attack(spec, flow).evaluate(Victim(classifier), ids, x, y, 0, 48)


def test_zero_latent_perturbation_returns_the_image(flow, images):
    """The exact decoder: G(F(x)) = x within float32 rounding (the published legacy decoder is off by up to .054)."""
    _, x, y = images
    codec = FlowCodec(flow)
    assert (codec.decode_flat(codec.encode_flat(x, y), y) - x).abs().max() < 1e-4


def test_r_la_geometry(flow, images):
    """L2: length exactly eta. Linf: 31.7 % of the coordinates at the bound, std after clamping 0.718 eta."""
    ids, x, y = images
    codec = FlowCodec(flow)
    _, shift = random_latent(codec, x, y, "l2", 0.7, SampleNoise(0, "t", ids, 0, torch.device("cpu")))
    torch.testing.assert_close(shift.norm(dim=1), torch.full((len(x),), 0.7))
    _, shift = random_latent(codec, x, y, "linf", 0.25, SampleNoise(0, "t", ids, 0, torch.device("cpu")))
    assert (shift.abs() >= 0.25 - 1e-6).float().mean().item() == pytest.approx(0.317, abs=0.02)
    assert shift.std().item() / 0.25 == pytest.approx(0.718, abs=0.02)
    _, shift = random_latent(codec, x, y, "none", 0.25, SampleNoise(0, "t", ids, 0, torch.device("cpu")))
    assert shift.abs().max() > 0.5
    assert shift.std().item() == pytest.approx(0.25, abs=0.01)


def test_a_la_starts_on_the_l2_sphere(flow, images):
    _, x, y = images
    space = LatentSpace(FlowCodec(flow), "l2", 0.9, 0.45, "cube")
    state = space.start(x, y, noise_for(len(x)))
    torch.testing.assert_close(state["lambda"].norm(dim=1), torch.full((len(x),), 0.9))


def test_label_source_predicted_moves_away_from_the_prediction(classifier, flow, images):
    """With a wrong clean prediction the loss of a-la-pred uses that prediction; the verdict the true label."""
    ids, x, y = images
    wrong = (y + 1) % 10  # every "true" label is now one the model does not predict
    spec = resolve_attack("a-la-pred", "digits", MODELS)
    spec = spec.model_copy(update={"parameters": {**spec.parameters, "early_stop": False}})
    attack = build_attack(spec, flow)
    outcome = attack.evaluate(Victim(classifier), ids, x, wrong, 0, 48)
    with torch.no_grad():
        before = nn.functional.cross_entropy(classifier(x), outcome.clean_predictions)
        after = nn.functional.cross_entropy(classifier(outcome.adversarial), outcome.clean_predictions)
    assert after > before
    assert not outcome.robust[outcome.clean_predictions != wrong].any()


def test_attacks_leave_the_model_as_it_was(classifier, flow, images):
    """Modes of every submodule, requires_grad flags, batch-norm statistics and .grad."""
    _, x, y = images
    model = nn.Sequential(nn.BatchNorm2d(1), copy.deepcopy(classifier))
    model.train()
    model[1].eval()
    model[0].requires_grad_(True)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    build_attack(resolve_attack("jsa10", "digits", MODELS), flow)(model, x, y)
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert all(p.requires_grad for p in model[0].parameters())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_ascend_equals_the_engine_without_early_stop(classifier, flow, images):
    """Training and evaluation share the step: same start, same steps, same image."""
    ids, x, y = images
    spec = resolve_attack("jsa10", "digits", MODELS)
    spec = spec.model_copy(update={"parameters": {"steps": 3, "early_stop": False}})
    outcome = build_attack(spec, flow).evaluate(Victim(classifier), ids, x, y, 5, 48)
    space = JointSpace(FlowCodec(flow), spec.epsilon, spec.epsilon / 4, spec.eta, spec.eta / 4)
    with attack_mode(classifier):
        state = space.start(x, y, SampleNoise(5, "jsa10", ids, 0, torch.device("cpu")))
        state = ascend(
            space, lambda image: error_log_odds(temper_logits(classifier(image), y), y), state, 3
        )  # what the engine climbs in place of the cross-entropy
    assert (
        (space.finish(state)[0] - outcome.adversarial).abs().flatten(1).amax(1) < 1e-5
    ).float().mean() > 0.95


class TestTheBaseClassDoesNotTrustAttacks:
    """Attacks that misbehave are caught, with attack, sample and amount in the message."""

    @staticmethod
    def misbehaving(change, flow=None):
        from robbench.attacks import Attack, Cost
        from robbench.attacks.base import Candidates

        class Bad(Attack):
            Parameters = create_model("AnyParameters", __config__={"extra": "allow"})
            cost = Cost(1, 0)

            def space(self):
                return LatentSpace(self.flow, self.spec.norm, self.spec.eta, 0.0) if self.flow else None

            def search(self, victim, task):
                n = len(task.x)
                zeros = torch.zeros(n, dtype=torch.int64)
                found = Candidates(task.x.clone(), zeros, zeros.clone(), zeros.clone(), [self.spec.name] * n)
                change(found)
                return found

        name = "pgd20" if flow is None else "om-pgd"
        return Bad(resolve_attack(name, "digits", MODELS), None if flow is None else FlowCodec(flow))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda f: f.adversarial[2].add_(0.5).clamp_(0, 1), r"'pgd20'.*sample 9 .*linf ball.*limit 0.2"),
            (lambda f: f.adversarial[1, 0, 0].sub_(0.1), r"'pgd20'.*sample 8.*box"),
            (lambda f: f.adversarial[0, 0, 0].fill_(float("nan")), r"NaN or infinite pixels for sample 7"),
            (lambda f: setattr(f, "adversarial", f.adversarial.double()), "float64"),
            (lambda f: setattr(f, "adversarial", f.adversarial[:, :, :4]), r"instead of float32"),
        ],
    )
    def test_violations_are_errors(self, change, message, classifier, images):
        ids, x, y = images
        with torch.no_grad():
            y = classifier(x).argmax(1)
        with pytest.raises(AttackViolation, match=message):
            self.misbehaving(change).evaluate(Victim(classifier), ids, x, y, 0, 48)

    def test_claims_of_success_do_not_count(self, classifier, images):
        ids, x, y = images
        outcome = self.misbehaving(lambda f: f.step.fill_(1)).evaluate(Victim(classifier), ids, x, y, 0, 48)
        assert torch.equal(outcome.robust, outcome.clean_predictions == y)

    def test_a_latent_example_without_witness_is_refused(self, classifier, flow, images):
        ids, x, y = images
        attack = self.misbehaving(lambda f: f.adversarial.mul_(0.9), flow)
        with pytest.raises(AttackViolation, match="no witness"):
            attack.evaluate(Victim(classifier), ids, x, y, 0, 48)

    def test_a_false_witness_is_refused(self, classifier, flow, images):
        ids, x, y = images

        def lie(found):
            found.witness["lambda"] = torch.full((len(found.adversarial), 64), 0.02)

        attack = self.misbehaving(lie, flow)
        with pytest.raises(AttackViolation, match="rendered from its witness"):
            attack.evaluate(Victim(classifier), ids, x, y, 0, 48)

    def test_a_witness_that_is_not_a_number_is_caught(self, classifier, flow, images):
        ids, x, y = images

        def lie(found):
            found.witness = {"lambda": torch.full((len(found.adversarial), 64), float("nan"))}

        with pytest.raises(AttackViolation, match=r"left its set: sample .* is nan outside"):
            self.misbehaving(lie, flow).evaluate(Victim(classifier), ids, x, y, 0, 48)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: torch.full((len(x), 10), float("nan")), "NaN or infinite logits"),
        (lambda x: x, r"returned \(32, 1, 8, 8\) for 32 images"),
        (lambda x: x.flatten(1)[:-1, :10], r"returned \(31, 10\) for 32 images"),
    ],
)
def test_models_that_return_nonsense_are_user_errors(model, message, images):
    class Nonsense(nn.Module):
        def forward(self, x):
            return model(x)

    ids, x, y = images
    with pytest.raises(UserError, match=message):
        build_attack(resolve_attack("pgd20", "digits", MODELS)).evaluate(Victim(Nonsense()), ids, x, y, 0, 48)


def test_images_outside_the_box_are_refused(classifier, images):
    _, x, y = images
    with pytest.raises(UserError, match=r"pixels in \[0,1\]"):
        build_attack(resolve_attack("pgd20", "digits", MODELS))(classifier, 2 * x, y)


def test_a_latent_attack_without_a_flow_says_what_to_do():
    with pytest.raises(UserError, match=r"--flow.*robbench train --defense clean"):
        build_attack(resolve_attack("jsa50", "digits", MODELS))


def test_a_randomised_model_is_refused(classifier, images):
    """Against random logits an early stop is luck and the verdict another draw: the accuracy would be too high."""

    class Noisy(nn.Module):
        def forward(self, x):
            return classifier(x + 0.1 * torch.randn_like(x))

    ids, x, y = images
    with pytest.raises(UserError, match="the model is randomised"):
        build_attack(resolve_attack("pgd20", "digits", MODELS)).evaluate(Victim(Noisy()), ids, x, y, 0, 48)


def test_a_tie_is_not_robust(classifier, images):
    """Logits rounded to multiples of 4 tie often; argmax would take the lowest class and call it right."""

    class Coarse(nn.Module):
        def forward(self, x):
            return (classifier(x) / 4).round() * 4

    ids, x, y = images
    outcome = build_attack(resolve_attack("fgsm", "digits", MODELS)).evaluate(
        Victim(Coarse()), ids, x, y, 0, 48
    )
    assert torch.equal(outcome.robust, (outcome.margins > 0) & (outcome.clean_margins > 0))
    assert (outcome.margins == 0).any(), "the case this test is about"


def test_a_flow_that_does_not_invert_itself_is_refused(classifier, flow, images):
    """The published decoder squeezes the contrast by 10 %: images would move before any attack does."""
    ids, x, y = images
    attack = build_attack(resolve_attack("om-pgd", "digits", MODELS), flow)
    exact = attack.flow.decode_flat
    attack.flow.decode_flat = lambda z, labels=None: 0.05 + 0.9 * exact(z, labels)
    with pytest.raises(UserError, match="does not invert itself"):
        attack.evaluate(Victim(classifier), ids, x, y, 0, 48)


def test_what_is_recorded_holds_every_default():
    """Two runs agree on an attack's hash only if they agree on what runs, defaults included."""
    attack = build_attack(resolve_attack("aa", "digits", MODELS))
    assert attack.spec.parameters["square_queries"] == 5000
    assert attack.spec.parameters["components"] == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert "pyautoattack" not in attack.engine
    assert "pyautoattack" in build_attack(resolve_attack("aa-reference", "digits", MODELS)).engine


def test_l1_steps_are_not_spent_on_pixels_that_stand_at_the_box():
    """All gradient mass on a pixel at 1 that wants to go up: the step goes to the next one instead."""
    from robbench.attacks.search.spaces import ImageSpace

    x = torch.zeros(1, 1, 4, 5)
    x[0, 0, 0, 0] = 1.0
    gradient = torch.full_like(x, 0.1)
    gradient[0, 0, 0, 0], gradient[0, 0, 1, 1] = 9.0, 1.0
    space = ImageSpace("l1", 0.5, 0.25, "zero")
    state = space.start(x, torch.zeros(1), noise_for(1))
    moved = space.advance(state, {"delta": gradient})["delta"]
    assert moved[0, 0, 0, 0] == 0
    assert moved[0, 0, 1, 1] == 0.25
