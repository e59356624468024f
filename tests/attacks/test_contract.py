"""Every shipped attack on classifiers meets the same contract, checked here without robbench's own checks."""

import numpy as np
import pytest
import torch
from grids import slow_but

from robbench.attacks import Victim, build_attack
from robbench.specs import ResolvedAttack, resolve_attack, threat_models

MODELS = threat_models()
# Corruptions search nothing and read files: tests/attacks/test_corruption.py.
SEARCHING = [m for m in MODELS.values() if m.target == "classifier" and m.space != "corruption"]
# Attacks with a budget for 8 x 8 images; the calibrated budgets of one attack run the same code.
NAMES = sorted(
    name
    for model in SEARCHING
    for name in model.attacks
    if not (model.space == "rendered" and name[-2:] in {f"-{place}" for place in range(1, 7)})
    if model.space != "rendered" or "digits" in model.budgets_of(name)
)
SKIP_KNOWN_ANSWERS = {  # a robust sample may need fewer forwards than it has queries, or than its search's longest
    *("aa", "square", "cw-l2", "deepfool-l2", "deepfool-linf")
}
BATCH_DEPENDENT = {
    "aa-reference",
    "aa-reference-l2",
    "aa-reference-l1",
}  # the reference package draws its noise a batch


def quick(spec: ResolvedAttack) -> ResolvedAttack:
    """The same attack with fewer steps, to keep the suite fast."""
    if spec.algorithm.startswith("autoattack"):
        short = {"iterations": 5, "square_queries": 30, "target_classes": 2, "fab_target_classes": 2}
        return spec.model_copy(update={"parameters": {**spec.parameters, **short}})
    if spec.algorithm == "carlini-wagner":
        short = {"steps": 20, "binary_search_steps": 3, "step_size": 0.05}
        return spec.model_copy(update={"parameters": {**spec.parameters, **short}})
    if "queries" in spec.parameters:
        short = {"queries": 66} | ({"pairs": 5} if spec.algorithm == "nes" else {})
        return spec.model_copy(update={"parameters": {**spec.parameters, **short}})
    if "steps" in spec.parameters:
        return spec.model_copy(
            update={"parameters": {**spec.parameters, "steps": min(6, spec.parameters["steps"])}}
        )
    return spec


class Accepting:
    """The guard of a detector that accepts every image, with a gradient."""

    name, threshold = "accepting", 1e9

    def scores(self, images):
        return images.double().flatten(1).square().sum(1)

    def scores_of(self, images):
        return self.scores(images)

    def flags(self, scores):
        return scores > self.threshold


def _kinds(names):
    """Of attacks that, made `quick`, differ in sizes and numbers of steps alone, the first: the same code runs."""
    found = {}
    for name in names:
        spec = quick(resolve_attack(name, "digits", MODELS))
        rest = {
            k: v
            for k, v in spec.parameters.items()
            if "step" not in k and k not in ("restarts", "confidence")
        }
        single = spec.parameters.get("steps") == 1
        found.setdefault(repr((spec.algorithm, spec.space, spec.norm, single, sorted(rest.items()))), name)
    return sorted(found.values())


# One attack of a kind; AutoAttack by its components, which its ensembles run one after the other.
KINDS = [name for name in _kinds(NAMES) if name not in ("aa-l1", "aa-l2", "aa-rand-l1", "aa-rand-l2")]
# One of an algorithm, and one in each norm: what is written once for all attacks is tried on these.
ONE_EACH = (
    "a-la",
    "aa-reference",
    "apgd-ce",
    "apgd-t-l1",
    "fab-t-l2",
    "fgsm",
    "jsa10",
    "mim",
    "om-pgd",
    "pgd20-l1",
)
ONE_EACH += ("r-la", "square")


def run(name, classifier, flow, images, batch_size=48, seed=0):
    ids, x, y = images
    attack = build_attack(quick(resolve_attack(name, "digits", MODELS)), flow)
    if attack.target == "detector":
        attack.guard = Accepting()
    return attack, attack.evaluate(Victim(classifier), ids, x, y, seed, batch_size)


