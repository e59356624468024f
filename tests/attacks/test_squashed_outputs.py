"""Models that return something squashed in place of logits are told apart from those that return logits."""

import pytest
import torch
from torch import nn

from robbench.attacks import Victim, build_attack
from robbench.attacks.trust.diagnosis import shape_of_outputs
from robbench.attacks.trust.suspicions import Diagnostics
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()


class After(nn.Module):
    def __init__(self, model, squash):
        super().__init__()
        self.model, self.squash = model, squash

    def forward(self, x):
        return self.squash(self.model(x))


SQUASHED = {
    "sigmoid": torch.sigmoid,
    "scaled sigmoid": lambda z: 10 * z.sigmoid() - 3,
    "tanh": torch.tanh,
    "scaled tanh": lambda z: 5 * z.tanh(),
    "hard tanh": lambda z: z.clamp(-1, 1),
    "hard sigmoid": nn.functional.hardsigmoid,
    "clipped logits": lambda z: z.clamp(-3, 3),
    "relu": torch.relu,
    "softmax": lambda z: z.softmax(1),
    "tempered softmax": lambda z: (z / 3).softmax(1),
    "clipped softmax": lambda z: z.softmax(1).clamp(0.01, 0.99),
    "logarithm of a clipped softmax": lambda z: z.softmax(1).clamp(1e-3).log(),
    "clipped log-softmax": lambda z: z.log_softmax(1).clamp(min=-6),
}
LOGITS = {
    "logits": lambda z: z,
    "small logits": lambda z: 1e-3 * z,
    "large logits": lambda z: 1e4 * z,
    "shifted logits": lambda z: z + 100.0,
    "log-softmax": lambda z: z.log_softmax(1),
}


def kinds(model, images, name="pgd20"):
    ids, x, y = images
    spec = resolve_attack(name, "digits", MODELS, 0.05)
    if spec.algorithm == "autoattack":
        short = {"iterations": 8, "square_queries": 30, "target_classes": 9, "fab_target_classes": 1}
        spec = spec.model_copy(update={"parameters": {**spec.parameters, **short}})
    return {one.kind: one for one in build_attack(spec).evaluate(Victim(model), ids, x, y, 0, 48).suspicions}


@pytest.mark.parametrize("how", SQUASHED)
def test_squashed_outputs_are_told_with_the_attack_to_trust(classifier, images, how):
    found = kinds(After(classifier, SQUASHED[how]), images)
    assert found.keys() & {"squashed", "probabilities"}
    if "squashed" in found:
        text = found["squashed"].text
        assert "\n" not in text
        assert "trust aa" in text
        for name in ("aa", "aa-l2", "aa-l1", "apgd-t", "fab-t", "square"):
            assert name in text
            resolve_attack(name, "digits", MODELS)  # exists


@pytest.mark.parametrize("how", LOGITS)
def test_logits_of_any_scale_are_not_suspected(classifier, images, how):
    found = kinds(After(classifier, LOGITS[how]), images)
    assert not found.keys() & {"squashed", "probabilities", "zero-steps", "weak-cross-entropy"}


def test_few_outputs_say_nothing():
    assert (shape_of_outputs(torch.rand(9, 4)) + Diagnostics(samples=9)).suspicions == ()
    (one,) = (shape_of_outputs(torch.rand(40, 4)) + Diagnostics(samples=40)).suspicions
    assert one.kind == "squashed"
    assert "lie in [0,1]" in one.text


def test_a_search_that_stands_still_on_its_way_is_told(classifier, images):
    """The gradient is there at the clean image, and gone as soon as a pixel has moved: a switch, not a function."""
    _, x, _ = images
    clean = {tuple(image.flatten().tolist()) for image in x}

    def switch(images):
        known = torch.tensor([tuple(image.flatten().tolist()) in clean for image in images.detach()])
        return torch.where(known[:, None, None, None], images, images.detach() + 0.0 * images)

    class Switched(nn.Module):
        def forward(self, images):
            return classifier(switch(images))

    found = kinds(Switched(), images)
    assert "zero-gradients" not in found
    numbers = found["zero-steps"].numbers
    assert numbers["zero"] == numbers["gradients"] > 48
    assert "compare with square" in found["zero-steps"].text


def test_targeted_apgd_far_ahead_of_the_cross_entropy_is_told():
    (one,) = Diagnostics(samples=100, weak_given=80, weak_broke=50).suspicions
    assert one.kind == "weak-cross-entropy"
    assert one.numbers == {"broken": 50, "given": 80, "share": 0.625}
    assert "50 of the 80 samples that APGD-CE left" in one.text
    # What robust models of the zoo show, and what an undefended one with one sample left does.
    assert Diagnostics(samples=120, weak_given=60, weak_broke=11).suspicions == ()
    assert Diagnostics(samples=120, weak_given=1, weak_broke=1).suspicions == ()


def test_counts_of_the_ensemble_are_those_of_its_ledger(classifier, images):
    ids, x, y = images
    spec = resolve_attack("aa", "digits", MODELS, 0.1)
    short = {"iterations": 6, "square_queries": 20, "target_classes": 2, "fab_target_classes": 1}
    spec = spec.model_copy(update={"parameters": {**spec.parameters, **short}})
    outcome = build_attack(spec).evaluate(Victim(classifier), ids, x, y, 0, 48)
    right = sum(name != "clean" for name in outcome.broken_by)
    seen = outcome.diagnostics
    assert seen.weak_broke == outcome.broken_by.count("apgd-t")
    assert seen.weak_given == right - outcome.broken_by.count("apgd-ce")
    assert seen.gradients == int(outcome.backwards.sum())
    assert seen.zero_steps == 0
