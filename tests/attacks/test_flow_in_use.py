"""A flow is checked on every image that is searched through it, before, during and after: attacks, training, verify."""

import pytest
import torch
from torch import nn

from robbench.attacks import Victim, build_attack, build_likelihood_attack
from robbench.attacks.codec import FlowCodec
from robbench.attacks.search.geometry import GeneratorNoise
from robbench.attacks.search.spaces import LatentSpace
from robbench.core.errors import AttackViolation, UserError
from robbench.defenses.base import Setting, build_defense
from robbench.models.flows import FrozenFlow, Glow
from robbench.specs import resolve_attack, threat_models

MODELS = threat_models()
LATENT = ("a-la", "jsa10", "om-pgd", "r-la")


def evaluated(name, classifier, flow, images, batch_size=48):
    ids, x, y = images
    spec = resolve_attack(name, "digits", MODELS)
    return build_attack(spec, flow).evaluate(Victim(classifier), ids, x, y, 0, batch_size)


def hostile(flow, **methods):
    """The frozen flow of a subclass with these methods; each is given the plain result too."""
    frozen = flow.freeze()

    def encode(self, x, y=None, u=0.5):
        latents, log_det = FrozenFlow.encode(self, x, y, u)
        return methods["encode"](self, x, latents), log_det

    def decode(self, latents, y=None, u=0.5):
        return methods["decode"](self, latents, FrozenFlow.decode(self, latents, y, u))

    def log_prob(self, x, y=None, u=0.5):
        return methods["log_prob"](self, x, FrozenFlow.log_prob(self, x, y, u))

    known = {"encode": encode, "decode": decode, "log_prob": log_prob}
    kind = type("Hostile", (FrozenFlow,), {name: known[name] for name in methods})
    return kind(frozen.input_shape, frozen.grey_levels, frozen.transform)


def exact_on(some):
    """A decoder that is exact on images near one of `some` [n,C,H,W], and elsewhere turns grey half way."""

    def decode(flow, latents, image):
        nearest = (image.flatten(1)[:, None] - some.flatten(1)).norm(dim=2).amin(1)
        return torch.where((nearest < 1.0)[:, None, None, None], image, 0.5 * image + 0.25)

    return decode


@pytest.mark.parametrize("name", LATENT)
@pytest.mark.parametrize("batch_size", [48, 7])
def test_a_flow_that_is_exact_on_the_first_images_alone_is_refused(
    name, batch_size, classifier, flow, images
):
    inexact = hostile(flow, decode=exact_on(images[1][:32]))
    with pytest.raises(UserError, match=r"does not invert itself: .* on \d+ of \d+ images") as caught:
        evaluated(name, classifier, inexact, images, batch_size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LATENT)
def test_one_inexact_image_is_enough(name, classifier, flow, images):
    kept = [i for i in range(48) if i != 40]
    with pytest.raises(UserError, match="on 1 of"):
        evaluated(name, classifier, hostile(flow, decode=exact_on(images[1][kept] + 0.0)), images)


def test_an_inexact_image_that_is_not_searched_does_not_matter(classifier, flow, images):
    """It is misclassified anyway: no perturbation of it enters a number."""
    ids, x, y = images
    y = y.clone()
    with torch.no_grad():
        y[40] = (classifier(x)[40].argmax() + 1) % 10
    kept = [i for i in range(48) if i != 40]
    outcome = evaluated("a-la", classifier, hostile(flow, decode=exact_on(x[kept])), (ids, x, y))
    assert not outcome.robust[40]


@pytest.mark.parametrize(
    ("name", "check_every"), [("jsa-at", 8), ("ijsat", 8), ("a-la", 8), ("r-la", 8), ("r-la", 1)]
)
def test_training_through_an_inexact_flow_is_refused(name, check_every, classifier, flow, images):
    _, x, y = images
    codec = FlowCodec(hostile(flow, decode=lambda flow, latents, image: 0.9 * image), check_every)
    defense = build_defense(name, {}, Setting("digits", MODELS, codec))
    with pytest.raises(UserError, match="does not invert itself"):
        defense.loss(classifier, x, y, torch.Generator().manual_seed(0))


