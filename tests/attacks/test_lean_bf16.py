"""Searches in bfloat16 on the CPU: the network they see, what they may get wrong, and that no break is missed by it."""

import math

import pytest
import torch
from torch import nn

from robbench.attacks import Victim, build_attack
from robbench.attacks.batches import CACHE_BYTES, LEAST_BATCH, batch_in_cache, largest_output
from robbench.attacks.inner import attacked
from robbench.attacks.lean import lean
from robbench.attacks.lean_bf16 import ExactLinear, blur, rounded, searchable_in_bf16
from robbench.attacks.victim import margins
from robbench.models.classifiers import ARCHITECTURES
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()


def in_bf16(network, x):
    with torch.autocast("cpu", torch.bfloat16):
        point = x.clone().requires_grad_(True)
        logits = network(point).float()
        (slope,) = torch.autograd.grad(logits[:, 0].sum(), point)
    return logits.detach(), slope


@pytest.mark.parametrize(
    ("name", "shape"), [("conv3", (1, 28, 28)), ("digits-cnn", (1, 8, 8)), ("resnet20-wide", (3, 8, 8))]
)
def test_it_computes_what_the_model_does_as_far_as_autocast_does(name, shape):
    """Oracle: the model in float64. The weights are those of autocast, so that errors are of the same size."""
    torch.manual_seed(0)
    module, x = ARCHITECTURES.get(name)(shape, 10).eval(), torch.rand(16, *shape)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with attacked(module):
        quick = searchable_in_bf16(module, x)
        assert quick is not module
        (found, slope), (plain, other) = in_bf16(quick, x), in_bf16(module, x)
        point = x.double().requires_grad_(True)
        truth = module.double()(point)
        (expected,) = torch.autograd.grad(truth[:, 0].sum(), point)
        module.float()
    truth = truth.detach()
    scale = float(truth.abs().max())
    assert float((found - truth).abs().max()) <= 2 * float((plain - truth).abs().max()) + 0.002 * scale
    assert float((slope - expected).norm()) <= 2 * float((other - expected).norm()) + 0.01 * float(
        expected.norm()
    )
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key])


