"""The network a search sees on the CPU: the model's function and gradient, and no verdict of its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from robbench.attacks import Victim, build_attack
from robbench.attacks.search import forward
from robbench.attacks.search.inner import attack_mode
from robbench.attacks.search.lean import FirstConvolution, lean, searchable
from robbench.attacks.victim import margins
from robbench.models.classifiers import ARCHITECTURES
from robbench.specs import resolve_attack, threat_models


def score(module, x):
    """Logits, and the gradient of a random combination of them."""
    point = x.clone().requires_grad_(True)
    logits = module(point)
    weights = torch.linspace(-1.0, 2.0, logits.numel()).reshape(logits.shape)
    return logits.detach(), torch.autograd.grad((logits * weights).sum(), point)[0]


def lively(module):
    """Batch norms with statistics and scales of a trained network."""
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.3, 3.0)
            if part.affine:
                nn.init.normal_(part.weight)
                nn.init.normal_(part.bias)
    return module


def assert_same_function(module, x):
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with attack_mode(module):
        quick = lean(module)
        expected, found = score(module.double(), x.double()), None
        module.float()
        found = score(lean(module), x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-3, atol=2e-4 * float(other.abs().max()))
    assert quick is not None
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    return quick


@settings(max_examples=25)
@given(
    channels=st.integers(1, 5),
    outputs=st.sampled_from((6, 16, 32)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    bias=st.booleans(),
    affine=st.booleans(),
    seed=st.integers(0, 99),
)
def test_layers_multiplied_out_are_the_same_function(
    channels, outputs, kernel, stride, padding, bias, affine, seed
):
    torch.manual_seed(seed)
    chain = nn.Sequential(
        nn.Conv2d(channels, outputs, kernel, stride, padding, bias=bias),
        nn.BatchNorm2d(outputs, affine=affine),
        nn.ReLU(),
        nn.Conv2d(outputs, 4, 1, bias=bias),
        nn.Flatten(),
        nn.LazyLinear(30, bias=bias),
        nn.Linear(30, 3),
    )
    x = torch.rand(3, channels, 7, 9)
    chain(x)
    quick = assert_same_function(lively(chain), x)
    assert not any(isinstance(part, nn.BatchNorm2d) for part in quick.modules())
    assert isinstance(next(iter(quick)), FirstConvolution) == (channels <= 4 and outputs >= 8 * channels)


@pytest.mark.parametrize(
    ("name", "shape"), [("conv3", (1, 28, 28)), ("digits-cnn", (1, 8, 8)), ("resnet20-wide", (3, 8, 8))]
)
def test_the_architectures_of_the_project(name, shape):
    torch.manual_seed(0)
    assert_same_function(lively(ARCHITECTURES.get(name)(shape, 10)), torch.rand(4, *shape))


class Wrapped(nn.Module):
    """Two uses of one layer, one of them past the children, and a normalisation of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.same = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, groups=3)
        self.hidden = [self.same]
        self.head = nn.Linear(3 * 36, 4)

    def forward(self, x):
        x = torch.relu(self.first((x - 0.5) / 0.2))
        return self.head(torch.relu(self.first(x) + self.same(x) + self.hidden[0](x)).flatten(1))


def test_a_module_with_a_forward_of_its_own_keeps_it():
    torch.manual_seed(0)
    module = Wrapped()
    quick = assert_same_function(module, torch.rand(5, 3, 6, 6))
    assert isinstance(quick, Wrapped)
    assert quick is not module
    assert module.first is not quick.first
    assert type(module.first) is nn.Conv2d


class TakenApart(nn.Module):
    """Uses parts of a chain, in another order than theirs."""

    def __init__(self):
        super().__init__()
        self.chain = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 324, 4))

    def forward(self, x):
        first, norm, *rest = self.chain
        return nn.Sequential(*rest)(norm(torch.relu(first(x))))