def test_every_eighth_batch_is_looked_at(flow, images):
    """Exact for the first batch, inexact from then on: found at the ninth at the latest."""
    state = {"exact": True}
    codec = FlowCodec(
        hostile(flow, decode=lambda flow, latents, image: image if state["exact"] else 0.9 * image), 8
    )
    codec.encode_flat(images[1])
    state["exact"] = False
    for _ in range(7):
        codec.encode_flat(images[1])
    with pytest.raises(UserError, match="does not invert itself"):
        codec.encode_flat(images[1])


def test_the_published_legacy_decoder_still_trains_and_is_no_flow_for_attacks(classifier, images):
    """Its distortion is its contract (docs of base.py); a decoder that breaks that contract is refused in training."""
    torch.manual_seed(0)
    _, x, y = images
    legacy = Glow((1, 8, 8), 17, levels=2, steps=1, width=4, preprocessing="logit", decode_mode="flp_legacy")
    frozen = legacy.eval().freeze()
    z = FlowCodec(frozen).encode_flat(x, y)
    torch.testing.assert_close(
        FlowCodec(frozen).decode_flat(z, y), 0.05 + 0.9 * (16 * x + 0.5) / 17, rtol=0, atol=1e-4
    )
    with pytest.raises(UserError, match="does not invert itself"):
        evaluated("r-la", classifier, frozen, images)
    frozen.decode = lambda latents, y=None, u=0.5: 0.5 * FrozenFlow.decode(frozen, latents, y, u)
    with pytest.raises(UserError, match="does not invert itself"):
        FlowCodec(frozen).encode_flat(x, y)


def well_for(limit, change):
    """A method that behaves for `limit` calls."""
    state = {"calls": 0}

    def method(flow, given, result):
        state["calls"] += 1
        return result if state["calls"] <= limit else change(result)

    return method


@pytest.mark.parametrize("name", ["a-la", "r-la", "jsa10"])
@pytest.mark.parametrize(
    "decode",
    [
        lambda: lambda flow, latents, image: image + 0.02 * (image.mean() - 0.3),
        lambda: lambda flow, latents, image: image + 0.05 * torch.randn_like(image),
        lambda: lambda flow, latents, image: image * (1.0 if len(image) < 20 else 0.99),
        lambda: well_for(5, lambda image: 0.8 * image),
        lambda: well_for(7, lambda image: 0.8 * image),
    ],
    ids=["batch", "noise", "large batches", "after 5 calls", "after 7 calls"],
)
def test_a_decoder_that_is_not_a_function_of_one_sample_gives_no_number(
    name, decode, classifier, flow, images
):
    with pytest.raises((UserError, AttackViolation)) as caught:
        evaluated(name, classifier, hostile(flow, decode=decode()), images)
    assert "\n" not in str(caught.value)


def test_a_decoder_that_depends_on_large_batches_alone_is_found_when_witnesses_are_decoded(
    classifier, flow, images
):
    """A shift by the mean of the batch, in batches of perturbed images only: the round trip of clean ones is exact."""
    clean = FlowCodec(flow).encode_flat(images[1])

    def decode(flow, latents, image):
        moved = (latents.flat()[:, None] - clean).norm(dim=2).amin(1) > 1e-3
        shift = 0.1 * (image * torch.arange(len(image))[:, None, None, None] / len(image)).mean()
        return torch.where(moved[:, None, None, None], image + shift, image)

    with pytest.raises(AttackViolation, match="rendered from its witness"):
        evaluated("a-la", classifier, hostile(flow, decode=decode), images)