def test_weights_are_cast_once_and_the_layer_of_the_logits_is_not():
    torch.manual_seed(0)
    module = ARCHITECTURES.get("digits-cnn")((1, 8, 8), 10).eval().requires_grad_(False)
    layers = list(rounded(lean(module), torch.rand(1, 1, 8, 8)))
    assert type(layers[-1]) is ExactLinear
    assert layers[-1].weight.dtype == torch.float32
    kinds = [p.dtype for layer in layers[:-1] for p in layer.parameters()]
    assert kinds
    assert set(kinds) == {torch.bfloat16}
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_networks_that_compute_something_else_are_left_to_autocast():
    class Sharp(nn.Module):
        """Multiplies a difference that bfloat16 does not see."""

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(9, 3)

        def forward(self, x):
            weight = self.head.weight
            return (x.flatten(1) @ (weight - weight.bfloat16().float()).T) * 1e4

    class Picky(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(9, 3)

        def forward(self, x):
            if self.head.weight.dtype != torch.float32:
                raise TypeError("not my weights")
            return 2 * self.head(x.flatten(1))

    x = torch.rand(4, 1, 3, 3)
    for module in (Sharp().eval(), Picky().eval()):
        with attacked(module):
            assert searchable_in_bf16(module, x) is module
            assert searchable_in_bf16(module, x[:0]) is module


def test_blur_bounds_the_error_of_every_margin():
    """Against each pair of classes by hand; a power of 2; 0 where nothing differs; infinite where logits are."""
    torch.manual_seed(0)
    x, weight, noise = torch.rand(6, 1, 2, 2), torch.randn(4, 5), 0.01 * torch.randn(4, 5)
    seen = torch.cat([x, (x + x.flip(0)) / 2]).flatten(1)
    worst = max(
        float(((seen @ noise)[:, a] - (seen @ noise)[:, b]).abs().max()) for a in range(5) for b in range(5)
    )

    def exact(images):
        return images.flatten(1) @ weight

    found = blur(exact, lambda images: images.flatten(1) @ (weight + noise), x)
    assert 2 * worst <= found * (1 + 1e-4) < 4 * worst * (1 + 1e-3)
    assert math.log2(found).is_integer()
    assert blur(exact, exact, x) == blur(exact, exact, x[:0]) == 0.0
    assert blur(exact, lambda images: exact(images) / 0.0, x) == math.inf


def short(name, **parameters):
    spec = resolve_attack(name, "digits", MODELS, 0.12)
    small = {"iterations": 10, "square_queries": 150, "target_classes": 4, "fab_target_classes": 4}
    return build_attack(spec.model_copy(update={"parameters": {**spec.parameters, **small, **parameters}}))


class Shifted(nn.Module):
    """A model whose searches see every margin of the label too large: the network of `low` is another one."""

    def __init__(self, model, labels, by):
        super().__init__()
        self.model, self.by, self.labels = model, by, labels

    def forward(self, x):
        out = self.model(x)
        low = torch.is_autocast_enabled("cpu")
        return out + self.by * nn.functional.one_hot(out.argmax(1), out.shape[1]) if low else out


@pytest.mark.parametrize("component", ["apgd-ce", "apgd-t", "fab-t", "square"])
def test_breaks_that_low_precision_hides_are_found(classifier, images, component):
    """In the search's eyes no image is ever misclassified by less than `by`; the model itself is asked there."""
    ids, x, y = images
    one = short("aa", components=(component,))
    hidden = Shifted(classifier, y, 0.5)
    exact = one.evaluate(Victim(classifier), ids, x, y, 0, 48)
    victim = Victim(hidden, precision="bf16")
    found = one.evaluate(victim, ids, x, y, 0, 48)
    assert victim.blur == 0.0, "known inside a call only"
    with torch.no_grad():
        right = margins(classifier(found.adversarial), y) > 0
    assert torch.equal(found.robust, right & (found.clean_margins > 0))
    attacked_rows = exact.clean_margins > 0
    broken, truth = (~o.robust & attacked_rows for o in (found, exact))
    assert truth.any()
    assert int(broken.sum()) >= int(truth.sum()) - 1
    assert (found.forwards[found.robust] >= exact.forwards[found.robust].min() - 150).all()


@pytest.mark.parametrize("norm", ["", "-l2", "-l1"])
def test_bf16_breaks_what_fp32_breaks(classifier, images, norm):
    """Verdicts differ only where both searches come near the boundary; backwards of robust samples are the budget."""
    ids, x, y = images
    spec = resolve_attack(f"aa{norm}", "digits", MODELS)
    small = {"iterations": 10, "square_queries": 150}
    one = build_attack(spec.model_copy(update={"parameters": {**spec.parameters, **small}}))
    fine, rough = (one.evaluate(Victim(classifier, "cpu", 48, p), ids, x, y, 0, 48) for p in ("fp32", "bf16"))
    lost = rough.robust & ~fine.robust
    assert int(lost.sum()) <= 1
    assert (rough.margins[lost].abs() <= 0.5).all()
    kept = rough.robust & fine.robust
    assert torch.equal(rough.backwards[kept], fine.backwards[kept])


def test_pgd_asks_the_model_near_the_boundary_too(classifier, images):
    ids, x, y = images
    one = build_attack(resolve_attack("pgd20", "digits", MODELS, 0.12))
    exact = one.evaluate(Victim(classifier), ids, x, y, 0, 48)
    found = one.evaluate(Victim(Shifted(classifier, y, 0.5), precision="bf16"), ids, x, y, 0, 48)
    assert abs(int(found.robust.sum()) - int(exact.robust.sum())) <= 1


def test_the_batch_is_the_largest_power_of_two_that_the_cache_holds():
    """By brute force over all of them; the user's own number where it fits."""
    for size in (1, 1000, 21632 * 4, 2**20, 10**8):
        for asked in (1, 7, 32, 33, 100, 256, 1000):
            found = batch_in_cache(size, asked)
            fitting = [2**k for k in range(11) if 2**k <= asked and 2**k * size <= CACHE_BYTES]
            if asked <= LEAST_BATCH or asked * size <= CACHE_BYTES:
                assert found == asked
            else:
                assert found == max([LEAST_BATCH, *fitting])
    assert batch_in_cache(0, 1000) == 1000


def test_the_largest_output_is_that_of_the_widest_layer():
    module = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 4))
    assert largest_output(module, module, torch.rand(2, 1, 4, 4)) == 8 * 4 * 4 * 4
    assert largest_output(module, module, torch.rand(0, 1, 4, 4)) == 0
    assert not any(part._forward_hooks for part in module.modules())


def test_a_wide_network_is_searched_in_smaller_batches(classifier, images):
    """Verdicts and counts do not depend on it."""
    ids, x, y = images

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.wide, self.sizes = classifier, nn.Upsample(scale_factor=48), []

        def forward(self, x):
            self.sizes += [len(x)] * torch.is_grad_enabled()
            return self.model(x) + 0.0 * self.wide(x).mean((1, 2, 3))[:, None]

    one, module = short("aa", components=("apgd-ce",)), Wide()
    rows = slice(40)
    wide = one.evaluate(Victim(module, "cpu", 48), ids[rows], x[rows], y[rows], 0, 40)
    assert module.sizes[0] > LEAST_BATCH, "the look at the gradients before the search"
    assert max(module.sizes[1:]) == LEAST_BATCH
    usual = one.evaluate(Victim(classifier, "cpu", 48), ids[rows], x[rows], y[rows], 0, 40)
    assert torch.equal(wide.robust, usual.robust)
    assert torch.equal(wide.backwards[wide.robust], usual.backwards[usual.robust])
