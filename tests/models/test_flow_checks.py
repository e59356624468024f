"""Flows of anybody: what is refused at load and at freeze, and that a correct one goes through."""

import hashlib
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.distributions import Beta

from robbench import evaluate
from robbench.attacks.codec import FlowCodec
from robbench.cli.app import main
from robbench.core.errors import UserError
from robbench.data import load_dataset
from robbench.models.flows import (
    ConditionalFlow,
    Flow,
    FrozenFlow,
    GatedCouplingFlow,
    Glow,
    RealNVP,
    frozen_module,
)
from robbench.models.flows.base import Encoded, Transform
from robbench.models.flows.checks import (
    calm_images,
    frozen_like,
    largest_gap,
    require_sound,
)
from robbench.models.loading import load_flow, load_flow_model
from robbench.models.state import ModelState
from robbench.models.zoo import read_entry

SHAPE = (1, 8, 8)
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "models.md"


class Whitening(Transform):
    """z = (v - shift) exp(-log_scale). Tests make it misbehave through the hooks `on_encode` and `on_decode`."""

    def __init__(self, on_encode=None, on_decode=None):
        super().__init__()
        self.level_shapes = (SHAPE,)
        self.on_encode, self.on_decode = on_encode, on_decode
        self.shift = nn.Parameter(0.1 * torch.linspace(-1, 1, 64).reshape(SHAPE))
        self.log_scale = nn.Parameter(torch.full(SHAPE, -1.0))
        self.register_buffer("calls", torch.zeros(()))

    def encode(self, v, y):
        z = (v - self.shift) * torch.exp(-self.log_scale)
        z = z if self.on_encode is None else self.on_encode(self, z)
        zero = z.new_zeros(())
        return Encoded((z,), ((zero, zero),), -self.log_scale.sum().expand(len(v)))

    def decode(self, levels, y):
        v = levels[0] * torch.exp(self.log_scale) + self.shift
        return v if self.on_decode is None else self.on_decode(self, v)

    def recolour(self, levels, y, rule, whitened):
        zero = levels[0].new_zeros(())
        return (rule(levels[0], zero, zero),)

    def freeze(self, dtype, memory):
        return frozen_module(self, dtype)


def whitening(kind=Flow, **hooks):
    return kind(SHAPE, 17, Whitening(**hooks))


# ------------------------------------------------------------------------------------------- one sample, one value
def counting(flow, z):
    flow.calls += 1
    return z


def after_many_calls():
    state = {"calls": 0}

    def hook(flow, z):
        state["calls"] += 1
        return z + (1.0 if state["calls"] % 3 == 0 else 0.0)

    return hook


def first_is_special(flow, z):
    return torch.cat([z[:1] + 0.5, z[1:]])


HOSTILE = {
    "batch mean": (
        lambda f, z: z - z.mean(0, keepdim=True),
        "the rest of its batch|on their own|another order",
    ),
    "batch size": (lambda f, z: z * (1.0 + 0.1 * len(z)), "on their own"),
    "place in the batch": (first_is_special, "in another order"),
    "noise": (lambda f, z: z + 0.1 * torch.randn_like(z), "a second time"),
    "calls": (after_many_calls(), "other values"),
    "moving buffer": (counting, "changed its own state.*calls"),
}


@pytest.mark.parametrize("method", ["encode", "decode"])
@pytest.mark.parametrize("name", HOSTILE)
def test_values_that_are_not_of_one_sample_alone_are_refused(name, method):
    hook, message = HOSTILE[name]
    frozen = whitening(**{f"on_{method}": hook}).freeze()
    with pytest.raises(UserError, match=message) as caught:
        require_sound(frozen)
    assert "\n" not in str(caught.value)
    assert method in str(caught.value)


class InPlace(FrozenFlow):
    def encode(self, x, y=None, u=0.5):
        x.mul_(0.5)
        return super().encode(2 * x, y, u)


class InPlaceLatents(FrozenFlow):
    def decode(self, latents, y=None, u=0.5):
        latents.levels[0].mul_(0.5)
        return super().decode(type(latents)((2 * latents.levels[0],)), y, u)


@pytest.mark.parametrize(("kind", "method"), [(InPlace, "encode"), (InPlaceLatents, "decode")])
def test_a_flow_that_writes_into_its_input_is_refused(kind, method):
    flow = kind(SHAPE, 17, whitening().freeze().transform)
    with pytest.raises(UserError, match=rf"{method} changes its input in place"):
        require_sound(flow)


