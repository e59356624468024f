"""A classifier gets contiguous float32 images, whatever memory format a flow or a speed-up uses inside."""

import pytest
import torch
from grids import slow_but
from test_contract import KINDS, ONE_EACH, quick
from torch import nn

from robbench.attacks import Victim, build_attack
from robbench.attacks.codec import FlowCodec
from robbench.attacks.search.spaces import decode_witness
from robbench.defenses.base import DEFENSES, Setting, build_defense
from robbench.models.flows import ConditionalFlow, GatedCouplingFlow, Glow, RealNVP
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()
LARGE = ("a-la", "aa", "fgsm", "jsa10")


class Flattening(nn.Module):
    """A small classifier of 3-channel images."""

    def __init__(self, side):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8 * side * side, 10)

    def forward(self, x):
        return 3.0 * self.head(self.conv(x).relu().flatten(1))


class Viewing(Flattening):
    """The same function as half of the published CIFAR models write it, and strict about its images."""

    def forward(self, x):
        assert x.is_contiguous(), f"strides {x.stride()}"
        assert x.dtype == torch.float32
        x.view(len(x), -1)
        h = self.conv(x).relu()
        return 3.0 * self.head(h.view(len(x), -1))


def subject(kind, side):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return kind(side).eval().requires_grad_(False)


def shaken(flow):
    """Initialised, with no layer left at its zero start."""
    flow.initialize(torch.rand(16, *flow.input_shape))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return flow.eval().requires_grad_(False)


def flow_of(side):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return shaken(Glow((3, side, side), 256, levels=2, steps=2, width=8))


def colour_images(side, n=6):
    x = torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(5)) * 0.2 + 0.4
    return torch.arange(n), x, subject(Flattening, side)(x).argmax(1)


CASES = [*((name, 8) for name in KINDS), *((name, 24) for name in LARGE)]
QUICK = [*((name, 8) for name in ONE_EACH), ("jsa10", 24)]


@pytest.mark.parametrize(("name", "side"), slow_but(QUICK, CASES))
def test_a_model_that_views_its_images_has_the_number_of_one_that_flattens_them(name, side):
    ids, x, y = colour_images(side)
    spec = quick(resolve_attack(name, "digits", MODELS))
    found = []
    for kind in (Flattening, Viewing):
        victim = Victim(subject(kind, side))
        found.append(build_attack(spec, flow_of(side)).evaluate(victim, ids, x, y, 0, 4))
    assert torch.equal(found[0].robust, found[1].robust)
    assert torch.equal(found[0].adversarial, found[1].adversarial)
    assert torch.equal(found[0].clean_predictions, y)


@pytest.mark.parametrize("name", sorted(DEFENSES))
def test_training_hands_on_such_images_too(name):
    _, x, y = colour_images(8)
    model = subject(Viewing, 8).requires_grad_(True).train()
    defense = build_defense(name, {}, Setting("digits", MODELS, FlowCodec(flow_of(8))))
    loss = defense.loss(model, x, y, torch.Generator().manual_seed(0))
    loss.backward()
    assert model.conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("memory", ["none", "mask", "invert"])
@pytest.mark.parametrize("kind", [Glow, RealNVP, GatedCouplingFlow, ConditionalFlow])
def test_decoded_images_are_contiguous_and_their_gradient_is_that_of_the_flow(kind, memory):
    torch.manual_seed(0)
    sizes = {
        Glow: {"levels": 2, "steps": 2, "width": 6},
        RealNVP: {"scales": 2, "width": 4, "blocks": 1},
        GatedCouplingFlow: {"couplings": 2, "width": 4, "blocks": 1},
        ConditionalFlow: {"blocks": 2, "width": 8},
    }[kind]
    flow = shaken(kind((3, 8, 8), 256, **sizes)).double()
    x, y = torch.rand(3, 3, 8, 8).double() * 0.4 + 0.3, torch.arange(3)
    slopes = []
    for frozen in (flow, flow.freeze(torch.float64, memory)):
        codec = FlowCodec.__new__(FlowCodec)
        codec.flow, codec.check_every, codec._batches = frozen, 1, 0
        z = codec.encode_flat(x, y).detach().requires_grad_()
        image = codec.decode_flat(z, y)
        weights = torch.randn(image.shape, generator=torch.Generator().manual_seed(1), dtype=image.dtype)
        slopes.append(torch.autograd.grad((image * weights).sum(), z)[0])
        assert image.is_contiguous()
        assert decode_witness(codec, x, y, {"lambda": torch.zeros_like(z)}).image.is_contiguous()
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-7, atol=1e-9)
    frozen = flow.freeze(memory=memory)
    assert frozen.sample(2, y=torch.arange(2)).is_contiguous()


def test_a_flow_in_double_precision_hands_out_images_in_that_of_its_latents():
    codec = FlowCodec(flow_of(8).double().freeze(torch.float64))
    _, x, y = colour_images(8)
    z = codec.encode_flat(x, y)
    assert z.dtype == torch.float32
    assert codec.decode_flat(z, y).dtype == torch.float32
    assert codec.decode_flat(codec.encode_flat(x.double(), y), y).dtype == torch.float64