@pytest.mark.parametrize("name", slow_but(KINDS, NAMES))
def test_examples_are_admissible_and_verdicts_follow_from_them(name, classifier, flow, images):
    ids, x, y = images
    attack, outcome = run(name, classifier, flow, images)
    spec = attack.spec
    assert torch.equal(outcome.sample_ids, ids)
    assert outcome.adversarial.shape == x.shape
    assert outcome.adversarial.dtype == torch.float32
    adversarial = outcome.adversarial.numpy().astype(np.float64)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    difference = (adversarial - x.numpy().astype(np.float64)).reshape(len(x), -1)
    sizes = {
        "l1": np.abs(difference).sum(1),
        "l2": np.sqrt((difference**2).sum(1)),
        "linf": np.abs(difference).max(1),
    }
    assert torch.equal(outcome.l0, torch.from_numpy((difference != 0).sum(1)).float())
    for norm, column in (("l1", outcome.l1), ("l2", outcome.l2), ("linf", outcome.linf)):
        np.testing.assert_allclose(column.numpy(), sizes[norm], rtol=1e-4, atol=1e-6)
    if spec.space == "image":
        assert sizes[spec.norm].max() <= spec.epsilon * (1 + 1e-5) + 1e-6
        assert sizes[spec.norm].max() > 0.5 * spec.epsilon, "the attack never used its budget"
    with torch.no_grad():
        clean, after = classifier(x), classifier(outcome.adversarial)
    assert torch.equal(outcome.predictions, after.argmax(1))
    assert torch.equal(outcome.clean_predictions, clean.argmax(1))
    held = (after.argmax(1) == y).numpy()
    if spec.space == "minimal":  # an image beyond the budget does not count
        held |= {**sizes, "l0": (difference != 0).sum(1)}[spec.norm] > spec.epsilon
    assert torch.equal(outcome.robust, (clean.argmax(1) == y) & torch.from_numpy(held))
    own = after[torch.arange(len(y)), y]
    rest = after.clone()
    rest[torch.arange(len(y)), y] = -torch.inf
    torch.testing.assert_close(outcome.margins, own - rest.max(1).values)
    torch.testing.assert_close(outcome.cross_entropy, -after.log_softmax(1)[torch.arange(len(y)), y])
    for robust, wrong, by, at in zip(
        outcome.robust.tolist(),
        (clean.argmax(1) != y).tolist(),
        outcome.broken_by,
        outcome.broken_at.tolist(),
        strict=True,
    ):
        assert (by is None) == robust
        assert (by == "clean") == wrong
        assert robust == (at == -1) or not outcome.counts_exact
    held = outcome.robust.nonzero().squeeze(1)
    if outcome.counts_exact and len(held) and name not in SKIP_KNOWN_ANSWERS:
        assert (outcome.forwards[held] >= attack.cost.forwards).all()
        assert (outcome.backwards[held] == attack.cost.backwards).all()


@pytest.mark.parametrize(
    "name", [n for n in NAMES if MODELS["joint"].attacks.get(n) or "-la" in n or n == "om-pgd"]
)
def test_latent_examples_decode_from_their_witness(name, classifier, flow, images):
    """The ball of a latent attack cannot be read off x'; decode lambda and delta again with the unfrozen flow."""
    from robbench.models.flows.base import Latents

    _ids, x, y = images
    attack, outcome = run(name, classifier, flow, images)
    attacked = outcome.clean_predictions == y
    lam = outcome.witness["lambda"]
    if attack.spec.norm == "l2":
        assert lam.norm(dim=1).max() <= attack.spec.eta * (1 + 1e-5)
    elif attack.spec.norm == "linf":
        assert lam.abs().max() <= attack.spec.eta * (1 + 1e-5)
    with torch.no_grad():
        z = flow.encode(x)[0].flat() + lam
        decoded = flow.decode(Latents.unflat(z, flow.level_shapes))
    if "delta" in outcome.witness:
        assert outcome.witness["delta"].abs().max() <= attack.spec.epsilon * (1 + 1e-5)
        decoded = decoded + outcome.witness["delta"]
    torch.testing.assert_close(
        decoded.clamp(0, 1)[attacked], outcome.adversarial[attacked], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", [n for n in KINDS if n not in BATCH_DEPENDENT])
def test_a_sample_does_not_depend_on_its_batch(name, classifier, flow, images):
    images = [part[:17] for part in images]
    _, whole = run(name, classifier, flow, images, batch_size=17)
    _, small = run(name, classifier, flow, images, batch_size=5)
    near_tie = (whole.margins.abs() < 1e-4) | (small.margins.abs() < 1e-4)
    assert near_tie.sum() <= 2
    assert torch.equal(whole.robust[~near_tie], small.robust[~near_tie])
    assert (whole.adversarial - small.adversarial).abs().flatten(1).amax(1).median() < 1e-5


@pytest.mark.parametrize("name", ["pgd20", "jsa10", "r-la", "aa"])
def test_the_same_seed_gives_the_same_example_and_another_seed_another(name, classifier, flow, images):
    _, first = run(name, classifier, flow, images, seed=3)
    _, again = run(name, classifier, flow, images, seed=3)
    _, other = run(name, classifier, flow, images, seed=4)
    assert torch.equal(first.adversarial, again.adversarial)
    assert not torch.equal(first.adversarial, other.adversarial)


def test_verdicts_of_pgd20_agree_over_batch_sizes_on_the_test_set(classifier, digits):
    """Batch sizes 1, 7 and 120 on 120 test images; samples with |margin| < 1e-4 are counted and excepted."""
    attack = build_attack(resolve_attack("pgd20", "digits", MODELS))
    x, y = digits.test.x(torch.arange(360)), digits.test.labels
    x, y, ids = x[:120], y[:120], digits.test.ids[:120]
    runs = [attack.evaluate(Victim(classifier), ids, x, y, 0, size) for size in (1, 7, 120)]
    excepted = torch.stack([outcome.margins.abs() < 1e-4 for outcome in runs]).any(0)
    print(f"samples excepted for |margin| < 1e-4: {int(excepted.sum())} of 120")
    assert excepted.sum() <= 3
    for outcome in runs[1:]:
        assert torch.equal(outcome.robust[~excepted], runs[0].robust[~excepted])


def test_epsilon_zero_is_the_clean_image(classifier, images):
    ids, x, y = images
    for name in ("pgd20", "aa", "pgd20-l2"):
        spec = resolve_attack(name, "digits", MODELS, epsilon=0.0)
        outcome = build_attack(spec).evaluate(Victim(classifier), ids, x, y, 0, 32)
        assert torch.equal(outcome.adversarial, x)
        assert torch.equal(outcome.robust, outcome.clean_predictions == y)