def test_images_are_safe_from_a_flow_that_writes_into_them():
    x, y = torch.rand(3, *SHAPE), torch.zeros(3, dtype=torch.int64)
    before = x.clone()
    FlowCodec(InPlace(SHAPE, 17, whitening().freeze().transform)).encode_flat(x, y)
    assert torch.equal(x, before)


class BatchDensity(FrozenFlow):
    """A density that is not of one image, latents that are."""

    def log_prob(self, x, y=None, u=0.5):
        own = super().log_prob(x, y, u)
        return own - 0.5 * (own - own.mean())


def test_a_density_that_depends_on_the_batch_is_refused():
    with pytest.raises(UserError, match="log_prob gives the same samples other values"):
        require_sound(BatchDensity(SHAPE, 17, whitening().freeze().transform))


def test_code_that_fails_is_named():
    def broken(flow, z):
        raise ZeroDivisionError("their bug")

    with pytest.raises(UserError, match=r"encode fails \(ZeroDivisionError: their bug\)"):
        require_sound(whitening(on_encode=broken).freeze())


@pytest.mark.parametrize("kind", [Glow, RealNVP, GatedCouplingFlow, ConditionalFlow])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_flows_of_robbench_are_sound(kind, dtype):
    torch.manual_seed(0)
    sizes = {
        Glow: {"levels": 2, "steps": 2, "width": 6},
        RealNVP: {"scales": 2, "width": 4, "blocks": 1},
        GatedCouplingFlow: {"couplings": 2, "width": 4, "blocks": 1},
        ConditionalFlow: {"blocks": 2, "width": 8},
    }[kind]
    flow = kind(SHAPE, 17, **sizes)
    flow.initialize(torch.rand(16, *SHAPE), torch.arange(16) % 10)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    frozen = frozen_like(flow, dtype, torch.rand(3, *SHAPE))
    assert flow.training, "modes are as before"
    assert frozen.dtype == dtype
    require_sound(frozen, torch.rand(3, *SHAPE))


@pytest.mark.parametrize("kind", [Glow, RealNVP, GatedCouplingFlow, ConditionalFlow])
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_frozen_copy_lives_where_the_flow_does(kind):
    sizes = {"levels": 2, "steps": 1, "width": 2} if kind is Glow else {}
    frozen = kind(SHAPE, 17, **sizes).to("cuda").eval().freeze()
    assert {buffer.device.type for buffer in frozen.buffers()} == {"cuda"}


# --------------------------------------------------------------------------------------------- the tools themselves
@settings(max_examples=30, derandomize=True)
@given(
    entry=st.integers(0, 10),
    dtype=st.sampled_from(
        [torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool, torch.float16]
    ),
)
def test_a_fingerprint_changes_with_any_entry(entry, dtype):
    module = nn.Module()
    module.register_buffer("kept", torch.linspace(0, 9, 11).to(dtype))
    before = ModelState.of(module)
    assert not list(before.changed_tensors(module))
    module.kept[entry] = 1 - module.kept[entry].to(torch.int64) % 2
    assert list(before.changed_tensors(module)) == ["kept"]


@settings(max_examples=30, derandomize=True)
@given(size=st.floats(1e-3, 1e6), share=st.floats(0, 10))
def test_a_gap_is_measured_in_what_is_allowed(size, share):
    one = torch.tensor([[size, 0.0]], dtype=torch.float64)
    other = one + torch.tensor([[0.0, share * 1e-3 * max(1.0, size)]], dtype=torch.float64)
    assert largest_gap(one, other, 1e-3) == pytest.approx(share, abs=1e-6)


def test_a_gap_to_a_number_that_is_none_is_infinite():
    one = torch.tensor([[1.0], [math.nan]])
    assert largest_gap(one, one, 1e-3) == 0.0
    assert largest_gap(one, torch.tensor([[math.inf], [math.nan]]), 1e-3) == math.inf
    assert largest_gap(one, one[:1], 1e-3) == math.inf


# ------------------------------------------------------------------------------------------------ freezing
class Variational:
    """Dequantisation by Beta(2, 2) noise, the importance weight in the density: log p(d) - log q(u)."""

    def log_prob(self, x, y=None, u=0.5):
        even = torch.as_tensor(u).to(x).expand_as(x).clamp(1e-4, 1 - 1e-4)
        noise = 0.5 - torch.sin(torch.asin(1.0 - 2.0 * even) / 3.0)  # quantile of Beta(2, 2)
        weight = Beta(torch.tensor(2.0), torch.tensor(2.0)).log_prob(noise.float()).to(x).flatten(1).sum(1)
        return super().log_prob(x, y, noise) - weight


class Lost(Variational, Flow):
    """Inherits freeze()."""


class FrozenVariational(Variational, FrozenFlow):
    pass