class ReadsWeights(nn.Module):
    """Computes with the weights of its layers itself."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3), nn.Linear(3 * 324, 4)

    def forward(self, x):
        weight = self.conv.weight / self.conv.weight.norm()
        return self.head(nn.functional.conv2d(x, weight, self.conv.bias).flatten(1))


def chosen(module, x):
    with attack_mode(module):
        return searchable(module, x)


def test_only_a_network_that_is_seen_to_be_equal_is_searched():
    torch.manual_seed(0)
    x = torch.rand(6, 1, 20, 20)
    apart = lively(TakenApart()).eval()
    assert not torch.allclose(lean(apart)(x), apart(x), atol=1e-2)
    assert chosen(apart, x) is apart
    reads = ReadsWeights().eval()
    torch.testing.assert_close(chosen(reads, x)(x), reads(x))
    plain = lively(nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten())).eval()
    assert chosen(plain, x) is not plain
    assert chosen(plain, x[:, :, :19]) is plain, "fewer pixels are not worth it"
    assert chosen(plain, x[:0]) is plain


def test_a_forward_that_fails_on_other_layers_is_left_alone():
    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 8, 3)

        def forward(self, x):
            if type(self.conv) is not nn.Conv2d:
                raise TypeError("not the convolution I was built with")
            return self.conv(x).mean((2, 3))

    module = Picky().eval()
    assert chosen(module, torch.rand(2, 1, 20, 20)) is module


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_layers_that_are_watched_or_changed_are_used_as_they_are():
    seen = []
    hooked = nn.Conv2d(1, 4, 3)
    hooked.register_forward_hook(lambda *_: seen.append(1))
    spectral = nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))
    circular = nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")
    module = nn.Sequential(hooked, nn.BatchNorm2d(4), spectral, circular, nn.Flatten(), nn.Linear(64, 3))
    quick = assert_same_function(lively(module), torch.rand(2, 1, 8, 8))
    assert seen
    assert {hooked, spectral} <= set(quick)
    linear = nn.Sequential(nn.Flatten(), nn.Tanh())
    assert score(lean(linear), torch.rand(2, 1, 3, 3))[0].shape == (2, 9)
    traced = torch.jit.script(nn.Conv2d(1, 2, 3))
    assert lean(traced) is traced


def test_a_network_that_lies_changes_no_verdict(classifier, images, monkeypatch):
    """What it claims is confirmed by the model itself, and a sample whose break is not goes on."""

    class Liar(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module, self.calls = module, 0

        def forward(self, x):
            self.calls += 1
            logits = self.module(x)
            return -logits if self.calls % 3 == 0 else logits

    ids, x, y = images
    spec = resolve_attack("apgd-ce", "digits", threat_models(), 0.1)
    truth = build_attack(spec).evaluate(Victim(classifier), ids, x, y, 0, 64)
    monkeypatch.setattr(forward, "searchable", lambda module, images: Liar(module))
    seen = Victim(classifier)
    outcome = build_attack(spec).evaluate(seen, ids, x, y, 0, 64)
    right = margins(classifier(outcome.adversarial), y) > 0
    assert torch.equal(outcome.robust, right & (truth.clean_margins > 0))
    assert (outcome.backwards[outcome.robust] == build_attack(spec).cost.backwards).all()
    assert outcome.robust.any()
    assert seen.forward.exact
    assert seen.forward.network is classifier


def test_a_randomised_model_is_right_only_where_it_is_each_time():
    """Of three means the one with the least margin counts."""
    turns = iter([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])

    class Turns(nn.Module):
        def forward(self, x):
            return torch.tensor([next(turns)])

    seen = Victim(Turns())
    seen.draws, seen.module = 2, Turns()
    seen._average_forwards = lambda x: seen.module(x)
    logits = seen.attacked_logits(torch.zeros(1, 1, 2, 2), torch.tensor([0]))
    assert logits.tolist() == [[0.0, 1.0]]
    assert next(turns, None) is None
