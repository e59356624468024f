"""The conditional coupling flow: exact inverse and density for every label, and FrEIA's own arithmetic."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from robbench.core.errors import UserError
from robbench.models.flows import ConditionalFlow, Flow, Latents
from robbench.models.flows.base import Memory
from robbench.models.flows.conditional import CouplingBlock, LabelledNet

quick = settings(max_examples=12, derandomize=True)


@st.composite
def flows(draw: st.DrawFn, max_side: int = 5) -> Flow:
    """Any number of pixels, odd ones included."""
    shape = (draw(st.sampled_from([1, 3])), draw(st.integers(1, max_side)), draw(st.integers(2, max_side)))
    torch.manual_seed(draw(st.integers(0, 99)))
    flow = ConditionalFlow(
        shape,
        draw(st.sampled_from([2, 17, 256])),
        classes=draw(st.sampled_from([1, 4])),
        blocks=draw(st.integers(1, 3)),
        width=draw(st.sampled_from([1, 6])),
        zero_start=False,
        preprocessing=draw(st.sampled_from(["shift", "logit"])),
    )
    return flow.eval()


def small(**how: int) -> Flow:
    torch.manual_seed(1)
    arguments = {"classes": 4, "blocks": 3, "width": 16, "zero_start": False} | how
    return ConditionalFlow((1, 4, 4), 17, **arguments).eval()  # type: ignore[arg-type]


def images(flow: Flow, n: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels, noise; float64."""
    generator = torch.Generator().manual_seed(5)
    size = (n, *flow.input_shape)
    x, u = (torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(2))
    assert flow.label_classes is not None
    return x, torch.randint(flow.label_classes, (n,), generator=generator), u


@quick
@given(flow=flows())
def test_decode_inverts_encode_with_the_stored_noise(flow: Flow) -> None:
    x, y, u = images(flow)
    assert float(flow.roundtrip_error(x.float(), y, u.float()).max()) < 1e-4
    assert float(flow.freeze().roundtrip_error(x.float(), y, u.float()).max()) < 1e-4
    flow.double()
    assert float(flow.roundtrip_error(x, y, u).max()) < 1e-9
    assert float(flow.freeze(torch.float64).roundtrip_error(x, y, u).max()) < 1e-9


@quick
@given(flow=flows(max_side=3))
def test_log_det_is_that_of_the_jacobian(flow: Flow) -> None:
    flow.double().requires_grad_(False)
    x, y, u = images(flow, n=1)
    jacobian = torch.autograd.functional.jacobian(lambda image: flow.encode(image, y, u)[0].flat(), x)
    change = flow.dimensions * math.log((flow.grey_levels - 1) / flow.grey_levels)
    expected = torch.linalg.slogdet(jacobian.reshape(flow.dimensions, -1)).logabsdet - change
    for model in (flow, flow.freeze(torch.float64)):
        torch.testing.assert_close(model.encode(x, y, u)[1][0], expected, rtol=1e-9, atol=1e-8)


@quick
@given(flow=flows(), memory=st.sampled_from(["none", "mask", "invert"]))
def test_frozen_agrees_with_the_flow(flow: Flow, memory: Memory) -> None:
    flow.double()
    frozen = flow.freeze(torch.float64, memory)
    x, y, u = images(flow)
    close = {"rtol": 1e-9, "atol": 1e-9}
    latents, log_det = flow.encode(x, y, u)
    torch.testing.assert_close(frozen.encode(x, y, u)[0].flat(), latents.flat(), **close)
    torch.testing.assert_close(frozen.encode(x, y, u)[1], log_det, **close)
    found = []
    for model in (flow, frozen):
        z, image = latents.flat().detach().requires_grad_(), x.clone().requires_grad_()
        decoded = model.decode(Latents.unflat(z, flow.level_shapes), y, u)
        (gradient,) = torch.autograd.grad(decoded.square().sum(), z)
        (slope,) = torch.autograd.grad(model.log_prob(image, y, u).sum(), image)
        found.append((decoded.detach(), gradient, slope))
    torch.testing.assert_close(found[0], found[1], **close)
    assert list(frozen.parameters()) == []