class Kept(Variational, Flow):
    def freeze(self, dtype=torch.float32, memory="none", decode_mode=None):
        transform = self.transform.freeze(dtype, memory)
        return FrozenVariational(self.input_shape, self.grey_levels, transform)


class Forgetful(Variational, Flow):
    """Has a freeze() of its own, and forgets the density there."""

    def freeze(self, dtype=torch.float32, memory="none", decode_mode=None):
        return FrozenFlow(self.input_shape, self.grey_levels, self.transform.freeze(dtype, memory))


def by_quadrature(flow, x):
    """Mean bits/dim over u of images under `Kept`, pixel by pixel on a midpoint grid of u, in float64."""
    transform, levels = flow.transform, flow.grey_levels
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    noise = 0.5 - torch.sin(torch.asin(1 - 2 * u.clamp(1e-4, 1 - 1e-4)) / 3)
    log_q = torch.log(6 * noise * (1 - noise))
    d = (x.double()[..., None] * (levels - 1) + noise) / levels - 0.5
    scale = transform.log_scale.detach().double()[None, ..., None]
    z = (d - transform.shift.detach().double()[None, ..., None]) * torch.exp(-scale)
    nats = -0.5 * z**2 - 0.5 * math.log(2 * math.pi) - scale - math.log(levels) - log_q
    return -nats.mean(-1).flatten(1).sum(1) / (64 * math.log(2))


def test_variational_dequantisation_is_kept_by_a_freeze_that_keeps_it():
    flow, x = whitening(Kept), (torch.rand(3, *SHAPE) * 16).round() / 16
    frozen = frozen_like(flow)
    found = frozen.bits_per_dim(x, n_samples=300, seed=0, sample_ids=range(3))
    torch.testing.assert_close(found.double(), by_quadrature(flow, x), rtol=0, atol=5e-3)
    torch.testing.assert_close(found, flow.bits_per_dim(x, n_samples=300, seed=0, sample_ids=range(3)))


def test_variational_dequantisation_is_refused_where_the_copy_would_lose_it(digits, classifier, images):
    _, x, y = images
    flow = whitening(Lost)
    for use in (
        flow.freeze,
        lambda: frozen_like(flow),
        lambda: FlowCodec(flow),
        lambda: evaluate(classifier, x, y, ["r-la"], dataset="digits", flow=flow, device="cpu"),
    ):
        with pytest.raises(UserError, match=r"Lost has a log_prob of its own.*override freeze\(\)") as caught:
            use()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "encode",
        "decode",
        "log_prob",
        "bits_per_dim",
        "log_prob_draws",
        "_dequantised",
        "whiten",
        "level_shapes",
    ],
)
def test_every_override_is_seen(name):
    kind = type(
        "Other",
        (Flow,),
        {name: property(lambda self: (SHAPE,)) if name == "level_shapes" else lambda *_: None},
    )
    with pytest.raises(UserError, match=rf"Other has a {name} of its own"):
        whitening(kind).freeze()


def test_a_method_replaced_on_the_flow_itself_is_seen():
    flow = whitening()
    flow.log_prob = lambda x, y=None, u=0.5: torch.zeros(len(x))
    with pytest.raises(UserError, match="has a log_prob of its own"):
        flow.freeze()


def wrong(change):
    class Wrong(Flow):
        def freeze(self, dtype=torch.float32, memory="none", decode_mode=None):
            return change(self, dtype)

    return whitening(Wrong)


def other_transform(**changes):
    def change(flow, dtype):
        transform = frozen_module(flow.transform, dtype)
        for name, value in changes.items():
            getattr(transform, name).fill_(value)
        return FrozenFlow(SHAPE, 17, transform)

    return change


