"""Normalizing flows: exact inverse, exact density, frozen copies that agree with what they were made from."""

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robbench.core.errors import UserError
from robbench.models.flows import Flow, FrozenFlow, Glow, Latents
from robbench.models.flows.base import Memory
from robbench.models.flows.frozen_net import NARROW, NarrowConv
from robbench.models.flows.layers import GlowStep, ZeroConv
from robbench.models.flows.multiscale import MultiScale, Prior, Step

quick = settings(max_examples=12, derandomize=True)


def lively(flow: Flow, seed: int = 0, spread: float = 0.05) -> Flow:
    """A flow with data-dependent initialisation and no layer left at its zero start."""
    torch.manual_seed(seed)
    flow.initialize(torch.rand(16, *flow.input_shape))
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, ZeroConv):
                module.conv.weight.normal_(std=spread)
                module.log_gain.normal_(std=spread)
        for name, parameter in flow.named_parameters():
            if "priors" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return flow


@st.composite
def flows(draw: st.DrawFn, max_side: int = 3, max_levels: int = 3) -> Flow:
    """Small Glows of every kind; the coarsest level may have odd sides (as 8x7x7 of a 28x28 image has)."""
    levels = draw(st.integers(1, max_levels))
    side = st.integers(1, max_side).map(lambda coarse: coarse * 2**levels)
    shape = (draw(st.sampled_from([1, 3])), draw(side), draw(side))
    seed = draw(st.integers(0, 99))
    torch.manual_seed(seed)
    flow = Glow(
        shape,
        draw(st.sampled_from([2, 17, 256])),
        levels=levels,
        steps=draw(st.integers(1, 3)),
        width=draw(st.sampled_from([1, 5])),
        coupling=draw(st.sampled_from(["affine", "additive"])),
        prior=draw(st.sampled_from(["standard", "learned"])),
        scale_floor=draw(st.sampled_from([0.0, 0.1])),
    )
    return lively(flow, seed)


def small(shape: tuple[int, int, int] = (1, 8, 8), levels: int = 2, width: int = 6) -> Flow:
    torch.manual_seed(1)
    return lively(Glow(shape, 17, levels=levels, steps=2, width=width))


