"""Photographs: examples of every attack stay in their ball by a float64 norm, and no honest attack is accused."""

import pytest
import torch
from torch import nn

from robbench.attacks import Victim, build_attack
from robbench.attacks.checks import PIXEL_ROUNDING, ball_allowance, inside_ball
from robbench.core.errors import AttackViolation
from robbench.specs import ResolvedAttack, resolve_attack, threat_models

MODELS = threat_models()
EPSILON = {"linf": (0.01, 0.3), "l2": (1.0, 8.0), "l1": (12.0, 300.0)}
SHORT = {"iterations": 5, "square_queries": 6, "target_classes": 1, "fab_target_classes": 1, "steps": 5}
ATTACKS = {
    "linf": ("fgsm", "pgd20", "mim", "apgd-ce", "apgd-t", "fab-t", "square"),
    "l2": ("fgsm-l2", "pgd20-l2", "apgd-ce-l2", "apgd-t-l2", "fab-t-l2", "square-l2"),
    "l1": ("pgd20-l1", "apgd-ce-l1", "apgd-t-l1", "fab-t-l1", "square-l1"),
}


class Pooled(nn.Module):
    """Channel means through a fixed linear layer: every pixel of a channel has the same gradient."""

    def __init__(self, channels):
        super().__init__()
        weight = torch.randn(5, channels, generator=torch.Generator().manual_seed(0))
        self.register_buffer("weight", weight)

    def forward(self, x):
        return 40.0 * x.mean((2, 3)) @ self.weight.T


def photographs(kind, channels, side):
    if kind == "even":  # of one grey level: all pixels round to the same side
        grey = torch.tensor([0.5, 0.61, 0.7])
        return grey[:, None, None, None].expand(3, channels, side, side).contiguous()
    return 0.2 + 0.6 * torch.rand(3, channels, side, side, generator=torch.Generator().manual_seed(side))


def distance(outcome, x, norm):
    moved = (outcome.adversarial.double() - x.double()).flatten(1)
    return float({"linf": moved.abs().amax(1), "l2": moved.norm(dim=1), "l1": moved.abs().sum(1)}[norm].max())


def checked(name, norm, epsilon, x):
    spec = resolve_attack(name, "none", MODELS, epsilon)
    short = {key: value for key, value in SHORT.items() if key in spec.parameters}
    if spec.algorithm == "autoattack":
        short = {key: value for key, value in SHORT.items() if key != "steps"}
    spec = spec.model_copy(update={"parameters": {**spec.parameters, **short}})
    model = Pooled(x.shape[1]).eval()
    outcome = build_attack(spec).evaluate(Victim(model), torch.arange(len(x)), x, model(x).argmax(1), 0, 4)
    slack = 2 * PIXEL_ROUNDING if norm == "linf" else 0.0
    assert distance(outcome, x, norm) <= epsilon + slack
    if not name.startswith("fab"):  # it hands back the clean image where it breaks nothing
        assert distance(outcome, x, norm) > 0.3 * epsilon


@pytest.mark.parametrize("kind", ["random", "even"])
@pytest.mark.parametrize(
    ("norm", "name"), [("linf", "pgd20"), ("l2", "pgd20-l2"), ("l2", "fgsm-l2"), ("l1", "pgd20-l1")]
)
def test_gradient_attacks_stay_in_the_ball(norm, name, kind):
    for epsilon in EPSILON[norm]:
        checked(name, norm, epsilon, photographs(kind, 3, 160))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["random", "even"])
@pytest.mark.parametrize("side", [160, 224, 299])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("norm", "name"), [(norm, name) for norm, names in ATTACKS.items() for name in names]
)
def test_every_attack_stays_in_the_ball(norm, name, channels, side, kind):
    if name not in {attack for model in MODELS.values() for attack in model.attacks}:
        pytest.skip(f"no attack is called {name}")
    for epsilon in EPSILON[norm]:
        checked(name, norm, epsilon, photographs(kind, channels, side))


def spec(norm, epsilon):
    return ResolvedAttack(
        name="a", label="a", threat_model="t", space="image", norm=norm, epsilon=epsilon, eta=None,
        algorithm="pgd", parameters={},
    )  # fmt: skip


@pytest.mark.parametrize("side", [8, 160, 299])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_what_is_accepted_is_inside_and_what_is_refused_was_outside_by_more_than_the_allowance(norm, side):
    x = photographs("random", 3, side)
    ray = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    order, ids = int(norm[1]), torch.arange(3)
    ray /= ray.flatten(1).norm(dim=1, p=order)[:, None, None, None]
    epsilon = 0.02 * x[0].numel() ** (1 / order) / (4 if norm == "l2" else 1)
    allowed = ball_allowance(norm, epsilon, x[0].numel())
    assert allowed <= 1e-5 * max(1.0, epsilon) + PIXEL_ROUNDING * x[0].numel() ** (1 / order)
    for excess in (-1e-3, 0.0, 0.4):
        images = (x.double() + ray * (epsilon + excess * allowed)).float()
        found = inside_ball(spec(norm, epsilon), ids, x, images)
        size = (found.double() - x.double()).flatten(1).norm(dim=1, p=order)
        assert (size <= epsilon).all()
        assert (size >= epsilon - 2 * allowed).all()
    with pytest.raises(AttackViolation, match=f"outside the {norm} ball"):
        inside_ball(spec(norm, epsilon), ids, x, (x.double() + ray * (epsilon + 3 * allowed)).float())