WRONG = {
    "scale": (other_transform(log_scale=-0.9), "disagree in log_prob"),
    "shift": (other_transform(shift=0.0), "disagree in"),
    "grey levels": (
        lambda f, d: FrozenFlow(SHAPE, 256, frozen_module(f.transform, d)),
        "has grey_levels 256 and the flow 17",
    ),
    "preprocessing": (
        lambda f, d: FrozenFlow(SHAPE, 17, frozen_module(f.transform, d), "logit"),
        "disagree in",
    ),
    "itself": (lambda f, d: f, "returned a Wrong; return a FrozenFlow"),
    "parameters": (lambda f, d: FrozenFlow(SHAPE, 17, Whitening()), "returned a FrozenFlow with parameters"),
    "decoder": (
        lambda f, d: FrozenFlow(SHAPE, 17, frozen_module(Whitening(on_decode=lambda _, v: 0.9 * v), d)),
        "disagree in decode",
    ),
    "crash": (lambda f, d: 1 / 0, r"freeze\(\) fails \(ZeroDivisionError"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_freeze_is_refused(name):
    change, message = WRONG[name]
    with pytest.raises(UserError, match=message) as caught:
        frozen_like(wrong(change))
    assert "\n" not in str(caught.value)


def test_a_freeze_that_forgets_the_density_is_refused_with_both_numbers():
    flow = whitening(Forgetful)
    x = calm_images(flow)
    live = -float(flow.log_prob(x)[0].detach()) / (64 * math.log(2))
    with pytest.raises(UserError, match=rf"disagree in log_prob, in bits/dim: {live:.4g} and"):
        frozen_like(flow)


# ------------------------------------------------------------------------------------------------ the documented flow
@pytest.fixture
def documented(tmp_path):
    """The example of docs/models.md, fitted to digits, with a card; its module is forgotten afterwards."""
    section = DOCUMENT.read_text().split("## A flow of your own")[1]
    code, card = (
        re.search(rf"```{kind}\n(.*?)```", section, re.DOTALL).group(1) for kind in ("python", "yaml")
    )
    yield written(tmp_path, code, yaml.safe_load(card))
    sys.modules.pop("my_flow", None)


def written(folder, code, card):
    """Path of a card of `code`, its weights those of a Gaussian a pixel fitted to digits."""
    train = load_dataset("digits").train
    v = (train.x(torch.arange(len(train))) * 16 + 0.5) / 17 - 0.5
    weights = folder / "weights.safetensors"
    deviation = v.std(0).clamp(min=0.02)
    save_file({"transform.shift": v.mean(0), "transform.log_scale": deviation.log()}, weights)
    card["weights"]["sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (folder / "my_flow.py").write_text(code)
    (folder / "card.yaml").write_text(yaml.safe_dump(card))
    return folder / "card.yaml"


def test_the_documented_flow_has_the_density_of_its_formula(documented):
    loaded = load_flow_model(read_entry(documented.parent), dtype=torch.float64)
    test = load_dataset("digits").test
    x = test.x(torch.arange(5))
    shift, log_scale = loaded.judge.transform.shift, loaded.judge.transform.log_scale
    d = (x.double() * 16 + 0.5) / 17 - 0.5
    normal = torch.distributions.Normal(shift, log_scale.exp())
    expected = normal.log_prob(d).flatten(1).sum(1) - 64 * math.log(17)
    torch.testing.assert_close(loaded.judge.log_prob(x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loaded.flow.log_prob(x).double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "CARD", "--attacks", "nll-in", "--epsilon", "16"],
        ["--model", "digits-standard", "--flow", "CARD", "--attacks", "a-la,jsa10,r-la"],
    ],
)
def test_the_documented_flow_runs(documented, arguments, tmp_path):
    given = [str(documented) if part == "CARD" else part for part in arguments]
    result = CliRunner().invoke(main, ["run", *given, "--n", "6", "--out", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (("return Flow(", "return Lossy("), "has a log_prob of its own"),
        (("torch.exp(self.log_scale) + self.shift", "torch.exp(self.log_scale)"), None),
        (("z = (v - self.shift)", "z = (v - v.mean(0))"), "in a batch|on their own|other order|disagree"),
        (
            ("frozen_module(self, dtype)", "frozen_module(Whitening(self.level_shapes[0]), dtype)"),
            "disagree in",
        ),
    ],
)
def test_a_wrong_variant_of_it_is_refused(documented, edit, message, tmp_path):
    code = (documented.parent / "my_flow.py").read_text()
    assert edit[0] in code
    lossy = "\n\nclass Lossy(Flow):\n    def log_prob(self, x, y=None, u=0.5):\n"
    lossy += "        return super().log_prob(x, y, u) + 9\n"
    (documented.parent / "my_flow.py").write_text(code.replace(*edit) + lossy)
    sys.modules.pop("my_flow", None)
    arguments = [
        "run",
        "--model",
        "digits-standard",
        "--flow",
        str(documented),
        "--attacks",
        "r-la",
        "--n",
        "6",
    ]
    result = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "run")])
    if message is None:  # exactness is a matter of the images that an attack searches: the cell fails
        assert "does not invert itself" in result.output
        assert result.exit_code != 0
    else:
        assert result.exit_code == 2
        assert re.search(message, result.output)


def test_a_card_that_says_something_else_than_the_flow_is_refused(documented):
    documented.write_text(yaml.safe_dump({**yaml.safe_load(documented.read_text()), "grey_levels": 16}))
    with pytest.raises(UserError, match=r"its card says grey_levels 16 .* builds a flow of grey_levels 17"):
        load_flow(read_entry(documented.parent))