@pytest.mark.parametrize("dimensions", [16, 6])
def test_a_block_against_freia(dimensions: int) -> None:
    """The same weights in FrEIA's coupling block and permutation: outputs and log-det."""
    freia = pytest.importorskip("FrEIA.modules")
    torch.manual_seed(0)
    sizes = dimensions // 2, dimensions - dimensions // 2
    nets = [LabelledNet(sizes[i], 4, 6, 2 * sizes[1 - i]).double() for i in (0, 1)]
    block = CouplingBlock(nets[0], nets[1], dimensions, 5, 2.0).double()
    made = iter(torch.nn.Sequential(net.first, torch.nn.ReLU(), net.last) for net in nets)
    theirs = freia.GLOWCouplingBlock(
        [(dimensions,)],
        dims_c=[(4,)],
        subnet_constructor=lambda _inputs, _outputs: next(made),
        clamp=2.0,
        clamp_activation="ATAN",
    ).double()
    h, y = 3.0 * torch.randn(3, dimensions, dtype=torch.float64), torch.tensor([0, 3, 1])
    label = torch.nn.functional.one_hot(y, 4).double()
    (expected,), expected_log_det = theirs([h], c=[label])
    out, log_det = block.encode(h, y)
    torch.testing.assert_close(out, freia.PermuteRandom([(dimensions,)], seed=5)([expected])[0][0])
    torch.testing.assert_close(log_det, expected_log_det)
    torch.testing.assert_close(block.decode(out, y), theirs([expected], c=[label], rev=True)[0][0])


def test_the_papers_size() -> None:
    flow = ConditionalFlow((1, 28, 28), 256, zero_start=False).eval()
    first = next(module for module in flow.modules() if isinstance(module, LabelledNet))
    assert (first.first.in_features, first.first.out_features, first.last.out_features) == (402, 512, 784)
    blocks = [module for module in flow.modules() if isinstance(module, CouplingBlock)]
    assert len(blocks) == 12
    assert blocks[3].permutation.tolist() == np.random.RandomState(3).permutation(784).tolist()
    assert flow.level_shapes == ((784,),)
    x, y = torch.rand(2, 1, 28, 28), torch.tensor([0, 9])
    assert float(flow.freeze().roundtrip_error(x, y).max()) < 1e-4


def test_a_zero_start_is_a_permutation_of_the_pixels() -> None:
    flow = ConditionalFlow((1, 28, 28), 256, width=8, preprocessing="logit").eval()
    x, y = torch.rand(2, 1, 28, 28).pow(4), torch.tensor([0, 9])
    latents, _ = flow.encode(x, y)
    assert torch.equal(latents.flat().sort(1).values, flow._dequantised(x, 0.5).flatten(1).sort(1).values)
    assert float(flow.roundtrip_error(x, y).max()) < 1e-4
    assert float(flow.double().roundtrip_error(x, y).max()) < 1e-9


def test_log_scales_are_clamped_however_far() -> None:
    block = CouplingBlock(LabelledNet(2, 1, 3, 4), LabelledNet(2, 1, 3, 4), 4, 0, 2.0)
    y = torch.zeros(1, dtype=torch.int64)
    _, log_det = block.requires_grad_(False).encode(torch.full((1, 4), 1e12), y)
    assert float(log_det.abs()) < 4 * 2.0
    flow = small()
    latents, _ = flow.encode(torch.rand(8, 1, 4, 4), y.expand(8))
    far = Latents(tuple(z + 10.0 * torch.randn_like(z) for z in latents.levels))
    assert torch.isfinite(flow.log_prob(flow.decode(far, y.expand(8)), y.expand(8))).all()


def test_labels_matter_and_follow_their_sample() -> None:
    flow = small().double()
    x, _, u = images(flow, n=4)
    y = torch.arange(4)
    whole = flow.log_prob(x, y, u)
    torch.testing.assert_close(flow.log_prob(x[[2, 0]], y[[2, 0]], u[[2, 0]]), whole[[2, 0]])
    assert (flow.log_prob(x, (y + 1) % 4, u) != whole).all()
    assert flow.bits_per_dim(x, y, seed=0, sample_ids=range(4)).shape == (4,)
    assert flow.sample(4, y=y).shape == x.shape
    latents, _ = flow.encode(x, y, u)
    torch.testing.assert_close(flow.unwhiten(flow.whiten(latents, y), y).flat(), latents.flat())


def test_wrong_labels_are_refused() -> None:
    for flow in (small(), small().freeze()):
        x = torch.rand(2, 1, 4, 4)
        with pytest.raises(UserError, match="without labels; give y, 2 labels from 0 to 3"):
            flow.log_prob(x)
        with pytest.raises(UserError, match="without labels"):
            flow.sample(2)
        with pytest.raises(UserError, match=r"labels y from 0 to 4; it knows 0 to 3"):
            flow.encode(x, torch.tensor([0, 4]))
        with pytest.raises(UserError, match=r"int64 labels of shape \(2,\)"):
            flow.encode(x, torch.tensor([0.0, 1.0]))
        assert flow.label_classes == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 0}, "classes=0"),
        ({"blocks": 0}, "blocks=0"),
        ({"width": 0}, "width=0"),
        ({"clamp": 0.0}, r"clamp=0\.0"),
        ({"input_shape": (1, 1, 1)}, "at least 2 pixels"),
    ],
)
def test_impossible_flows_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"input_shape": (1, 4, 4), "grey_levels": 17, "blocks": 1, "width": 2}
    with pytest.raises(UserError, match=message):
        ConditionalFlow(**(arguments | change))  # type: ignore[arg-type]
