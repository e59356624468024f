"""Attacks against independent implementations on the same model and the same start."""

import foolbox
import pytest
import torch
from scaled_models import Scaled

from robbench.attacks import Victim, build_attack
from robbench.attacks.search.geometry import project
from robbench.specs import ResolvedAttack


@pytest.fixture
def classifier(classifier):
    return Scaled(classifier, 0.3).eval()  # small margins: no cross-entropy loses its gradient


def spec(norm: str, epsilon: float, algorithm: str = "pgd", **parameters: object) -> ResolvedAttack:
    return ResolvedAttack(
        name="test", label="test", threat_model=norm, space="image", norm=norm, epsilon=epsilon, eta=None,
        algorithm=algorithm, parameters=parameters,
    )  # fmt: skip


def foolbox_model(classifier):
    return foolbox.PyTorchModel(classifier, bounds=(0, 1), device="cpu")


CASES = {
    "fgsm": (spec("linf", 0.1, steps=1, relative_step_size=1.0, start="zero", early_stop=False),
             foolbox.attacks.LinfFastGradientAttack(random_start=False)),
    "pgd-linf": (spec("linf", 0.1, steps=20, start="zero", early_stop=False),
                 foolbox.attacks.LinfProjectedGradientDescentAttack(rel_stepsize=0.25, steps=20, random_start=False)),
    "pgd-l2": (spec("l2", 0.5, steps=20, start="zero", early_stop=False),
               foolbox.attacks.L2ProjectedGradientDescentAttack(rel_stepsize=0.25, steps=20, random_start=False)),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(CASES))
def test_equals_foolbox_from_the_clean_image(case, classifier, images):
    ids, x, y = images
    ours, theirs = CASES[case]
    outcome = build_attack(ours).evaluate(Victim(classifier), ids, x, y, 0, 16)
    _, clipped, success = theirs(
        foolbox_model(classifier), x, foolbox.criteria.Misclassification(y), epsilons=ours.epsilon
    )
    gap = (outcome.adversarial - clipped).abs().flatten(1).amax(1)
    assert (gap < 1e-5).float().mean() > 0.95, (
        "more than rounding: a sign flip at a near-zero gradient is the exception"
    )
    torch.testing.assert_close(outcome.robust, ~success)


def test_equals_foolbox_from_the_same_random_start(classifier, images, monkeypatch):
    """Our start handed to foolbox: same iterates, hence the start is the only random part of PGD."""
    ids, x, y = images
    ours = spec("linf", 0.15, steps=10, early_stop=False)
    outcome = build_attack(ours).evaluate(Victim(classifier), ids, x, y, 7, 48)
    from robbench.attacks.search.geometry import SampleNoise, random_start

    noise = SampleNoise(7, "test", ids, 0, torch.device("cpu"))
    start = (x + random_start("uniform", "linf", 0.15, (1, 8, 8), noise)).clamp(0, 1)
    attack = foolbox.attacks.LinfProjectedGradientDescentAttack(
        rel_stepsize=0.25, steps=10, random_start=True
    )
    monkeypatch.setattr(attack, "get_random_start", lambda x0, epsilon: type(x0)(start))
    _, clipped, success = attack(
        foolbox_model(classifier), x, foolbox.criteria.Misclassification(y), epsilons=0.15
    )
    assert ((outcome.adversarial - clipped).abs().flatten(1).amax(1) < 1e-5).float().mean() > 0.95
    torch.testing.assert_close(outcome.robust, ~success)


def test_mim_equals_a_literal_transcription_of_dong_et_al(classifier, images):
    """g <- mu g + grad / ||grad||_1; x <- clip(x + alpha sign g); written out, last iterate."""
    ids, x, y = images
    ours = spec("linf", 0.1, steps=10, relative_step_size=0.1, start="zero", momentum=1.0, early_stop=False)
    outcome = build_attack(ours).evaluate(Victim(classifier), ids, x, y, 0, 48)
    adversarial, momentum = x.clone(), torch.zeros_like(x)
    for _ in range(10):
        adversarial.requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(classifier(adversarial), y, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, adversarial)
        momentum = momentum + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        moved = adversarial.detach() + 0.01 * momentum.sign()
        adversarial = torch.minimum(torch.maximum(moved, x - 0.1), x + 0.1).clamp(0, 1)
    assert ((outcome.adversarial - adversarial).abs().flatten(1).amax(1) < 1e-5).float().mean() > 0.95
    with torch.no_grad():
        assert torch.equal(outcome.predictions, classifier(adversarial).argmax(1))


def test_mim_equals_torchattacks(classifier, images):
    """torchattacks pins old packages, so the extra `dev` leaves it out: pip install --no-deps torchattacks.

    (foolbox's method of that name accumulates raw gradients, not the L1-normalised ones of the paper.)
    """
    torchattacks = pytest.importorskip("torchattacks", reason="pip install --no-deps torchattacks")
    ids, x, y = images
    ours = spec("linf", 0.1, steps=10, relative_step_size=0.1, start="zero", momentum=1.0, early_stop=False)
    outcome = build_attack(ours).evaluate(Victim(classifier), ids, x, y, 0, 48)
    theirs = torchattacks.MIFGSM(classifier, eps=0.1, alpha=0.01, steps=10, decay=1.0)(x, y)
    assert ((outcome.adversarial - theirs).abs().flatten(1).amax(1) < 1e-5).float().mean() > 0.95
    with torch.no_grad():
        assert torch.equal(outcome.predictions, classifier(theirs).argmax(1))