def images(flow: Flow, n: int = 3, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Random images and dequantisation noise, float64."""
    generator = torch.Generator().manual_seed(seed)
    size = (n, *flow.input_shape)
    return (
        torch.rand(size, generator=generator, dtype=torch.float64),
        torch.rand(size, generator=generator, dtype=torch.float64),
    )


# --------------------------------------------------------------------------------------- inverse
@quick
@given(flow=flows())
def test_decode_inverts_encode_with_the_stored_noise(flow: Flow) -> None:
    x, u = images(flow)
    assert float(flow.roundtrip_error(x.float(), u=u.float()).max()) < 1e-4
    assert float(flow.freeze().roundtrip_error(x.float(), u=u.float()).max()) < 1e-4
    flow.double()
    assert float(flow.roundtrip_error(x, u=u).max()) < 1e-9
    assert float(flow.freeze(torch.float64).roundtrip_error(x, u=u).max()) < 1e-9


@quick
@given(flow=flows())
def test_latents_flatten_and_return(flow: Flow) -> None:
    latents, log_det = flow.encode(images(flow)[0].float())
    flat = latents.flat()
    again = Latents.unflat(flat, flow.level_shapes)
    assert latents.shapes == flow.level_shapes
    assert flat.shape == (3, flow.dimensions)
    assert log_det.shape == (3,)
    assert all(torch.equal(a, b) for a, b in zip(again.levels, latents.levels, strict=True))
    with pytest.raises(ValueError, match="flat latents"):
        Latents.unflat(flat[:, 1:], flow.level_shapes)


@pytest.mark.parametrize(
    ("shape", "levels", "expected"),
    [
        ((1, 8, 8), 2, ((2, 4, 4), (8, 2, 2))),
        ((1, 28, 28), 2, ((2, 14, 14), (8, 7, 7))),
        ((3, 32, 32), 3, ((6, 16, 16), (12, 8, 8), (48, 4, 4))),
        ((3, 28, 28), 1, ((12, 14, 14),)),
    ],
)
def test_level_shapes(shape: tuple[int, int, int], levels: int, expected: object) -> None:
    flow = small(shape, levels)
    assert flow.level_shapes == expected
    assert float(flow.freeze().roundtrip_error(torch.rand(2, *shape)).max()) < 1e-4


@pytest.mark.parametrize("coupling", ["affine", "additive"])
def test_noise_images_and_far_latents_stay_finite(coupling: str) -> None:
    flow = lively(Glow((1, 8, 8), 256, levels=2, steps=6, width=16, coupling=coupling), spread=0.2)  # type: ignore[arg-type]
    noise = torch.rand(64, 1, 8, 8)
    for model in (flow, flow.freeze(), flow.double().freeze(torch.float64)):
        latents, log_det = model.encode(noise)
        far = Latents(tuple(z + 10.0 * torch.randn_like(z) for z in latents.levels))
        decoded = model.decode(far)
        assert torch.isfinite(log_det).all()
        assert torch.isfinite(decoded).all()
        assert torch.isfinite(model.log_prob(decoded)).all()
        assert torch.isfinite(model.bits_per_dim(noise, seed=0, sample_ids=range(64))).all()


# --------------------------------------------------------------------------------------- density
@quick
@given(flow=flows(max_side=1, max_levels=2))
def test_log_det_is_that_of_the_jacobian(flow: Flow) -> None:
    flow.double().requires_grad_(False)
    x, u = images(flow, n=1)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow.encode(v, u=u)[0].flat(), x)
    square = jacobian.reshape(flow.dimensions, flow.dimensions)
    # encode's log-det is with respect to v = ((L-1) x + u) / L - 1/2, the Jacobian with respect to x
    change = flow.dimensions * math.log((flow.grey_levels - 1) / flow.grey_levels)
    expected = torch.linalg.slogdet(square).logabsdet - change
    for model in (flow, flow.freeze(torch.float64)):
        torch.testing.assert_close(model.encode(x, u=u)[1][0], expected, rtol=1e-9, atol=1e-8)


def test_bits_per_dim_of_a_rotation_in_closed_form() -> None:
    """Fresh additive Glow without initialisation is orthogonal: |z| = |v| and log-det 0."""
    flow = Glow((1, 4, 4), 17, levels=1, steps=2, width=3, coupling="additive", prior="standard").double()
    x = torch.rand(5, 1, 4, 4, dtype=torch.float64)
    v = (16 * x + 0.5) / 17 - 0.5
    nats = 0.5 * v.square().flatten(1).sum(1) + 16 * (0.5 * math.log(2 * math.pi) + math.log(17))
    torch.testing.assert_close(flow.log_prob(x), -nats, rtol=1e-6, atol=1e-6)
    noisy = flow.bits_per_dim(x, n_samples=400, seed=3, sample_ids=range(5))
    spread = v.square() + 1 / (12 * 17**2)  # E over u of v^2
    expected = (0.5 * spread.flatten(1).mean(1) + 0.5 * math.log(2 * math.pi) + math.log(17)) / math.log(2)
    torch.testing.assert_close(noisy, expected, rtol=0, atol=2e-3)


@pytest.mark.parametrize("prior", ["standard", "learned"])
def test_probabilities_of_all_images_add_up_to_one(prior: str) -> None:
    """Sum over the 16 black-and-white 2x2 images of E_u[exp log_prob], u on a midpoint grid of 8^4 points."""
    torch.manual_seed(0)
    flow = lively(Glow((1, 2, 2), 2, levels=1, steps=2, width=4, prior=prior)).double()  # type: ignore[arg-type]
    first = next(module for module in flow.modules() if isinstance(module, GlowStep))
    with torch.no_grad():
        first.actnorm.log_scale.add_(1.2)  # concentrates the density inside the cube of all images
        grid = (torch.arange(8, dtype=torch.float64) + 0.5) / 8
        u = torch.cartesian_prod(grid, grid, grid, grid).reshape(-1, 1, 2, 2)
        total = 0.0
        for bits in itertools.product([0.0, 1.0], repeat=4):
            x = torch.tensor(bits, dtype=torch.float64).reshape(1, 1, 2, 2).expand_as(u)
            total += float(flow.log_prob(x, u=u).exp().mean())
    assert total == pytest.approx(1.0, abs=0.02)


def test_bits_per_dim_depends_on_the_sample_alone() -> None:
    flow = small().double()
    x, _ = images(flow, n=6)
    ids = [40, 7, 3, 90, 1, 2]
    whole = flow.bits_per_dim(x, n_samples=2, seed=1, sample_ids=ids)
    order = [4, 1]
    part = flow.bits_per_dim(x[order], n_samples=2, seed=1, sample_ids=[ids[i] for i in order])
    torch.testing.assert_close(part, whole[order], rtol=1e-12, atol=1e-12)
    assert torch.equal(whole, flow.bits_per_dim(x, n_samples=2, seed=1, sample_ids=torch.tensor(ids)))
    assert (whole != flow.bits_per_dim(x, n_samples=2, seed=2, sample_ids=ids)).all()
    with pytest.raises(UserError, match="one id an image"):
        flow.bits_per_dim(x, seed=1, sample_ids=[1])
    with pytest.raises(UserError, match="n_samples=0"):
        flow.bits_per_dim(x, n_samples=0, seed=1, sample_ids=ids)


def test_bits_per_dim_is_differentiable_in_the_image() -> None:
    flow = small().double().freeze(torch.float64)
    x, direction = images(flow, n=2)
    value = lambda image: flow.bits_per_dim(image, seed=0, sample_ids=[0, 1]).sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(value(x.requires_grad_()), x)
    step = 1e-6
    with torch.no_grad():
        slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


@quick
@given(flow=flows())
def test_whitening_inverts_and_explains_the_density(flow: Flow) -> None:
    flow.double()
    x, u = images(flow)
    latents, log_det = flow.encode(x, u=u)
    for model in (flow, flow.freeze(torch.float64)):
        epsilon = model.whiten(latents)
        torch.testing.assert_close(model.unwhiten(epsilon).flat(), latents.flat(), rtol=1e-9, atol=1e-9)
        moments = model.transform.encode(model._dequantised(x, u), None).moments
        log_sigma = sum(
            s.expand(z.shape).flatten(1).sum(1) for (_, s), z in zip(moments, latents.levels, strict=True)
        )
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(epsilon.flat()).sum(1)
        expected = normal - log_sigma + log_det - flow.dimensions * math.log(flow.grey_levels)
        torch.testing.assert_close(model.log_prob(x, u=u), expected, rtol=1e-9, atol=1e-8)


def test_samples() -> None:
    flow = small()
    draw = lambda seed, temperature: flow.sample(4, temperature, torch.Generator().manual_seed(seed))  # noqa: E731
    assert draw(0, 1.0).shape == (4, 1, 8, 8)
    assert torch.equal(draw(0, 1.0), draw(0, 1.0))
    assert not torch.equal(draw(0, 1.0), draw(1, 1.0))
    assert torch.equal(draw(0, 0.0), draw(1, 0.0))
    assert float(draw(0, 3.0).min()) >= 0.0
    assert float(draw(0, 3.0).max()) <= 1.0


def test_initialisation_normalises_every_step() -> None:
    torch.manual_seed(0)
    flow = Glow((3, 8, 8), 256, levels=2, steps=2, width=4)
    x = 0.3 * torch.rand(64, 3, 8, 8)
    flow.initialize(x)
    latents, _ = flow.requires_grad_(False).encode(x)  # couplings start as a constant scaling
    first = next(module for module in flow.modules() if isinstance(module, GlowStep))
    h, _ = first.actnorm.encode(torch.nn.functional.pixel_unshuffle(flow._dequantised(x, 0.5), 2))
    torch.testing.assert_close(h.mean((0, 2, 3)), torch.zeros(12), rtol=0, atol=1e-4)
    torch.testing.assert_close(h.std((0, 2, 3), correction=0), torch.ones(12), rtol=1e-4, atol=0)
    assert 0.3 < float(latents.flat().std()) < 1.5
    flow.initialize(torch.zeros_like(x))  # a constant batch must not divide by zero
    assert torch.isfinite(flow.encode(x)[0].flat()).all()


# --------------------------------------------------------------------------------------- frozen
@quick
@given(flow=flows(), memory=st.sampled_from(["none", "mask", "invert"]))
def test_frozen_agrees_with_the_flow(flow: Flow, memory: Memory) -> None:
    flow.double()
    frozen = flow.freeze(torch.float64, memory)
    x, u = images(flow)
    latents, log_det = flow.encode(x, u=u)
    frozen_latents, frozen_log_det = frozen.encode(x, u=u)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(frozen_latents.flat(), latents.flat(), **close)
    torch.testing.assert_close(frozen_log_det, log_det, **close)
    torch.testing.assert_close(frozen.log_prob(x, u=u), flow.log_prob(x, u=u), **close)
    found = []
    for model in (flow, frozen):
        z = latents.flat().detach().requires_grad_()
        decoded = model.decode(Latents.unflat(z, flow.level_shapes), u=u)
        (gradient,) = torch.autograd.grad(decoded.square().sum(), z)
        found.append((decoded.detach(), gradient))
    torch.testing.assert_close(found[0], found[1], **close)


@quick
@given(flow=flows())
def test_gradient_of_the_frozen_decoder(flow: Flow) -> None:
    frozen = flow.double().freeze(torch.float64)
    latents, _ = frozen.encode(images(flow)[0])
    z = latents.flat().detach().requires_grad_()
    weights = torch.randn_like(z).reshape(-1, *flow.input_shape)
    value = lambda flat: (weights * frozen.decode(Latents.unflat(flat, flow.level_shapes)).sin()).sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(value(z), z)
    direction, step = torch.randn_like(z), 1e-6
    with torch.no_grad():
        slope = (value(z + step * direction) - value(z - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("outputs", "size"), [(2, (5, 1)), (6, (1, 4)), (NARROW, (3, 3))])
def test_narrow_convolution_is_a_convolution(outputs: int, size: tuple[int, int]) -> None:
    weight, h = (
        torch.randn(outputs, 7, 3, 3, dtype=torch.float64),
        torch.randn(2, 7, *size, dtype=torch.float64),
    )
    expected = torch.nn.functional.conv2d(h, weight, padding=1)
    torch.testing.assert_close(NarrowConv(weight)(h), expected, rtol=1e-12, atol=1e-12)


def test_memory_modes_keep_less_for_the_backward_pass() -> None:
    flow = small(width=64)
    kept = {memory: _bytes_kept(flow.freeze(memory=memory)) for memory in get_args(Memory)}
    assert kept["mask"] < 0.5 * kept["none"]
    assert kept["invert"] < 0.2 * kept["mask"]


def _bytes_kept(frozen: FrozenFlow) -> int:
    """Bytes that autograd keeps between decode and its backward, weights left out."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in frozen.buffers()}
    sizes: dict[int, int] = {}

    def record(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    z = torch.randn(64, frozen.dimensions, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
        decoded = frozen.decode(Latents.unflat(z, frozen.level_shapes))
    decoded.sum().backward()
    return sum(sizes.values())


def test_frozen_is_an_independent_copy_without_parameters() -> None:
    flow = small()
    frozen = flow.freeze()
    x = torch.rand(2, 1, 8, 8)
    before = frozen.log_prob(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)
    assert torch.equal(frozen.log_prob(x), before)
    assert list(frozen.parameters()) == []
    assert not frozen.train().training
    assert not before.requires_grad
    assert frozen.decode(frozen.encode(x)[0]).dtype == torch.float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_frozen_moves_to_a_gpu() -> None:
    frozen = small().freeze(torch.float64)
    x = torch.rand(2, 1, 8, 8)
    on_cpu = frozen.log_prob(x)
    latents, _ = frozen.to("cuda").encode(x.cuda())
    assert float(frozen.roundtrip_error(x.cuda()).max()) < 1e-9
    assert latents.flat().is_cuda
    torch.testing.assert_close(frozen.log_prob(x.cuda()).cpu(), on_cpu, rtol=1e-9, atol=1e-9)


def test_freeze_in_float64_from_float32_weights_inverts_to_float64() -> None:
    flow = small()
    frozen = flow.freeze(torch.float64)
    x = torch.rand(2, 1, 8, 8)
    assert float(frozen.roundtrip_error(x).max()) < 1e-12
    torch.testing.assert_close(frozen.log_prob(x).float(), flow.log_prob(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("log_diagonal", [-math.inf, math.inf, math.nan, -200.0])
def test_a_singular_mixing_matrix_is_refused_when_freezing(log_diagonal: float) -> None:
    flow = small()
    state = flow.state_dict()
    name = next(key for key in state if key.endswith("log_diagonal"))
    state[name][0] = log_diagonal
    flow.load_state_dict(state)
    with pytest.raises(UserError, match=r"1x1 convolution of level 1, step 1 is singular"):
        flow.freeze()


def test_weights_that_are_not_finite_are_refused_when_freezing() -> None:
    flow = small()
    state = flow.state_dict()
    state["transform.stacks.1.0.coupling.net.second.weight"][0] = math.nan
    flow.load_state_dict(state)
    with pytest.raises(UserError, match=r"stacks\.1\.0\.net\.second.* NaN"):
        flow.freeze()


# --------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"levels": 3, "input_shape": (1, 28, 28)}, r"level 3 would squeeze 7x7 .* at most 2 levels"),
        ({"input_shape": (1, 9, 8)}, "must be even"),
        ({"levels": 0}, "levels=0"),
        ({"steps": 0}, "steps=0"),
        ({"width": 0}, "width=0"),
        ({"coupling": "afine"}, "coupling='afine'"),
        ({"prior": "uniform"}, "prior='uniform'"),
        ({"scale_floor": 1.0}, r"scale_floor=1\.0"),
        ({"grey_levels": 1}, "grey_levels=1"),
    ],
)
def test_impossible_flows_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "input_shape": (1, 8, 8),
        "grey_levels": 17,
        "levels": 1,
        "steps": 1,
        "width": 2,
    }
    with pytest.raises(UserError, match=message):
        Glow(**(arguments | change))  # type: ignore[arg-type]


def test_wrong_use_is_refused() -> None:
    flow = small()
    with pytest.raises(UserError, match=r"images of shape \(2, 3, 8, 8\)"):
        flow.encode(torch.rand(2, 3, 8, 8))
    with pytest.raises(UserError, match=r"uint8 images"):
        flow.encode(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(UserError, match=r"memory='masks'\) is unknown; choose one of: none, mask, invert"):
        flow.freeze(memory="masks")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="float16"):
        flow.freeze(torch.float16)


# --------------------------------------------------------------------------------------- extensions
class LabelShift(Step):
    """A conditional step as another flow would write it: adds the label."""

    def encode(self, h: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert y is not None
        return h + y.to(h)[:, None, None, None], h.new_zeros(())

    def decode(self, h: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        return h - y.to(h)[:, None, None, None]

    def freeze(self, dtype: torch.dtype, memory: Memory, where: str) -> "LabelShift":
        return LabelShift()


class LabelPrior(Prior):
    """N(label, 1)."""

    log_sigma: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_sigma", torch.zeros(()))

    def moments(self, context: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
        assert y is not None
        return y.to(self.log_sigma)[:, None, None, None], self.log_sigma

    def freeze(self, dtype: torch.dtype) -> "LabelPrior":
        return LabelPrior().to(dtype)


def test_a_conditional_flow_needs_only_steps_and_priors() -> None:
    shape = (1, 4, 4)
    x, y = torch.rand(3, *shape, dtype=torch.float64), torch.tensor([0, 2, 5])
    # z = v + label under N(label, 1): the density is the same for every label
    plain = Flow(shape, 17, MultiScale(shape, [[LabelShift()]], [LabelPrior()])).double()
    torch.testing.assert_close(plain.log_prob(x, y), plain.log_prob(x, y + 3))
    step = GlowStep(4, 3, "affine", 0.1)
    mixed = Flow(shape, 17, MultiScale(shape, [[LabelShift(), step]], [LabelPrior()])).double()
    for model in (mixed, mixed.freeze(torch.float64)):
        assert float(model.roundtrip_error(x, y).max()) < 1e-9
        assert (model.log_prob(x, y) != model.log_prob(x, y + 3)).all()
        assert model.sample(3, y=y).shape == x.shape
        assert model.bits_per_dim(x, y, seed=0, sample_ids=[1, 2, 3]).shape == (3,)