def test_a_buffer_that_moves_during_the_attack_is_named(classifier, flow, images):
    def decode(flow, latents, image):
        if len(image) > 8:
            next(b for b in flow.buffers() if b.is_floating_point()).view(-1)[:1].mul_(1.0 + 1e-6)
        return image

    with pytest.raises(UserError, match=r"the flow changed its own state \(transform"):
        evaluated("r-la", classifier, hostile(flow, decode=decode), images)


@pytest.mark.parametrize(
    "moved", [lambda image: 1.0 - image, lambda image: 0.0 * image + 0.5], ids=["inverted", "grey"]
)
def test_a_decoder_that_inverts_at_clean_latents_alone_is_said(moved, classifier, flow, images):
    """Any image would pass for a perturbation of R-LA, which follows no gradient."""
    clean = FlowCodec(flow).encode_flat(images[1])

    def decode(flow, latents, image):
        off = (latents.flat()[:, None] - clean).norm(dim=2).amin(1) > 1e-3
        return torch.where(off[:, None, None, None], moved(image), image)

    outcome = evaluated("r-la", classifier, hostile(flow, decode=decode), images)
    (said,) = [one for one in outcome.suspicions if one.kind == "misplaced"]
    assert said.numbers == {"misplaced": 48, "decoded": 48}
    for name in LATENT:
        sound = evaluated(name, classifier, flow, images)
        assert sound.diagnostics.decoded > 0
        assert sound.diagnostics.misplaced == 0


@pytest.mark.parametrize(
    ("decode", "message"),
    [
        (lambda flow, latents, image: image.detach(), "has no gradient"),
        (lambda flow, latents, image: image.detach() + 0.0 * image, "has no gradient"),
        (
            lambda flow, latents, image: image.detach() - 0.5 * (image.detach() - image),
            "gradient .* is wrong",
        ),
    ],
)
def test_a_decoder_without_its_gradient_is_no_flow_for_a_gradient_attack(
    decode, message, classifier, flow, images
):
    changed = hostile(flow, decode=decode)
    for name in ("a-la", "jsa10"):
        with pytest.raises(UserError, match=message):
            evaluated(name, classifier, changed, images)
    plain, without = (evaluated("r-la", classifier, f, images) for f in (flow, changed))
    assert torch.equal(plain.robust, without.robust), "R-LA follows no gradient"


# --------------------------------------------------------------------------------------------------- likelihood
def likelihood(flow, images, name="nll-in"):
    ids, x, y = images
    spec = resolve_attack(name, "digits", MODELS, epsilon=16.0)
    spec = (
        spec.model_copy(update={"parameters": {**spec.parameters, "steps": 2}}) if name != "noise" else spec
    )
    return build_likelihood_attack(spec).evaluate(flow, flow, ids, x, y, 0, 16)


@pytest.mark.parametrize("name", ["nll-in", "nll-out", "noise"])
@pytest.mark.parametrize(
    ("log_prob", "message"),
    [
        (lambda: lambda flow, x, value: value - 0.5 * (value - value.mean()), "other values"),
        (lambda: lambda flow, x, value: value + 10.0 * torch.randn_like(value), "a second time"),
        (lambda: well_for(5, lambda value: value - 100.0), "changed during the attack"),
    ],
    ids=["batch", "noise", "calls"],
)
def test_a_density_that_is_not_of_one_image_gives_no_bits_per_dim(name, log_prob, message, flow, images):
    with pytest.raises(UserError, match=message):
        likelihood(hostile(flow, log_prob=log_prob()), images, name)


def off_the_test_set(images, change):
    """A density that is `change` of the plain one for images that are not among `images`."""

    def log_prob(flow, x, value):
        near = (x.detach()[:, None] - images).flatten(2).abs().amax(2).amin(1) < 1e-6
        return torch.where(near, value, change(value))

    return log_prob


