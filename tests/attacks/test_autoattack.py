"""robbench's AutoAttack as a whole: order of components, refills, randomised models, few classes, odd images."""

import pytest
import torch
from torch import nn

from robbench.attacks import Victim, build_attack
from robbench.core.errors import UserError
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()
SHORT = {"iterations": 6, "square_queries": 40, "target_classes": 3, "fab_target_classes": 3}


def attack(name="aa", epsilon=0.15, **parameters):
    spec = resolve_attack(name, "digits", MODELS, epsilon)
    return build_attack(spec.model_copy(update={"parameters": {**spec.parameters, **SHORT, **parameters}}))


def evaluated(one, model, images, batch_size=48, seed=0, **victim):
    ids, x, y = images
    return one.evaluate(Victim(model, "cpu", batch_size, **victim), ids, x, y, seed, batch_size)


def test_every_component_sees_what_the_ones_before_left(classifier, images):
    """Components alone break at least what they are named for in the ensemble, and the ensemble breaks their union."""
    whole = evaluated(attack(), classifier, images)
    alone = {
        name: evaluated(attack(components=(name,)), classifier, images)
        for name in ("apgd-ce", "apgd-t", "fab-t", "square")
    }
    union = ~torch.stack([outcome.robust for outcome in alone.values()]).all(0)
    assert torch.equal(~whole.robust, union)
    for row, by in enumerate(whole.broken_by):
        if by in alone:
            assert not alone[by].robust[row]
    assert {"apgd-ce", None} <= set(whole.broken_by)


@pytest.mark.parametrize("batch_size", [5, 17])
def test_a_refilled_batch_gives_every_sample_the_same(classifier, images, batch_size):
    whole, parts = (
        evaluated(attack(), classifier, images),
        evaluated(attack(), classifier, images, batch_size),
    )
    assert torch.equal(whole.robust, parts.robust)
    assert whole.broken_by == parts.broken_by
    assert torch.equal(whole.broken_at, parts.broken_at)
    torch.testing.assert_close(whole.adversarial, parts.adversarial, atol=1e-5, rtol=0)


def test_a_sample_alone_is_the_sample_in_a_batch(classifier, images):
    ids, x, y = images
    whole = evaluated(attack(), classifier, images)
    for row in (0, 7, 30):
        one = slice(row, row + 1)
        alone = evaluated(attack(), classifier, (ids[one], x[one], y[one]), 1)
        assert bool(alone.robust) == bool(whole.robust[row])
        assert int(alone.forwards) == int(whole.forwards[row])


class Noisy(nn.Module):
    """Logits of a model of randomly moved images, as randomised defenses do it."""

    def __init__(self, model, scale=0.05):
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x):
        return self.model(x + self.scale * torch.randn_like(x))


def test_randomised_models_need_the_version_for_them(classifier, images):
    with pytest.raises(UserError, match="aa-rand"):
        evaluated(attack(), Noisy(classifier), images)
    ids, x, y = images
    torch.manual_seed(0)
    one = attack("aa-rand", 0.1, eot_iterations=4)
    outcome = evaluated(one, Noisy(classifier), (ids[:16], x[:16], y[:16]))
    assert one.verdict_forwards == 4
    plain = evaluated(attack(components=("apgd-ce", "apgd-dlr"), epsilon=0.1), classifier, images)
    assert int(outcome.robust.sum()) <= int(plain.robust[:16].sum()) + 3
    # A break that the next average does not confirm costs that average and nothing of the budget.
    assert (outcome.forwards <= one.cost.forwards + one.cost.backwards).all()
    assert (outcome.backwards <= one.cost.backwards).all()
    assert bool((outcome.backwards == one.cost.backwards).any())


class Linear(nn.Module):
    def __init__(self, classes, shape):
        super().__init__()
        generator = torch.Generator().manual_seed(classes)
        weight = torch.randn(classes, int(torch.tensor(shape).prod()), generator=generator)
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return (x - 0.5).flatten(1) @ self.weight.T


@pytest.mark.parametrize("classes", [2, 3, 4, 12])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_few_classes_and_images_that_are_not_square(classes, norm):
    """A linear model's Linf robustness is known: margin to every class against epsilon |w_y - w_k|_1 (away from the
    box). The attack must find exactly the breakable ones; in the other norms it must respect its set."""
    shape, n, epsilon = (2, 3, 5), 40, {"linf": 0.05, "l2": 0.2, "l1": 0.18}[norm]
    model = Linear(classes, shape).eval()
    x = 0.5 + 0.3 * (2 * torch.rand(n, *shape, generator=torch.Generator().manual_seed(1)) - 1)
    y = model(x).argmax(1)
    name = {"linf": "aa", "l2": "aa-l2", "l1": "aa-l1"}[norm]
    outcome = evaluated(
        attack(name, epsilon, iterations=12, square_queries=60), model, (torch.arange(n), x, y)
    )
    gaps = model.weight[y][:, None, :] - model.weight[None]
    dual = {"linf": gaps.abs().sum(2), "l2": gaps.norm(dim=2), "l1": gaps.abs().amax(2)}[norm]
    logits = model(x)
    lead = logits.gather(1, y[:, None]) - logits
    other = ~nn.functional.one_hot(y, classes).bool()
    breakable = ((lead <= epsilon * dual) & other).any(1)
    clear = (((lead - epsilon * dual).abs() > 0.02 * epsilon * dual) | ~other).all(1)
    assert torch.equal(~outcome.robust[clear], breakable[clear])
    assert breakable.any()
    assert not breakable.all()


def test_double_and_strided_inputs_are_the_same_images(classifier, images):
    ids, x, y = images
    one = attack(components=("apgd-ce",))
    strided = x.double().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    plain, other = evaluated(one, classifier, images), evaluated(one, classifier, (ids, strided, y))
    assert torch.equal(plain.adversarial, other.adversarial)


def test_a_component_that_cannot_be_is_refused(images):
    model = Linear(2, (1, 8, 8)).eval()
    ids, x, _ = images
    y = model(x).argmax(1)
    with pytest.raises(UserError, match=r"apgd-dlr.*three logits.*2 classes"):
        evaluated(attack(components=("apgd-dlr",)), model, (ids, x, y))
