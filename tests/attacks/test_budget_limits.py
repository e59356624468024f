"""Budgets that are surely on another scale are refused in one line, before anything is attacked."""

import math

import pytest
import torch
from torch import nn

import robbench
from robbench.attacks import Victim, build_attack
from robbench.attacks.checks import require_latent_budget
from robbench.attacks.codec import FlowCodec
from robbench.attacks.likelihood import build_likelihood_attack
from robbench.core.budget_limits import IMAGE_SHAPES, box_diameter, exact_text
from robbench.core.errors import UserError
from robbench.data.names import BUILT_IN
from robbench.defenses import Setting, build_defense
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()


def refused(call):
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shapes_are_those_of_the_data_sets(digits):
    assert IMAGE_SHAPES.keys() == BUILT_IN.keys()
    assert IMAGE_SHAPES["digits"] == digits.shape


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_the_diameter_is_the_distance_of_opposite_corners(norm, shape):
    ends = torch.ones(shape).double().flatten()
    order = {"linf": math.inf, "l2": 2, "l1": 1}[norm]
    assert box_diameter(norm, shape) == pytest.approx(float(ends.norm(p=order)))


@pytest.mark.parametrize(
    ("name", "whole"),
    [("pgd20", 1.0), ("aa", 1.0), ("pgd20-l2", math.sqrt(3072)), ("aa-l2", math.sqrt(3072)), ("pgd20-l1", 3072.0),
     ("aa-l1", 3072.0), ("jsa50", 1.0), ("nll-in", 255.0), ("noise", 255.0)],
)  # fmt: skip
def test_a_budget_beyond_the_box_is_refused_and_the_whole_box_is_not(name, whole):
    assert resolve_attack(name, "cifar10", MODELS, epsilon=whole).epsilon == whole
    text = refused(lambda: resolve_attack(name, "cifar10", MODELS, epsilon=1.01 * whole))
    assert text.startswith(f"--epsilon {exact_text(1.01 * whole)}: attack '{name}'")
    assert f"{whole:.6g}" in text


@pytest.mark.parametrize(
    ("name", "epsilon"), [("pgd20", 8), ("pgd20-l2", 128), ("jsa10", 8), ("pgd20-l1", 4000)]
)
def test_the_usual_scale_is_suggested(name, epsilon):
    text = refused(lambda: resolve_attack(name, "cifar10", MODELS, epsilon=float(epsilon)))
    assert f"give {epsilon}/255 if you mean {epsilon} of 255" in text


def test_a_budget_of_a_threat_model_file_is_held_to_the_same():
    linf = MODELS["linf"]
    budget = linf.budgets["cifar10"].model_copy(update={"epsilon": 8.0})
    own = linf.model_copy(update={"budgets": {"cifar10": budget}})
    assert refused(lambda: resolve_attack("pgd20", "cifar10", {"linf": own})).startswith(
        "epsilon 8: attack 'pgd20'"
    )


def test_where_the_data_set_is_not_known_the_images_decide(classifier, images):
    _, x, y = images
    assert resolve_attack("pgd20-l2", "somebody's", MODELS, epsilon=128.0).epsilon == 128.0
    text = refused(lambda: robbench.evaluate(classifier, x, y, ["pgd20-l2"], epsilon=128.0, device="cpu"))
    assert "128/255" in text
    assert "1 x 8 x 8" in text
    assert robbench.evaluate(classifier, x, y, ["fgsm-l2"], epsilon=8.0, device="cpu").n == len(x)


def test_inner_attacks_of_training_are_held_to_the_same():
    text = refused(lambda: build_defense("at", {"epsilon": 8.0}, Setting("cifar10", MODELS)))
    assert "8/255" in text


def test_likelihood_attacks_look_at_the_images(images):
    _, x, y = images
    spec = resolve_attack("nll-in", "somebody's", MODELS, epsilon=255.0).model_copy(update={"epsilon": 300.0})
    attack = build_likelihood_attack(spec)
    assert "at most 255" in refused(lambda: attack.evaluate(nn.Identity(), nn.Identity(), x, x, y, 0, 8))


@pytest.mark.parametrize("name", ["om-pgd", "a-la", "r-la", "jsa10", "a-la-l2", "r-la-l2", "r-la-none"])
def test_latent_budgets_are_measured_on_the_latents(classifier, flow, images, name):
    if name not in {attack for model in MODELS.values() for attack in model.attacks}:
        pytest.skip(f"no attack is called {name}")
    ids, x, y = images
    right = classifier(x).argmax(1) == y  # every attack here searches these, perturbations the others as well
    ids, x, y = ids[right], x[right], y[right]
    with torch.no_grad():
        z = FlowCodec(flow).encode_flat(x[:32], y[:32])
    norm = resolve_attack(name, "digits", MODELS).norm
    length = 4 * z.double().norm(dim=1).median()
    most = float({"linf": z.abs().max(), "l2": length, "none": length / math.sqrt(64)}[norm])
    codec = FlowCodec(flow)
    near = resolve_attack(name, "digits", MODELS, eta=0.99 * most)
    require_latent_budget(near, codec, x[:32], y[:32])
    far = resolve_attack(name, "digits", MODELS, eta=1.01 * most)
    text = refused(lambda: build_attack(far, flow).evaluate(Victim(classifier), ids, x, y, 0, 48))
    assert text.startswith(f"eta {exact_text(1.01 * most)}: attack")
    assert f"give at most {most:.4g}" in text


def test_latent_budgets_of_the_digits_are_far_below(flow, images):
    _, x, y = images
    for model in MODELS.values():
        if model.space in ("latent", "joint"):
            name = next(iter(model.attacks))
            require_latent_budget(resolve_attack(name, "digits", MODELS), FlowCodec(flow), x, y)