@pytest.mark.parametrize("name", ["nll-in", "nll-out"])
@pytest.mark.parametrize("change", [lambda value: 0.0 * value - 100.0, lambda value: value.detach()])
def test_a_density_that_no_ascent_can_follow_gives_no_bits_per_dim(name, change, flow, images):
    """The images would stay where they are, and their bits/dim look unharmed."""
    with pytest.raises(UserError, match="no gradient with respect to the image"):
        likelihood(hostile(flow, log_prob=lambda flow, x, value: change(value)), images, name)


def test_a_gradient_that_is_not_finite_is_refused(flow, images):
    spoiled = off_the_test_set(
        images[1], lambda value: value * torch.nan
    )  # its gradient is NaN on the test set too
    with pytest.raises(UserError, match="0 or not finite"):
        likelihood(hostile(flow, log_prob=spoiled), images)


@pytest.mark.parametrize("name", ["nll-in", "noise"])
def test_bits_below_zero_are_those_of_no_density(name, flow, images):
    with pytest.raises(UserError, match=r"gives 48 original images -\d"):
        likelihood(hostile(flow, log_prob=lambda flow, x, value: value + 1e4), images, name)
    with pytest.raises(UserError, match=r"gives 48 attacked images -\d"):
        likelihood(
            hostile(flow, log_prob=off_the_test_set(images[1], lambda value: value + 1e4)), images, name
        )


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_bits_of_attacked_images_that_are_not_finite_stay_so(value, flow, images):
    spoiled = off_the_test_set(images[1], lambda bits: torch.full_like(bits, value))
    outcome = likelihood(hostile(flow, log_prob=spoiled), images, "noise")
    assert outcome.nll_before.isfinite().all()
    assert not outcome.nll_after.isfinite().any()


def test_a_density_that_writes_into_the_images_is_refused(flow, images):
    before = images[1].clone()
    with pytest.raises(UserError, match="changes its input in place"):
        likelihood(hostile(flow, log_prob=lambda flow, x, value: (x.mul_(0.5), value)[1]), images)
    assert torch.equal(images[1], before)


def test_sound_flows_pass_with_any_batch_size(classifier, flow, images):
    for name in LATENT:
        whole, part = (evaluated(name, classifier, flow, [p[:24] for p in images], size) for size in (24, 7))
        assert (whole.robust == part.robust).float().mean() > 0.95
    assert likelihood(flow.freeze(), images).nll_after.isfinite().all()


def test_a_search_starts_from_checked_latents(flow, images):
    """Whoever searches through a codec is served: a space of its own, as in other people's attacks, too."""
    codec = FlowCodec(hostile(flow, decode=lambda flow, latents, image: 0.9 * image))
    space = LatentSpace(codec, "l2", 1.0, 0.1)
    with pytest.raises(UserError, match="does not invert itself"):
        space.start(images[1], images[2], GeneratorNoise(48, torch.Generator().manual_seed(0)))


def test_a_flow_may_be_any_codec(classifier, images):
    """The protocol alone, without a `FrozenFlow` behind it."""

    class Identity:
        def encode_flat(self, x, y=None):
            return x.flatten(1)

        latents = encode_flat

        def decode_flat(self, z, y=None):
            return z.reshape(-1, 1, 8, 8)

        def level_mask(self, levels):
            return torch.ones(64)

    from robbench.attacks.latent import LatentAttack

    ids, x, y = images
    attack = LatentAttack(resolve_attack("om-pgd", "digits", MODELS), Identity())
    outcome = attack.evaluate(Victim(nn.Sequential(classifier)), ids, x, y, 0, 48)
    searched = outcome.clean_predictions == y
    assert outcome.witness["lambda"][searched].abs().amax(1).min() > 0
    torch.testing.assert_close(
        outcome.adversarial[searched],
        (x + outcome.witness["lambda"].reshape(x.shape)).clamp(0, 1)[searched],
        rtol=0,
        atol=1e-4,
    )