def test_early_stop_breaks_at_least_what_the_last_iterate_breaks(classifier, images):
    ids, x, y = images
    runs = [
        build_attack(spec("linf", 0.1, steps=20, early_stop=stop)).evaluate(
            Victim(classifier), ids, x, y, 0, 16
        )
        for stop in (True, False)
    ]
    assert not (runs[0].robust & ~runs[1].robust).any()
    assert runs[0].backwards.sum() < runs[1].backwards.sum()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_reference_equals_the_package_component_by_component(norm, classifier, images, monkeypatch):
    """Same seed for every component and one batch: the examples are the package's own, bit for bit."""
    from pyautoattack import AutoAttack

    from robbench.attacks.autoattack import reference as autoattack_reference

    monkeypatch.setattr(autoattack_reference, "derive_seed", lambda *parts: 0)
    ids, x, y = images
    epsilon = {"linf": 0.15, "l2": 0.6, "l1": 2.0}[norm]
    budget = {"iterations": 10, "square_queries": 60, "target_classes": 3, "fab_target_classes": 3}
    outcome = build_attack(spec(norm, epsilon, "autoattack-reference", **budget)).evaluate(
        Victim(classifier), ids, x, y, 0, len(x)
    )
    package = AutoAttack(classifier, norm={"linf": "Linf", "l2": "L2", "l1": "L1"}[norm], eps=epsilon, seed=0)
    package.apgd.n_restarts, package.apgd_targeted.n_target_classes, package.fab.n_target_classes = 1, 3, 3
    package.apgd.use_largereps = package.apgd_targeted.use_largereps = False
    package.apgd.n_iter = package.apgd_targeted.n_iter = package.fab.n_iter = 10
    package.square.n_queries = 60
    theirs, _ = package.run_standard_evaluation(x, y, batch_size=len(x))
    torch.testing.assert_close(outcome.adversarial, theirs, atol=1e-6, rtol=0)
    with torch.no_grad():
        assert torch.equal(
            outcome.robust, (classifier(theirs).argmax(1) == y) & (classifier(x).argmax(1) == y)
        )
    assert set(outcome.broken_by) & {"apgd-ce", "apgd-t", "fab-t", "square"}


def test_standard_budgets_are_the_packages_own():
    """The shipped aa and aa-reference carry exactly the numbers pyautoattack's "standard" version sets."""
    from pyautoattack import AutoAttack

    from robbench.attacks.autoattack.ensemble import AutoAttackParameters
    from robbench.specs import resolve_attack, threat_models

    for name, norm in (
        (f"{engine}{ending}", norm)
        for engine in ("aa", "aa-reference")
        for ending, norm in (("", "Linf"), ("-l2", "L2"), ("-l1", "L1"))
    ):
        p = AutoAttackParameters(**resolve_attack(name, "digits", threat_models()).parameters)
        package = AutoAttack(torch.nn.Identity(), norm=norm, eps=0.1, version="standard")
        assert list(p.components) == package.attacks_to_run
        assert p.iterations == package.apgd.n_iter == package.apgd_targeted.n_iter == package.fab.n_iter
        assert p.apgd_restarts == package.apgd.n_restarts
        assert package.apgd_targeted.n_restarts == package.fab.n_restarts == 1
        assert (p.target_classes, p.fab_target_classes) == (
            package.apgd_targeted.n_target_classes, package.fab.n_target_classes
        )  # fmt: skip
        assert p.square_queries == package.square.n_queries
        assert p.large_radii == package.apgd.use_largereps == package.apgd_targeted.use_largereps
    for name, norm in (("aa-rand", "Linf"), ("aa-rand-l2", "L2"), ("aa-rand-l1", "L1")):
        p = AutoAttackParameters(**resolve_attack(name, "digits", threat_models()).parameters)
        package = AutoAttack(torch.nn.Identity(), norm=norm, eps=0.1, version="rand")
        assert list(p.components) == package.attacks_to_run
        assert p.eot_iterations == package.apgd.eot_iter
        assert p.iterations == package.apgd.n_iter
        assert p.apgd_restarts == package.apgd.n_restarts
        assert p.large_radii == package.apgd.use_largereps


def test_l1_projection_equals_a_brute_force_search():
    """Nearest point of the L1 ball by scipy's generic constrained optimiser."""
    import numpy as np
    from scipy.optimize import minimize

    generator = np.random.default_rng(0)
    for _ in range(5):
        point = generator.normal(size=6)
        ours = project(torch.tensor(point)[None], "l1", 1.0)[0].numpy()
        split = minimize(
            lambda v, point=point: ((v[:6] - v[6:] - point) ** 2).sum(), np.full(12, 0.01), bounds=[(0, None)] * 12,
            constraints={"type": "ineq", "fun": lambda v: 1.0 - v.sum()}, method="SLSQP", options={"ftol": 1e-14},
        ).x  # fmt: skip
        np.testing.assert_allclose(ours, split[:6] - split[6:], atol=2e-4)
