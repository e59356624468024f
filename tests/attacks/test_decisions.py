"""Decision-based attacks: they see decisions alone, count every query, find the boundary, as near as foolbox."""

import foolbox
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import one_hot

from robbench.attacks import Victim, build_attack
from robbench.core.errors import UserError
from robbench.models.loading import load_model
from robbench.models.zoo import zoo_entries
from robbench.specs import attack_name, resolve_attack, threat_models

MODELS = threat_models()
NAMES = ("hopskipjump-l2", "hopskipjump-linf", "boundary")


def build(name, queries, dataset="digits"):
    spec = resolve_attack(name, dataset, MODELS)
    return build_attack(spec.model_copy(update={"parameters": {**spec.parameters, "queries": queries}}))


class DecisionOnly(nn.Module):
    """A model of which nothing but the class can be seen, and that has no gradients."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return one_hot(self.model(x).argmax(1), 10).float()


class Constant(nn.Module):
    def forward(self, x):
        return one_hot(torch.zeros(len(x)).long(), 10).float() + 0.0 * x.flatten(1)[:, :1]


class Hyperplane(nn.Module):
    """Two classes; the boundary is weight . (x - 1/2) = offset."""

    def __init__(self, shape=(1, 4, 4), offset=0.3):
        super().__init__()
        self.weight = torch.linspace(0.5, 1.5, 16).reshape(shape) * torch.tensor([1.0, -1.0]).repeat(
            8
        ).reshape(shape)
        self.offset = offset

    def forward(self, x):
        lead = ((x - 0.5) * self.weight).flatten(1).sum(1) - self.offset
        return torch.stack([-lead, lead], 1)


@pytest.mark.parametrize("name", NAMES)
def test_only_decisions_count_and_every_query_is_counted(name, classifier, images):
    ids, x, y = (part[:6] for part in images)
    seen, hidden = (
        build(name, 150).evaluate(Victim(model), ids, x, y, 0, 6)
        for model in (classifier, DecisionOnly(classifier))
    )
    right = seen.clean_predictions == y
    assert torch.equal(seen.adversarial, hidden.adversarial)
    assert not seen.backwards.any()
    assert (seen.forwards[right] == 150 + 2).all()
    assert build(name, 150).cost.forwards == 150 + 2
    assert ((seen.predictions != y) & right).sum() >= right.sum() - 1, (
        "a random image is hardly ever the label's"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_searched_alone(name, classifier, images):
    ids, x, y = (part[:5] for part in images)
    order = torch.tensor([3, 1])
    whole = build(name, 60).evaluate(Victim(classifier), ids, x, y, 0, 5)
    part = build(name, 60).evaluate(Victim(classifier), ids[order], x[order], y[order], 0, 1)
    torch.testing.assert_close(part.adversarial, whole.adversarial[order], atol=1e-6, rtol=0)
    other = build(name, 60).evaluate(Victim(classifier), ids, x, y, 1, 5)
    assert not torch.equal(other.adversarial, whole.adversarial)


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_cannot_be_fooled_keeps_its_clean_images(name, images):
    ids, x, _ = (part[:3] for part in images)
    outcome = build(name, 20).evaluate(Victim(Constant()), ids, x, torch.zeros(3).long(), 0, 3)
    assert torch.equal(outcome.adversarial, x)
    assert outcome.robust.all()
    assert (outcome.broken_at == -1).all()


@pytest.mark.parametrize(("name", "queries", "dual", "allowed"), [
    ("hopskipjump-l2", 1500, 2, 1.06), ("hopskipjump-linf", 700, 1, 1.15), ("boundary", 3000, 2, 1.15),
])  # fmt: skip
def test_the_distance_to_a_hyperplane(name, queries, dual, allowed):
    model, x = Hyperplane(), torch.full((3, 1, 4, 4), 0.5)
    attack = build(name, queries, "")
    outcome = attack.evaluate(Victim(model), torch.arange(3), x, torch.zeros(3).long(), 0, 3)
    found = outcome.linf if name.endswith("linf") else outcome.l2
    exact = model.offset / float(torch.linalg.vector_norm(model.weight, dual))
    assert (outcome.predictions == 1).all()
    assert (found >= exact * (1 - 1e-5)).all()
    assert (found <= exact * allowed).all(), found / exact


def test_the_query_that_broke_a_sample_is_the_first_within_the_budget(classifier, images):
    ids, x, y = (part[:8] for part in images)
    long = build("hopskipjump-linf", 200).evaluate(Victim(classifier), ids, x, y, 0, 8)
    (row, *_) = ((long.broken_at > 1) & ~long.robust).nonzero().squeeze(1).tolist()
    query, one = int(long.broken_at[row]), slice(row, row + 1)
    for queries, robust in ((query + 1, False), (query - 1, True)):
        found = build("hopskipjump-linf", queries).evaluate(
            Victim(classifier), ids[one], x[one], y[one], 0, 8
        )
        assert bool(found.robust) == robust


def foolbox_distances(attack, model, x, y, norm):
    """Median distance, and the calls of the model that foolbox made per sample."""
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        np.random.seed(0)
        found, _, _ = attack(
            foolbox.PyTorchModel(model.eval(), bounds=(0, 1), device="cpu"),
            x,
            foolbox.criteria.Misclassification(y),
            epsilons=None,
        )
    return torch.linalg.vector_norm((found - x).flatten(1), norm, dim=1).median(), len(calls)


def compare_with_foolbox(name, attack, digits, n):
    model = load_model(zoo_entries()["digits-standard"]).module
    ids, x, y = digits.test.ids[:n], digits.test.x(torch.arange(n)), digits.test.labels[:n]
    theirs, queries = foolbox_distances(
        attack, nn.Sequential(model), x, y, float("inf") if "linf" in name else 2
    )
    outcome = build(name, queries).evaluate(Victim(model), ids, x, y, 0, n)
    ours = (outcome.linf if "linf" in name else outcome.l2).median()
    assert (outcome.predictions != y).all()
    assert ours <= 1.05 * theirs, (ours, theirs, queries)


def foolbox_attack(name, steps):
    if name == "boundary":
        return foolbox.attacks.BoundaryAttack(steps=steps)
    return foolbox.attacks.HopSkipJumpAttack(steps=steps, constraint=name.removeprefix("hopskipjump-"))


@pytest.mark.parametrize(("name", "steps"), [("hopskipjump-l2", 1), ("boundary", 200)])
def test_as_near_as_foolbox_with_few_queries(name, steps, digits):
    compare_with_foolbox(name, foolbox_attack(name, steps), digits, 8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "steps"), [("hopskipjump-l2", 12), ("hopskipjump-linf", 12), ("boundary", 4500)]
)
def test_as_near_as_foolbox(name, steps, digits):
    """About 3,000 queries (HopSkipJump) and 5,000 (boundary), counted from foolbox's own calls."""
    compare_with_foolbox(name, foolbox_attack(name, steps), digits, 16)


@pytest.mark.parametrize(("written", "meant"), [
    ("hsj", "hopskipjump-l2"), ("HopSkipJumpAttack", "hopskipjump-l2"), ("hsj-linf", "hopskipjump-linf"),
    ("HopSkipJump_Linf", "hopskipjump-linf"), ("BoundaryAttack", "boundary"), ("boundary-l2", "boundary"),
    ("NES", "nes"),
])  # fmt: skip
def test_names_of_papers_and_other_libraries(written, meant):
    assert attack_name(written, MODELS) == meant


def test_an_attack_that_needs_gradients_names_one_that_does_not(classifier, images):
    ids, x, y = (part[:2] for part in images)
    attack = build_attack(resolve_attack("ddn-l2", "digits", MODELS))
    with pytest.raises(UserError, match="hopskipjump-l2, which needs no gradient"):
        attack.evaluate(Victim(DecisionOnly(classifier)), ids, x, y, 0, 2)
