"""RealNVP: exact inverse and density in eval mode, masks, folding of batch and weight norm."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robbench.core.errors import UserError
from robbench.models.flows import Latents, RealNVP
from robbench.models.flows.base import Memory
from robbench.models.flows.multiscale import unsqueeze
from robbench.models.flows.realnvp import ChannelCoupling, CheckerboardCoupling, DiagonalOrder
from robbench.models.flows.residual_net import ResidualNet

quick = settings(max_examples=10, derandomize=True)


def lively(flow: RealNVP, seed: int = 0) -> RealNVP:
    """Batch norms with statistics and affine parameters of their own, scales away from 1; well conditioned."""
    torch.manual_seed(seed)
    flow.initialize(torch.rand(32, *flow.input_shape))
    with torch.no_grad():
        for module in flow.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(1.0, 0.2)
                module.bias.normal_(0.0, 0.1)
                module.running_var.clamp_(min=0.1)  # a nearly dead channel would multiply rounding by 300
        for name, parameter in flow.named_parameters():
            if name.endswith(".scale"):
                parameter.uniform_(0.1, 0.4)  # float32 errors grow with exp(their sum)
    return flow.eval()


@st.composite
def flows(draw: st.DrawFn, max_scales: int = 3, max_side: int = 2) -> RealNVP:
    scales = draw(st.integers(1, max_scales))
    side = st.integers(1, max_side).map(lambda coarse: coarse * 2**scales)
    shape = (draw(st.sampled_from([1, 3])), draw(side), draw(side))
    seed = draw(st.integers(0, 99))
    torch.manual_seed(seed)
    flow = RealNVP(
        shape,
        draw(st.sampled_from([2, 17, 256])),
        scales=scales,
        width=draw(st.sampled_from([1, 4])),
        blocks=draw(st.integers(1, 2)),
        preprocessing=draw(st.sampled_from(["shift", "logit"])),
    )
    return lively(flow, seed)


def small(shape: tuple[int, int, int] = (1, 8, 8), width: int = 6) -> RealNVP:
    torch.manual_seed(1)
    return lively(RealNVP(shape, 17, width=width, blocks=2))


def images(flow: RealNVP, n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    size = (n, *flow.input_shape)
    return tuple(torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


# --------------------------------------------------------------------------------------- inverse and density
@quick
@given(flow=flows())
def test_decode_inverts_encode_with_the_stored_noise(flow: RealNVP) -> None:
    x, u = images(flow)
    assert float(flow.roundtrip_error(x.float(), u=u.float()).max()) < 1e-4
    assert float(flow.freeze().roundtrip_error(x.float(), u=u.float()).max()) < 1e-4
    flow.double()
    assert float(flow.roundtrip_error(x, u=u).max()) < 1e-9
    assert float(flow.freeze(torch.float64).roundtrip_error(x, u=u).max()) < 1e-9


@quick
@given(flow=flows(max_scales=2, max_side=1))
def test_log_det_is_that_of_the_jacobian(flow: RealNVP) -> None:
    flow.double().requires_grad_(False)
    x, u = images(flow, n=1)
    jacobian = torch.autograd.functional.jacobian(lambda image: flow.encode(image, u=u)[0].flat(), x)
    change = flow.dimensions * math.log((flow.grey_levels - 1) / flow.grey_levels)
    expected = torch.linalg.slogdet(jacobian.reshape(flow.dimensions, -1)).logabsdet - change
    for model in (flow, flow.freeze(torch.float64)):
        torch.testing.assert_close(model.encode(x, u=u)[1][0], expected, rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize(
    ("shape", "scales", "expected"),
    [
        ((1, 8, 8), 1, ((4, 4, 4),)),
        ((1, 28, 28), 2, ((2, 14, 14), (8, 7, 7))),
        ((3, 32, 32), 2, ((6, 16, 16), (24, 8, 8))),
    ],
)
def test_level_shapes(shape: tuple[int, int, int], scales: int, expected: object) -> None:
    flow = lively(RealNVP(shape, 256, scales=scales, width=4, blocks=1))
    assert flow.level_shapes == expected
    assert flow.bits_per_dim(torch.rand(2, *shape), seed=0, sample_ids=[4, 5]).shape == (2,)


def test_noise_images_and_far_latents_stay_finite() -> None:
    for model in (small(), small().freeze(), small().double().freeze(torch.float64)):
        latents, log_det = model.encode(torch.rand(32, 1, 8, 8))
        far = Latents(tuple(z + 10.0 * torch.randn_like(z) for z in latents.levels))
        assert torch.isfinite(log_det).all()
        assert torch.isfinite(model.log_prob(model.decode(far))).all()


def test_samples() -> None:
    flow = small()
    draw = lambda seed: flow.sample(4, 0.7, torch.Generator().manual_seed(seed))  # noqa: E731
    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert draw(0).shape == (4, 1, 8, 8)


# --------------------------------------------------------------------------------------- masks
def test_a_checkerboard_coupling_changes_one_colour_only() -> None:
    net = ResidualNet(1, 3, 2, 1, doubled=True).eval()
    h = torch.randn(2, 4, 3, 2)
    squares = torch.arange(6)[:, None] + torch.arange(4)
    for reverse in (False, True):
        out, _ = CheckerboardCoupling(net, torch.ones(1, 1, 1), (6, 4), reverse).encode(h, None)
        changed = (unsqueeze(out) != unsqueeze(h))[:, 0]
        assert torch.equal(changed, (squares % 2 == (1 if reverse else 0)).expand(2, 6, 4))


def test_a_channel_coupling_changes_one_half_only() -> None:
    net = ResidualNet(2, 3, 4, 1, doubled=False).eval()
    h = torch.randn(2, 4, 3, 2)
    for reverse in (False, True):
        out, _ = ChannelCoupling(net, torch.ones(2, 1, 1), reverse).encode(h, None)
        changed = (out != h).flatten(2).all(2)
        assert torch.equal(changed, torch.tensor([not reverse] * 2 + [reverse] * 2).expand(2, 4))


def test_the_half_that_stays_is_a_diagonal_of_every_block_of_every_channel() -> None:
    pixels = torch.arange(2 * 16.0).reshape(1, 2, 4, 4)
    order = DiagonalOrder(8)
    squeezed = torch.nn.functional.pixel_unshuffle(pixels, 2)
    out, log_det = order.encode(squeezed, None)
    kept = out.chunk(2, dim=1)[0].flatten()
    rows, columns = torch.arange(4)[:, None], torch.arange(4)
    diagonal = pixels[:, :, (rows % 2 == columns % 2)].flatten()
    assert sorted(kept.tolist()) == sorted(diagonal.tolist())
    assert torch.equal(order.decode(out, None), squeezed)
    assert float(log_det) == 0.0


def test_coupling_against_normflows() -> None:
    """The same masked affine map, with the same weights, in an independent library."""
    affine = pytest.importorskip("normflows.flows.affine.coupling")
    net = ResidualNet(1, 3, 2, 1, doubled=True).eval().double()
    step = CheckerboardCoupling(net, torch.tensor([[[0.7]]], dtype=torch.float64), (4, 6), reverse=True)
    h = torch.randn(2, 4, 2, 3, dtype=torch.float64)
    out, log_det = step.encode(h, None)
    log_scale = lambda kept: 0.7 * torch.tanh(net(kept)[:, :1])  # noqa: E731
    shift = lambda kept: net(kept)[:, 1:] * torch.exp(log_scale(kept))  # noqa: E731 - theirs is h e^s + t
    oracle = affine.MaskedAffineFlow(step.kept[0], _Function(shift), _Function(log_scale))
    expected, expected_log_det = oracle(unsqueeze(h))
    torch.testing.assert_close(unsqueeze(out), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_det, expected_log_det, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(unsqueeze(step.decode(out, None)), oracle.inverse(expected)[0])


class _Function(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, h: Tensor) -> Tensor:
        return self.function(h)  # type: ignore[operator,no-any-return]


# --------------------------------------------------------------------------------------- frozen
@quick
@given(flow=flows(max_scales=2), memory=st.sampled_from(["none", "mask", "invert"]))
def test_frozen_agrees_with_the_flow(flow: RealNVP, memory: Memory) -> None:
    flow.double()
    frozen = flow.freeze(torch.float64, memory)
    x, u = images(flow)
    close = {"rtol": 1e-9, "atol": 1e-9}
    latents, log_det = flow.encode(x, u=u)
    torch.testing.assert_close(frozen.encode(x, u=u)[0].flat(), latents.flat(), **close)
    torch.testing.assert_close(frozen.encode(x, u=u)[1], log_det, **close)
    found = []
    for model in (flow, frozen):
        z, image = latents.flat().detach().requires_grad_(), x.clone().requires_grad_()
        decoded = model.decode(Latents.unflat(z, flow.level_shapes), u=u)
        (gradient,) = torch.autograd.grad(decoded.square().sum(), z)
        (slope,) = torch.autograd.grad(model.log_prob(image, u=u).sum(), image)
        found.append((decoded.detach(), gradient, slope))
    torch.testing.assert_close(found[0], found[1], **close)


@pytest.mark.parametrize("doubled", [False, True])
def test_folded_net_equals_the_net(doubled: bool) -> None:
    torch.manual_seed(3)
    net = ResidualNet(3, 5, 4, 3, doubled).double()
    net.adopt_statistics(torch.randn(8, 3, 6, 6, dtype=torch.float64) * 3.0 + 1.0)
    net.eval()
    h = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    for small_memory in (False, True):
        frozen = net.freeze(torch.float64, small_memory)
        found = []
        for model in (net, frozen):
            inputs = h.clone().requires_grad_()
            out = model(inputs)
            found.append((out.detach(), torch.autograd.grad(out.sin().sum(), inputs)[0]))
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)
        assert not list(frozen.parameters())
        assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())


def test_frozen_is_an_independent_copy_without_parameters() -> None:
    flow = small()
    frozen, x = flow.freeze(), torch.rand(2, 1, 8, 8)
    before = frozen.log_prob(x)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1)
    flow.train().log_prob(torch.rand(8, 1, 8, 8))  # moves the running statistics
    assert torch.equal(frozen.log_prob(x), before)
    assert list(frozen.parameters()) == []
    assert not before.requires_grad


def test_memory_modes_keep_less_for_the_backward_pass() -> None:
    flow, kept = small(width=24), {}
    for memory in ("none", "mask", "invert"):
        frozen, sizes = flow.freeze(memory=memory), {}  # type: ignore[arg-type,var-annotated]
        weights = {tensor.untyped_storage().data_ptr() for tensor in frozen.buffers()}

        def record(tensor: Tensor, sizes: dict[int, int] = sizes, weights: set[int] = weights) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        z = torch.randn(16, frozen.dimensions, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor):
            decoded = frozen.decode(Latents.unflat(z, frozen.level_shapes))
        decoded.sum().backward()
        kept[memory] = sum(sizes.values())
    assert kept["mask"] < 0.5 * kept["none"]
    assert kept["invert"] < 0.2 * kept["mask"]


# --------------------------------------------------------------------------------------- batch norm
def test_everything_exact_asks_for_eval_mode() -> None:
    flow = small().train()
    x = torch.rand(4, 1, 8, 8)
    assert flow.log_prob(x).shape == (4,)  # training needs the batch's statistics
    for call in (
        lambda: flow.encode(x),
        lambda: flow.roundtrip_error(x),
        lambda: flow.sample(2),
        lambda: flow.bits_per_dim(x, seed=0, sample_ids=range(4)),
    ):
        with pytest.raises(UserError, match=r"RealNVP\.\w+ in training mode.* call eval\(\)"):
            call()


def test_densities_in_eval_mode_do_not_depend_on_the_batch() -> None:
    flow = small().double()
    x, u = images(flow, n=5)
    torch.testing.assert_close(flow.log_prob(x, u=u)[1:2], flow.log_prob(x[1:2], u=u[1:2]))
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    flow.bits_per_dim(x, seed=0, sample_ids=range(5))
    flow.freeze().encode(x.float())
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())


def test_initialisation_adopts_the_statistics_of_the_batch() -> None:
    torch.manual_seed(0)
    flow = RealNVP((1, 8, 8), 256, width=4, blocks=1)
    x = 0.3 * torch.rand(2048, 1, 8, 8)  # many: evaluation's variances are n / (n - 1) times the batch's
    flow.initialize(x)
    assert flow.training
    with torch.no_grad():
        evaluated = flow.eval().log_prob(x)
        trained = flow.train().log_prob(x)
    assert float((evaluated - trained).abs().mean()) < 0.1
    assert all(m.momentum == 0.1 for m in flow.modules() if isinstance(m, nn.BatchNorm2d))


def test_it_learns() -> None:
    torch.manual_seed(0)
    flow = RealNVP((1, 4, 4), 17, scales=1, width=8, blocks=1)
    x = torch.linspace(0.2, 0.8, 64)[:, None, None, None].expand(64, 1, 4, 4)
    flow.initialize(x)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    score = lambda: float(flow.eval().bits_per_dim(x, seed=0, sample_ids=range(64)).detach().mean())  # noqa: E731
    before = score()
    for _ in range(40):
        optimizer.zero_grad()
        (-flow.train().log_prob(x, u=torch.rand_like(x)).mean() / 16).backward()
        optimizer.step()
    assert score() < before - 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": 0}, "scales=0"),
        ({"width": 0}, "width=0"),
        ({"blocks": 0}, "blocks=0"),
        ({"scales": 4}, r"level 4 would squeeze 1x1 .* at most 3 levels"),
        ({"grey_levels": 1}, "grey_levels=1"),
    ],
)
def test_impossible_flows_are_refused(change: dict[str, int], message: str) -> None:
    arguments = {"grey_levels": 17, "scales": 2, "width": 2, "blocks": 1} | change
    with pytest.raises(UserError, match=message):
        RealNVP((1, 8, 8), arguments.pop("grey_levels"), **arguments)  # type: ignore[arg-type]
