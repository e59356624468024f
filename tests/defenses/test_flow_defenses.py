"""Adversarial and hybrid training of flows: what the inner attack does, what is minimised, what is recorded."""

import math

import numpy as np
import pytest
import torch

from robbench.attacks import build_likelihood_attack
from robbench.core.errors import UserError
from robbench.defenses import Setting, build_defense
from robbench.defenses.training import TrainRequest, train
from robbench.models.flows.realnvp import RealNVP
from robbench.models.loading import load_flow
from robbench.models.zoo import read_entry
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()


def defense(name, dataset="digits", **parameters):
    return build_defense(name, parameters, Setting(dataset, MODELS), "flow")


@pytest.mark.parametrize(("dataset", "epsilon"), [("digits", 32), ("fashionmnist", 8), ("cifar10", 8)])
def test_the_inner_attack_is_the_papers(dataset, epsilon):
    """Ten steps of 2.5 epsilon / 10 from the image, in the budget of the data set."""
    p = defense("at", dataset).parameters
    assert (p.epsilon, p.steps, p.step_size, p.start) == (epsilon, 10, 2.5 * epsilon / 10, "zero")


@pytest.mark.parametrize("architecture", ["glow", "realnvp"])
def test_adversarial_images_raise_the_nll_inside_the_ball(architecture, flow, digits):
    x, y = digits.train.x(torch.arange(64)), digits.train.labels[:64]
    model = flow
    if architecture == "realnvp":
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = RealNVP((1, 8, 8), digits.grey_levels, scales=2, width=8, blocks=1)
            model.initialize(x)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.02 * torch.randn_like(parameter))
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = defense("at").adversarial(model, x, y, torch.Generator().manual_seed(0))
    assert not found.requires_grad
    assert float((found - x).abs().max()) <= 32 / 255 + 1e-6
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    model.eval()
    with torch.no_grad():
        clean, attacked = (model.log_prob(images, None, 0.5).mean() for images in (x, found))
    assert float(attacked) < float(clean) - 10  # nats
    noisy = (
        x + (32 / 255) * (2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) - 1)
    ).clamp(0, 1)
    with torch.no_grad():
        assert float(attacked) < float(model.log_prob(noisy, None, 0.5).mean())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    flow.eval()


def test_losses_are_what_the_paper_says(monkeypatch, flow, digits):
    """With a known inner attack and no dequantisation noise: NLL of x' alone, and half the sum of both NLLs."""
    x, y = digits.train.x(torch.arange(16)), digits.train.labels[:16]
    moved = (x + 0.1).clamp(0, 1)
    monkeypatch.setattr(torch, "rand", lambda shape, **_: torch.full(tuple(shape), 0.25))
    with torch.no_grad():
        bits = [-flow.log_prob(images, y, 0.25).mean() / (64 * math.log(2)) for images in (x, moved)]
    for name, expected in (("clean", bits[0]), ("at", bits[1]), ("hybrid", (bits[0] + bits[1]) / 2)):
        one = defense(name)
        monkeypatch.setattr(type(one), "adversarial", lambda *a: moved, raising=False)
        value = one.loss(flow, x, y, torch.Generator().manual_seed(0))
        torch.testing.assert_close(value.detach(), expected)


def test_the_epoch_is_chosen_by_what_is_minimised(flow, digits):
    from robbench.defenses import selection

    split = digits.validation.subset(torch.arange(40))
    device = torch.device("cpu")
    scores = {name: selection.score(defense(name), flow, split, device) for name in ("clean", "at", "hybrid")}
    spec = resolve_attack("nll-in", "digits", MODELS, 32, steps=10)
    frozen = flow.freeze()
    outcome = build_likelihood_attack(spec).evaluate(
        frozen, frozen, split.ids, split.x(torch.arange(40)), split.labels, selection.SCORE_SEED, 40
    )
    before, after = float(outcome.nll_before.mean()), float(outcome.nll_after.mean())
    assert scores["clean"] == pytest.approx(before, rel=1e-5)
    assert scores["at"] == pytest.approx(after, rel=1e-5)
    assert scores["hybrid"] == pytest.approx((before + after) / 2, rel=1e-5)
    assert scores["at"] > scores["clean"] + 0.1
    assert all(selection.sign(defense(name).criterion) == -1 for name in scores)


def small(out, name, **changes):
    overrides = {"architecture.steps": 2, "architecture.width": 8, "recipe.warmup_samples": 0}
    overrides |= {"recipe.validation_samples": 60} | changes
    return TrainRequest(
        defense=name,
        dataset="digits",
        architecture="glow",
        epochs=6,
        train_samples=512,
        out=out,
        device="cpu",
        overrides=overrides,
    )


@pytest.mark.slow
def test_trained_flows_show_what_training_was_for(tmp_path):
    """Even after six epochs of a tiny flow: attacked, both defended flows beat the clean one; clean, they do not."""
    flows = {name: load_flow(read_entry(train(small(tmp_path, name)))) for name in ("clean", "at", "hybrid")}
    card = read_entry(tmp_path / "digits-glow-at").card
    assert (card.kind, card.defense) == ("flow", "at")
    assert card.training.parameters["defense"]["epsilon"] == 32
    assert card.training.selection == "best attacked_bits_per_dim on validation"
    from robbench.data import load_dataset

    test = load_dataset("digits").test.subset(torch.arange(120))
    attack = build_likelihood_attack(resolve_attack("nll-in", "digits", MODELS, 32, steps=10))
    found = {
        name: attack.evaluate(one, one, test.ids, test.x(torch.arange(120)), test.labels, 0, 120)
        for name, one in flows.items()
    }
    after = {name: float(np.mean(outcome.nll_after.numpy())) for name, outcome in found.items()}
    before = {name: float(np.mean(outcome.nll_before.numpy())) for name, outcome in found.items()}
    assert max(after["at"], after["hybrid"]) < after["clean"]
    assert before["clean"] < before["at"]


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("at", {"epsilon": 0.03}, ["0.03", "0..255"]),
        ("at", {"attack": "pgd20"}, ["pgd20", "classifier"]),
        ("hybrid", {"steps": 0}, ["steps", "hybrid"]),
        ("hybrid", {"eta": 1.0}, ["eta", "hybrid"]),
        ("clean", {"epsilon": 8}, ["epsilon", "clean"]),
    ],
)
def test_bad_parameters(name, changes, words):
    with pytest.raises(UserError) as caught:
        defense(name, **changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)
